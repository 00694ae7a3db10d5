"""`SearchGRPOTrainer` as users run it: short trainings with the features of TRL."""

from __future__ import annotations

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from tests.support.scripted_trainer import (
    DATA,
    GOLD,
    ROWS,
    answer,
    config,
    later_is_better,
    real_trainer,
    scripted_trainer,
    steps,
)
from trl_search.environment import Environment
from trl_search.policies.tiny import tiny_policy_path
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.types import Answer, Observation, StopReason

DATA_OF_PROMPTS = Dataset.from_list([{"prompt": f"book {i}"} for i in range(4)])


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_equal_weights(one, other, **tolerance):
    for name, parameter in one.items():
        torch.testing.assert_close(parameter, other[name], **(tolerance or {"atol": 0, "rtol": 0}))


@pytest.fixture
def saved_model(tmp_path, random_model, tokenizer):
    """The folder of a model, from which TRL also loads the reference model of beta > 0."""
    folder = tmp_path / "model"
    random_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def load(folder):
    return Qwen2ForCausalLM.from_pretrained(folder)


# A drop-in GRPOTrainer


def test_tiny_names_the_shipped_policy_as_on_the_command_line(tmp_path):
    trainer = SearchGRPOTrainer("tiny", later_is_better, config(tmp_path), DATA_OF_PROMPTS)
    assert trainer.model.config._name_or_path == tiny_policy_path()


def test_without_an_environment_it_equals_its_parent(tmp_path, saved_model, tokenizer):
    runs = {}
    for trainer_class, config_class in ((GRPOTrainer, GRPOConfig), (SearchGRPOTrainer, None)):
        arguments = config(tmp_path, max_completion_length=12, num_iterations=2, beta=0.05, max_steps=3)
        if config_class is not None:
            names = config_class.__dataclass_fields__
            shared = {name: value for name, value in vars(arguments).items() if name in names}
            arguments = config_class(**{**shared, "generation_batch_size": None})
        model = load(saved_model)
        trainer = trainer_class(model, later_is_better, arguments, DATA_OF_PROMPTS, processing_class=tokenizer)
        trainer.train()
        runs[trainer_class] = trainer
    parent, ours = runs.values()
    assert_equal_weights(weights(parent.model), weights(ours.model))
    for theirs, mine in zip(steps(parent), steps(ours), strict=True):
        timed = {name for name in theirs if "time" in name}
        assert {n: v for n, v in theirs.items() if n not in timed} == {n: v for n, v in mine.items() if n not in timed}


def test_without_an_environment_reward_models_are_left_to_trl(tmp_path, random_model, tokenizer):
    model = Qwen2ForSequenceClassification(Qwen2Config(**{**random_model.config.to_dict(), "num_labels": 1}))
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rewards = [str(tmp_path / "judge"), later_is_better]
    trainer = SearchGRPOTrainer(random_model, rewards, config(tmp_path), DATA_OF_PROMPTS, processing_class=tokenizer)
    assert trainer.reward_func_names == ["judge", "later_is_better"]


# Models, rewards and environments


def test_a_model_may_be_given_by_its_folder(tmp_path, saved_model):
    trainer = real_trainer(tmp_path, saved_model, None, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.protocol.tokenizer is trainer.processing_class


def test_rewards_by_name_by_callable_and_both(tmp_path, random_model, tokenizer):
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, rewards=["em", later_is_better, "reflection"])
    trainer.train()
    assert trainer.reward_func_names == ["em", "later_is_better", "reflection"]
    assert trainer.reward_weights.tolist() == [1.0, 1.0, 0.0]  # reflection is tracked, not trained on
    logged = steps(trainer)[0]
    assert logged["rewards/em/mean"] == 0.5 and logged["rewards/later_is_better/mean"] == 1.5
    assert logged["reward"] == 2.0 and logged["rewards/reflection/mean"] == 0.0
    assert trainer.args.reward_weights is None  # the same config works for another trainer


def test_the_default_reward_is_em_and_weights_can_be_given(tmp_path, random_model, tokenizer):
    assert scripted_trainer(tmp_path, random_model, tokenizer, rewards=None).reward_func_names == ["em"]
    given = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=["em", "reflection"], reward_weights=[0.5, 0.25]
    )
    assert given.reward_weights.tolist() == [0.5, 0.25]


