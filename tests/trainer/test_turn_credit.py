"""Credit per turn: the numbers checked by hand, the tokens that get them, and the model's probabilities."""

from __future__ import annotations

import pytest
import torch

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import DATA, GOLD, PASSAGES, answer, scripted_trainer, search, steps
from trl_search.common.errors import UserError
from trl_search.config.grpo import SearchGRPOConfig
from trl_search.trainer.loss.without_gradient import METRIC
from trl_search.trainer.turn_credit import group_credit, information_gains, observed_turns, retrieval_gains
from trl_search.types import Completion, FinishReason, StopReason, Trajectory


def alone(tensor):
    return tensor


def spoken(*turns):
    """A trajectory in which turns and observations alternate, with two tokens each."""
    trajectory = Trajectory(prompt_ids=(5,))
    for index, text in enumerate(turns):
        if index % 2:
            trajectory.observe((8, 9), text)
        else:
            trajectory.act(Completion((1, 2), (-0.1, -0.1), FinishReason.EOS), text)
    return trajectory


def test_gains_are_normalised_per_group_and_summed_from_the_end():
    # Mean 0.2, standard deviation sqrt(0.02 / 3) = 0.0816: -1.2247, 1.2247 and 0; the second group has equal gains.
    credit = group_credit([[0.1, 0.3], [0.2], [0.4], [0.4, 0.4]], 2, alone, 0)
    assert credit[0] == pytest.approx([0.0, 1.2247], abs=1e-4) and credit[1] == pytest.approx([0.0], abs=1e-9)
    assert credit[2:] == [[0.0], [0.0, 0.0]]
    assert group_credit([[], []], 2, alone, 0) == [[], []]


def test_a_group_may_be_split_over_two_ranks():
    both = group_credit([[0.1, 0.3], [0.2]], 2, alone, 0)
    first = torch.tensor([[2, 0.4, 0.1]], dtype=torch.float64)
    assert group_credit([[0.2]], 2, lambda mine: torch.cat([first, mine]), 1) == [pytest.approx(both[1], abs=1e-9)]


def test_turns_with_credit_are_those_followed_by_an_observation():
    trajectory = spoken("search", "Lyon is a city", "search", "she was born in Paris", "answer", "")
    assert [(turn.start, reply.end) for turn, reply in observed_turns(trajectory)] == [(0, 4), (4, 8)]
    assert retrieval_gains(trajectory, ["Paris"]) == [0.0, 1.0]
    assert retrieval_gains(trajectory, ["the city", "Lyon"]) == [1.0, 0.0]  # the first observation that contains it
    assert retrieval_gains(trajectory, []) == [0.0, 0.0]
    trajectory.finish(StopReason.RETRIEVAL_FAILED)
    assert retrieval_gains(trajectory, ["Paris"]) == []


def two_searches(number, prompt):
    return [
        [search("nothing"), search("the author"), answer(GOLD)],
        [search("the author"), answer("Nobody")],
        [answer("Nobody")],
        [search("nothing"), answer(GOLD)],
    ][number % 4]


class Knowing(FixedRetriever):
    """Finds the author if the query asks for the author."""

    def search(self, queries, k=3):
        found = super().search(queries, k)
        return [hits if "author" in query else [] for query, hits in zip(queries, found, strict=True)]


def credited(tmp_path, model, tokenizer, kind, script=two_searches, **options):
    return scripted_trainer(
        tmp_path, model, tokenizer, script, retriever=Knowing(PASSAGES), turn_credit=kind, **options
    )


@pytest.mark.parametrize("kind", ["information_gain", "retrieval"])
def test_credit_goes_to_the_tokens_of_the_turn(tmp_path, random_model, tokenizer, kind):
    trainer = credited(tmp_path, random_model, tokenizer, kind, turn_credit_coef=0.25)
    batch = trainer.score()
    trajectories = trainer.last_rollout.trajectories
    gains = (
        information_gains(trainer, trajectories, [[GOLD]] * 4)
        if kind == "information_gain"
        else [[0.0, 1.0], [1.0], [], [0.0]]
    )
    assert trainer.logged["credit/gain"] == pytest.approx(sum(map(sum, gains)) / 4)
    credit = group_credit(gains, 4, alone, 0)
    outcome = torch.tensor([1.0, 0.0, 0.0, 1.0])
    outcome = (outcome - outcome.mean()) / (outcome.std() + 1e-4)
    expected = outcome.unsqueeze(1).repeat(1, batch["completion_ids"].shape[1])
    for row, trajectory in enumerate(trajectories):
        searches = [turn for turn in trajectory.turns if turn.role == "assistant"][:-1]
        for turn, value in zip(searches, credit[row], strict=True):
            expected[row, turn.start : turn.end] += 0.25 * value
    torch.testing.assert_close(batch["advantages"], expected)
    assert any(abs(value) > 0.1 for row in credit for value in row)


def test_trajectories_without_a_reward_have_no_credit(tmp_path, random_model, tokenizer):
    def leaves_out_the_first(completions, **columns):
        return [None, *[float(number % 2) for number in range(1, len(completions))]]

    trainer = credited(tmp_path, random_model, tokenizer, "retrieval", rewards=[leaves_out_the_first])
    advantages_BC = trainer.score()["advantages"]
    assert not advantages_BC[0].any()
    assert trainer.logged["credit/gain"] == pytest.approx((1.0 + 0.0) / 2)  # of the second and fourth trajectory
    found, nothing = (advantages_BC[row, 0] - advantages_BC[row, -1] for row in (1, 3))
    assert found > 0 > nothing


