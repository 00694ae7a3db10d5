"""What must hold where trajectories are carried over (`carry_over`, `max_staleness`); checked before anything runs."""

from __future__ import annotations

from typing import Any

from trl_search.common.errors import UserError


def carries_over(args: Any) -> bool:
    """Whether trajectories of a [`SearchGRPOConfig`] may be sampled from the weights of several steps."""
    return bool(args.carry_over > 1 or args.max_staleness)


def groups_per_batch(args: Any) -> int:
    """Groups of one generation batch of one process."""
    return int(args.per_device_train_batch_size * args.steps_per_generation // args.num_generations)


def groups_under_way(args: Any) -> int:
    """Groups that one process has under way when a rollout begins."""
    share = args.carry_over if args.carry_over > 1 else 1 + args.max_staleness
    return int(share * groups_per_batch(args))


def check_carry_over(args: Any) -> None:
    """Raises `UserError` for what would be ignored, or would train on a wrong estimate."""
    if args.carry_over < 1:
        raise UserError(f"carry_over={args.carry_over} is in batches: give 1 (off) or more, such as 1.5")
    if args.max_staleness < 0:
        raise UserError(f"max_staleness={args.max_staleness} is in batches: give 0 (off) or more")
    if not carries_over(args):
        return
    asked = f"carry_over={args.carry_over:g}" if args.carry_over > 1 else f"max_staleness={args.max_staleness}"
    if args.max_staleness and not (args.use_vllm and args.vllm_mode == "server"):
        raise UserError(
            f"max_staleness={args.max_staleness} generates while the trainer computes, which needs GPUs of its own: "
            "set use_vllm: true and vllm_mode: server, or take carry_over, which works in one process"
        )
    if args.max_staleness and args.carry_over > 1 + args.max_staleness:
        raise UserError(
            f"carry_over={args.carry_over:g} starts more than max_staleness={args.max_staleness} batches can take: "
            f"set carry_over to {1 + args.max_staleness} at most, or leave it out"
        )
    if args.refill_groups:
        raise UserError(
            f"{asked} and refill_groups={args.refill_groups} both choose which groups make a batch: take one of them "
            "(carry_over goes with curriculum)"
        )
    if not args.vllm_importance_sampling_correction:
        raise UserError(
            f"{asked} trains on tokens of older weights, and vllm_importance_sampling_correction=false leaves them "
            "uncorrected: set it to true"
        )
    if args.loss_type == "vespo" and not args.vllm_importance_sampling_mode.startswith("token"):
        raise UserError(
            f"{asked} with loss_type=vespo needs vllm_importance_sampling_mode=token_truncate or token_mask, and it "
            f"is {args.vllm_importance_sampling_mode}"
        )
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if rows % args.num_generations:
        raise UserError(
            f"{asked} closes a batch when whole groups are done, and num_generations={args.num_generations} does not "
            f"divide the {rows} trajectories of a process (per_device_train_batch_size × steps_per_generation): make "
            "it divide them"
        )
    if groups_under_way(args) == groups_per_batch(args):
        raise UserError(
            f"{asked} starts no group more than the {groups_per_batch(args)} of a batch: set it to "
            f"{1 + 1 / groups_per_batch(args):.3g} or more"
        )
