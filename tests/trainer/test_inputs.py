"""Bad input to the trainer: said before or at the first rollout, with the cause and what to change."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset
from trl import GRPOConfig

from tests.support.fakes import FixedRetriever
from tests.support.scripted_trainer import DATA, PASSAGES, config, later_is_better, real_trainer
from trl_search.common.errors import UserError
from trl_search.environment import AnswerOnly
from trl_search.trainer.grpo import SearchGRPOTrainer

EMPTY = DATA.select([])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": EMPTY}, "train_dataset is empty"),
        ({"data": IterableDataset.from_generator(lambda: iter([]))}, "train_dataset is empty"),
        ({"trainer": {"eval_dataset": EMPTY}}, "^eval_dataset is empty"),
        ({"trainer": {"eval_dataset": {"near": EMPTY}}}, r"eval_dataset\['near'\] is empty"),
        ({"data": DATA.remove_columns("question")}, "needs a column 'question' .* it has: golden_answers"),
        ({"data": DATA.remove_columns("golden_answers"), "rewards": "em"}, "'em' needs the dataset column 'golden_an"),
        ({"trainer": {"eval_dataset": DATA.remove_columns("golden_answers")}, "rewards": ["f1"]}, "'f1' needs"),
        ({"trainer": {"environment": AnswerOnly()}}, "a retriever or an environment, not both"),
        ({"trainer": {"tools": [print]}}, "^tools is TRL's way"),
        ({"trainer": {"environment_factory": object}}, "^environment_factory is TRL's way"),
        ({"trainer": {"rollout_func": print}}, "^rollout_func is TRL's way"),
        ({"repetition_penalty": 1.1}, "repetition_penalty and generation_kwargs do not reach"),
        ({"rewards": "exact_mach"}, "unknown reward 'exact_mach'.*em, f1, format"),
        ({"rewards": []}, "no reward is given"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)  # fmt: skip
def test_what_cannot_be_done_is_said_at_start(tmp_path, random_model, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        real_trainer(tmp_path, random_model, tokenizer, **arguments)


def test_a_plain_grpo_config_lacks_what_a_search_needs(tmp_path, random_model, tokenizer):
    arguments = GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="must be a SearchGRPOConfig, and it is a GRPOConfig"):
        SearchGRPOTrainer(random_model, later_is_better, arguments, DATA, retriever=FixedRetriever(PASSAGES))


def test_positions_that_do_not_suffice(tmp_path, random_model, tokenizer):
    trainer = real_trainer(tmp_path, random_model, tokenizer, max_completion_length=2040)
    with pytest.raises(UserError, match=r"length=2040 need \d+ positions, and the model has 2048: lower"):
        trainer.train()


def test_a_tokenizer_without_tool_calls_under_qwen_tools(tmp_path, random_model):
    from tools.tiny_policy.tokenizer import make_tokenizer

    base = make_tokenizer()
    base.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template that takes tools.*protocol='search_r1'"):
        real_trainer(tmp_path, random_model, base)
    # ... which is as good as its word.
    assert real_trainer(tmp_path, random_model, base, protocol="search_r1").protocol.name == "search_r1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "qwen_tool"}, "unknown protocol 'qwen_tool': did you mean 'qwen_tools'"),
        ({"max_failed_share": 1.5}, "max_failed_share=1.5 is a share"),
        ({"passages_per_query": 0}, "passages_per_query=0 must be at least 1"),
        ({"max_turn_length": 0}, "max_turn_length=0 must be at least 1"),
        ({"max_searches": -1}, "max_searches=-1 must be at least 0"),
        ({"search_timeout_s": 0}, "search_timeout_s=0 must be more than 0"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0 must be at least 1"),
        ({"max_queries_per_search": 0}, "max_queries_per_search=0 must be at least 1"),
    ],
    ids=str,
)
def test_settings_without_a_meaning(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_questions_may_come_as_prompts(tmp_path, random_model, tokenizer):
    """A string is asked as a question is; a conversation stays as it is."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    for prompt, expected in (("Who?", [{"role": "user", "content": "Who?"}]), (talk, talk)):
        trainer = real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list([{"prompt": prompt}] * 4))
        assert trainer.train_dataset[0]["prompt"] == expected
