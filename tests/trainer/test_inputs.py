"""Bad input to the trainer is reported before or at the first rollout, with cause and remedy."""

from __future__ import annotations

import json
from unittest import mock

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from peft import PrefixTuningConfig, PromptTuningConfig
from transformers import Qwen2Config, Qwen2ForSequenceClassification, TrainerCallback
from trl import GRPOConfig
from trl.rewards import think_format_reward

from tests.support.fakes import FixedRetriever
from tests.support.families import FAMILIES
from tests.support.scripted_trainer import DATA, PASSAGES, config, later_is_better, real_trainer, steps
from trl_search.common.errors import UserError
from trl_search.environment import AnswerOnly
from trl_search.protocols import QwenTools, SearchR1
from trl_search.rewards import em, of_last_message
from trl_search.trainer.callbacks.held_out import HeldOut
from trl_search.trainer.grpo import SearchGRPOTrainer
from trl_search.trainer.prompts import with_prompts

EMPTY = DATA.select([])
PROMPT_TUNING = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
PREFIX_TUNING = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data": EMPTY}, "train_dataset is empty"),
        ({"data": IterableDataset.from_generator(lambda: iter([]))}, "train_dataset is empty"),
        ({"trainer": {"eval_dataset": EMPTY}}, "^eval_dataset is empty"),
        ({"trainer": {"eval_dataset": {}}}, "^eval_dataset is empty"),
        ({"trainer": {"eval_dataset": {"near": EMPTY}}}, r"eval_dataset\['near'\] is empty"),
        ({"data": DATA.remove_columns("question")}, "needs a column 'question' .* it has: golden_answers"),
        ({"data": DATA.remove_columns("golden_answers"), "rewards": "em"}, "'em' needs the dataset column 'golden_an"),
        ({"trainer": {"eval_dataset": DATA.remove_columns("golden_answers")}, "rewards": ["f1"]}, "'f1' needs"),
        ({"trainer": {"environment": AnswerOnly()}}, "a retriever or an environment, not both"),
        ({"trainer": {"environment": AnswerOnly(), "retriever": None}, "search_floor_steps": 1}, "Only has no tools"),
        ({"trainer": {"environment": AnswerOnly()}}, r"give it to AnswerOnly \("),
        ({"trainer": {"environment": "my:World"}}, r'environment=load_environment\("my:World", retriever=...\)'),
        ({"trainer": {"environment": "my:World", "retriever": None}}, r'environment=load_environment\("my:World"\)'),
        ({"trainer": {"tools": [print]}}, "^tools configures TRL's multi-turn.*An Environment declares your tools"),
        ({"trainer": {"environment_factory": object}}, "^environment_factory configures TRL's .*environment="),
        ({"trainer": {"rollout_func": print}}, "^rollout_func configures TRL's multi-turn rollouts"),
        ({"repetition_penalty": 1.1}, "repetition_penalty and generation_kwargs have no effect"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex has no effect on our rollouts"),
        ({"rewards": "exact_mach"}, "unknown reward 'exact_mach'.*em, f1, format"),
        ({"rewards": "./mine.py"}, r"'./mine.py' is a file: give its import path, mine:NAME$"),
        ({"rewards": []}, "reward_funcs is empty"),
        ({"max_tool_calling_iterations": 3}, "max_tool_calling_iterations configures TRL's .*max_searches"),
        ({"cache_implementation": "static"}, "cache_implementation configures TRL's generation"),
        ({"use_transformers_continuous_batching": True}, "continuous_batching configures TRL's .*rollout_batch_size"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches: true gives processes other rows"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches: true gives processes other rows"),
        ({"remove_unused_columns": True}, "remove_unused_columns=True removes columns"),
        ({"trainer": {"peft_config": PROMPT_TUNING}}, "^prompt_tuning puts tokens before every prompt.*LoRA"),
        ({"trainer": {"peft_config": PREFIX_TUNING}}, "^prefix_tuning puts tokens before every prompt.*LoRA"),
        ({"data": DATA.add_column("image", [None] * len(DATA))}, "train_dataset has the column 'image'"),
        ({"rewards": ["em", em]}, "two rewards are called 'em', so the logs would mix them"),
        ({"rewards": lambda completions: [0.0]}, "'<lambda>' cannot be called with the columns of train_dataset"),
        ({"data": DATA.add_column("prompts", ["x"] * len(DATA))}, "train_dataset has the column 'prompts'"),
        ({"torch_compile": True}, "^torch_compile wraps the model in a module from which rollouts cannot sample"),
        ({"data": DATA.with_format("numpy")}, "train_dataset returns rows in the format numpy: reset it"),
        ({"data": DATA.with_format("pandas")}, "train_dataset returns rows in the format pandas"),
        ({"push_to_hub": True}, "^push_to_hub uploads the whole folder .* run `trl-search push .* owner/name`"),
        ({"optim": "schedule_free_adamw"}, "^optim: schedule_free_adamw: You need to install `schedulefree`"),
        ({"optim": "grokadamw", "trainer": {"optimizers": (None, None)}}, "^optim: grokadamw: Please install"),
        ({"data_seed": 7}, "^data_seed=7 has no effect, as TRL draws the questions of GRPO with seed=1"),
        ({"data": DatasetDict(train=DATA, test=DATA)}, r"train_dataset has several splits \(train, test\): pass one"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)  # fmt: skip
def test_impossible_arguments_are_refused_at_the_start(tmp_path, random_model, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message):
        real_trainer(tmp_path, random_model, tokenizer, **arguments)


def test_a_plain_grpo_config_is_refused(tmp_path, random_model, tokenizer):
    arguments = GRPOConfig(str(tmp_path), per_device_train_batch_size=4, num_generations=4, use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="must be a SearchGRPOConfig, not a GRPOConfig"):
        SearchGRPOTrainer(random_model, later_is_better, arguments, DATA, retriever=FixedRetriever(PASSAGES))


LONG = Dataset.from_list([{"question": "who " * words, "golden_answers": ["x"]} for words in (3, 1200, 4, 1300)])


def test_prompts_that_are_too_long_are_reported_when_the_dataset_is_loaded(tmp_path, random_model, tokenizer):
    """With their rows, before anything is generated, and the advice works."""
    said = (
        r"2 of 4 prompts of train_dataset are too long \(row 1 has \d+ tokens, row 3 .*length=1000 leaves 1048 for a "
    )
    with pytest.raises(UserError, match=said + r"prompt: lower max_completion_length to \d+, or leave these rows out"):
        real_trainer(tmp_path, random_model, tokenizer, data=LONG, max_completion_length=1000)
    with pytest.raises(UserError, match=r"2 of 4 prompts of eval_dataset\['near'\] are too long"):
        evaluated = {"eval_dataset": {"near": LONG}}
        real_trainer(tmp_path, random_model, tokenizer, trainer=evaluated, max_completion_length=1000)
    with pytest.raises(UserError, match=r"for a prompt: lower max_completion_length to \d+$"):
        real_trainer(tmp_path, random_model, tokenizer, max_completion_length=2040)
    kept = real_trainer(
        tmp_path, random_model, tokenizer, data=LONG, max_completion_length=1000, skip_long_prompts=True
    )
    assert [row["question"].count("who") for row in kept.train_dataset] == [3, 4]


def test_streamed_prompts_are_checked_as_they_arrive(tmp_path, random_model, tokenizer):
    trainer = real_trainer(
        tmp_path, random_model, tokenizer, data=LONG.to_iterable_dataset(), max_completion_length=1000
    )
    with pytest.raises(UserError, match=r"length=1000 need \d+ positions, but the model has 2048: lower .* or leave"):
        trainer.train()


def test_a_tokenizer_without_tool_calls_needs_another_protocol(tmp_path, random_model):
    from tools.tiny_policy.tokenizer import make_tokenizer

    base = make_tokenizer()
    base.chat_template = None
    with pytest.raises(ValueError, match=r"needs a chat template.*protocol='search_r1'"):
        real_trainer(tmp_path, random_model, base)
    # The advice works.
    assert real_trainer(tmp_path, random_model, base, protocol="search_r1").protocol.name == "search_r1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "qwen_tool"}, "unknown protocol 'qwen_tool': did you mean 'qwen_tools'"),
        ({"max_failed_share": 1.5}, "max_failed_share=1.5 must be a number from 0 to 1"),
        ({"passages_per_query": 0}, "passages_per_query=0 must be at least 1"),
        ({"max_turn_length": 0}, "max_turn_length=0 must be at least 1"),
        (
            {"num_generations": 3},
            r"a batch has 4 trajectories \(per_device_.*which is not a multiple of num_generations=3: make it",
        ),
        ({"max_completion_length": None}, "max_completion_length is empty, but must be a whole number"),
        ({"max_searches": -1}, "max_searches=-1 must be at least 0"),
        ({"search_timeout_s": 0}, "search_timeout_s=0.0 must be a finite number above 0"),
        ({"rollout_batch_size": 0}, "rollout_batch_size=0 must be at least 1"),
        ({"max_queries_per_search": 0}, "max_queries_per_search=0 must be at least 1"),
    ],
    ids=str,
)
def test_meaningless_settings_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_questions_may_be_given_as_prompts(tmp_path, random_model, tokenizer):
    """A string is treated as a question; a conversation is not changed."""
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    for prompt, expected in (("Who?", [{"role": "user", "content": "Who?"}]), (talk, talk)):
        trainer = real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list([{"prompt": prompt}] * 4))
        assert trainer.train_dataset[0]["prompt"] == expected


