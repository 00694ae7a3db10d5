"""The seams of TRL that `SearchGRPOTrainer` depends on, one test per seam, named after it.

These tests test TRL, not this package. If a new TRL breaks one, read its `grpo_trainer.py`, correct the method that
the test names (`trl_search/trainer/grpo.py` lists their files), and raise the bound in `pyproject.toml`.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from tests.support.scripted_trainer import config
from trl_search.trainer.even_micro_batches import OF_THE_BATCH, OTHERS, PROMPTS

QUESTIONS = Dataset.from_list([{"prompt": [{"role": "user", "content": f"q{i}"}], "gold": i} for i in range(6)])


class Spy(GRPOTrainer):
    """A stock trainer with a `rollout_func` of three tokens, which records what passes through each seam."""

    def _generate_and_score_completions(self, inputs):
        self.rows = inputs
        self.scored = super()._generate_and_score_completions(inputs)
        return self.scored

    def _generate(self, prompts):
        self.generated = super()._generate(prompts)
        completions = [[{"role": "assistant", "content": f"text {i}"}] for i in range(len(prompts))]
        return (*self.generated[:3], completions, *self.generated[4:])

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids):
        self.reward_arguments = (inputs, prompts, completions, completion_ids)
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        self.rewards = rewards.clone()
        rewards[-1] = torch.nan
        return rewards

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        self.logps = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        return self.logps


def rollout(prompts, trainer):
    """Completions 5 6 7, where 6 is an observation; one token more for every second prompt."""
    ids = [[5, 6, 7] + [8] * (i % 2) for i in range(len(prompts))]
    trainer.prompts_seen = prompts
    return {
        "prompt_ids": [[1, 2]] * len(prompts),
        "completion_ids": ids,
        "logprobs": [[-0.1] * len(row) for row in ids],
        "env_mask": [[1, 0] + [1] * (len(row) - 2) for row in ids],
        "an_extra": [f"extra {i}" for i in range(len(prompts))],
    }


@pytest.fixture
def spy(tmp_path, random_model, tokenizer):
    seen = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        kwargs["log_extra"]("column", [str(i) for i in range(len(prompts))])
        kwargs["log_metric"]("metric", 4.0)
        return [float(i) for i in range(len(prompts))]

    arguments = config(tmp_path, per_device_train_batch_size=6, num_generations=3)
    trainer = Spy(random_model, reward, arguments, QUESTIONS, processing_class=tokenizer)
    # `rollout_func` is set after __init__, as in our trainer, because TRL reads the attribute.
    trainer.rollout_func = rollout
    trainer.seen = seen
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def generation_batch(trainer):
    return [dict(row) for row in next(iter(trainer.get_train_dataloader()))]


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_init_signature():
    assert parameters(GRPOTrainer.__init__)[:7] == [
        "self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class",
    ]  # fmt: skip
    taken = {"peft_config", "callbacks", "optimizers", "tools", "rollout_func", "environment_factory"}
    assert taken <= set(parameters(GRPOTrainer.__init__))


def test_method_signatures():
    assert parameters(GRPOTrainer._generate_and_score_completions) == ["self", "inputs"]
    assert parameters(GRPOTrainer._generate) == ["self", "prompts"]
    calculate = parameters(GRPOTrainer._calculate_rewards)
    assert calculate == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters(GRPOTrainer._log_completion_extra) == ["self", "column", "values"]
    assert "_run_epoch" in inspect.getsource(GRPOTrainer._inner_training_loop)  # `RollsBack` skips some steps
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:7] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ]  # fmt: skip


def test_unwrap_model_for_generation_accepts_our_arguments():
    taken = {"model", "accelerator", "gather_deepspeed3_params", "gradient_checkpointing_kwargs"}
    assert taken <= set(parameters(unwrap_model_for_generation))


def test_config_fields_that_we_read_or_change():
    fields = GRPOConfig.__dataclass_fields__
    read = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "reward_weights"]
    read += ["ds3_gather_for_generation", "gradient_checkpointing_kwargs", "chat_template_kwargs", "use_vllm", "seed"]
    changed = ["max_completion_length", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"]
    assert set(read + changed) <= set(fields)
    # Otherwise the dataset's rows, and so rewards and environments, would lose their columns.
    assert fields["remove_unused_columns"].default is False


def test_prompts_arrive_already_repeated_for_their_groups(spy):
    spy._generate_and_score_completions(generation_batch(spy))
    texts = [prompt[0]["content"] for prompt in spy.prompts_seen]
    assert len(texts) == 6 and texts[:3] == [texts[0]] * 3 and texts[3:] == [texts[3]] * 3 and texts[0] != texts[3]
    # ... and in the order of the rows that `_generate_and_score_completions` was given.
    assert texts == [row["prompt"][0]["content"] for row in spy.rows]


def test_rollout_func_must_return_these_keys(spy):
    spy.rollout_func = lambda prompts, trainer: {"prompt_ids": []}
    with pytest.raises(ValueError, match=re.escape("['completion_ids', 'logprobs']")):
        spy._generate_and_score_completions(generation_batch(spy))


def test_generate_returns_the_completions_at_position_3(spy):
    spy._generate_and_score_completions(generation_batch(spy))
    assert spy.generated[0] == [[1, 2]] * 6
    assert spy.generated[1][1] == [5, 6, 7, 8]
    assert spy.generated[2][1] == [1, 0, 1, 1]
    assert [message["role"] for completion in spy.generated[3] for message in completion] == ["assistant"] * 6
    assert spy.seen["completions"] == [[{"role": "assistant", "content": f"text {i}"}] for i in range(6)]


def test_env_mask_becomes_the_tool_mask(spy):
    scored = spy._generate_and_score_completions(generation_batch(spy))
    assert scored["tool_mask"].tolist() == [[1, 0, 1, 1]] * 6  # padded with 1 where completion_mask is 0
    assert scored["completion_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]] * 3
    assert scored["num_items_in_batch"] == 3 * 2 + 3 * 3


def test_the_loss_runs_over_completion_mask_times_tool_mask(spy):
    scored = spy._generate_and_score_completions(generation_batch(spy))
    loss = spy.compute_loss(spy.model, {**scored, "advantages": torch.ones(6)})
    spy.logps[0].retain_grad()
    loss.backward()
    assert (spy.logps[0].grad != 0).tolist() == [[True, False, True, False], [True, False, True, True]] * 3


def test_logps_and_entropies_are_over_the_completion(spy):
    scored = spy._generate_and_score_completions(generation_batch(spy))
    spy.compute_loss(spy.model, scored)
    logps, entropies, aux_loss = spy.logps
    assert logps.shape == entropies.shape == scored["completion_ids"].shape and aux_loss is None


def test_rewards_get_columns_extras_and_log_functions(spy):
    spy._generate_and_score_completions(generation_batch(spy))
    assert {"gold", "an_extra", "trainer_state", "log_extra", "log_metric"} <= set(spy.seen)
    assert spy.seen["an_extra"] == [f"extra {i}" for i in range(6)]
    assert spy.seen["completion_ids"][0] == [5, 6, 7]
    assert list(spy._logs["extra"]["column"]) == [str(i) for i in range(6)]
    assert spy._metrics["train"]["metric"] == [4.0]


def test_rewards_have_one_row_per_sample_of_all_ranks(spy):
    spy._generate_and_score_completions(generation_batch(spy))
    assert spy.rewards.tolist() == [[float(i)] for i in range(6)]


def test_a_row_of_nan_rewards_is_in_no_baseline_and_has_no_advantage(spy):
    advantages = spy._generate_and_score_completions(generation_batch(spy))["advantages"]
    # Rewards 0 1 2 | 3 4 NaN: the second group's mean is 3.5.
    torch.testing.assert_close(advantages[:3], torch.tensor([-1.0, 0.0, 1.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages[3:], torch.tensor([-(0.5**0.5), 0.5**0.5, 0.0]), atol=1e-3, rtol=0)
    assert spy._metrics["train"]["reward"] == [2.0]


def test_extra_columns_are_flushed_with_their_batch(spy):
    spy._log_completion_extra("stop_reason", ["answer"] * 6)
    spy._generate_and_score_completions(generation_batch(spy))
    assert list(spy._logs["extra"]["stop_reason"]) == ["answer"] * 6 and not spy._pending_extra_logs


def test_metrics_are_lists_by_mode_and_name(spy):
    spy._metrics["train"]["ours"].append(1.0)
    spy._metrics["eval"]["ours"].append(2.0)
    spy.log({})
    assert spy.state.log_history[-1]["ours"] == 1.0 and not spy._metrics["train"]
    spy.model.eval()
    spy.log({})
    assert spy.state.log_history[-1]["eval_ours"] == 2.0


def test_attributes_that_we_read(spy):
    assert spy._tokenizer is not None and spy.model_wrapped is spy.model
    assert spy.state.global_step == 0 and spy.is_fsdp_enabled is False
    assert spy.reward_weights.tolist() == [1.0] and spy.reward_func_names == ["reward"]


def test_one_generation_serves_several_iterations(spy):
    """`_prepare_inputs` generates once for steps_per_generation x num_iterations steps."""
    calls = []
    spy.num_iterations, spy._generate_and_score_completions = 2, lambda rows: calls.append(rows) or spy.scored
    spy.scored = {"completion_ids": torch.zeros(6, 2), "num_items_in_batch": torch.tensor(3)}
    for spy._step in range(4):
        spy._prepare_inputs(generation_batch(spy))
    assert len(calls) == 2


def test_a_batch_is_kept_as_the_list_of_its_micro_batches(spy):
    """`_prepare_inputs` returns one of them, and keeps all as `_buffered_inputs`, which we replace."""
    spy.args.steps_per_generation = 3
    inputs = spy._prepare_inputs(generation_batch(spy))
    assert inputs is spy._buffered_inputs[0] and len(spy._buffered_inputs) == 3
    assert {len(inputs[name]) for name in inputs if name != OF_THE_BATCH} == {6}
    assert inputs["num_items_in_batch"].dim() == 0


def test_the_entries_of_a_batch_of_text():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions).split("output = {")[1]
    entries = {*re.findall(r'^ {12}"(\w+)": ', source, re.MULTILINE), *re.findall(r'output\["(\w+)"\] =', source)}
    of_images = {
        "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
        "mm_token_type_ids", "image_position_ids", "num_images", "num_tiles",
    }  # fmt: skip
    assert entries - of_images == {OF_THE_BATCH, *PROMPTS, *OTHERS}


# The seams of trainer/generation/vllm_backend.py and server_sync.py, checked in TRL's source, because vLLM is not
# installed here. tests/policies/test_vllm_colocate.py and test_vllm_server.py run them with the real vLLM.


def test_the_trainer_creates_its_vllm_backend_by_this_name():
    assert grpo_trainer.VLLMGeneration is VLLMGeneration
    assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(GRPOTrainer.__init__)


def test_the_trainer_passes_these_arguments_to_its_vllm_backend():
    given = inspect.getsource(GRPOTrainer.__init__).split("VLLMGeneration(")[1]
    read = ["model", "accelerator", "mode", "server_base_url", "server_host", "server_port", "server_timeout"]
    for name in [*read, "max_model_length", "enable_sleep_mode"]:
        assert f" {name}=" in given and name in parameters(VLLMGeneration.__init__)
        assert f"self.{name} = {name}" in inspect.getsource(VLLMGeneration.__init__)


def test_the_trainer_syncs_before_it_rolls_out():
    generate = inspect.getsource(GRPOTrainer._generate)
    assert generate.index("self.vllm_generation.sync_weights()") < generate.index("self.rollout_func(")


def test_the_backend_creates_its_engine_by_this_name_after_its_options_are_set():
    made = inspect.getsource(VLLMGeneration._init_vllm)
    assert "self.llm = LLM(" in made and 'logprobs_mode="processed_logprobs"' in made
    assert 'distributed_executor_backend="external_launcher"' in made  # the engine is in this process
    source = inspect.getsource(VLLMGeneration.__init__)
    assert source.index("self.enable_sleep_mode = ") < source.index("self._init_vllm()")
    assert "from vllm import LLM" in inspect.getsource(vllm_generation)


def test_the_backends_engine_sleeps_after_the_start_if_configured():
    made = inspect.getsource(VLLMGeneration._init_vllm)
    asleep = made.split("if self.enable_sleep_mode:")[1]
    assert "self.llm.sleep(level=2)" in asleep and "self._llm_weights_sleeping = self.enable_sleep_mode" in asleep
    assert made.rstrip().endswith("accelerator.wait_for_everyone()")


def test_the_methods_of_the_server_client():
    assert {"base_url", "connection_timeout"} <= set(parameters(VLLMClient.__init__))
    assert "init_communicator" not in inspect.getsource(VLLMClient.__init__)  # a process group, only on request
    assert {"metadata", "named_params"} <= set(parameters(VLLMClient.update_named_params))
    for method in ("weight_update", "get_server_info", "_post"):
        assert callable(getattr(VLLMClient, method))
