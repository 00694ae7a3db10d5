"""Questions and the worlds they are about.

questions.py         questions from files and the hub, in one schema
summary.py           what a set of questions holds
world.py             the embedded world: a fictional encyclopedia with its questions
scripted_players.py  players that know the way to an answer, for warm starts and tests
wiki18.py            the Wikipedia corpus of the published runs, and its indexes
"""

from trl_search.data.questions import (
    EVALUATION_SETS,
    HUB_SETS,
    HubSet,
    is_hub_set,
    load_evaluation_questions,
    load_questions,
    question_key,
    sample_questions,
    without_overlap,
)

__all__ = [
    "EVALUATION_SETS",
    "HUB_SETS",
    "HubSet",
    "is_hub_set",
    "load_evaluation_questions",
    "load_questions",
    "question_key",
    "sample_questions",
    "without_overlap",
]
