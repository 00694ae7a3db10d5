"""The policy with a real vLLM engine (CPU build) in the trainer's process, and the trainer that uses it.

tests/support/vllm_colocate_run.py runs once, in a process with vLLM on its path. The tests below read what it wrote
and compare it with the transformers policy.
"""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.scripted_trainer import ROWS
from tests.support.vllm_colocate_run import GREEDY, LIMITS, PROTOCOLS, ROOM
from tests.support.vllm_engine import check_held_out, make_model_folder, require_vllm, run_with_vllm
from trl_search.policies.transformers_policy import TransformersPolicy
from trl_search.protocols import load_protocol

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colocate")
    make_model_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()


@pytest.fixture(scope="module")
def prompts(world, tokenizer):
    asked = [{"role": "user", "content": question.row()["question"]} for question in world.questions("train")[:8]]
    protocols = {name: load_protocol(name, tokenizer, instruction="") for name in PROTOCOLS}
    return {name: [list(protocol.prompt_ids([message])) for message in asked] for name, protocol in protocols.items()}


@pytest.fixture(scope="module")
def seen(folder, prompts):
    """What the process wrote."""
    require_vllm()
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    run_with_vllm(folder, "tests.support.vllm_colocate_run", str(folder))
    return json.loads((folder / "colocate.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_trajectories_search_and_have_the_models_logprobs(seen, model, tokenizer, name):
    found = seen["rollouts"][name]
    assert len(found) == 48
    assert sum(trajectory["searches"] for trajectory in found) > 16
    assert sum(trajectory["stop_reason"] == "answer" for trajectory in found) > 24
    for trajectory in found:
        assert len(trajectory["ids"]) <= LIMITS.completion_tokens
        ids, start = torch.tensor([[*trajectory["prompt_ids"], *trajectory["ids"]]]), len(trajectory["prompt_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, start - 1 : -1].float() / 0.8
        own = torch.log_softmax(logits, -1).gather(1, ids[0, start:, None]).squeeze(1)
        sampled = torch.tensor(trajectory["mask"], dtype=torch.bool)
        torch.testing.assert_close(torch.tensor(trajectory["logprobs"])[sampled], own[sampled], atol=2e-4, rtol=1e-4)
    closed_by_model = [t for t in found if t["mask"][-1] == 1 and t["ids"][-1] == tokenizer.eos_token_id]
    assert bool(closed_by_model) == (name == "qwen_tools")  # after a tag of search_r1, the EOS is synthetic


def test_greedy_turns_equal_those_of_the_transformers_policy(seen, model, tokenizer, prompts):
    stop = load_protocol("search_r1", tokenizer).stop

    async def go():
        policy = TransformersPolicy(model, tokenizer)
        await policy.open()
        try:
            return await asyncio.gather(
                *(policy.generate(ids, max_tokens=40, sampling=GREEDY, stop=stop) for ids in prompts["search_r1"])
            )
        finally:
            await policy.close()

    theirs = asyncio.run(go())
    assert {completion.finish_reason for completion in theirs} >= {"stop"}
    for ours, other in zip(seen["turns"]["greedy"], theirs, strict=True):
        assert (ours["ids"], ours["finish_reason"]) == (list(other.ids), other.finish_reason)
        assert ours["logprobs"] == pytest.approx(other.logprobs, abs=2e-4)


def test_a_turn_ends_at_eos_and_at_its_budget(seen, tokenizer):
    whole, cut = seen["turns"]["whole"], seen["turns"]["cut"]
    assert whole["finish_reason"] == "eos" and whole["ids"][-1] == tokenizer.eos_token_id
    assert cut["finish_reason"] == "length" and cut["ids"] == whole["ids"][:7]


@pytest.mark.parametrize("where", ["inside", "border"])
def test_a_stop_string_keeps_all_of_its_last_token(seen, where):
    turns = seen["turns"]
    end = turns["index"] + 1
    assert turns[where]["finish_reason"] == "stop" and turns[where]["ids"] == turns["whole"]["ids"][:end]
    assert turns[where]["logprobs"] == pytest.approx(turns["whole"]["logprobs"][:end], abs=2e-4)


def test_the_seed_determines_the_completion(seen):
    seeds = seen["seeds"]
    assert seeds["alone"]["ids"] == seeds["again"]["ids"] != seeds["another"]["ids"]
    assert seeds["again"]["logprobs"] == pytest.approx(seeds["alone"]["logprobs"], abs=2e-4)


def test_a_cancelled_coroutine_leaves_no_request_in_the_engine(seen):
    cancelled = seen["faults"]["cancelled"]
    assert cancelled["cancelled"] and cancelled["left"] == [0, 0] and len(cancelled["after"]["ids"]) == 4


def test_an_interrupted_turn_continues_from_its_tokens(seen):
    interrupted = seen["faults"]["interrupted"]
    cut, rest, whole = interrupted["cut"][0], interrupted["rest"], interrupted["whole"]
    assert [part["finish_reason"] for part in interrupted["cut"]] == ["interrupted"] * 2 and len(cut["ids"]) > 0
    assert [*cut["ids"], *rest["ids"]] == whole["ids"] and interrupted["left"] == [0, 0]
    assert [*cut["logprobs"], *rest["logprobs"]] == pytest.approx(whole["logprobs"], abs=2e-4)


def test_closing_cancels_running_requests(seen):
    assert seen["faults"]["closed"] == {"cancelled": [True] * 3, "left": [0, 0]}


def test_an_engine_that_raises_fails_waiting_and_later_requests(seen):
    broken = seen["faults"]["broken"]
    assert [*broken["waiting"], broken["late"]] == ["RuntimeError: the engine is on fire"] * 9
    assert broken["left"] == [0, 0] and len(seen["faults"]["after"][0]["ids"]) == 4


def test_a_prompt_that_is_too_long_fails_alone(seen):
    too_long, other = seen["faults"]["too_long"]
    assert "Error: " in too_long and str(ROOM) in too_long and len(other["ids"]) == 4
    assert seen["faults"]["left"] == [0, 0]


def test_an_engine_with_too_little_room_is_refused_with_the_number_needed(seen):
    assert f"has room for {ROOM}: set vllm_max_model_length=" in seen["too_little_room"]
    needed = int(seen["too_little_room"].split("vllm_max_model_length=")[1].split()[0])
    assert ROOM < needed < ROOM + 200


def test_the_adapter_reaches_the_engine_after_every_step(seen):
    """Each step samples with the weights of the step before; if they had not arrived, the log-probs would differ."""
    training = seen["training"]
    assert len(training["logged"]) == 2 and max(training["logged"]) < 1e-3
    assert training["stale"] > 0.05 and training["synced"] < 1e-3


def test_evaluation_during_training_uses_the_engine_with_the_latest_weights(seen):
    check_held_out(seen["training"]["held_out"], len(ROWS))
