"""The embedded world: a seeded, fictional encyclopedia and questions that only its passages can answer.

    world = generate_world(passages=2000, seed=0)
    world.passages[17]          Passage("17", "Mira Talvane", "Mira Talvane was born in Port Eskel in 1847 and ...")
    world.questions("test")[0]  Question("test-0", "Where was the author of Silent Harbor born?", ["Port Eskel"], ...)

Every fact is random and is in exactly one passage, so without a search a policy can only guess. Searching is not
trivial: names share words (in a small world of 2,000 passages, each surname has about nine bearers), passages name
other entities, and one passage in eight is about a gathering and answers nothing.

The split is by entity, and facts never cross it: no entity of a held-out question, its bridge or its answer (except
literals such as years) appears in a training question. About 30 % of the questions take one hop, 50 % two, and 20 %
compare two entities.

Passages are rendered on demand from compact tables; `iter_passages()` streams a million of them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from trl_search.common.errors import UserError
from trl_search.data.world_language import KINDS, LITERALS, RELATIONS, WORDS, Kind, Relation
from trl_search.types import Passage

Split = Literal["train", "test"]
QuestionType = Literal["one_hop", "two_hop", "comparison"]

SPLITS: tuple[Split, ...] = ("train", "test")
TEST_SHARE = 0.25
MIX: dict[QuestionType, float] = {"one_hop": 0.3, "two_hop": 0.5, "comparison": 0.2}
MIN_PASSAGES, MAX_PASSAGES = 50, 100_000_000
# Compared years differ by at least this much, so that a comparison is clear.
MIN_YEARS_APART = 5


@dataclass(frozen=True, slots=True)
class Entity:
    """The subject of one passage. `facts[j]` is the value of the kind's j-th relation: an index of `World.entities`,
    or a literal."""

    kind: str
    name: str
    split: Split
    facts: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Hop:
    """One search that a question needs: its query, the passage with the fact, and the fact's value."""

    query: str
    passage_id: str
    value: str
    subject: str
    relation: str


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    question: str
    golden_answers: list[str]
    type: QuestionType
    split: Split
    hops: tuple[Hop, ...]

    def row(self) -> dict[str, Any]:
        """The question as a dataset row, in the schema of the seven QA sets."""
        return {
            "id": self.id,
            "question": self.question,
            "golden_answers": self.golden_answers,
            "data_source": f"world_{self.type}",
            "split": self.split,
        }


# All two-hop questions: a relation whose value is an entity, and a relation of that entity.
CHAINS: tuple[tuple[str, Relation, Relation], ...] = tuple(
    (name, first, second)
    for name, kind in KINDS.items()
    for first in kind.relations
    if first.phrases
    for second in KINDS[first.target].relations
    # The country of the capital is the country itself.
    if second.asks and (first.name, second.name) != ("capital", "country")
)


