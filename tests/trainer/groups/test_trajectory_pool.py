"""The pool of trajectories: batches close without slow ones, which keep their searches and join a later batch."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from tests.support.slow_searches import BOOKS, Library, Reader, gates_of
from trl_search.protocols import load_protocol
from trl_search.rollout import Limits
from trl_search.trainer.groups import trajectory_pool
from trl_search.trainer.groups.trajectory_pool import TrajectoryPool
from trl_search.types import Sampling, StopReason

LIMITS = Limits(completion_tokens=600, turn_tokens=200, observation_tokens=200)


@pytest.fixture
def make_pool(tokenizer):
    made = []

    def make(gates, **options):
        made.append(TrajectoryPool(Library(gates), load_protocol("qwen_tools", tokenizer, instruction=""), LIMITS,
                                   group_size=2, **options))  # fmt: skip
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def start(pool, *numbers):
    rows = [BOOKS[number] for number in numbers]
    protocol = pool._protocol
    pool.start(rows, [protocol.prompt_ids(protocol.messages(row["question"])) for row in rows], Sampling(seed=1))


def books(groups):
    return [int(group.row["question"].split()[-1][:-1]) for group in groups]


def test_a_slow_search_is_parked_keeps_its_result_and_comes_first_when_done(make_pool, tokenizer):
    gates = gates_of([1])
    pool = make_pool(gates)
    pool.attach(Reader(tokenizer), version=0)
    start(pool, 0, 1, 2)
    assert books(pool.take(2)) == [0, 2] and books(pool.groups) == [1]
    pool.detach()
    gates["book 1"].set_result(None)  # while the trainer computes
    pool.attach(Reader(tokenizer), version=1)
    start(pool, 3, 4)
    taken = []
    while not taken or books(taken)[0] != 1:  # the search may end after the new ones
        taken = pool.take(1)
    (group,) = taken
    assert group.born == 0
    for trajectory in group.trajectories:
        assert trajectory.stop_reason is StopReason.ANSWER and "author 1" in trajectory.spoken[-1]
        # Its first turn has version 0, its last version 1, and observations have none.
        versions = [sorted(set(trajectory.versions[turn.start : turn.end])) for turn in trajectory.turns if turn.text]
        assert versions == [[0], [-1], [1]]
    assert pool.environment.searched.count("book 1") == 2  # once per trajectory


def test_the_thread_of_the_pool_uses_the_gpu_of_its_process(make_pool, tokenizer, monkeypatch):
    """The engine's probe and a user's environment run there, and a new thread starts on GPU 0."""
    used = []
    monkeypatch.setattr(
        trajectory_pool, "use_device", lambda device: used.append((threading.current_thread().name, device))
    )
    pool = make_pool(gates_of([]), device=torch.device("cuda", 3))
    opened = pool.environment.open

    async def open_on_the_gpu():
        assert used == [("carried-over trajectories", torch.device("cuda", 3))]
        await opened()

    monkeypatch.setattr(pool.environment, "open", open_on_the_gpu)
    pool.attach(Reader(tokenizer), version=0)
    pool.detach()
    pool.attach(Reader(tokenizer), version=1)
    assert len(used) == 1


def test_the_oldest_finished_groups_are_taken(make_pool, tokenizer):
    gates = gates_of([0])
    pool = make_pool(gates)
    pool.attach(Reader(tokenizer), version=0)
    start(pool, 0, 1)
    assert books(pool.take(1)) == [1]
    gates["book 0"].set_result(None)
    start(pool, 2, 3)
    assert books(pool.take(3)) == [0, 2, 3]


@pytest.mark.parametrize(
    ("born", "whole", "taken"),
    [
        ([0, 0, 0, 0], [1, 1, 0, 0], [0, 1]),  # the others are due in the next rollout
        ([0, 0, 1, 1], [1, 0, 1, 1], None),  # the second was due now
        ([0, 0, 1, 1], [1, 1, 0, 0], [0, 1]),
        ([0, 0, 1, 1], [0, 0, 1, 1], None),
    ],
)
def test_a_group_waits_for_at_most_max_staleness_rollouts(make_pool, born, whole, taken):
    pool = make_pool({}, max_staleness=1)
    pool.rollout = max(born)
    pool.groups = [SimpleNamespace(born=b, whole=bool(w), members=[]) for b, w in zip(born, whole, strict=True)]
    found = pool.takeable(2)
    assert found == (None if taken is None else [pool.groups[place] for place in taken])
    pool.groups = []


def test_no_more_groups_are_left_than_the_next_batch_has_room_for(make_pool):
    """Of three old groups, at most two may be left for the next rollout, because a batch has room for two."""
    pool = make_pool({}, max_staleness=2)
    pool.rollout = 1
    pool.groups = [SimpleNamespace(born=0, whole=place == 3, members=[]) for place in range(4)]
    pool.groups += [SimpleNamespace(born=1, whole=True, members=[]) for _ in range(2)]
    assert pool.takeable(2) is None
    pool.groups[0].whole = True
    assert pool.takeable(2) == [pool.groups[0], pool.groups[3]]
    pool.groups = []


def test_an_engine_that_breaks_ends_the_rollout(make_pool, tokenizer):
    class Broken(Reader):
        async def generate(self, prompt_ids, **options):
            raise RuntimeError("device lost")

    pool = make_pool({})
    pool.attach(Broken(tokenizer), version=0)
    start(pool, 0, 1)
    with pytest.raises(RuntimeError, match="device lost"):
        pool.take(1)


def test_closing_ends_the_searches_that_still_run(make_pool, tokenizer):
    gates = gates_of([0])
    pool = make_pool(gates)
    pool.attach(Reader(tokenizer), version=0)
    start(pool, 0, 1)
    pool.take(1)
    pool.close()
    pool.close()
    assert all(member.cancelled() for group in pool.groups for member in group.members)
    assert pool.environment.log == ["open", "close"] and gates["book 0"].cancelled()