class GuessTheNumber(Environment):
    """A user's environment with state per trajectory."""

    tools = ()

    def start(self, row):
        game = super().start(row)
        game.guesses = []
        return game

    async def step(self, action):
        if not isinstance(action, Answer):
            return Observation(done=StopReason.END_OF_TURN)
        self.guesses.append(action.text)
        if action.text == self.row["number"]:
            return Observation(done=StopReason.ENVIRONMENT)
        return Observation(notice=f"{self.row['number']} is not {' or '.join(self.guesses)}.")


def test_a_users_own_environment(tmp_path, random_model, tokenizer):
    def brevity(completions, number, **kwargs):
        return [1.0 / len(completion) for completion in completions]

    rows = [{"question": f"Guess {i}", "number": str(i + 2)} for i in range(4)]
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, lambda i, prompt: [answer(str(guess)) for guess in range(i % 2, 9)],
        rewards=brevity, data=Dataset.from_list(rows), num_generations=2,
        trainer={"retriever": None, "environment": GuessTheNumber()},
    )  # fmt: skip
    trainer.train()
    for i, trajectory in enumerate(trainer.last_rollout.trajectories):
        question = int(tokenizer.decode(trajectory.prompt_ids).split("Guess ")[1][0])
        number = question + 2  # the game was started with the row of its trajectory
        notices = [turn.text for turn in trajectory.turns if turn.role == "tool"]
        tried = [str(guess) for guess in range(i % 2, number)]
        assert notices == [f"{number} is not {' or '.join(tried[: n + 1])}." for n in range(len(tried))]
        assert trajectory.stop_reason is StopReason.ENVIRONMENT
    assert steps(trainer)[-1]["stop/environment"] == 1.0 and steps(trainer)[-1]["frac_reward_zero_std"] == 0


@pytest.mark.parametrize("max_searches", [0, 2])
def test_without_searches_the_prompt_has_no_tool(tmp_path, random_model, tokenizer, max_searches):
    script = lambda number, prompt: [answer(GOLD)]  # noqa: E731
    trainer = scripted_trainer(tmp_path, random_model, tokenizer, script, max_searches=max_searches)
    trainer.score()
    prompt = tokenizer.decode(trainer.actor.asked[0][0])
    assert ("<tools>" in prompt) is (max_searches > 0)


# Features of TRL, with searches


def test_lora_trains_adapters_and_does_not_change_the_model(tmp_path, saved_model, tokenizer):
    from peft import AutoPeftModelForCausalLM, LoraConfig

    before = weights(load(saved_model))
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = real_trainer(tmp_path, saved_model, tokenizer, trainer={"peft_config": lora}, beta=0.1)
    trainer.train()
    after = weights(trainer.model)
    assert all(parameter.any() for name, parameter in after.items() if "lora_B" in name)
    base = {name: p for name, p in trainer.model.get_base_model().named_parameters() if "lora" not in name}
    assert_equal_weights(before, {name.replace(".base_layer", ""): p.detach() for name, p in base.items()})
    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    reloaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_equal_weights(
        {name: p for name, p in weights(reloaded).items() if "lora_B" in name},
        {name: p for name, p in after.items() if "lora_B" in name},
    )


def test_gradient_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path, saved_model, tokenizer):
    ends = []
    for size, accumulation in ((4, 1), (2, 2)):
        trainer = scripted_trainer(
            tmp_path, load(saved_model), tokenizer,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_grad_norm=0.0,
            optim="sgd", learning_rate=10.0,
        )  # fmt: skip
        trainer.train()
        assert trainer.actor.rollouts == 2 and len(trainer.actor.said) == 4
        ends.append(weights(trainer.model))
    assert_equal_weights(*ends, atol=1e-5, rtol=1e-4)
    start = weights(load(saved_model))
    assert any((ends[0][name] - parameter).abs().max() > 1e-3 for name, parameter in start.items())


def test_several_iterations_and_a_reference_model(tmp_path, saved_model, tokenizer):
    trainer = scripted_trainer(
        tmp_path, saved_model, tokenizer, num_iterations=2, beta=0.1, max_steps=4, learning_rate=0.1, optim="sgd"
    )
    trainer.train()
    assert trainer.actor.rollouts == 2  # each batch is trained on twice
    kl = [entry["kl"] for entry in steps(trainer)]
    assert kl[0] == 0 and all(math.isfinite(value) and value > 0 for value in kl[1:])


