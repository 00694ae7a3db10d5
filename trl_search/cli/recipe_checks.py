"""Checks in about a second, before anything is loaded, whether this machine can run a recipe.

Each check compares the recipe's values with one fact about the machine. All problems are collected: `train` and `sft`
raise one error with the whole list, and `trl-search doctor RECIPE` prints it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trl_search.cli.model_checks import check_template
from trl_search.cli.preflight import Check, Device, Status, check_sampling
from trl_search.cli.retriever_checks import package_problem, retriever_checks
from trl_search.cli.server_checks import recipe_servers, server_checks
from trl_search.cli.start_checks import refuse
from trl_search.common.errors import UserError, unknown_name
from trl_search.common.files import parse_object, read_object
from trl_search.common.hub import dataset_is_cached
from trl_search.common.launched import launched_processes, launched_rank
from trl_search.config.agent import SETTINGS_FILE
from trl_search.config.recipe import build_arguments
from trl_search.config.refused_keys import refuse_keys
from trl_search.config.run_file import OUTPUT_DIR, absolute_folder
from trl_search.config.searched import WORLD, resolve_searched
from trl_search.config.task import set_names
from trl_search.data import HUB_SETS, is_hub_set
from trl_search.data.hub_download import free_bytes
from trl_search.environment.registry import ENVIRONMENTS, SEARCH, takes_retriever
from trl_search.environment.script import load_script
from trl_search.evaluation.outcomes import RESULTS_FILE
from trl_search.policies.adapters import ADAPTER_CONFIG
from trl_search.policies.loading import model_source, read_config
from trl_search.protocols.instructions import tool_names
from trl_search.records.tracker_checks import refuse_trackers
from trl_search.trainer.resume import is_whole

GIB = 2**30
_TRACKERS = ("wandb", "trackio", "tensorboard")
_TIMEOUT_S = 5.0
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


def refuse_problems(values: Mapping[str, Any], classes: Sequence[Any]) -> None:
    """Raises `UserError` with every problem and its remedy if this machine cannot run the recipe. Only the first
    process checks."""
    if launched_rank():
        return
    refuse(recipe_checks(values, classes))


def recipe_checks(values: Mapping[str, Any], classes: Sequence[Any]) -> list[Check]:
    """Runs every check of a recipe."""
    devices, model = gpus(), check_model_is_there(values.get("model_name_or_path"))
    checks = [
        check_configuration(values, classes),
        # A cold start may sample from a truncated distribution.
        *([check_sampling(values), check_rewards(values)] if "reward_funcs" in values else []),
        check_precision(values, devices),
        *check_packages(values),
        model,
        *check_questions(values),
        *check_environment(values),
        *check_retriever(values),
        check_output(values),
    ]
    if model.status is Status.OK and values.get("protocol"):
        checks.append(check_template(values["model_name_or_path"], values["protocol"], values.get("eos_token")))
    if model.status is Status.OK and (parameters := count_parameters(values["model_name_or_path"])) is not None:
        checks += [check_memory(values, parameters, devices), check_disk(values, parameters)]
    for server in recipe_servers(values):
        checks += server_checks(server, values)
    return checks


def gpus() -> list[Device]:
    """The GPUs and their memory. Free memory is not read, because that needs a CUDA context on each GPU."""
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Device(one.name, one.total_memory, one.total_memory) for one in found]


def check_configuration(values: Mapping[str, Any], classes: Sequence[Any]) -> Check:
    """Runs TRL's and our own checks of the keys, for example of batch sizes and names."""
    if launched_processes() > 1:
        # Building the arguments connects the ranks: with `use_cpu` over gloo, while the others wait in NCCL.
        return Check("configuration", Status.OK, "every rank checks it when it starts")
    anywhere = {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "deepspeed": None, "report_to": "none"}

    def fit() -> str:
        here = {**values, **{key: value for key, value in anywhere.items() if key in values}}
        refuse_keys(*build_arguments(here, classes))
        return "keys and batch sizes fit together"

    return _unless_refused("configuration", fit)


def _unless_refused(name: str, say: Callable[[], str]) -> Check:
    """What `say` returns, or the problem that it raises."""
    try:
        return Check(name, Status.OK, say())
    except UserError as error:
        return Check(name, Status.PROBLEM, str(error))


def check_rewards(values: Mapping[str, Any]) -> Check:
    rewards, weights = values.get("reward_funcs") or [], values.get("reward_weights")
    if weights and len(weights) != len(rewards):
        given, named = " ".join(map(str, weights)), " ".join(map(str, rewards))
        said = f"{len(weights)} reward_weights ({given}) for {len(rewards)} reward_funcs ({named})"
        return Check("rewards", Status.PROBLEM, said, "give --reward_weights, one per reward")
    return Check("rewards", Status.OK, ", ".join(map(str, rewards)) or "none needed")


