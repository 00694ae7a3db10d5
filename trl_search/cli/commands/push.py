"""Uploads the model of a run to the Hugging Face hub, with a model card.

    trl-search push runs/qwen3b owner/name --dry_run                  writes the card and lists the files; no network
    trl-search push runs/qwen3b owner/name --eval runs/qwen3b-eval    private repository; evaluation in the card
    trl-search push runs/qwen3b/best owner/name --public              a checkpoint; public repository

It uploads weights, tokenizer, card, trl_search.json (the agent settings) and curves; never optimizer states,
checkpoints or logs. The token comes from `hf auth login` or HF_TOKEN. Then try it: `trl-search chat owner/name`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from trl_search.common.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the folder of a run, or a checkpoint in it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name on the hub")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="DIR",
        type=Path,
        help="an output folder of `trl-search eval`, for the card's results; repeatable",
    )
    parser.add_argument(
        "--license", metavar="ID", help="the hub's id of the weights' licence (default: the base model's)"
    )
    parser.add_argument("--base_model", metavar="NAME", help="the base model on the hub (default: as recorded)")
    parser.add_argument("--card", metavar="FILE", type=Path, help="upload this card instead of a generated one")
    parser.add_argument(
        "--with_trajectories", action="store_true", help="also upload the trajectories, which contain training data"
    )
    parser.add_argument("--public", action="store_true", help="make the repository public (default: private)")
    parser.add_argument("--dry_run", action="store_true", help="write the card into RUN_DIR and upload nothing")


def run(args: argparse.Namespace) -> int:
    from huggingface_hub import HfApi, get_token

    if not args.run_dir.is_dir():
        raise UserError(f"there is no folder {args.run_dir}: give the output_dir of a run")
    if args.repo_id.count("/") != 1 or not _is_repository(args.repo_id):
        raise UserError(f"{args.repo_id!r} is not a repository name: write it as owner/name")
    token = get_token()
    if token is None and not args.dry_run:
        raise UserError("no token: log in (`hf auth login`), set HF_TOKEN, or use --dry_run")
    from trl_search.records.publish.card_facts import read_facts
    from trl_search.records.publish.model_card import write_card
    from trl_search.records.publish.upload import CARD, adapter_text, license_of, plan_upload, publish, settings_text

    plan_upload(args.run_dir, {}, with_trajectories=args.with_trajectories)  # before anything is loaded
    api = HfApi(token=token)
    facts = read_facts(args.run_dir, args.repo_id, args.eval, base_model=args.base_model, license=args.license)
    texts = adapter_text(facts.adapter, facts.hub_base) if facts.adapter else {}
    if facts.license is None and not args.dry_run and facts.hub_base is not None:
        facts = replace(facts, license=license_of(facts.hub_base, api))
    card = _own_card(args.card) if args.card else str(write_card(facts))
    texts |= {CARD: card, **(settings_text(facts.settings.as_json()) if facts.settings else {})}
    upload = plan_upload(args.run_dir, texts, with_trajectories=args.with_trajectories)
    if facts.license is None:
        print("The card names no licence: give --license ID")
    if facts.settings is None:
        print("There is neither run.json nor trl_search.json: the card cannot list the agent settings.")
    if args.dry_run:
        print(f"Would upload to {args.repo_id}, {'public' if args.public else 'private'}:")
        print("\n".join(upload.lines()))
        if not args.card:
            print(f"The card is in {_write_beside(args.run_dir / CARD, card)}.")
        return 0
    print("\n".join([f"To {args.repo_id}, {'public' if args.public else 'private'}:", *upload.lines()]), flush=True)
    print(publish(upload, args.repo_id, api=api, public=args.public))
    return 0


def _is_repository(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _own_card(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"there is no card {path}: give the path of a Markdown file")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): convert it") from None
    if not text.startswith("---\n"):
        raise UserError(f"{path} has no metadata: a card begins with YAML between two lines of ---")
    return text


def _write_beside(path: Path, text: str) -> Path:
    """Writes a file, or `.new.md` beside it if it exists with other content: the user may have edited it."""
    if path.is_file() and path.read_text("utf-8", errors="replace") != text:
        path = path.with_suffix(".new.md")
    path.write_text(text, "utf-8")
    return path