def test_the_gain_is_the_models_own_probability_of_the_answer(tmp_path, random_model, tokenizer):
    with torch.no_grad():
        random_model.get_input_embeddings().weight.mul_(10)
    trainer = credited(tmp_path, random_model, tokenizer, "information_gain", temperature=0.7)
    trainer.score()
    trajectory = trainer.last_rollout.trajectories[0]
    opening, gold = (tokenizer.encode(text, add_special_tokens=False) for text in ("<answer>", f" {GOLD}"))

    def probability(end):
        ids = [*trajectory.prompt_ids, *trajectory.ids[:end], *opening, *gold]
        with torch.no_grad():
            logits = random_model(torch.tensor([ids])).logits[0] / 0.7
        logps = logits.log_softmax(dim=-1)[range(len(ids) - len(gold) - 1, len(ids) - 1), gold]
        return logps.mean().exp().item()

    ends = [0, *(turn.end for turn in trajectory.turns if turn.role == "tool" and turn.text)]
    assert len(ends) == 3
    before, middle, after = map(probability, ends)
    (found,) = information_gains(trainer, [trajectory], [[GOLD, "an alias"]])
    assert found == pytest.approx([middle - before, after - middle], rel=1e-3, abs=1e-9)


def test_shared_prefixes_run_once_and_in_one_call(tmp_path, random_model, tokenizer):
    trainer = credited(tmp_path, random_model, tokenizer, "information_gain", packed_attention="sdpa")
    trainer.score()  # the probe of the log-probs runs before the first rollout
    forwards = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(int((kwargs["position_ids"] == 0).sum())), with_kwargs=True
    )
    trainer.score()
    # The prompt, both searches for the author, and a search that finds nothing, with which two trajectories begin.
    assert forwards == [4]


def test_without_an_answer_or_room_there_is_no_gain(tmp_path, random_model, tokenizer):
    trainer = credited(tmp_path, random_model, tokenizer, "information_gain")
    trainer.score()
    trajectory = trainer.last_rollout.trajectories[0]
    assert information_gains(trainer, [trajectory], [[]]) == [[0.0, 0.0]]
    trainer.model.config.max_position_embeddings = len(trajectory.prompt_ids) + trajectory.turns[1].end + 20
    first, last = information_gains(trainer, [trajectory], [[GOLD]])[0]
    assert first != 0.0 and last == 0.0


def wrong_whatever_it_finds(number, prompt):
    return [search("the author" if number % 2 else "nothing"), answer("Nobody")]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"])
def test_a_group_of_equal_rewards_learns_from_its_turns(tmp_path, random_model, tokenizer, loss_type):
    level = {"importance_sampling_level": "sequence"} if loss_type == "luspo" else {}
    trainer = credited(
        tmp_path, random_model, tokenizer, "retrieval", wrong_whatever_it_finds, loss_type=loss_type, **level
    )
    batch = trainer.score()
    loss, logged = trainer.loss(batch)
    loss.backward()
    gradient, seen = trainer.logps.grad, (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert logged[METRIC] == 0
    for row, trajectory in enumerate(trainer.last_rollout.trajectories):
        searched = gradient[row, : trajectory.turns[0].end]
        assert (
            (searched < 0).all() if row % 2 else (searched > 0).all()
        )  # searches that found something become more likely
        if loss_type != "luspo":  # this loss sums over a sequence
            assert not gradient[row, trajectory.turns[0].end :].any()
    assert not gradient[~seen].any()


def test_a_training_with_credit_and_accumulation(tmp_path, random_model, tokenizer):
    trainer = credited(
        tmp_path, random_model, tokenizer, "information_gain", per_device_train_batch_size=2,
        gradient_accumulation_steps=2, num_iterations=2, max_steps=2, llds_coef=0.1,
    )  # fmt: skip
    trainer.train()
    assert all(entry["grad_norm"] > 0 for entry in steps(trainer)) and "credit/gain" in steps(trainer)[0]


def test_credit_alone_trains(tmp_path, random_model, tokenizer):
    """Weights of 0 for all rewards were refused, because nothing would be learnt."""
    trainer = credited(
        tmp_path, random_model, tokenizer, "retrieval", wrong_whatever_it_finds, reward_weights=[0.0], max_steps=1
    )
    trainer.train()
    assert steps(trainer)[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turn_credit": "gain"}, "unknown turn_credit 'gain'"),
        ({"turn_credit": "retrieval", "loss_type": "vespo"}, "loss_type=vespo, which weights whole trajectories"),
        ({"turn_credit": "retrieval", "max_searches": 0}, "max_searches=0 permits none"),
        (
            {"turn_credit": "retrieval", "turn_credit_coef": 0.0},
            "turn_credit_coef=0.0 must be a finite number above 0",
        ),
    ],
)
def test_incompatible_options_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        SearchGRPOConfig(str(tmp_path), bf16=False, **options)


def test_questions_without_golden_answers_are_refused(tmp_path, random_model, tokenizer):
    questions = DATA.remove_columns("golden_answers")
    with pytest.raises(UserError, match="turn_credit=retrieval needs the column golden_answers"):
        credited(tmp_path, random_model, tokenizer, "retrieval", rewards="format", data=questions)