def check_precision(values: Mapping[str, Any], devices: Sequence[Device]) -> Check:
    wanted = [key for key in ("bf16", "fp16") if values.get(key)]
    if not wanted or values.get("use_cpu"):
        return Check("precision", Status.OK, wanted[0] if wanted else "float32")
    if not devices:
        said = f"{wanted[0]}: true needs a GPU, and there is none here"
        return Check("precision", Status.PROBLEM, said, "use a machine with a GPU, or --bf16 false for a tiny model")
    import torch

    if wanted == ["bf16"] and not torch.cuda.is_bf16_supported(including_emulation=False):
        said = f"bf16: true, but {devices[0].name} does not support bfloat16"
        return Check("precision", Status.PROBLEM, said, "--bf16 false --fp16 true")
    return Check("precision", Status.OK, f"{wanted[0]} on {devices[0].name}")


def check_packages(values: Mapping[str, Any]) -> Iterator[Check]:
    """Checks the packages that the recipe's keys need."""
    wanted: dict[str, tuple[str, str]] = {}  # by key: the module, and the extra that installs it
    if values.get("use_vllm"):
        wanted["use_vllm: true"] = ("vllm", "vllm")
    if str(values.get("attn_implementation") or "").startswith("flash_attention"):
        wanted["attn_implementation"] = ("flash_attn", "flash-attn")
    for tracker in set_names(values.get("report_to") or []):
        if tracker in _TRACKERS and importlib.util.find_spec(tracker) is None:
            wanted[f"report_to: {tracker}"] = (tracker, tracker)
        elif tracker not in ("all", "none"):
            yield _unless_refused("packages", partial(_tracker, tracker, values))
    for key, (module, extra) in wanted.items():
        if importlib.util.find_spec(module) is None:
            yield package_problem(key, module, extra)
        else:
            yield Check("packages", Status.OK, f"{module}, for {key}")
    if values.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        said = "use_liger_kernel: true needs liger-kernel"
        yield Check("packages", Status.PROBLEM, said, "pip install liger-kernel")


def _tracker(name: str, values: Mapping[str, Any]) -> str:
    refuse_trackers([name], values.get("trackio_space_id"))
    return f"report_to: {name}"


def check_model_is_there(name: str | None) -> Check:
    if not name:
        return Check("model", Status.PROBLEM, "model_name_or_path is missing", "--model_name_or_path owner/name")
    if name == "tiny":
        return Check("model", Status.OK, "the shipped policy")
    try:
        source = model_source(name)
    except UserError as error:
        return Check("model", Status.PROBLEM, str(error))
    if Path(source).is_dir():
        return Check("model", Status.OK, source)
    from huggingface_hub import HfApi, try_to_load_from_cache

    files = ("config.json", ADAPTER_CONFIG)
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return Check("model", Status.OK, f"{name}, in the hub's cache")
    return on_hub("model", name, lambda: HfApi().model_info(name, timeout=_TIMEOUT_S))


def check_questions(values: Mapping[str, Any]) -> Iterator[Check]:
    """Checks each question set: a file must exist, a hub set must be cached or reachable."""
    for name in set_names([values.get("questions") or "world", *(values.get("eval_questions") or [])]):
        if name == "world":
            yield Check("questions", Status.OK, "the embedded world")
        elif Path(name).expanduser().exists():
            yield Check("questions", Status.OK, name)
        elif is_hub_set(name):
            yield _hub_set(name)
        else:
            is_path = "/" in name or Path(name).suffix
            said = f"there is no file {name}" if is_path else str(unknown_name("dataset", name, [*HUB_SETS, WORLD]))
            yield Check("questions", Status.PROBLEM, said)


def _hub_set(name: str) -> Check:
    from huggingface_hub import HfApi

    repository = HUB_SETS[name].repository
    if dataset_is_cached(repository, HUB_SETS[name].config):
        return Check("questions", Status.OK, f"{name}, in the cache of datasets")
    return on_hub("questions", f"{name} ({repository})", lambda: HfApi().dataset_info(repository, timeout=_TIMEOUT_S))


def on_hub(what: str, name: str, ask: Callable[[], Any]) -> Check:
    try:
        ask()
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        said = f"{name} is not on this machine, and cannot be read from the hub ({reason})"
        return Check(what, Status.PROBLEM, said, "connect and log in (hf auth login), or give a path on this machine")
    return Check(what, Status.OK, f"{name}, on the hub")


def check_environment(values: Mapping[str, Any]) -> Iterator[Check]:
    """Checks that a custom environment and a script can be loaded."""
    name, script = values.get("environment") or SEARCH, values.get("script")

    def tools() -> str:
        return f"{name}, with {', '.join(tool_names(getattr(ENVIRONMENTS.find(name), 'tools', ()))) or 'no tools'}"

    if name != SEARCH:
        yield _unless_refused("environment", tools)
    if script:
        yield _unless_refused("script", lambda: _loaded(script))


def _loaded(script: str) -> str:
    load_script(script)
    return script


