"""Checks, before anything is loaded, whether this machine can run an evaluation."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import httpx

from trl_search.cli.model_checks import check_template
from trl_search.cli.preflight import Check, Device, Status
from trl_search.cli.recipe_checks import GIB, check_model_is_there, check_questions, count_parameters, gpus
from trl_search.cli.retriever_checks import package_problem, retriever_checks
from trl_search.cli.start_checks import StartChecks
from trl_search.common.errors import UserError
from trl_search.common.launched import launched_rank
from trl_search.evaluation.plan import Plan, searches, what_is_searched
from trl_search.evaluation.settings import read_settings_file
from trl_search.policies.loading import placement
from trl_search.policies.vllm_address import client_options, read_models

_TIMEOUT_S = 5.0


def refuse_evaluation(plan: Plan) -> None:
    """Raises `UserError` if the evaluation cannot run here. Only the first process checks."""
    if launched_rank():
        return
    found = StartChecks()
    found.see("output", lambda: read_settings_file(plan.output))
    found.add(checkpoint_checks(plan, gpus()))
    if plan.backend.name == "transformers":
        found.see("device", lambda: placement(plan.backend.device, plan.backend.dtype))
    found.add(check_questions({"questions": plan.datasets[0], "eval_questions": list(plan.datasets[1:])}))
    if plan.acts and found.see("environment", lambda: searches(plan)):
        searched = found.see("retriever", lambda: what_is_searched(plan))
        found.add(retriever_checks(searched) if searched is not None else ())
    found.refuse()


def checkpoint_checks(plan: Plan, devices: list[Device]) -> Iterator[Check]:
    model = check_model_is_there(plan.model)
    yield model
    if model.status is Status.OK:
        yield check_template(plan.model, plan.agent.protocol)
    backend = plan.backend
    if backend.name == "vllm" and importlib.util.find_spec("vllm") is None:
        yield package_problem("--backend vllm", "vllm", "vllm")
    if backend.name == "vllm_server" and backend.server is not None:
        yield check_server(backend.server, backend.served_model)
        return
    if model.status is Status.OK and devices and backend.device != "cpu":
        yield check_weights(plan.model, backend.dtype, devices)


def check_weights(model: str, dtype: str | None, devices: list[Device]) -> Check:
    """Whether the weights fit on a GPU. Generation needs more memory, which is not counted."""
    parameters = count_parameters(model)
    if parameters is None:
        return Check("gpu memory", Status.NOTE, "the size of the model is unknown until it is loaded")
    need, total = parameters * (4 if dtype == "float32" else 2), min(device.total for device in devices)
    said = f"the weights need {need / GIB:.1f} GiB, and a GPU here has {total / GIB:.1f} GiB"
    if need > total:
        return Check("gpu memory", Status.PROBLEM, said, "--dtype bfloat16, or --backend vllm_server on several GPUs")
    return Check("gpu memory", Status.OK, said)


def check_server(url: str, served: str | None) -> Check:
    """Whether a vLLM server answers and serves the model."""
    try:
        with httpx.Client(timeout=_TIMEOUT_S, **client_options(url)) as client:
            models = read_models(client.get("/v1/models"))
        names = [str(model["id"]) for model in models]
        adapters = [str(model["id"]) for model in models if model.get("parent")]
    except UserError as error:
        return Check("server", Status.PROBLEM, str(error))
    except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
        said = f"no vLLM server answers at {url} ({error or type(error).__name__})"
        return Check("server", Status.PROBLEM, said, "start it with `vllm serve`: docs/vllm.md")
    if served is not None and served not in names:
        said = f"{url} serves {', '.join(names)}, not {served}"
        return Check("server", Status.PROBLEM, said, "give one of these names as --served_model")
    if served is None and adapters:
        said = f"{url} serves adapters ({', '.join(adapters)}) beside their base, which would answer"
        return Check("server", Status.PROBLEM, said, f"give one of {', '.join(names)} as --served_model")
    return Check("server", Status.OK, f"{url} serves {', '.join(names)}")