def test_evaluation_during_training(tmp_path, random_model, tokenizer):
    wrong = Dataset.from_list([{**row, "golden_answers": ["Nobody"]} for row in ROWS[:3]])
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, trainer={"eval_dataset": {"right": DATA.select([0]), "wrong": wrong}},
        eval_strategy="steps", eval_steps=1, log_completions=True, num_completions_to_print=0,
    )  # fmt: skip
    trainer.train()
    for name, em in (("right", 0.5), ("wrong", 0.5)):
        entries = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        assert [entry[f"eval_{name}_rewards/em/mean"] for entry in entries] == [em, em]
        assert all(entry[f"eval_{name}_search/searches"] == 0.75 for entry in entries)
    assert [entry["rewards/em/mean"] for entry in steps(trainer)] == [0.5, 0.5]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, saved_model, tokenizer):
    """Bit for bit on a CPU: data order, sampled trajectories, optimizer and shuffling continue."""
    whole = real_trainer(
        tmp_path / "whole", load(saved_model), tokenizer, max_steps=4, save_strategy="steps", save_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    whole.train()
    resumed = real_trainer(
        tmp_path / "resumed", load(saved_model), tokenizer, max_steps=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4 and [entry["step"] for entry in steps(resumed)] == [1, 2, 3, 4]
    assert [t.ids for t in resumed.last_rollout.trajectories] == [t.ids for t in whole.last_rollout.trajectories]
    assert_equal_weights(weights(whole.model), weights(resumed.model))


def test_every_generation_has_its_own_samples_and_a_repeated_run_the_same(tmp_path, saved_model, tokenizer):
    def sampled(**options):
        seen = []

        def reward(completions, completion_ids, **kwargs):
            seen.extend(map(tuple, completion_ids))
            return later_is_better(completions)

        trainer = real_trainer(
            tmp_path, load(saved_model), tokenizer, rewards=reward, learning_rate=0.0, max_steps=3, **options
        )
        trainer.train()
        return seen

    same = DATA.select([0, 0])
    one = sampled(data=same, gradient_accumulation_steps=2, steps_per_generation=1)
    # One prompt and fixed weights: 3 steps x 2 generations x 4 trajectories, all different.
    assert len(one) == len(set(one)) == 24
    assert one == sampled(data=same, gradient_accumulation_steps=2, steps_per_generation=1)
    assert one != sampled(data=same, gradient_accumulation_steps=2, steps_per_generation=1, seed=2)


def test_a_model_may_be_used_by_several_trainers_in_turn(tmp_path, random_model, tokenizer):
    for name in ("first", "second"):
        trainer = scripted_trainer(tmp_path / name, random_model, tokenizer, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1 and trainer.state.log_history[0]["grad_norm"] > 0


def test_gradient_checkpointing_and_streamed_data(tmp_path, random_model, tokenizer):
    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    trainer = real_trainer(tmp_path, random_model, tokenizer, data=stream, gradient_checkpointing=True)
    trainer.train()
    assert trainer.state.global_step == 2 and all(entry["grad_norm"] > 0 for entry in steps(trainer))


def test_trl_neither_decodes_nor_parses_a_trajectory(tmp_path, random_model, tokenizer, monkeypatch):
    """Some tokenizers (Qwen3's) tell TRL how to parse a response, but a trajectory of several turns is not one."""
    monkeypatch.setattr(tokenizer, "response_template", {"type": "object"}, raising=False)
    read = []
    monkeypatch.setattr(type(tokenizer), "batch_decode", lambda *args, **kwargs: read.append("decoded"))
    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", lambda *args, **kwargs: read.append("parsed"))
    rewarded = []
    trainer = scripted_trainer(
        tmp_path, random_model, tokenizer, rewards=lambda completions, **k: rewarded.extend(completions) or [0.0] * 4
    )
    trainer.score()
    assert not read
    assert all(completion[0]["role"] == "assistant" for completion in rewarded)
    assert trainer.processing_class is tokenizer