def check_retriever(values: Mapping[str, Any]) -> list[Check]:
    """Checks what the recipe's environment searches."""
    word, environment = values.get("retriever"), values.get("environment") or SEARCH
    try:
        if word is None or not takes_retriever(environment):
            return [Check("retriever", Status.OK, "none needed")]
        options = parse_object(values.get("retriever_options") or "{}", "retriever_options", "{}")
        searched = resolve_searched(word, options, in_world=values.get("questions") == "world")
    except UserError as error:
        return [Check("retriever", Status.PROBLEM, str(error))]
    return list(retriever_checks(searched))


def count_parameters(name: str) -> int | None:
    """The number of parameters of a model, from its configuration alone; `None` if that cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM

    from trl_search.policies.tiny import tiny_policy_path

    try:
        config = read_config(tiny_policy_path() if name == "tiny" else name)
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())
    except Exception:  # loading the model will report the cause
        return None


def check_memory(values: Mapping[str, Any], parameters: int, devices: Sequence[Device]) -> Check:
    """Counts weights, gradients, Adam's two moments and the reference model, but no activations and buffers."""
    weights = parameters * _BYTES.get(str(values.get("dtype") or "float32"), 4)
    shares = 1 if values.get("use_peft") else 4 + bool(values.get("beta"))
    need = shares * weights
    size = f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.1f} M"
    said = f"{need / GIB:.1f} GiB for {size} parameters ({shares} x weights) without activations"
    sharded = values.get("deepspeed") or values.get("fsdp") or os.environ.get("ACCELERATE_USE_DEEPSPEED")
    if sharded or os.environ.get("ACCELERATE_USE_FSDP"):
        return Check("gpu memory", Status.NOTE, f"{said}; sharded over the processes")
    if not devices:
        return Check("memory", Status.NOTE, said)
    total = min(device.total for device in devices)
    resident = values.get("use_vllm") and values.get("vllm_mode") == "colocate"
    if resident and not values.get("vllm_enable_sleep_mode"):
        total = int(total * (1 - float(values.get("vllm_gpu_memory_utilization") or 0)))
    if need > total:
        remedy = (
            "use_peft: true with dtype: bfloat16, more GPUs with recipes/accelerate/zero2.yaml, or a smaller model"
        )
        return Check("gpu memory", Status.PROBLEM, f"{said}; a GPU here has {total / GIB:.1f} GiB for it", remedy)
    return Check("gpu memory", Status.OK, f"{said}; a GPU here has {total / GIB:.1f} GiB for it")


def check_disk(values: Mapping[str, Any], parameters: int) -> Check:
    """A checkpoint holds the weights and Adam's moments, three times the weights; that of an adapter is small."""
    if str(values.get("save_strategy")) == "no":
        return Check("disk", Status.OK, "no checkpoints are saved")
    if values.get("use_peft"):
        return Check("disk", Status.OK, "checkpoints of an adapter are small")
    weights = parameters * _BYTES.get(str(values.get("dtype") or "float32"), 4)
    kept = values.get("save_total_limit") or 1
    need = weights * (3 * kept + 1)
    folder = Path(absolute_folder(values.get("output_dir")))
    free = free_bytes(folder)
    copies = "a checkpoint" if kept == 1 else f"{kept} checkpoints"
    said = f"{need / GIB:.1f} GiB for {copies} and the model; {free / GIB:.1f} GiB are free in {folder}"
    if need > free:
        return Check("disk", Status.PROBLEM, said, "--save_total_limit 1, or another --output_dir")
    return Check("disk", Status.OK, said)


def check_output(values: Mapping[str, Any]) -> Check:
    """Checks that the run would not overwrite a finished one, or delete the checkpoints of an interrupted one."""
    folder = Path(values.get("output_dir") or OUTPUT_DIR)
    results = folder / RESULTS_FILE
    asked = values.get("overwrite") or values.get("resume_from_checkpoint") or values.get("collect_only")
    if asked:
        return Check("output", Status.OK, str(folder))
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    trained = results.is_file() and read_object(results, "move it away").get("history")
    if trained or (folder / SETTINGS_FILE).is_file():  # `sft` writes the second one last
        resume = "--resume_from_checkpoint last with more steps to continue it, " if checkpoints else ""
        remedy = f"give another --output_dir, {resume}or --overwrite true to replace it"
        return Check("output", Status.PROBLEM, f"{folder} holds a finished run", remedy)
    # A new run there would soon reach its save_total_limit and delete them, the oldest first.
    if whole := [path.name for path in checkpoints if is_whole(path)]:
        said = f"{folder} holds the checkpoints of an interrupted run, up to {whole[-1]}"
        remedy = (
            "--resume_from_checkpoint last to continue it, another --output_dir, or --overwrite true to begin anew"
        )
        return Check("output", Status.PROBLEM, said, remedy)
    return Check("output", Status.OK, str(folder))
