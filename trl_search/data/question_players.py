"""Scripted players for any question: they look up names in the question, then names in the passages, and answer.

    Where was the director of film Rogues' Regiment born?
    <think> The question is about Rogues' Regiment. I look that up first. </think>
    <search> Rogues' Regiment </search>
    <think> "Rogues' Regiment" says: "… directed by Robert Florey …". So I look up Robert Florey next. </think>
    <search> Robert Florey </search>
    <think> "Robert Florey" says: "Born as Robert Fuchs in Paris …". So the answer is Paris. </think>
    <answer> Paris </answer>

No model is used. A player first makes a plan (`question_plans.py`), then plays it in the environment. It answers only
from text that the environment has shown.

Some players search carelessly first and must search again, and some check their answer, so that a policy trained on
them learns both.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from trl_search.common.errors import UserError
from trl_search.data.question_plans import TITLE_WORDS, Gold, Lead, SearchFunction, Step, is_comparison, plan
from trl_search.data.quotes import best_sentence, first_of, quote, year
from trl_search.data.scripted_players import Script, ScriptedPolicy
from trl_search.policies.base import Policy, Turn
from trl_search.protocols import Protocol
from trl_search.retrieval.base import RetrievalError
from trl_search.rewards.answers import normalize_answer
from trl_search.types import Answer, Completion, Passage, Search

# The share of players that check their answer.
REFLECTIVE_SHARE = 0.08
# Plans are random, so a new one may succeed where another failed.
_PLANS = 3
UNKNOWN = "unknown"


def play_plan(question: str, golden: Sequence[str], steps: Sequence[Step] | None, rng: random.Random) -> Script:
    """Plays the plan: each thought quotes what was found and says why the next query follows."""
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
        # A passage that was quoted for a name may also hold the answer.
        new = [(step, p, words) for step, p, _ in told if (words := _answering(golden, p)) and words in seen][:1]
        answer = first_of(golden, new[0][2]) if new else None
    if is_comparison(question, golden):
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
    """The quote from a passage that holds the name to look up next, the answer, or the requested fact."""
    onward = next((step.lead.subject for step in steps if step.lead.source == passage and step.found), None)
    if onward and (words := quote(passage.text, onward)):
        return words
    if not is_comparison(question, golden):
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
    """The facts side by side, with their years if these decide the comparison."""
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
    # A long title is only the beginning of the text.
    if not passage.title or len(passage.title.split()) > TITLE_WORDS:
        return f'A passage says: "{fact}".'
    return rng.choice((f'The passage "{passage.title}" says: "{fact}".', f'According to "{passage.title}": "{fact}".'))


_DEATH = {"died", "die", "death", "dies"}
_NUMBERS = _DEATH | {"older", "younger", "earlier", "later", "first", "born", "birth", "released", "founded"}


def _wants_number(question: str) -> bool:
    return bool(_NUMBERS & set(_words(question)))


def _words(question: str) -> list[str]:
    return normalize_answer(question).split()


class QuestionPlayers:
    """The players for a collection of demonstrations: `for_row` returns the policy that plays one row. `search` finds
    as many passages per query as the environment shows."""

    def __init__(self, search: SearchFunction, protocol: Protocol, *, max_searches: int) -> None:
        self.search, self.protocol, self.max_searches = search, protocol, max_searches

    def for_row(self, row: Mapping[str, Any], seed: int) -> Policy:
        return _Player(self, row, random.Random(f"{seed}/player"))


class _Player(Policy):
    def __init__(self, players: QuestionPlayers, row: Mapping[str, Any], rng: random.Random) -> None:
        self._players, self._row, self._rng = players, row, rng
        self._speaker: ScriptedPolicy | None = None

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        if self._speaker is None:
            # On a thread: a retriever blocks, and the event loop runs other trajectories.
            script = await asyncio.to_thread(self._script)
            self._speaker = ScriptedPolicy(script, self._players.protocol)
        return await self._speaker.generate(prompt_ids, **turn)

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
