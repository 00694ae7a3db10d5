"""The environment that a policy acts in: it takes an `Action` and returns an `Observation`.

base.py       `Environment`, which users subclass
search.py     `SearchEnvironment`: searches, answered from a retriever
registry.py   environments by name, and how a package adds one
play.py       `play`: runs an environment by hand, without a model
script.py     a user's script that plays a question turn by turn
"""

from trl_search.environment.base import AnswerOnly, Environment, check_environment, start_episode, take_step
from trl_search.environment.play import play
from trl_search.environment.registry import ENVIRONMENTS, load_environment
from trl_search.environment.search import PASSAGE_TEMPLATE, SearchEnvironment

__all__ = [
    "ENVIRONMENTS",
    "PASSAGE_TEMPLATE",
    "AnswerOnly",
    "Environment",
    "SearchEnvironment",
    "check_environment",
    "load_environment",
    "play",
    "start_episode",
    "take_step",
]
