"""Supervised fine-tuning on trajectories: TRL's SFTTrainer, with the loss on the policy's own tokens.

The trajectories come from the rollout loop, so their ids and masks have the same form as GRPO's. They are either

- right attempts of a policy or a teacher, with real searches: a cold start (`trainer/cold_start`), or
- scripts of the embedded world (`data/scripted_players.py`): a warm start. By default their quality is mixed: the
  policy learns the format, but often answers without a search or stops after one hop. GRPO has to correct that.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTConfig, SFTTrainer

from trl_search.common.errors import UserError
from trl_search.config.key_docs import key, with_documented_keys
from trl_search.config.recipe_values import convert_numbers
from trl_search.config.run_file import absolute_folder
from trl_search.config.trl_keys import check_sft_keys
from trl_search.data.scripted_players import WEAK, scripted_trajectories
from trl_search.data.world import World
from trl_search.environment import Environment
from trl_search.policies.adapters import refuse_tied, refuse_tokens_of_the_head, refuse_unsupported
from trl_search.protocols import Protocol
from trl_search.records.run_log import RunLog
from trl_search.retrieval.base import Retriever
from trl_search.trainer.callbacks.progress import show_steps
from trl_search.trainer.finite import FiniteSteps, avoid_cudnn_attention, refuse_nonfinite_weights
from trl_search.trainer.loss.attention import why_not_padding_free
from trl_search.trainer.resume import (
    LoadsTiedWeights,
    NamesDoneCheckpoint,
    checkpoint_to_resume,
    warn_of_missing_optimizer,
)
from trl_search.trainer.resumed_adapter import refuse_another_adapter
from trl_search.trainer.resumed_optimizer import ResumesOptimizer
from trl_search.trainer.trajectory_order import KeepsTrajectoryOrder, order_of
from trl_search.types import Trajectory

logger = logging.getLogger(__name__)


@with_documented_keys
@dataclass
class SearchSFTConfig(SFTConfig):
    """Configuration of [`train`]. It accepts all parameters of [`~trl.SFTConfig`], and adds or changes these."""

    # TRL cuts at 1,024 tokens, but a cut trajectory teaches no ending.
    max_length: int | None = key(None, "Longer trajectories are left out, not cut. Default: no limit.")
    # Padding costs three times as much, because most trajectories are far shorter than the longest. Models that would
    # mix them (sliding windows, hybrid layers) are padded.
    padding_free: bool = key(True, "Concatenate the trajectories of a batch instead of padding them.")
    initialise_tags: bool = key(
        False,
        "Set the embedding of each tag that the checkpoint never trained, such as <tool_call>, to the mean of the "
        "embeddings of its text. A run warns about such tags at its start.",
    )
    merge_adapter: bool = key(
        True,
        "With use_peft, save the model with the adapter merged into it, as a start for GRPO and vLLM. false: save "
        "only the adapter.",
    )

    def __post_init__(self) -> None:
        convert_numbers(self)
        super().__post_init__()
        self.output_dir = absolute_folder(self.output_dir)
        check_sft_keys(self)


class _SFTTrainer(KeepsTrajectoryOrder, LoadsTiedWeights, ResumesOptimizer, FiniteSteps, SFTTrainer):
    pass


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    config: SearchSFTConfig,
    *,
    peft_config: PeftConfig | None = None,
    run_log: RunLog | None = None,
) -> None:
    """Trains the model in place on `rows` (`input_ids`, `assistant_masks`), and saves it with its tokenizer.

    Raises:
        UserError: if the adapter cannot be merged as configured.
    """
    if peft_config is not None:
        refuse_unsupported(peft_config)
    # Rows that are too long have been left out; otherwise TRL would cut them, or warn that it cannot.
    config = copy.copy(config)
    config.max_length = None
    if config.padding_free and (reason := why_not_padding_free(model)):
        logger.warning("padding_free is off for %s: %s", type(model).__name__, reason)
        config.padding_free = False
    if peft_config is not None and config.initialise_tags and not config.merge_adapter:
        raise UserError(
            "initialise_tags changes the base model, which merge_adapter: false does not save: set merge_adapter: true"
        )
    rows = rows.select_columns(["input_ids", "assistant_masks"])
    if peft_config is not None and config.merge_adapter and is_deepspeed_zero3_enabled():
        raise UserError(
            "under ZeRO-3 no process has the whole model to merge the adapter into: set merge_adapter: false, or use "
            "ZeRO-2"
        )
    avoid_cudnn_attention()
    trainer = _SFTTrainer(
        model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.order = order_of(config, rows)
    refuse_tokens_of_the_head(trainer.model)
    if config.merge_adapter and isinstance(trainer.model, PeftModel):
        refuse_tied(trainer.model, "or set merge_adapter: false")
    show_steps(trainer)
    trainer.add_callback(NamesDoneCheckpoint())
    if run_log is not None:
        trainer.callback_handler.callbacks.insert(0, run_log)  # first, because it names the run for the trackers
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, Path(config.output_dir or "."))
    refuse_another_adapter(trainer.model, checkpoint)
    if trainer.accelerator.is_main_process:
        warn_of_missing_optimizer(checkpoint)
    trainer.train(checkpoint)
    trained = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(trained, PeftModel) and config.merge_adapter:
        if trainer.accelerator.is_main_process:
            merged = trained.merge_and_unload()
            refuse_nonfinite_weights(merged.named_parameters(), config.output_dir)
            merged.save_pretrained(str(config.output_dir))
            tokenizer.save_pretrained(str(config.output_dir))
        trainer.accelerator.wait_for_everyone()
    else:
        trainer.save_model(config.output_dir)


def warm_start(
    model: PreTrainedModel,
    protocol: Protocol,
    world: World,
    retriever: Retriever,
    *,
    output_dir: str,
    steps: int,
    learning_rate: float,
    batch_size: int = 16,
    quality: Mapping[str, float] = WEAK,
    environment: Environment | None = None,
    seed: int = 0,
    use_cpu: bool = False,
) -> list[Trajectory]:
    """Trains the model in place on a world's training questions, none used twice, and saves it with its tokenizer.
    `quality` has the shares of the players; `use_cpu` must equal that of the run, or each process trains alone.
    Returns what was trained on."""
    config = SearchSFTConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, steps // 20),
        dataloader_pin_memory=torch.cuda.is_available(),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=use_cpu,
        save_strategy="no",
        report_to="none",
        logging_steps=max(1, steps // 4),
        seed=seed,
        data_seed=seed,
    )
    trajectories = scripted_trajectories(
        world,
        retriever,
        protocol,
        n=steps * batch_size * config.world_size,
        quality=quality,
        seed=seed,
        environment=environment,
    )
    train(model, protocol.tokenizer, sft_dataset(trajectories), config)
    return trajectories


def sft_dataset(trajectories: Sequence[Trajectory], *, max_tokens: int | None = None) -> Dataset:
    """Trajectories in SFTTrainer's format: `input_ids`, and `assistant_masks`, 1 for the policy's tokens. Trajectories
    longer than `max_tokens` are left out, not cut: a cut one teaches no ending.

    Raises:
        UserError: if no trajectory can be trained on.
    """
    kept = [
        (trajectory.prompt_ids, trajectory.ids, trajectory.mask)
        for trajectory in trajectories
        # Trajectories whose environment failed are left out.
        if trajectory.model_tokens
        and not trajectory.error
        and (max_tokens is None or len(trajectory.prompt_ids) + len(trajectory.ids) <= max_tokens)
    ]
    if len(kept) < len(trajectories):
        logger.warning("%d of %d trajectories left out of training", len(trajectories) - len(kept), len(trajectories))
    if not kept:
        raise UserError(
            f"none of {len(trajectories)} trajectories can be trained on: each is empty, failed, or longer than "
            f"max_tokens={max_tokens}, which max_length sets"
        )
    return sft_rows(kept)


def sft_rows(tokens: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]]) -> Dataset:
    """The same from tuples of prompt ids, ids and mask."""
    rows = [
        {"input_ids": [*prompt_ids, *ids], "assistant_masks": [*[0] * len(prompt_ids), *mask]}
        for prompt_ids, ids, mask in tokens
    ]
    return Dataset.from_list(rows)
