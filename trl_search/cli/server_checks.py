"""The checks of `trl-search doctor` on a vLLM server, which is tested with requests: its options do not prove how it
behaves.

`ask_server` gathers the facts; each check is a pure function of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from packaging.version import Version

from trl_search.cli.preflight import Check, Status, installed_version
from trl_search.common.errors import UserError
from trl_search.policies.vllm_address import client_options, read_models
from trl_search.policies.vllm_completions import error_text, format_request, refusal
from trl_search.policies.vllm_metrics import ONE_ADDRESS, shares_engines
from trl_search.policies.vllm_versions import can_join, version_problem
from trl_search.policies.weight_checksums import EXTENSION
from trl_search.types import Sampling

DEV_MODE = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
WEIGHT_TRANSFER = """start it with --weight-transfer-config '{"backend": "nccl"}'"""
LOGPROBS_MODE = "start it with --logprobs-mode processed_logprobs"
# Token ids that every vocabulary has.
_PROMPT = (10, 11, 12)
_TOP = 5
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """The replies of a vLLM server. `cold` and `hot` are the most probable next tokens at temperature 1 and 2."""

    version: str
    models: Sequence[Mapping[str, Any]]
    info: Mapping[str, Any] | None
    adapters: bool
    cold: Mapping[str, float]
    hot: Mapping[str, float]
    turn: Mapping[str, Any]
    stop: str
    stopped: Mapping[str, Any]


def recipe_servers(recipe: Mapping[str, Any]) -> list[str]:
    """The addresses of the vLLM servers that a recipe samples from; empty if it uses none."""
    if not recipe.get("use_vllm") or recipe["vllm_mode"] != "server":
        return []
    given = recipe["vllm_server_base_url"] or f"http://{recipe['vllm_server_host']}:{recipe['vllm_server_port']}"
    return [given] if isinstance(given, str) else list(given)


def server_checks(url: str, recipe: Mapping[str, Any] | None = None, *, prompt_tokens: int = 512) -> list[Check]:
    """Checks whether a search agent can be trained with the server at `url`."""
    try:
        facts = ask_server(url)
    except UserError as error:
        return [Check("server", Status.PROBLEM, str(error))]
    except httpx.TransportError as error:
        said = f"nothing answers at {url} ({error or type(error).__name__})"
        return [Check("server", Status.PROBLEM, said, "start it with `vllm serve`: docs/vllm.md")]
    except (httpx.HTTPStatusError, KeyError, IndexError, TypeError, ValueError) as error:
        said = f"the server at {url} is not a working vLLM server ({error})"
        return [Check("server", Status.PROBLEM, said, "read its log; docs/vllm.md shows how to start one")]
    return [
        Check("server", Status.OK, f"{url} answers"),
        check_server_version(facts.version, installed_version("vllm")),
        check_model(facts.models, recipe),
        check_room(facts.models, recipe, prompt_tokens),
        check_token_ids(facts.turn),
        check_logprobs_mode(facts.cold, facts.hot),
        check_stop(facts.stop, facts.stopped),
        _check_sync(facts, recipe or {}),
    ]


def ask_server(url: str) -> ServerFacts:
    """Sends the requests for all checks, among them four short generations."""
    with httpx.Client(timeout=_TIMEOUT_S, **client_options(url)) as client:
        version = client.get("/version").raise_for_status().json()["version"]
        models = read_models(client.get("/v1/models"))
        info = client.get("/server_info", params={"config_format": "json"})
        # It takes only POST; a server without the path answers 404.
        adapters = client.get("/v1/load_lora_adapter").status_code == httpx.codes.METHOD_NOT_ALLOWED

        def ask(max_tokens: int, temperature: float, stop: Sequence[str] = (), **more: Any) -> dict[str, Any]:
            body = format_request(models[0]["id"], _PROMPT, max_tokens, Sampling(temperature), stop) | more
            answer = client.post("/v1/completions", json=body)
            if answer.is_client_error:
                said = f"{answer.status_code}: {error_text(answer.content) or answer.reason_phrase}"
                raise refusal(url, said, needed=len(_PROMPT) + max_tokens, model=body["model"])
            choice: dict[str, Any] = answer.raise_for_status().json()["choices"][0]
            return choice

        def top(temperature: float) -> dict[str, float]:
            choice = ask(1, temperature, logprobs=_TOP, return_tokens_as_token_ids=True)
            return dict(choice["logprobs"]["top_logprobs"][0])

        turn = ask(24, 0.0)
        stop = _stop_inside_a_token(turn["logprobs"]["tokens"])
        return ServerFacts(
            version=version,
            models=models,
            info=info.json()["vllm_config"] if info.is_success else None,
            adapters=adapters,
            cold=top(1.0),
            hot=top(2.0),
            turn=turn,
            stop=stop,
            stopped=ask(24, 0.0, [stop]) if stop else {},
        )


def check_server_version(version: str, here: str | None) -> Check:
    """TRL supports certain versions, and the trainer sends weights with the code of its own vLLM."""
    if problem := version_problem(version):
        return Check("server version", Status.WARNING, problem, "pip install 'trl-search[vllm]' where it runs")
    if here is None:
        said = f"{version}, and no vLLM here: TRL's client sends the weights with vLLM's own code"
        return Check("server version", Status.PROBLEM, said, "pip install 'trl-search[vllm]'")
    if Version(here).base_version != Version(version).base_version:
        said = f"{version} on the server, {here} here: the weight sync may fail between different versions"
        return Check("server version", Status.WARNING, said, "install the same version on both sides")
    return Check("server version", Status.OK, version)


def check_model(models: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any] | None) -> Check:
    served = [str(model["id"]) for model in models]
    wanted = recipe.get("model_name_or_path") if recipe else None
    if wanted and wanted not in {*served, *(str(model.get("root")) for model in models)}:
        said = f"the server has {', '.join(served)}, but the recipe trains {wanted}"
        return Check("model", Status.WARNING, said, "serve the model that is trained: the shapes must be the same")
    return Check("model", Status.OK, ", ".join(served))


def check_room(models: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any] | None, prompt_tokens: int) -> Check:
    room = max(int(model.get("max_model_len") or 0) for model in models)
    if recipe is None:
        return Check("max_model_len", Status.OK, f"{room}; give a recipe to compare it")
    completion = int(recipe["max_completion_length"])
    needed = prompt_tokens + completion
    said = f"{room}; prompts of {prompt_tokens} tokens and max_completion_length {completion} need {needed}"
    if room < needed:
        remedy = f"start it with --max-model-len {needed} or more"
        return Check("max_model_len", Status.PROBLEM, said, remedy)
    return Check("max_model_len", Status.OK, said)


def check_token_ids(turn: Mapping[str, Any]) -> Check:
    ids, logprobs = turn.get("token_ids"), turn["logprobs"]["token_logprobs"]
    if not ids or len(ids) != len(logprobs):
        said = f"the server returned {len(ids or ())} ids with {len(logprobs)} logprobs"
        return Check("token ids", Status.PROBLEM, said, "use a vLLM that supports return_token_ids")
    return Check("token ids", Status.OK, "returned, each with its logprob")


def check_logprobs_mode(cold: Mapping[str, float], hot: Mapping[str, float]) -> Check:
    """Doubling the temperature halves the distance of two logprobs, unless they are computed without temperature."""
    name = "logprobs mode"
    both = sorted(cold.keys() & hot.keys(), key=lambda token: cold[token])
    if any(value > 0 for value in (*cold.values(), *hot.values())):
        return Check(name, Status.PROBLEM, "the server returns logits", LOGPROBS_MODE)
    distance = cold[both[-1]] - cold[both[0]] if both else 0.0
    if distance < 0.01:
        return Check(name, Status.WARNING, "unknown: all tokens are equally probable", LOGPROBS_MODE)
    share = (hot[both[-1]] - hot[both[0]]) / distance
    if abs(share - 0.5) > 0.1:
        return Check(name, Status.PROBLEM, "the server's logprobs ignore the temperature", LOGPROBS_MODE)
    return Check(name, Status.OK, "processed_logprobs, at the sampling temperature")


def check_stop(stop: str, stopped: Mapping[str, Any]) -> Check:
    """Checks that a stop string which ends inside a token leaves the whole token in the ids."""
    name = "stop strings"
    if not stop:
        return Check(name, Status.WARNING, "not tested: the model wrote no text to stop at")
    tokens, ids = stopped["logprobs"]["tokens"], stopped.get("token_ids") or []
    said = "".join(tokens)
    if stopped.get("stop_reason") != stop or len(ids) != len(tokens) or said.find(stop) < 0 or said.endswith(stop):
        said = f"with stop {stop!r}, the server returned {said!r}"
        return Check(name, Status.PROBLEM, said, "use a vLLM that keeps the sampled ids")
    return Check(name, Status.OK, "they end a turn, and the sampled ids stay whole")


def check_weight_sync(info: Mapping[str, Any] | None, version: str = "", here: str | None = None) -> Check:
    """Checks what TRL's client needs to send the weights in every step, by the versions of vLLM there and here."""
    name = "weight sync"
    if here is not None and not can_join(version, here):
        said = f"vLLM {version} on the server and {here} here send weights in different ways"
        return Check(name, Status.PROBLEM, said, "install the same version on both sides")
    if info is None:
        return Check(name, Status.PROBLEM, "the server's development endpoints are off", DEV_MODE)
    transfer = info.get("weight_transfer_config")
    if not transfer or transfer.get("backend") != "nccl":
        return Check(name, Status.PROBLEM, f"the server's weight-transfer engine is {transfer}", WEIGHT_TRANSFER)
    if shares_engines(info):
        said = "the server shares its engines with other servers, but weights reach all engines through one address"
        return Check(name, Status.PROBLEM, said, ONE_ADDRESS)
    if (info.get("device_config") or {}).get("device") == "cpu":
        return Check(name, Status.WARNING, "the server runs on a CPU: NCCL cannot send weights to it")
    if (info.get("parallel_config") or {}).get("worker_extension_cls") != EXTENSION:
        said = "the server cannot check the weights that it receives, so a faulty sync would go unnoticed"
        return Check(name, Status.NOTE, said, f"start it with --worker-extension-cls {EXTENSION}")
    return Check(name, Status.OK, "development endpoints, an NCCL engine and checksums are available")


def check_adapter_sync(adapters: bool, info: Mapping[str, Any] | None) -> Check:
    """Checks what `vllm_lora_sync=adapter` needs: adapters loaded at run time, and settings that TRL can read."""
    if not adapters:
        remedy = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
        return Check("weight sync", Status.PROBLEM, "the server cannot load adapters at run time", remedy)
    if info is None:
        return Check("weight sync", Status.PROBLEM, "the server hides its settings, which TRL reads", DEV_MODE)
    return Check("weight sync", Status.OK, "adapters can be loaded")


def _check_sync(facts: ServerFacts, recipe: Mapping[str, Any]) -> Check:
    if recipe.get("use_peft") and recipe.get("vllm_lora_sync") == "adapter":
        return check_adapter_sync(facts.adapters, facts.info)
    return check_weight_sync(facts.info, facts.version, installed_version("vllm"))


def _stop_inside_a_token(tokens: Sequence[str]) -> str:
    """A stop string that ends inside a token; empty if there is none."""
    for index in range(1, len(tokens)):
        for end in range(1, len(tokens[index])):
            stop = tokens[index - 1][-1:] + tokens[index][:end]
            if "".join(tokens[:index]).find(stop) < 0 and stop.isascii():
                return stop
    return ""
