"""Scripted players of any questions: they look up what the question names, then what the passages lead to, and answer.

    Where was the director of film Rogues' Regiment born?
    <think> The question is about Rogues' Regiment. I look that up first. </think>
    <search> Rogues' Regiment </search>
    <think> "Rogues' Regiment" says: "… directed by Robert Florey …". So I look up Robert Florey next. </think>
    <search> Robert Florey </search>
    <think> "Robert Florey" says: "Born as Robert Fuchs in Paris …". So the answer is Paris. </think>
    <answer> Paris </answer>

No model is asked. A player plans before it speaks: it tries candidate queries (the question, its names, names in the
passages found so far, each alone and with words of the question) and takes one whose passages lead on. What leads on:
the gold passages where the row knows them, otherwise a passage that holds a golden answer. It then plays its plan in
the environment, and answers only from quotes that it was really shown: what was cut away leads to no answer.

Some shares search carelessly first and have to search again, and some check once more, so that a policy that copies
them has seen both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_search.common.errors import UserError
from trl_search.data.quotes import best_sentence, first_of, key_words, names, quote, year
from trl_search.data.scripted_players import Script, ScriptedPolicy
from trl_search.policies.base import Policy
from trl_search.protocols import Protocol
from trl_search.retrieval.base import RetrievalError
from trl_search.rewards.answers import contains_answer, normalize_answer
from trl_search.types import Answer, Completion, Passage, Sampling, Search

SearchFunction = Callable[[Sequence[str]], Sequence[Sequence[Passage]]]
# How often a player searches carelessly before it searches well, and how often it checks its answer once more.
CARELESS_SHARE, REFLECTIVE_SHARE = 0.12, 0.08
# A plan takes its turns by chance: where one leads nowhere, another may not.
_PLANS = 3
UNKNOWN = "unknown"
_YES_NO = {"yes", "no"}
# A longer title is the beginning of its text, and names nothing.
_TITLE_WORDS = 8


@dataclass(frozen=True, slots=True)
class Gold:
    """What a row tells of its evidence: ids or titles of the passages that hold it. Both may be empty."""

    ids: frozenset[str] = frozenset()
    titles: frozenset[str] = frozenset()

    def holds(self, passage: Passage) -> bool:
        return passage.id in self.ids or normalize_answer(passage.title) in self.titles

    def key(self, passage: Passage) -> str:
        """Two passages of one key are one piece of evidence."""
        return passage.id if passage.id in self.ids else normalize_answer(passage.title)

    def __len__(self) -> int:
        return len(self.ids) or len(self.titles)


@dataclass(frozen=True, slots=True)
class Lead:
    """A query worth trying: what it looks up, and the passage that named it (`None`: the question did)."""

    query: str
    subject: str = ""
    source: Passage | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A search of a plan, and the passages among its results that lead on; none where it was careless."""

    lead: Lead
    found: tuple[Passage, ...]


# Planning


def plan(
    question: str, golden: Sequence[str], gold: Gold, search: SearchFunction, *, max_searches: int, rng: random.Random
) -> list[Step] | None:
    """Searches that lead to an answer; `None` where none were found.

    Args:
        search (`Callable`): The passages of each query, as many as the environment shows.
        max_searches (`int`): The plan has at most so many steps.
    """
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
    """The next search that finds something new, now and then after a careless one. Where none does, a careless one and
    a second that takes a title from what it showed."""
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
        if passage.title and len(passage.title.split()) <= _TITLE_WORDS
    ]
    found = search([lead.query for _, lead in seconds]) if seconds else []
    paths = [[first, Step(lead, new(seen))] for (first, lead), seen in zip(seconds, found, strict=True) if new(seen)]
    return rng.choice(paths) if paths else []


def _answers(question: str, golden: Sequence[str], held: Sequence[Passage], *, complete: bool) -> bool:
    """Whether what is held tells the answer. A comparison ("yes", or one of the two films that the question names) is
    told by all of the evidence, and stands in none of it."""
    if _compared(question, golden):
        return complete
    return any(first_of(golden, passage.text) for passage in held)


def _compared(question: str, golden: Sequence[str]) -> bool:
    return any(normalize_answer(answer) in _YES_NO for answer in golden) or contains_answer(question, golden)


