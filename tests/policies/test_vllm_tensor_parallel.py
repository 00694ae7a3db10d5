"""An engine that two ranks share: two policies in one process, each with a fake of its half of the engine."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tests.support.two_ranks import run_ranks
from tests.support.vllm_engine import make_model_folder, require_vllm, vllm_environment, vllm_fork_server
from trl_search.policies import vllm_colocate
from trl_search.policies.vllm_tensor_parallel import VLLMTensorParallelPolicy
from trl_search.types import Completion, FinishReason, Sampling


class HalfAnEngine:
    """Records its calls. A request takes `max_tokens` steps; prompts with token 13 are refused."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.left: dict[str, int] = {}
        self.llm_engine = self
        self.model_executor = None
        self.output_processor = SimpleNamespace(request_states={})
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=64))

    def add_request(self, name, prompt, request, lora_request):
        if prompt["prompt_token_ids"] == [13]:
            raise ValueError("no room for 13")
        self.told.append(("add", name, prompt["prompt_token_ids"]))
        self.left[name] = request.max_tokens

    def abort_request(self, names):
        for name in names:
            self.told.append(("abort", name))
            del self.left[name]

    def step(self):
        self.told.append("step")
        self.left = {name: left - 1 for name, left in self.left.items()}
        done = [name for name, left in self.left.items() if left == 0]
        for name in done:
            del self.left[name]
        return [SimpleNamespace(request_id=name, finished=True, outputs=[name]) for name in done]


class Meeting:
    """An exchange between two threads, in place of one between ranks."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=600)
        self.said = [None, None]

    def of(self, rank):
        def exchange(news):
            self.said[rank] = news
            self.barrier.wait()
            everyone = list(self.said)
            self.barrier.wait()
            return everyone

        return exchange


def completion_of(name):
    owner, number = map(int, name.split("-")[1:])
    return Completion((owner, number), (0.0, 0.0), FinishReason.EOS)


@pytest.fixture
def ranks(monkeypatch):
    """Two policies on one engine, and the halves of the engine."""
    monkeypatch.setattr(vllm_colocate, "_params", lambda request: request)
    monkeypatch.setattr(vllm_colocate, "_completion", completion_of)
    meeting, halves = Meeting(), [HalfAnEngine(), HalfAnEngine()]
    return [VLLMTensorParallelPolicy(halves[rank], rank=rank, exchange=meeting.of(rank)) for rank in range(2)], halves


def together(*coroutines):
    """Runs each rank on its own thread and event loop."""
    with ThreadPoolExecutor() as threads:
        return [future.result() for future in [threads.submit(asyncio.run, each) for each in coroutines]]


async def generate(policy, *lengths):
    """One trajectory with turns of these lengths."""
    return [(await policy.generate([7], max_tokens=length, sampling=Sampling())).ids[0] for length in lengths]


async def rank(policy, *trajectories):
    await policy.open()
    try:
        return await asyncio.gather(*(generate(policy, *lengths) for lengths in trajectories), return_exceptions=True)
    finally:
        await policy.close()


def test_both_halves_get_the_same_requests_and_each_rank_its_own_results(ranks):
    policies, halves = ranks
    first, second = together(
        rank(policies[0], [3, 1], [2]), rank(policies[1], [1] * 9, [4, 4], [2, 8])
    )  # the first closes while the second still generates
    assert first == [[0, 0], [0]]
    assert second == [[1] * 9, [1, 1], [1, 1]]
    assert halves[0].told == halves[1].told
    assert halves[0].left == halves[1].left == {}
    added = [told[1] for told in halves[0].told if told[0] == "add"]
    assert sorted(name.split("-")[1] for name in added) == ["0"] * 3 + ["1"] * 13


def test_the_engine_can_be_used_again(ranks):
    policies, halves = ranks
    for _ in range(2):
        assert together(rank(policies[0], [1]), rank(policies[1], [2])) == [[[0]], [[1]]]
    assert halves[0].told == halves[1].told


def test_a_rank_without_trajectories_takes_part(ranks):
    policies, halves = ranks
    assert together(rank(policies[0]), rank(policies[1], [5])) == [[], [[1]]]
    assert halves[0].told == halves[1].told and halves[0].told.count("step") == 5


async def cancelled(policy, half):
    await policy.open()
    task = asyncio.create_task(policy.generate([7], max_tokens=10**9, sampling=Sampling()))
    while not half.left:
        await asyncio.sleep(0.001)
    task.cancel()
    while half.left:
        await asyncio.sleep(0.001)
    await policy.close()
    return task.cancelled()


def test_a_cancelled_request_ends_on_all_ranks(ranks):
    policies, halves = ranks
    assert together(cancelled(policies[0], halves[0]), rank(policies[1])) == [True, []]
    assert halves[0].told == halves[1].told and halves[0].told[-1][0] == "abort"


async def interrupted(policy, half):
    await policy.open()
    task = asyncio.create_task(policy.generate([7], max_tokens=10**9, sampling=Sampling()))
    while not half.left:
        await asyncio.sleep(0.001)
    await policy.interrupt()
    await policy.close()
    return (await task).finish_reason


def test_an_interruption_returns_the_requests_of_its_rank(ranks):
    policies, halves = ranks
    assert together(interrupted(policies[0], halves[0]), rank(policies[1], [40])) == [
        FinishReason.INTERRUPTED,
        [[1]],
    ]
    assert halves[0].told == halves[1].told and halves[0].left == {}


async def left_behind(policy, half):
    """Closes the policy while a request is running."""
    await policy.open()
    task = asyncio.create_task(policy.generate([7], max_tokens=10**9, sampling=Sampling()))
    while not half.left:
        await asyncio.sleep(0.001)
    await policy.close()
    await asyncio.wait([task])
    return task.cancelled()


def test_requests_that_a_rank_leaves_behind_are_ended(ranks):
    policies, halves = ranks
    assert together(left_behind(policies[0], halves[0]), rank(policies[1], [3])) == [True, [[1]]]
    assert halves[0].told == halves[1].told and halves[0].left == {}


async def refused(policy):
    await policy.open()
    asked = (policy.generate([token], max_tokens=2, sampling=Sampling()) for token in (13, 7))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    await policy.close()
    return answers


def test_a_request_that_the_engine_refuses_fails_alone(ranks):
    policies, halves = ranks
    (error, answer), second = together(refused(policies[0]), rank(policies[1], [2]))
    assert "no room for 13" in str(error) and answer.ids[0] == 0 and second == [[1]]
    assert halves[0].told == halves[1].told


@pytest.mark.slow
def test_two_processes_share_a_real_engine(tmp_path):
    """vLLM's CPU build over two processes: greedy completions equal those of an engine in one process."""
    require_vllm()
    make_model_folder(tmp_path / "model")
    run_ranks(
        "tests.support.vllm_tensor_parallel_run",
        [str(tmp_path)],
        tmp_path,
        environment=vllm_environment(tmp_path),
        server=vllm_fork_server(),
    )
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["shared"] == first["alone"] and second["shared"] == second["alone"]
    assert first["shared"] != second["shared"]