@dataclass(frozen=True)
class World:
    """A generated encyclopedia. Passage `str(i)` is about `entities[i]`."""

    seed: int
    entities: tuple[Entity, ...]

    @cached_property
    def passages(self) -> list[Passage]:
        return list(self.iter_passages())

    def iter_passages(self) -> Iterator[Passage]:
        """The passages in order, rendered one by one."""
        return map(self.passage, range(len(self.entities)))

    def passage(self, index: int) -> Passage:
        """Renders one passage. Seed and index select one of the sentences of its kind."""
        entity = self.entities[index]
        kind = KINDS[entity.kind]
        # Knuth's multiplicative hash is random enough here, and cheap.
        pick = ((index + 1) * 2654435761 + self.seed * 40503) % 2**32 >> 16
        fields = {relation.name: self._text(fact) for relation, fact in zip(kind.relations, entity.facts, strict=True)}
        text = kind.sentences[pick % len(kind.sentences)].format(name=entity.name, **fields)
        return Passage(id=str(index), title=entity.name, text=text)

    def questions(self, split: Split, limit: int | None = None) -> list[Question]:
        """Distinct questions about the entities of one split, in random order. A larger limit extends the same list.
        Without a limit, one per entity of the split.

        Raises:
            UserError: for an unknown split.
        """
        if split not in SPLITS:
            raise UserError(f"there is no split {split!r}: choose 'train' or 'test'")
        rng = random.Random(f"{self.seed}/{split}/questions")
        wanted = sum(map(len, self._members[split].values())) if limit is None else limit
        mix = {name: share for name, share in MIX.items() if name != "comparison" or self.compared[split]}
        types, weights = list(mix), list(mix.values())
        asked: set[tuple[Any, ...]] = set()
        questions: list[Question] = []
        for _ in range(20 * wanted):
            if len(questions) == wanted:
                break
            question_type = rng.choices(types, weights)[0]
            key, text, answer, hops = getattr(self, f"_{question_type}")(split, rng)
            if key not in asked:
                asked.add(key)
                questions.append(Question(f"{split}-{len(questions)}", text, [answer], question_type, split, hops))
        return questions

    def guess(self, relation: str, rng: random.Random) -> str:
        """A plausible value of the relation, drawn at random."""
        target = RELATIONS[relation].target
        if target in LITERALS:
            return rng.choice(LITERALS[target])
        return self.entities[rng.choice(self._members[rng.choice(SPLITS)][target])].name

    @cached_property
    def _members(self) -> dict[Split, dict[str, list[int]]]:
        members: dict[Split, dict[str, list[int]]] = {split: {kind: [] for kind in KINDS} for split in SPLITS}
        for index, entity in enumerate(self.entities):
            members[entity.split][entity.kind].append(index)
        return members

    @cached_property
    def compared(self) -> dict[Split, list[str]]:
        """Per split, the kinds with two entities far enough apart in time. A world of fifty passages may lack some."""
        compared: dict[Split, list[str]] = {split: [] for split in SPLITS}
        for split, name in itertools.product(SPLITS, (name for name, kind in KINDS.items() if kind.year_of)):
            relation = RELATIONS[KINDS[name].year_of]
            years = [int(self._fact(subject, relation)) for subject in self._members[split][name]]
            if max(years) - min(years) >= MIN_YEARS_APART:
                compared[split].append(name)
        return compared

    def _text(self, fact: int | str) -> str:
        return fact if isinstance(fact, str) else self.entities[fact].name

    def _fact(self, subject: int, relation: Relation) -> int | str:
        entity = self.entities[subject]
        return entity.facts[KINDS[entity.kind].relations.index(relation)]

    def _hop(self, subject: int, relation: Relation, rng: random.Random) -> Hop:
        name = self.entities[subject].name
        value = self._text(self._fact(subject, relation))
        return Hop(rng.choice(relation.asks).format(name), str(subject), value, name, relation.name)

    # Each method draws one question: a key (to find duplicates), the text, the answer, and the hops.

    def _one_hop(self, split: Split, rng: random.Random) -> tuple[tuple[Any, ...], str, str, tuple[Hop, ...]]:
        kind = rng.choice([name for name in KINDS if name != "gathering"])
        subject = rng.choice(self._members[split][kind])
        hop = self._hop(subject, rng.choice(KINDS[kind].relations), rng)
        return (subject, hop.relation), hop.query, hop.value, (hop,)

    def _two_hop(self, split: Split, rng: random.Random) -> tuple[tuple[Any, ...], str, str, tuple[Hop, ...]]:
        kind, first, second = rng.choice(CHAINS)
        subject = rng.choice(self._members[split][kind])
        bridge = self._fact(subject, first)
        assert isinstance(bridge, int)
        hops = (self._hop(subject, first, rng), self._hop(bridge, second, rng))
        description = rng.choice(first.phrases).format(self.entities[subject].name)
        return (subject, first.name, second.name), rng.choice(second.asks).format(description), hops[1].value, hops

    def _comparison(self, split: Split, rng: random.Random) -> tuple[tuple[Any, ...], str, str, tuple[Hop, ...]]:
        name = rng.choice(self.compared[split])
        kind, relation = KINDS[name], RELATIONS[KINDS[name].year_of]
        while True:
            pair = rng.sample(self._members[split][name], 2)
            years = [int(self._fact(subject, relation)) for subject in pair]
            if abs(years[0] - years[1]) >= MIN_YEARS_APART:
                break
        template, later = rng.choice(kind.compares)
        hops = tuple(self._hop(subject, relation, rng) for subject in pair)
        answer = hops[int((years[1] > years[0]) == later)].subject
        return (*sorted(pair), later), template.format(*(hop.subject for hop in hops)), answer, hops