def _plan_without_gold(
    question: str, golden: Sequence[str], search: SearchFunction, *, max_searches: int, rng: random.Random
) -> list[Step] | None:
    """One search, or two of which the second looks up a name that the first one found."""
    if all(normalize_answer(answer) in _YES_NO for answer in golden):
        return None  # those words stand everywhere and prove nothing

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
    """Candidate queries: from the question as it stands, its names, and the names in what was found."""
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
    """Prefers what finds more, and what looks up by its name what it finds."""
    titles = {_bare(passage.title) for passage in way.found}
    return len(way.found) * (5.0 if _bare(way.lead.subject) in titles else 1.0)


def _alike(name: str, title: str) -> bool:
    """Whether a name in a passage is only that of the passage itself, written in another way."""
    words, others = set(normalize_answer(name).split()), set(title.split())
    shared = len(words & others)
    return others <= words or (shared * 2 >= len(words) and shared * 2 >= len(others))


def _bare(title: str) -> str:
    return normalize_answer(title.split(" (")[0])


# Playing


def play_plan(question: str, golden: Sequence[str], steps: Sequence[Step] | None, rng: random.Random) -> Script:
    """Speaks the plan: each thought says what was found, quoted, and why the next query follows from it."""
    if not steps:
        yield "I search for the question.", Search((question,))
        yield "These passages do not tell me.", Answer(UNKNOWN)
        return
    thought = _first_thought(steps[0].lead, rng)
    told: list[tuple[Step, Passage, str]] = []
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        seen = yield thought, Search((step.lead.query,))
        new = [(step, passage, _fact(question, golden, passage, steps)) for passage in step.found]
        if not all(fact in seen for *_, fact in new):
            yield "What I need is not in these passages.", Answer(UNKNOWN)
            return
        told += new
        if following is not None:
            thought = _next_thought([(passage, fact) for _, passage, fact in new], following.lead, rng)
    answer = next((one for one in (first_of(golden, fact) for *_, fact in reversed(told)) if one), None)
    if answer is None:
        # A passage that was quoted for where it leads may answer as well.
        new = [(step, p, words) for step, p, _ in told if (words := _answering(golden, p)) and words in seen][:1]
        answer = first_of(golden, new[0][2]) if new else None
    if _compared(question, golden):
        sources = [step.lead.source for step in steps]
        thought = _comparison(question, [one for one in told if one[1] not in sources], rng)
        answer = golden[0]
    elif answer is None:
        yield "What I need is not in these passages.", Answer(UNKNOWN)
        return
    else:
        telling = [one for one in told if one in new or first_of([answer], one[2])]
        thought = " ".join(_told(passage, fact, rng) for _, passage, fact in telling)
    if rng.random() < REFLECTIVE_SHARE:
        thought += rng.choice((" Let me verify this with the question: it fits.", " Let me double-check: this is it."))
    thought += rng.choice((f" So the answer is {answer}.", f" This means that the answer is {answer}."))
    yield thought, Answer(answer)


def _fact(question: str, golden: Sequence[str], passage: Passage, steps: Sequence[Step]) -> str:
    """What to quote of a passage: where it names what is looked up next, where it answers, or what is asked of it."""
    onward = next((step.lead.subject for step in steps if step.lead.source == passage and step.found), None)
    if onward and (words := quote(passage.text, onward)):
        return words
    if not _compared(question, golden):
        if words := _answering(golden, passage):
            return words
        for other in (p for step in steps for p in step.found if p is not passage):
            if words := quote(passage.text, other.title.split(" (")[0]):
                return words
    return best_sentence(passage.text, question, wants_number=_wants_number(question))


def _answering(golden: Sequence[str], passage: Passage) -> str | None:
    answer = first_of(golden, passage.text)
    return quote(passage.text, answer) if answer else None


def _first_thought(lead: Lead, rng: random.Random) -> str:
    if not lead.subject:
        return rng.choice(
            (
                "I need to look this up. I search for what the question asks.",
                "I am not sure about this, so I search for it.",
                "Let me find a passage that answers the question.",
            )
        )
    wanted = lead.query.removeprefix(lead.subject).strip()
    options = (
        (
            f"The question is about {lead.subject}. I need this: {wanted}.",
            f"First I need to find out about {lead.subject} ({wanted}).",
            f"I have to know something about {lead.subject}: {wanted}. I search for that.",
        )
        if wanted
        else (
            f"The question is about {lead.subject}. I look that up first.",
            f"First I need to know more about {lead.subject}.",
            f"The question names {lead.subject}, so I search for {lead.subject}.",
        )
    )
    return rng.choice(options)


