"""The plan of a scripted player: searches that lead to the answer of a question, found by trying candidate queries.

    Where was the director of film Rogues' Regiment born?
    "Rogues' Regiment"   a name in the question; finds the gold passage of the film
    "Robert Florey"      a name in that passage; finds the other gold passage, which holds the answer

Candidates are the question, its names, and names in the passages found so far, each alone and with words of the
question. A search succeeds if it finds a gold passage or, if the row names none, a passage with a golden answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trl_search.data.quotes import first_of, key_words, names
from trl_search.rewards.answers import contains_answer, normalize_answer
from trl_search.types import Passage

SearchFunction = Callable[[Sequence[str]], Sequence[Sequence[Passage]]]
# The share of plans with a careless search before a good one, so that a policy learns to search again.
CARELESS_SHARE = 0.12
_YES_NO = {"yes", "no"}
# A longer title is the beginning of its text, not a name.
TITLE_WORDS = 8


@dataclass(frozen=True, slots=True)
class Gold:
    """The gold passages of a row, by ids or titles. Both may be empty."""

    ids: frozenset[str] = frozenset()
    titles: frozenset[str] = frozenset()

    def holds(self, passage: Passage) -> bool:
        return passage.id in self.ids or normalize_answer(passage.title) in self.titles

    def key(self, passage: Passage) -> str:
        """Passages with the same key are the same piece of evidence."""
        return passage.id if passage.id in self.ids else normalize_answer(passage.title)

    def __len__(self) -> int:
        return len(self.ids) or len(self.titles)


@dataclass(frozen=True, slots=True)
class Lead:
    """A candidate query: its subject, and the passage that names the subject (`None`: the question names it)."""

    query: str
    subject: str = ""
    source: Passage | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A search of a plan, and the useful passages among its results; none if the search was careless."""

    lead: Lead
    found: tuple[Passage, ...]


def plan(
    question: str, golden: Sequence[str], gold: Gold, search: SearchFunction, *, max_searches: int, rng: random.Random
) -> list[Step] | None:
    """Finds searches that lead to an answer; `None` if there are none."""
    if not len(gold):
        return _plan_without_gold(question, golden, search, max_searches=max_searches, rng=rng)
    steps: list[Step] = []
    held: dict[str, Passage] = {}
    while len(held) < len(gold) and len(steps) < max_searches:

        def new(passages: Sequence[Passage]) -> tuple[Passage, ...]:
            return tuple({gold.key(p): p for p in passages if gold.holds(p) and gold.key(p) not in held}.values())

        room = max_searches - len(steps)
        leads = _leads(question, list(held.values()), asked=[step.lead.query for step in steps])
        onward = _choose(question, leads, search, new, room=room, spare=room > len(gold) - len(held), rng=rng)
        if not onward:
            break
        steps += onward
        held.update((gold.key(passage), passage) for step in onward for passage in step.found)
    return steps if _answers(question, golden, list(held.values()), complete=len(held) == len(gold)) else None


def _choose(
    question: str,
    leads: Sequence[Lead],
    search: SearchFunction,
    new: Callable[[Sequence[Passage]], tuple[Passage, ...]],
    *,
    room: int,
    spare: bool,
    rng: random.Random,
) -> list[Step]:
    """Chooses the next search that finds new evidence, sometimes after a careless one. If no candidate finds any: a
    careless search, then one for a title among its results."""
    results = search([lead.query for lead in leads]) if leads else []
    ways = [Step(lead, new(passages)) for lead, passages in zip(leads, results, strict=True)]
    good = [way for way in ways if way.found]
    if good:
        chosen = rng.choices(good, [_weight(way) for way in good])[0]
        careless = [way for way in ways if not way.found and way.lead.source is chosen.lead.source]
        return [rng.choice(careless), chosen] if careless and spare and rng.random() < CARELESS_SHARE else [chosen]
    if room < 2:
        return []
    wanted = key_words(question, limit=5)
    seconds = [
        (way, Lead(f"{passage.title.split(' (')[0]} {wanted}", passage.title.split(" (")[0]))
        for way, passages in list(zip(ways, results, strict=True))[:4]
        for passage in passages
        if passage.title and len(passage.title.split()) <= TITLE_WORDS
    ]
    found = search([lead.query for _, lead in seconds]) if seconds else []
    paths = [[first, Step(lead, new(seen))] for (first, lead), seen in zip(seconds, found, strict=True) if new(seen)]
    return rng.choice(paths) if paths else []


def _answers(question: str, golden: Sequence[str], held: Sequence[Passage], *, complete: bool) -> bool:
    """Whether the passages found hold the answer. A comparison ("yes", or one of two films in the question) needs all
    gold passages, because no single passage holds its answer."""
    if is_comparison(question, golden):
        return complete
    return any(first_of(golden, passage.text) for passage in held)


def is_comparison(question: str, golden: Sequence[str]) -> bool:
    return any(normalize_answer(answer) in _YES_NO for answer in golden) or contains_answer(question, golden)


def _plan_without_gold(
    question: str, golden: Sequence[str], search: SearchFunction, *, max_searches: int, rng: random.Random
) -> list[Step] | None:
    """One search, or two: the second looks up a name that the first one found."""
    if all(normalize_answer(answer) in _YES_NO for answer in golden):
        return None  # these words are in most passages and prove nothing

    def new(passages: Sequence[Passage]) -> tuple[Passage, ...]:
        return tuple(p for p in passages if contains_answer(p.text, golden))[:1]

    leads = _leads(question, [], asked=[])
    if one := _choose(question, leads, search, new, room=max_searches, spare=max_searches > 1, rng=rng):
        return one
    if max_searches < 2:
        return None
    for lead in rng.sample(leads, len(leads)):
        for passage in search([lead.query])[0][:2]:
            onward = [one for one in _leads(question, [passage], asked=[lead.query]) if one.source is passage]
            for second, seen in zip(onward, search([one.query for one in onward]) if onward else (), strict=True):
                if found := new(seen):
                    return [Step(lead, (passage,)), Step(second, found)]
    return None


def _leads(question: str, held: Sequence[Passage], *, asked: Sequence[str]) -> list[Lead]:
    """Candidate queries: the question itself, its names, and names in the passages found."""
    leads: list[Lead] = []
    known = {normalize_answer(passage.title) for passage in held}
    if not held:
        leads += [Lead(question.rstrip(" ?")), Lead(key_words(question, limit=12))]
    for source, text in [(None, question), *((p, p.text) for p in reversed(held))]:
        named = [name for name in names(text) if not any(_alike(name, title) for title in known)]
        for name in named:
            wanted = key_words(question, without=" ".join([*names(question), name]), limit=4)
            leads.append(Lead(name, name, source))
            if wanted:
                leads.append(Lead(f"{name} {wanted}", name, source))
    unique = {normalize_answer(lead.query): lead for lead in leads if normalize_answer(lead.query)}
    return [lead for key, lead in unique.items() if key not in map(normalize_answer, asked)]


def _weight(way: Step) -> float:
    """Prefers queries that find more, and queries that name what they find."""
    titles = {_bare(passage.title) for passage in way.found}
    return len(way.found) * (5.0 if _bare(way.lead.subject) in titles else 1.0)


def _alike(name: str, title: str) -> bool:
    """Whether a name is only the title of its passage, written differently."""
    words, others = set(normalize_answer(name).split()), set(title.split())
    shared = len(words & others)
    return others <= words or (shared * 2 >= len(words) and shared * 2 >= len(others))


def _bare(title: str) -> str:
    return normalize_answer(title.split(" (")[0])