def test_a_processor_works_like_its_tokenizer(tmp_path, random_model, tokenizer):
    from types import SimpleNamespace

    trainer = real_trainer(tmp_path, random_model, SimpleNamespace(tokenizer=tokenizer))
    assert trainer.processing_class is tokenizer


def test_rewards_that_read_the_first_message_are_named(tmp_path, random_model, tokenizer, caplog):
    with caplog.at_level("WARNING"):
        real_trainer(tmp_path, random_model, tokenizer, rewards=[think_format_reward, later_is_better])
    assert "think_format_reward reads only the first message" in caplog.text and "later_is_better" not in caplog.text
    caplog.clear()
    last = of_last_message(think_format_reward)
    real_trainer(tmp_path, random_model, tokenizer, rewards=last)
    assert "first message" not in caplog.text
    call = {"role": "assistant", "content": "<tool_call> x </tool_call>"}
    answer = {"role": "assistant", "content": "<think>a</think> b"}
    talk = [call, {"role": "tool", "content": "y"}, answer]
    assert think_format_reward(completions=[talk]) == [0.0] and last(completions=[talk]) == [1.0]
    assert last(completions=[talk[:2]]) == [0.0] and last.__name__ == "think_format_reward"


def test_evaluate_and_predict_accept_what_the_constructor_accepts(tmp_path, random_model, tokenizer):
    trainer = real_trainer(tmp_path, random_model, tokenizer, num_generations_eval=2, per_device_eval_batch_size=4)
    asked = [{"role": "user", "content": "Who?"}]
    for data in (DATA, Dataset.from_list([{"prompt": "Who?"}] * 2), Dataset.from_list([{"prompt": asked}] * 2)):
        assert "eval_loss" in trainer.evaluate(data)
    assert {"eval_near_loss", "eval_far_loss"} <= trainer.evaluate({"near": DATA, "far": DATA}).keys()
    assert trainer.predict(DATA).metrics
    with pytest.raises(UserError, match="eval_dataset needs a column 'question'"):
        trainer.evaluate(DATA.remove_columns("question"))