def _next_thought(new: Sequence[tuple[Passage, str]], lead: Lead, rng: random.Random) -> str:
    if not new:
        again = lead.subject or "the words of the question"
        return rng.choice(
            (
                f"Wait, these passages do not tell me that. I should search again, for {again}.",
                f"That is not what I need. Let me search again with other words: {again}.",
                f"These passages do not help. I try {again} instead.",
            )
        )
    found = " ".join(_told(passage, fact, rng) for passage, fact in new)
    subject = lead.subject or "the rest of the question"
    if lead.source is None:
        return f"{found} " + rng.choice((f"Now I need to know about {subject}.", f"Next I look up {subject}."))
    return f"{found} " + rng.choice(
        (
            f"So I look up {subject} next.",
            f"So now I need to know more about {subject}.",
            f"So I search for {subject}.",
        )
    )


def _comparison(question: str, told: Sequence[tuple[Step, Passage, str]], rng: random.Random) -> str:
    """The facts side by side, and their years where those decide."""
    found = " ".join(_told(passage, fact, rng) for _, passage, fact in told)
    years = [year(fact, last=bool(_DEATH & set(_words(question)))) for *_, fact in told]
    if len(told) == 2 and all(years) and _wants_number(question):
        sides = [f"{_side(step, passage)} {one}" for (step, passage, _), one in zip(told, years, strict=True)]
        found += f" So I compare: {', '.join(sides)}."
    return found


def _side(step: Step, passage: Passage) -> str:
    """ "Gang Bullets (Lambert Hillyer)": what the question names, and what was looked up for it."""
    source, name = step.lead.source, passage.title.split(" (")[0]
    return name if source is None else f"{source.title.split(' (')[0]} ({name})"


def _told(passage: Passage, fact: str, rng: random.Random) -> str:
    # A title that only repeats how the text begins names nothing.
    if not passage.title or len(passage.title.split()) > _TITLE_WORDS:
        return f'A passage says: "{fact}".'
    return rng.choice((f'The passage "{passage.title}" says: "{fact}".', f'According to "{passage.title}": "{fact}".'))


_DEATH = {"died", "die", "death", "dies"}
_NUMBERS = _DEATH | {"older", "younger", "earlier", "later", "first", "born", "birth", "released", "founded"}


def _wants_number(question: str) -> bool:
    return bool(_NUMBERS & set(_words(question)))


def _words(question: str) -> list[str]:
    return normalize_answer(question).split()


class QuestionPlayers(Policy):
    """The players of a collection: `for_row` gives the one that answers a row.

    Args:
        search (`Callable`): What the players try their queries with: the environment's retriever, and as many passages
            as the environment shows.
    """

    def __init__(self, search: SearchFunction, protocol: Protocol, *, max_searches: int) -> None:
        self.search, self.protocol, self.max_searches = search, protocol, max_searches

    def for_row(self, row: Mapping[str, Any], seed: int) -> Policy:
        return _Player(self, row, random.Random(f"{seed}/player"))

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Completion:
        raise TypeError("a script answers one row: take the policy that for_row gives")


class _Player(Policy):
    def __init__(self, players: QuestionPlayers, row: Mapping[str, Any], rng: random.Random) -> None:
        self._players, self._row, self._rng = players, row, rng
        self._speaker: ScriptedPolicy | None = None

    async def generate(
        self, prompt_ids: Sequence[int], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Completion:
        if self._speaker is None:
            # A retriever blocks, and the event loop has other trajectories to run.
            script = await asyncio.to_thread(self._script)
            self._speaker = ScriptedPolicy(script, self._players.protocol)
        return await self._speaker.generate(prompt_ids, max_tokens=max_tokens, sampling=sampling, stop=stop)

    def _script(self) -> Script:
        question, golden = str(self._row["question"]), list(self._row["golden_answers"])
        titles = frozenset(map(normalize_answer, self._row.get("gold_titles") or ()))
        gold = Gold(frozenset(self._row.get("gold_ids") or ()), titles)
        try:
            for _ in range(_PLANS):
                steps = plan(
                    question,
                    golden,
                    gold,
                    self._players.search,
                    max_searches=self._players.max_searches,
                    rng=self._rng,
                )
                if steps:
                    break
        except RetrievalError as error:
            raise UserError(
                f"the retriever failed while the scripted players tried their queries: {error}. Put it right and "
                "start again: what was collected is kept"
            ) from error
        return play_plan(question, golden, steps, self._rng)
