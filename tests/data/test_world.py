"""The embedded world: sizes, names, facts that occur in one passage only, splits without shared facts, questions."""

from __future__ import annotations

from collections import Counter

import pytest

from trl_search.common.errors import UserError
from trl_search.data.world import MIN_YEARS_APART, SPLITS, Question, World, generate_world
from trl_search.data.world_language import KINDS, LITERALS, WORDS
from trl_search.retrieval import Retriever


@pytest.mark.parametrize("passages", [50, 333, 2000, 20_000])
def test_the_world_has_the_given_number_of_passages_with_unique_names(passages: int) -> None:
    world = generate_world(passages=passages, seed=5)
    assert [passage.id for passage in world.iter_passages()] == [str(index) for index in range(passages)]
    assert len({entity.name for entity in world.entities}) == passages


def test_the_seed_determines_the_world_and_its_questions(world: World) -> None:
    again, other = generate_world(passages=1000, seed=3), generate_world(passages=1000, seed=4)
    assert again == world and again.passages == world.passages
    assert again.questions("train", limit=50) == world.questions("train", limit=50)
    assert other.passages != world.passages


def test_names_have_two_words_in_small_worlds_and_as_many_as_needed_in_large_ones() -> None:
    assert {len(entity.name.split()) for entity in generate_world(passages=1000).entities} == {2}
    assert {len(entity.name.split()) for entity in generate_world(passages=300, name_words=3).entities} == {3}
    assert {len(entity.name.split()) for entity in generate_world(passages=20_000).entities} == {3}


def test_names_share_words(world: World) -> None:
    surnames = Counter(entity.name.split()[-1] for entity in world.entities if entity.kind == "person")
    assert sum(surnames.values()) / len(surnames) > 4


def test_word_pools_are_disjoint() -> None:
    words = [word for pool in WORDS.values() for word in pool]
    assert len(words) == len(set(words))
    prose = {word.strip(".,?:") for kind in KINDS.values() for text in kind.sentences for word in text.split()}
    assert not prose & (set(words) | {value for pool in LITERALS.values() for value in pool})


def test_a_passage_states_every_fact_of_its_entity(world: World) -> None:
    for index, entity in enumerate(world.entities):
        text = world.passage(index).text
        assert entity.name in text
        for fact in entity.facts:
            assert (fact if isinstance(fact, str) else world.entities[fact].name) in text


def test_no_fact_crosses_the_split(world: World) -> None:
    for entity in world.entities:
        for fact in entity.facts:
            assert isinstance(fact, str) or world.entities[fact].split == entity.split


def test_a_held_out_question_shares_no_entity_with_a_training_question(world: World) -> None:
    def about(questions: list[Question]) -> set[str]:
        return {hop.subject for question in questions for hop in question.hops}

    train, test = world.questions("train"), world.questions("test")
    assert train and test and not about(train) & about(test)
    assert all(question.split == "train" for question in train)
    assert len({question.question for question in train}) > 0.99 * len(train)


def test_capitals_lie_in_their_country(world: World) -> None:
    for index, entity in enumerate(world.entities):
        if entity.kind == "country":
            assert isinstance(entity.facts[0], int) and world.entities[entity.facts[0]].facts[0] == index


def test_the_hops_of_a_question_lead_to_its_answer(world: World) -> None:
    for question in world.questions("test"):
        for hop in question.hops:
            passage = world.passage(int(hop.passage_id))
            assert passage.title == hop.subject and hop.subject in hop.query and hop.value in passage.text
        answer = question.golden_answers[0]
        if question.type == "comparison":
            years = [int(hop.value) for hop in question.hops]
            assert answer in {hop.subject for hop in question.hops} and abs(years[0] - years[1]) >= MIN_YEARS_APART
            wants_later = any(word in question.question for word in ("later", "younger"))
            right = years.index(max(years) if wants_later else min(years))
            assert question.hops[right].subject == answer
        else:
            assert question.hops[-1].value == answer and question.hops[0].subject in question.question
        if question.type == "two_hop":
            bridge = question.hops[1].subject
            assert question.hops[0].value == bridge and bridge not in question.question


def test_the_three_types_of_questions_have_the_right_shares() -> None:
    counts = Counter(question.type for question in generate_world(passages=4000).questions("train", limit=2000))
    assert [round(counts[name] / 2000, 1) for name in ("one_hop", "two_hop", "comparison")] == [0.3, 0.5, 0.2]


def test_bm25_finds_the_passage_of_the_first_hop_but_not_of_the_second(world: World, retriever: Retriever) -> None:
    questions = [question for question in world.questions("test") if question.type == "two_hop"]
    hops = [hop for question in questions for hop in question.hops]
    found = retriever.search([hop.query for hop in hops], 3)
    recalled = [hop.passage_id in {p.id for p in passages} for hop, passages in zip(hops, found, strict=True)]
    assert sum(recalled) > 0.95 * len(recalled)
    at_once = retriever.search([question.question for question in questions], 3)
    both = [
        {hop.passage_id for hop in question.hops} <= {p.id for p in passages}
        for question, passages in zip(questions, at_once, strict=True)
    ]
    assert sum(both) < 0.15 * len(both)


def test_a_world_too_small_for_comparisons_has_no_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few works may include no two that are far enough apart in time: in about half of the worlds with 90 years."""
    monkeypatch.setattr("trl_search.data.world.MIN_YEARS_APART", 90)
    compared = []
    for seed in range(10):
        world = generate_world(50, seed)
        for split in SPLITS:
            types = {question.type for question in world.questions(split)}
            compared.append("comparison" in types)
            assert types == {"one_hop", "two_hop"} | ({"comparison"} if world.compared[split] else set())
    assert 0 < sum(compared) < len(compared)


def test_bad_arguments_are_refused_clearly(world: World) -> None:
    with pytest.raises(UserError, match="at least 50 and at most"):
        generate_world(passages=49)
    with pytest.raises(UserError, match="no split 'dev'"):
        world.questions("dev")  # type: ignore[arg-type]
