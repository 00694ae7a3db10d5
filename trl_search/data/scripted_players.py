"""Scripted players for the embedded world: they know the searches that lead to the answer, and play them well or
badly.

    good      <think> I need the author. </think> search, <think> The author is Mira Talvane. </think> search, answer
    one_hop   one search, then an answer, even if more searches are needed
    guess     an answer of the right kind, without a search

A script is a generator: it yields pairs of thought and action, and is sent the conversation as the policy sees it. It
plays as a `Policy` in the rollout engine, so its trajectories have the same form as those of a model. They train the
shipped model and, at mixed quality, the warm start before GRPO.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Unpack

from trl_search.common.errors import UserError, unknown_name
from trl_search.data.world import Hop, Question, World
from trl_search.data.world_language import RELATIONS
from trl_search.environment import Environment, SearchEnvironment
from trl_search.policies.base import Policy, Turn
from trl_search.protocols import Protocol
from trl_search.retrieval.base import Retriever
from trl_search.rollout import Limits, rollout
from trl_search.types import Answer, Completion, FinishReason, Passage, Sampling, Search, Trajectory

Script = Generator[tuple[str, Search | Answer], str, None]
Player = Callable[[World, Question, random.Random], Script]

# The mix of the warm start: mostly guesses, some players that stop too early, a few good ones.
WEAK: Mapping[str, float] = {"guess": 0.70, "one_hop": 0.20, "good": 0.10}

# How often a good player says that it checks, and how often it searches carelessly and must search again.
REFLECTIVE_SHARE = 0.08
CARELESS_SHARE = 0.04

# Large enough never to end a script early.
_LIMITS = Limits(completion_tokens=8192, turn_tokens=1024, observation_tokens=4096)


def good(world: World, question: Question, rng: random.Random) -> Script:
    """Searches each hop, retries a failed search, and answers from what it read, or guesses."""
    thought = f"{rng.choice(('I need', 'I need', 'First'))} the {_keyword(question.hops[0])}."
    for hop in question.hops:
        queries = [hop.query, f"{_keyword(hop)} of {hop.subject}"]
        rng.shuffle(queries)
        if rng.random() < CARELESS_SHARE:
            queries = [f"{_keyword(hop)} of {hop.subject.split()[-1]}", hop.query]
        for query in queries:
            seen = yield thought, Search((query,))
            found = world.passage(int(hop.passage_id)).text in seen
            spent = "no searches left" in seen
            if found or spent:
                break
            thought = rng.choice(
                ("Wait, that is not the right passage. I should search again.", "Let me think again.")
            )
        if not found or (spent and hop is not question.hops[-1]):
            yield from guess(world, question, rng)
            return
        thought = _reflected(f"The {_keyword(hop)} is {hop.value}.", rng)
    if question.type == "comparison":
        thought = _compared(question)
    yield thought, Answer(question.golden_answers[0])


def one_hop(world: World, question: Question, rng: random.Random) -> Script:
    """Searches only the first hop. If the question needs more, it answers with what it found, or guesses."""
    hop = question.hops[0]
    yield f"I need the {_keyword(hop)}.", Search((hop.query,))
    enough = question.type == "one_hop"
    if enough or (question.type == "two_hop" and rng.random() < 0.5):
        yield f"The {_keyword(hop)} is {hop.value}.", Answer(hop.value)
    else:
        yield from guess(world, question, rng)


def guess(world: World, question: Question, rng: random.Random) -> Script:
    """Answers with a plausible value, without a search."""
    if question.type == "comparison":
        answer = rng.choice(question.hops).subject
    else:
        answer = world.guess(question.hops[-1].relation, rng)
    yield f"{rng.choice(('I think it is', 'It must be'))} {answer}.", Answer(answer)


def read(world: World, question: Question, passages: Sequence[Passage], rng: random.Random) -> Script:
    """Answers from passages in the prompt, as one-shot RAG does; guesses if a hop is missing."""
    shown = {passage.id for passage in passages}
    if not all(hop.passage_id in shown for hop in question.hops):
        yield from guess(world, question, rng)
        return
    learned = " ".join(f"The {_keyword(hop)} is {hop.value}." for hop in question.hops)
    yield _compared(question) if question.type == "comparison" else learned, Answer(question.golden_answers[0])


PLAYERS: dict[str, Player] = {"good": good, "one_hop": one_hop, "guess": guess}


def scripted_trajectories(
    world: World,
    retriever: Retriever,
    protocol: Protocol,
    *,
    n: int,
    quality: Mapping[str, float] = WEAK,
    seed: int = 0,
    environment: Environment | None = None,
) -> list[Trajectory]:
    """Plays `n` training questions of a world, repeated if it has fewer, with players of mixed `quality`: the share of
    each of `PLAYERS`.

    Raises:
        UserError: for an unknown player, or a share that is not positive.
    """
    for name in quality:
        if name not in PLAYERS:
            raise unknown_name("player", name, PLAYERS)
    if not quality or min(quality.values()) < 0 or not sum(quality.values()):
        raise UserError(f"the shares of players must be positive, not {dict(quality)}")
    rng = random.Random(f"{seed}/scripts")
    pool = world.questions("train", limit=n)
    questions = [pool[i % len(pool)] for i in range(n)]
    names = rng.choices(list(quality), list(quality.values()), k=n)
    # Each script has its own random generator, because the order in which scripts advance depends on the searches.
    scripts = [
        PLAYERS[name](world, question, random.Random(f"{seed}/scripts/{index}"))
        for index, (name, question) in enumerate(zip(names, questions, strict=True))
    ]
    prompts = [protocol.prompt_ids(protocol.messages(question.question)) for question in questions]
    return play_scripts(scripts, prompts, protocol, environment or SearchEnvironment(retriever))


def play_scripts(
    scripts: Sequence[Script], prompts: Sequence[tuple[int, ...]], protocol: Protocol, environment: Environment
) -> list[Trajectory]:
    """Plays every script from its prompt, all concurrently, so that their searches are batched."""
    return rollout(
        prompts,
        [{}] * len(prompts),
        policies=[ScriptedPolicy(script, protocol) for script in scripts],
        policy=None,
        environment=environment,
        protocol=protocol,
        limits=_LIMITS,
        sampling=Sampling(),
        progress=None,
    )


class ScriptedPolicy(Policy):
    """A policy that returns the turns of one script as if it had sampled them."""

    def __init__(self, script: Script, protocol: Protocol) -> None:
        self._script, self._protocol, self._started = script, protocol, False

    async def generate(self, prompt_ids: Sequence[int], **turn: Unpack[Turn]) -> Completion:
        if self._started:
            thought, action = self._script.send(self._protocol.decode(prompt_ids))
        else:
            self._started = True
            thought, action = next(self._script)
        text = self._protocol.write(thought, action)
        return as_sampled(text, self._protocol, prompt_ids, ends=isinstance(action, Answer), stop=turn.get("stop", ()))


def as_sampled(
    text: str, protocol: Protocol, prompt_ids: Sequence[int], *, ends: bool, stop: Sequence[str]
) -> Completion:
    """Converts a written turn to the completion that a policy would have sampled. `ends`: the turn ends the
    conversation, as an answer does and a call does not."""
    if protocol.opened_thought(prompt_ids):
        text = text.removeprefix("<think>").lstrip()
    ids = protocol.encode(text)
    # If a stop string ends the turn, the policy samples no end-of-turn token.
    if not stop:
        ids.append(protocol.answer_end_id if ends else protocol.turn_end_id)
    return Completion(tuple(ids), (0.0,) * len(ids), FinishReason.STOP if stop else FinishReason.EOS)


def _keyword(hop: Hop) -> str:
    return RELATIONS[hop.relation].keyword


def _reflected(claim: str, rng: random.Random) -> str:
    if rng.random() >= REFLECTIVE_SHARE:
        return claim
    phrases = ("Let me verify. {}", "{} Let me verify.", "Let me double-check. {}", "Wait, let me think again. {}")
    return rng.choice(phrases).format(claim)


def _compared(question: Question) -> str:
    """The years in order, which decide the comparison."""
    first, last = sorted((hop.value for hop in question.hops), key=int)
    return f"{first} before {last}."
