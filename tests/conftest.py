"""Shared fixtures: the tiny policy's tokenizer, a small world, its retriever, a model with random weights."""

from __future__ import annotations

import gc
import os
import signal
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT in its background processes, and their children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Heavy imports are inside functions: xdist's controller also reads this file, but runs no tests.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

    from trl_search.data.world import World
    from trl_search.retrieval import Retriever


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.support.workers import Scheduling

    return Scheduling(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """In the controller: one process imports torch and TRL for all workers and for the processes that tests fork."""
    from tests.support.forked import fork_workers

    folder = tempfile.TemporaryDirectory(prefix="trl-search-")
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(fork_workers(specs, f"{folder.name}/forks").close)


def pytest_collection(session: pytest.Session) -> None:
    """Property tests have no deadline, because the machine may be busy."""
    if session.config.getoption("dist", "no") != "no" and not hasattr(session.config, "workerinput"):
        return  # xdist's controller runs no tests
    from hypothesis import HealthCheck, settings

    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # a worker of xdist
        from tests.support.workers import slow_first

        slow_first(items)


def pytest_collection_finish() -> None:
    """Every trainer calls `gc.collect()`, which then skips a million imported objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def visible_devices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test marked `gpu` sees one device, a test marked `multi_gpu` two, and so do the processes that they start.

    With several devices, transformers' Trainer would wrap the model in `nn.DataParallel`, which TRL refuses.
    """
    needed = next(
        (count for mark, count in {"gpu": 1, "multi_gpu": 2}.items() if request.node.get_closest_marker(mark)), 0
    )
    if not needed:
        return
    import torch

    if torch.cuda.device_count() > needed:
        torch.cuda.init()  # initialise CUDA with all devices first: this process reads the environment once
        monkeypatch.setattr(torch.cuda, "device_count", lambda: needed)
        all_devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(all_devices.split(",")[:needed]))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    from tools.tiny_policy.tokenizer import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def world() -> World:
    from trl_search.data.world import generate_world

    return generate_world(passages=1000, seed=3)


@pytest.fixture(scope="session")
def retriever(world: World) -> Retriever:
    from trl_search.retrieval import load_retriever

    return load_retriever("bm25", passages=world.passages)


def make_random_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """The real architecture with two layers of random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config).eval()


def save_random_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Saves the random model with its tokenizer, for separate processes."""
    make_random_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def random_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    return make_random_model(tokenizer)
