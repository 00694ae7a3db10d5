"""Checks the settings `carry_over` and `max_staleness` before anything runs."""

from __future__ import annotations

from typing import Any

from trl_search.common.errors import UserError


def carries_over(args: Any) -> bool:
    """Whether a [`SearchGRPOConfig`] lets one trajectory be sampled from the weights of several steps."""
    return bool(args.carry_over > 1 or args.max_staleness)


def groups_per_batch(args: Any) -> int:
    """Groups per generation batch and process."""
    return int(args.per_device_train_batch_size * args.steps_per_generation // args.num_generations)


def groups_under_way(args: Any) -> int:
    """Groups in progress per process when a rollout begins."""
    share = args.carry_over if args.carry_over > 1 else 1 + args.max_staleness
    return int(share * groups_per_batch(args))


def check_carry_over(args: Any) -> None:
    """Raises `UserError` for settings that would have no effect or would bias the loss."""
    if args.carry_over < 1:
        raise UserError(f"carry_over={args.carry_over} counts batches: set it to 1 (off) or more, such as 1.5")
    if args.max_staleness < 0:
        raise UserError(f"max_staleness={args.max_staleness} counts batches: set it to 0 (off) or more")
    if not carries_over(args):
        return
    asked = f"carry_over={args.carry_over:g}" if args.carry_over > 1 else f"max_staleness={args.max_staleness}"
    if args.max_staleness and not (args.use_vllm and args.vllm_mode == "server"):
        raise UserError(
            f"max_staleness={args.max_staleness} generates while the trainer computes, so generation needs separate "
            "GPUs: set use_vllm: true and vllm_mode: server, or use carry_over, which works in one process"
        )
    if args.max_staleness and args.carry_over > 1 + args.max_staleness:
        raise UserError(
            f"carry_over={args.carry_over:g} starts more groups than max_staleness={args.max_staleness} allows: "
            f"set carry_over to at most {1 + args.max_staleness}, or leave it out"
        )
    if args.refill_groups:
        raise UserError(
            f"{asked} and refill_groups={args.refill_groups} both choose the groups of a batch: use only one of them "
            "(carry_over works with curriculum)"
        )
    if not args.vllm_importance_sampling_correction:
        raise UserError(
            f"{asked} trains on tokens sampled from older weights, which vllm_importance_sampling_correction=false "
            "leaves uncorrected: set it to true"
        )
    if args.loss_type == "vespo" and not args.vllm_importance_sampling_mode.startswith("token"):
        raise UserError(
            f"{asked} with loss_type=vespo needs vllm_importance_sampling_mode=token_truncate or token_mask, not "
            f"{args.vllm_importance_sampling_mode}"
        )
    check_whole_groups(args, f"{asked} makes batches of whole groups")
    if groups_under_way(args) == groups_per_batch(args):
        raise UserError(
            f"{asked} has no effect, as it starts only the {groups_per_batch(args)} groups of a batch: set it to "
            f"{1 + 1 / groups_per_batch(args):.3g} or more"
        )


def check_whole_groups(args: Any, needs: str) -> None:
    """Raises `UserError` if a process gets parts of groups. `needs` says what needs whole ones."""
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if rows % args.num_generations:
        raise UserError(
            f"{needs}, but num_generations={args.num_generations} does not divide the {rows} trajectories per process "
            "(per_device_train_batch_size × steps_per_generation): change one of them"
        )