def test_a_partly_constructed_trainer_behaves_like_its_parent():
    trainer = object.__new__(SearchGRPOTrainer)
    assert trainer.environment is None and trainer.logprobs is None


def test_training_evaluation_and_record_use_the_same_prompt(tmp_path, random_model, tokenizer):
    """The prompt of the dataset, everywhere."""
    own = [{"role": "user", "content": "In one word: who?"}]
    rows = [
        {"prompt": own, "question": "Who?", "golden_answers": ["x"], "id": str(i), "data_source": "a"}
        for i in range(4)
    ]
    trainer = real_trainer(tmp_path, random_model, tokenizer, data=Dataset.from_list(rows), max_steps=1)
    seen = []
    ask = trainer.protocol.prompt_ids
    evaluated = HeldOut(trainer, Dataset.from_list(rows))
    trainer.train()
    recorded = json.loads((tmp_path / "run.json").read_text())["prompt"]
    assert "In one word: who?" in recorded and recorded == trainer.protocol.decode(ask(own))
    with mock.patch.object(type(trainer.protocol), "prompt_ids", lambda self, m: seen.append(list(m)) or ask(m)):
        evaluated.measure()
    asked = [messages for messages in seen if messages != trainer.protocol.messages("")]  # measured for its length
    assert asked and all(messages == own for messages in asked)


def test_cached_prompts_depend_on_the_control_tokens_of_the_model(tmp_path):
    """Else the second model would get the prompts of the first, with its own control tokens in them."""
    row = {"question": "What do [INST] and <|eot_id|> mean?"}
    Dataset.from_list([row]).save_to_disk(tmp_path / "data")
    for family in ("Qwen3", "Mistral 7B", "Llama 3"):
        protocol = SearchR1(FAMILIES[family].tokenizer())
        rows = with_prompts(Dataset.load_from_disk(tmp_path / "data"), protocol, [], "train_dataset")
        assert rows[0]["prompt"] == protocol.conversation(row)
        asked = protocol.prompt_ids(protocol.messages("x"))
        control = [
            [index for index in ids if index in protocol.control.ids]
            for ids in (asked, protocol.prompt_ids(rows[0]["prompt"]))
        ]
        assert control[0] == control[1]


