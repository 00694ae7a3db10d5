"""trl-search: train language models that search, with TRL.

    from trl_search import SearchGRPOConfig, SearchGRPOTrainer, load_questions, load_retriever

Names are imported on first use, so that `import trl_search` and `trl-search --help` stay quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_search.config.grpo import SearchGRPOConfig
    from trl_search.data import load_questions
    from trl_search.environment import Environment, SearchEnvironment, load_environment, play
    from trl_search.protocols import load_protocol
    from trl_search.retrieval import Retriever, load_retriever
    from trl_search.trainer.grpo import SearchGRPOTrainer
    from trl_search.types import Answer, Observation, Passage, Search, StopReason, ToolCall, Trajectory

__version__ = "0.1.0"

_HOME = {
    "SearchGRPOConfig": "trl_search.config.grpo",
    "SearchGRPOTrainer": "trl_search.trainer.grpo",
    "load_questions": "trl_search.data",
    "load_retriever": "trl_search.retrieval",
    "load_protocol": "trl_search.protocols",
    "Retriever": "trl_search.retrieval",
    "Environment": "trl_search.environment",
    "SearchEnvironment": "trl_search.environment",
    "load_environment": "trl_search.environment",
    "play": "trl_search.environment",
    "Answer": "trl_search.types",
    "Search": "trl_search.types",
    "StopReason": "trl_search.types",
    "ToolCall": "trl_search.types",
    "Observation": "trl_search.types",
    "Passage": "trl_search.types",
    "Trajectory": "trl_search.types",
}
__all__ = [
    "Answer",
    "Environment",
    "Observation",
    "Passage",
    "Retriever",
    "Search",
    "SearchEnvironment",
    "SearchGRPOConfig",
    "SearchGRPOTrainer",
    "StopReason",
    "ToolCall",
    "Trajectory",
    "load_environment",
    "load_protocol",
    "load_questions",
    "load_retriever",
    "play",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trl_search' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
