"""The model that ships with the package: about 3 million parameters, which can search and read but know no facts.

A Qwen2 decoder with a tokenizer of 2,176 entries for the language of `trl_search.data.world`. It calls the search
tool, reads passages, follows a fact from one passage to the next and answers, in every protocol. It was trained on
thousands of random worlds, each seen once, so it can only answer by searching. Quickstart, tests and benchmarks use it
when they need real tool calls. One command trains it on one GPU in minutes:

    python -m tools.tiny_policy.make --output trl_search/policies/tiny/model
"""

from __future__ import annotations

from pathlib import Path


def tiny_policy_path() -> str:
    """The folder of the model and its tokenizer, for `from_pretrained`."""
    return str(Path(__file__).parent / "model")
