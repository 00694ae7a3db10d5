"""Keeps a resumed run at its place in its questions (GRPO) or trajectories (a cold start), or refuses to train.

transformers skips as many batches as the checkpoint was trained on. With batches of another size, or the data in
another order, a resumed run would take some twice and others never.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from trl_search.common.differences import differences
from trl_search.common.errors import UserError
from trl_search.common.files import read_object, write_json
from trl_search.trainer.resume import checkpoint_folder


class ResumesInOrder(Trainer):
    """A mixin that compares the order of a resumed run with its checkpoint's. List it before TRL's trainer."""

    order: dict[str, Any] | None = None  # everything that determines what the n-th step takes; `None`: not compared
    order_of_what = "questions"
    order_file = "question_order.json"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """A resumed training calls it before its first batch.

        Raises:
            UserError: if the checkpoint was trained in another order.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.order is not None and not self.args.ignore_data_skip:
            check_order(Path(checkpoint, self.order_file), self.order, self.order_of_what)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.order is not None and self.args.should_save:
            write_json(checkpoint_folder(self, trial) / self.order_file, self.order)
        super()._save_checkpoint(model, trial)


def check_order(path: Path, order: dict[str, Any], what: str) -> None:
    """Compares the order of a run with that of the checkpoint that it resumes, in `path`, which checkpoints of earlier
    versions do not have.

    Raises:
        UserError: if the checkpoint was trained in another order.
    """
    if not path.is_file():
        return
    found = list(differences(read_object(path, "remove it to continue without comparing"), order))
    if not found:
        return
    said = [f"{name}: {old} then, {new} now" for name, old, new in found if name != what]
    raise UserError(
        f"{path.parent} was trained with other {what} or batches ({', '.join(said) or f'the {what} differ'}), so this "
        f"run would take some {what} twice and others never: resume with the same {what}, seed and batches (half as "
        "many processes need twice the gradient_accumulation_steps and, in GRPO, steps_per_generation), or set "
        f"ignore_data_skip: true to begin with the first of the {what} again"
    )