def test_cached_prompts_depend_on_the_protocol(tmp_path, tokenizer):
    """`map` caches by fingerprint. If that left out the protocol, another protocol would get these prompts."""

    class Polite(SearchR1):
        def conversation(self, row):
            return self.messages(f"Please: {row['question']}")

    Dataset.from_list(DATA.to_list()).save_to_disk(tmp_path / "data")
    protocols = [QwenTools(tokenizer, instruction=text) for text in ("A ", "B ")]
    protocols += [
        QwenTools(tokenizer, instruction="A ", system_prompt="Be brief."),
        SearchR1(tokenizer),
        Polite(tokenizer),
    ]
    for protocol in [*protocols, *protocols]:
        dataset = Dataset.load_from_disk(tmp_path / "data")
        rows = with_prompts(dataset, protocol, [], "train_dataset")
        assert list(rows["prompt"]) == [protocol.conversation(row) for row in dataset]


def test_fewer_questions_than_a_batch_are_refused(tmp_path, random_model, tokenizer):
    one = DATA.select([0])
    for data in (one, one.to_iterable_dataset()):
        trainer = real_trainer(tmp_path, random_model, tokenizer, data=data, per_device_train_batch_size=8)
        with pytest.raises(UserError, match=r"a batch has 2 questions .* there are only 1: give more questions"):
            trainer.train()


def test_the_tokenizer_of_another_model_is_refused(tmp_path, random_model, tokenizer):
    random_model.resize_token_embeddings(100)
    with pytest.raises(UserError, match=r"the tokenizer has ids up to .* but the model has embeddings for 100 tokens"):
        real_trainer(tmp_path, random_model, tokenizer)


def test_a_loaded_reward_model_scores_as_one_that_is_named(tmp_path, random_model, tokenizer):
    judge = Qwen2ForSequenceClassification(Qwen2Config(**{**random_model.config.to_dict(), "num_labels": 1})).eval()
    judge.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    scores = []
    for reward in (judge, str(tmp_path / "judge")):
        of_judge = {"reward_processing_classes": tokenizer} if reward is judge else {}
        trainer = real_trainer(tmp_path, random_model, tokenizer, rewards=reward, trainer=of_judge, learning_rate=0.0)
        trainer.train()
        scores.append([entry["reward"] for entry in steps(trainer)])
    assert scores[0] == pytest.approx(scores[1]) and scores[0][0] != scores[0][1]


def test_a_script_does_not_upload_trajectories_unasked(tmp_path, random_model, tokenizer):
    """transformers would upload every file of output_dir."""
    with pytest.raises(UserError, match="push_to_hub uploads the whole folder of the run"):
        real_trainer(tmp_path, random_model, tokenizer).push_to_hub()


def test_rewards_without_weight_are_refused(tmp_path, random_model, tokenizer):
    trainer = real_trainer(tmp_path, random_model, tokenizer, rewards="reflection")
    with pytest.raises(
        UserError, match=r"the weights of all rewards \(reflection\) are 0, so nothing would be learnt"
    ):
        trainer.train()


class Changes(TrainerCallback):
    """Changes keys after the first step."""

    def __init__(self, **keys):
        self.keys = keys

    def on_step_end(self, args, state, control, **kwargs):
        vars(args).update(self.keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"temperature": 0.5},
            r"temperature was changed from 1\.0 to 0\.5 .* would still compute log-probs at 1\.0",
        ),
        (
            {"max_searches": 1},
            "max_searches was changed from 4 to 1 .* set trainer.environment.max_searches, too",
        ),
        ({"system_prompt": "Be brief."}, "system_prompt was changed from None .* or build another trainer"),
    ],
    ids=["temperature", "searches", "prompt"],
)
def test_what_a_callback_changes_without_effect_is_refused(tmp_path, random_model, tokenizer, keys, message):
    trainer = real_trainer(tmp_path, random_model, tokenizer, trainer={"callbacks": [Changes(**keys)]})
    with pytest.raises(UserError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
    assert "eval_reward" in trainer.evaluate(DATA)  # nothing is learnt there


def test_what_a_callback_may_change_has_an_effect(tmp_path, random_model, tokenizer):
    changes = Changes(max_turn_length=3, max_searches=1)
    trainer = real_trainer(tmp_path, random_model, tokenizer, max_steps=2, trainer={"callbacks": [changes]})
    trainer.environment.max_searches = 1
    trainer.train()
    assert max(len(trajectory.ids) for trajectory in trainer.last_rollout.trajectories) == 3
