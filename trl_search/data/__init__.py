"""Questions and the worlds they are about.

questions.py         questions from files and the hub, in one schema
hub_sets.py          sets that have a name
question_rows.py     one row, from any known schema
overlap.py           training questions that are also in an evaluation set
summary.py           statistics of a set of questions
world.py             the embedded world: a fictional encyclopedia with its questions
scripted_players.py  players of the embedded world, which know the way to an answer
question_players.py  players of any other questions, with their plans (question_plans.py), evidence and quotes
wiki18.py            the Wikipedia corpus of the published runs, and its indexes (wiki18_checks.py)
"""

from trl_search.data.hub_sets import EVALUATION_SETS, HUB_SETS, HubSet, is_hub_set
from trl_search.data.overlap import question_key, without_overlap
from trl_search.data.question_rows import QuestionFields
from trl_search.data.questions import load_evaluation_questions, load_questions, sample_questions

__all__ = [
    "EVALUATION_SETS",
    "HUB_SETS",
    "HubSet",
    "QuestionFields",
    "is_hub_set",
    "load_evaluation_questions",
    "load_questions",
    "question_key",
    "sample_questions",
    "without_overlap",
]
