"""Several servers as one policy, with fake `vllm serve` servers on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest

from tests.support.servers import Said, Server
from trl_search.policies.vllm_server import ServerLost, VLLMServerPolicy
from trl_search.policies.vllm_servers import VLLMServersPolicy
from trl_search.types import Sampling

SAMPLING = Sampling(temperature=1.0, seed=1)


TWO_ENGINES = 'vllm:num_requests_running{engine="0"} 0.0\nvllm:num_requests_running{engine="1"} 0.0\n'


class VLLM:
    """A fake server whose completion is the sum of the prompt, so that every server gives the same one."""

    def __init__(self, started_at=1.0):
        self.started_at = started_at
        self.engines = ""  # lines of /metrics; with several engines, workers say when they started
        self.prompts, self.asked_engines = [], []
        self.lock = threading.Lock()
        self.dies_after = None
        self.server = Server(self.answer)

    @property
    def url(self):
        return self.server.url

    def answer(self, asked):
        if asked.target == "/v1/models":
            return Said({"data": [{"id": "tiny", "max_model_len": 512}]})
        if asked.target == "/version":
            return Said({"version": "0.31.0"})
        if asked.target == "/metrics":
            start = "" if self.engines else f"process_start_time_seconds {self.started_at}\n"
            return Said(f"{start}{self.engines}".encode())
        if asked.target == "/collective_rpc":
            assert asked.json == {"method": "started_at"}
            return Said({"results": [self.started_at]})
        if asked.target == "/health":
            return Said()
        prompt = asked.json["prompt"]
        with self.lock:
            self.prompts.append(prompt)
            self.asked_engines.append((prompt[0], asked.headers.get("x-data-parallel-rank")))
            if self.dies_after is not None and len(self.prompts) > self.dies_after:
                threading.Thread(target=self.server.kill).start()
                return Said(by_hand=lambda connection: connection.shutdown(2))
        choice = {"token_ids": [sum(prompt) % 1000], "finish_reason": "stop", "stop_reason": None}
        return Said({"choices": [{**choice, "logprobs": {"token_logprobs": [-0.5]}}]})


@pytest.fixture
def servers():
    made = [VLLM(), VLLM()]
    yield made
    for one in made:
        one.server.kill()


def policy_of(servers, **options):
    return VLLMServersPolicy(
        [VLLMServerPolicy(one.url, patience_s=0.3, weights_since=1.0, **options) for one in servers]
    )


def roll_out(policy, trajectories=8, turns=4):
    """The tokens of each trajectory after its turns. All trajectories run at the same time."""

    async def trajectory(number, gate):
        ids = [number]
        for _ in range(turns):
            completion = await policy.generate(ids, max_tokens=8, sampling=SAMPLING)
            ids = [*ids, *completion.ids]
            await gate.wait()
        return ids

    async def go():
        gate = asyncio.Barrier(trajectories)
        await policy.open()
        try:
            return await asyncio.gather(*(trajectory(number, gate) for number in range(1, trajectories + 1)))
        finally:
            await policy.close()

    return asyncio.run(go())


def expected(trajectories=8, turns=4):
    found = []
    for number in range(1, trajectories + 1):
        ids = [number]
        for _ in range(turns):
            ids.append(sum(ids) % 1000)
        found.append(ids)
    return found


def test_a_trajectory_stays_on_its_server_and_the_load_is_balanced(servers):
    assert roll_out(policy_of(servers)) == expected()
    homes = [{prompt[0] for prompt in one.prompts} for one in servers]
    assert homes[0].isdisjoint(homes[1]) and [len(home) for home in homes] == [4, 4]
    assert all(count == 4 for one in servers for count in Counter(prompt[0] for prompt in one.prompts).values())


def test_a_trajectory_stays_on_one_engine_of_its_server(servers):
    assert roll_out(VLLMServerPolicy(servers[0].url)) == expected()
    assert {engine for _, engine in servers[0].asked_engines} == {None}
    servers[1].engines = TWO_ENGINES
    assert roll_out(VLLMServerPolicy(servers[1].url)) == expected()
    pairs = Counter(servers[1].asked_engines)
    assert len(pairs) == 8 and set(pairs.values()) == {4}
    assert Counter(engine for _, engine in pairs) == {"0": 4, "1": 4}


def test_the_trajectories_of_a_dead_server_move_to_the_other(servers):
    servers[0].dies_after = 6
    assert roll_out(policy_of(servers)) == expected()
    assert {prompt[0] for prompt in servers[1].prompts} == set(range(1, 9))


@pytest.mark.parametrize("engines", ["", TWO_ENGINES], ids=["one engine", "two engines"])
def test_a_restarted_server_has_lost_the_weights_and_gets_no_requests(servers, engines):
    for one in servers:
        one.engines = engines
    servers[0].started_at = 2.0
    assert roll_out(policy_of(servers)) == expected()
    assert servers[0].prompts == []


def test_one_of_two_servers_is_enough_to_start(servers):
    servers[1].server.kill()
    assert roll_out(policy_of(servers)) == expected()


def test_without_any_server_the_error_names_them(servers):
    for one in servers:
        one.server.kill()
    with pytest.raises(ServerLost) as lost:
        roll_out(policy_of(servers))
    assert servers[0].url in str(lost.value) and servers[1].url in str(lost.value)


def test_when_the_last_server_dies_the_rollout_ends(servers):
    servers[0].dies_after = servers[1].dies_after = 6
    with pytest.raises(ServerLost, match="was lost"):
        roll_out(policy_of(servers))


def test_a_warning_names_the_lost_server_once_and_no_remedy_that_ends_the_run(servers, caplog):
    servers[0].dies_after = 6
    roll_out(policy_of(servers))
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Continuing")]
    assert len(said) == 1 and said[0].startswith(f"Continuing with one server: the vLLM server at {servers[0].url} ")
    assert "resume" not in said[0]


def test_a_turn_after_the_loss_of_all_servers_names_it(servers):
    """Another trajectory has had the error, for example while this one searched."""

    async def go():
        policy = policy_of(servers)
        await policy.open()
        for one in servers:
            one.server.kill()
        try:
            for _ in range(2):
                with pytest.raises(ServerLost, match="was lost"):
                    await policy.generate([1], max_tokens=8, sampling=SAMPLING)
            with pytest.raises(ServerLost, match="was lost"):
                await policy.interrupt()
        finally:
            await policy.close()

    asyncio.run(go())


def test_a_request_that_every_server_would_refuse_is_not_retried(servers):
    with pytest.raises(ValueError, match="need 600 tokens"):
        roll_out(policy_of(servers, context_length=600))