def generate_world(passages: int = 2000, seed: int = 0, *, name_words: int = 2) -> World:
    """Draws a world of exactly `passages` passages, from 50 to more than a million.

    Args:
        name_words (`int`, *optional*, defaults to `2`): Words per name; large worlds use more.

    Raises:
        UserError: for too few or too many passages.
    """
    if not MIN_PASSAGES <= passages <= MAX_PASSAGES:
        raise UserError(f"a world has at least {MIN_PASSAGES} and at most {MAX_PASSAGES:,} passages; got {passages}")
    rng = random.Random(f"{seed}/world")

    # 1. Names, and which entities are held out.
    counts = _counts(passages)
    named = [
        (kind, name) for kind, count in counts.items() for name in _draw_names(KINDS[kind], count, name_words, rng)
    ]
    held_out = [rank < max(2, round(count * TEST_SHARE)) for count in counts.values() for rank in range(count)]
    order = list(zip(named, held_out, strict=True))
    rng.shuffle(order)
    members: dict[Split, dict[str, list[int]]] = {split: {kind: [] for kind in KINDS} for split in SPLITS}
    for index, ((kind, _), test) in enumerate(order):
        members["test" if test else "train"][kind].append(index)

    # 2. Facts, within each split.
    facts: dict[int, tuple[int | str, ...]] = {}
    for split in SPLITS:
        for kind in KINDS:
            for index in members[split][kind]:
                drawn: list[int | str] = []
                for relation in KINDS[kind].relations:
                    literals = LITERALS.get(relation.target)
                    drawn.append(rng.choice(literals) if literals else rng.choice(members[split][relation.target]))
                facts[index] = tuple(drawn)
        _move_capitals_home(facts, members[split], rng)

    return World(
        seed,
        tuple(
            Entity(kind, name, "test" if test else "train", facts[index])
            for index, ((kind, name), test) in enumerate(order)
        ),
    )


def _counts(passages: int) -> dict[str, int]:
    """The number of entities of each kind, `passages` in all; at least four, so that each split can compare two."""
    counts = {name: max(4, round(passages * kind.share)) for name, kind in KINDS.items()}
    counts["person"] += passages - sum(counts.values())
    return counts


def _draw_names(kind: Kind, count: int, words_at_least: int, rng: random.Random) -> list[str]:
    """Distinct names of `words_at_least` words or more, drawn from few enough words that names share them."""
    pools: list[Sequence[str]] = [WORDS[key] for key in kind.name]
    while len(pools) < words_at_least or 3 * count > math.prod(map(len, pools)):
        pools.insert(1, WORDS[kind.middle])
    # About one in eight combinations of the words is a name.
    shrink = min(1.0, (8 * count / math.prod(map(len, pools))) ** (1 / len(pools)))
    pools = [rng.sample(pool, max(2, math.ceil(len(pool) * shrink))) for pool in pools]
    capacity = math.prod(map(len, pools))
    names: list[str] = []
    drawn = count
    # Names that repeat a word are dropped: draw more until enough are left.
    while len(names) < count:
        if drawn > 2 * capacity:
            raise RuntimeError(f"there are no {count} names of kind {kind.middle} in {capacity} combinations")
        drawn += drawn // 4 + 8
        candidates = (_combine(pools, code) for code in rng.sample(range(capacity), min(capacity, drawn)))
        names = [" ".join(words) for words in candidates if len(set(words)) == len(words)][:count]
    return names


def _combine(pools: Sequence[Sequence[str]], code: int) -> list[str]:
    """The combination with number `code`, one word from each pool."""
    words: list[str] = []
    for pool in pools:
        code, rank = divmod(code, len(pool))
        words.append(pool[rank])
    return words


def _move_capitals_home(
    facts: dict[int, tuple[int | str, ...]], members: dict[str, list[int]], rng: random.Random
) -> None:
    """Moves each capital into its own country, and makes it the capital of only that country."""
    towns = rng.sample(members["town"], len(members["country"]))
    for country, town in zip(members["country"], towns, strict=True):
        facts[country] = (town, *facts[country][1:])
        facts[town] = (country, *facts[town][1:])
