"""The language of the fictional encyclopedia: names, relations, and the sentences and questions about them.

Everything is a template over names. A space precedes each name that a policy may copy, so that a tokenizer trained on
these sentences has one token per word of a name. Values that are not entities (occupations, products, years) come from
`LITERALS`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact about one kind of entity."""

    name: str  # unique among all kinds
    target: str  # the kind of entity that is the value, or a key of `LITERALS`
    keyword: str  # the word for the value: "I need the founder", "founder of Hexatron Mills"
    asks: tuple[str, ...] = ()  # questions for the value; `{}` is the subject. Empty: the fact is never asked for.
    phrases: tuple[str, ...] = ()  # descriptions that replace the value in a two-hop question


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of entity: its share of the encyclopedia, its names, and its sentences."""

    share: float
    name: tuple[str, str]  # the keys of `WORDS` from which the first and the last word of a name are drawn
    middle: str  # the key for the words between them; large worlds need one or two
    relations: tuple[Relation, ...]
    sentences: tuple[str, ...]  # passage texts; `{name}` and every relation's name are fields
    year_of: str = ""
    compares: tuple[tuple[str, bool], ...] = ()  # questions that compare `year_of`; True asks for the later


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _blend(heads: str, tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in heads.split() for tail in tails.split())


# Disjoint sets of capitalised words. None of them occurs in the sentences either.
WORDS: dict[str, tuple[str, ...]] = {
    "given": _blend("Al Be Ca Do El Fa Ga Ha Ir Jo Ka Li Mi Ne Or Pe Ro Sa Ta Vi", "ra vin len mos dra rik na"),
    "surname": _blend(
        "Tal Mer Har Bren Cald Dorn Fen Gris Holt Jas Kel Lor Mor Nor Pel Quin Ras Sten Thor Wil",
        "vane mott wick lund sen gard",
    ),
    "qualifier": _words("Port New Upper Lower Fort Saint West East North South Lake Mount"),
    "place": _blend("Es Os Ar Ber Cor Dun Ev Fal Gil Hes Is Kar Lin Mal Nev Ol Pra Rud", "kel lan mere holm ford nis"),
    "brand": _blend("Axo Bri Cry Dyna Elto Flu Gly Hexa Iso Jov Kry Luma Novo Opti", "dyne tron plex zor lex nox"),
    "trade": _words("Mills Works Forge Foundry Shipping Motors Press Glass Textiles Optics Mining Railways"),
    "adjective": _words(
        "Silent Golden Broken Hidden Crimson Distant Frozen Gentle Hollow Iron Lonely Pale Quiet Restless "
        "Scarlet Secret Shining Silver Sleeping Stolen Velvet Wandering White Winter Amber Bitter Burning "
        "Copper Empty Endless Fallen Fading Hungry Ivory Last Laughing Lost Midnight Painted Patient Rising "
        "Ruined Sacred Salted Sunken Tangled Tender Vanishing Violet Wild Wooden Woven"
    ),
    "noun": _words(
        "Harbor Garden Mirror River Tower Lantern Orchard Bridge Castle Compass Crown Desert Feather Forest "
        "Hammer Island Kingdom Ladder Meadow Mountain Ocean Palace Prairie Raven Sparrow Staircase Storm "
        "Summer Throne Thunder Valley Village Violin Voyage Window Anchor Arrow Autumn Candle Canyon Chapel "
        "Dagger Falcon Fountain Horizon Journey Labyrinth Letter Locket Marble Moon Needle Nightingale Oath "
        "Pearl Shadow"
    ),
    "nation": _blend("Zan Vel Ygr Umb Xan Wex Thal Sar Rhe Qua", "moria dovia stria gonia"),
    "realm": _words("Republic Union Federation Isles Empire Commonwealth Confederacy Dominion"),
    "gathering": _words("Fair Festival Congress Parade Regatta Banquet Exhibition Tournament Carnival Jubilee"),
}

LITERALS: dict[str, tuple[str, ...]] = {
    "year": tuple(str(year) for year in range(1800, 1900)),
    "occupation": _words(
        "baker botanist carpenter chemist clerk composer cook dancer dentist doctor farmer fisher gardener "
        "geologist hunter jeweler judge lawyer librarian mason miner nurse painter pilot poet sailor sculptor "
        "singer surgeon tailor teacher weaver"
    ),
    "product": _words(
        "barrels bells boots bottles bricks buttons cables carpets chairs clocks curtains engines fiddles "
        "gloves hats keys knives lamps lenses locks mirrors nails pencils pianos plates ropes saddles scales "
        "ships soap stoves tiles"
    ),
    "currency": _words("crown dinar ducat florin guilder krona lira mark peso rand ruble shilling taler zloty"),
}

KINDS: dict[str, Kind] = {
    "person": Kind(
        share=0.40,
        name=("given", "surname"),
        middle="given",
        relations=(
            Relation("birthplace", "town", "birthplace",
                     ("Where was {} born?", "In which town was {} born?", "What is the birthplace of {}?"),
                     ("the birthplace of {}", "the town where {} was born")),
            Relation("birth_year", "year", "birth year", ("When was {} born?", "In which year was {} born?")),
            Relation("occupation", "occupation", "occupation",
                     ("What was the occupation of {}?", "What did {} do for a living?")),
            Relation("employer", "company", "employer",
                     ("Which company employed {}?", "Who was the employer of {}?"),
                     ("the employer of {}", "the company that employed {}")),
        ),
        sentences=(
            "{name} was born in {birthplace} in {birth_year} and worked as a {occupation} for {employer}.",
            "{name}, a {occupation} employed by {employer}, was born in {birth_year} in {birthplace}.",
            "Born in {birthplace} in {birth_year}, {name} was a {occupation} at {employer}.",
            "{name} worked for {employer} as a {occupation}. Birthplace: {birthplace}, in {birth_year}.",
        ),
        year_of="birth_year",
        compares=(
            ("Who was born earlier, {} or {}?", False),
            ("Who was born first, {} or {}?", False),
            ("Who is older, {} or {}?", False),
            ("Who was born later, {} or {}?", True),
            ("Who is younger, {} or {}?", True),
        ),
    ),
    "company": Kind(
        share=0.16,
        name=("brand", "trade"),
        middle="brand",
        relations=(
            Relation("founder", "person", "founder",
                     ("Who founded {}?", "Who was the founder of {}?"),
                     ("the founder of {}", "the person who founded {}")),
            Relation("headquarters", "town", "head office",
                     ("Where is {} based?", "In which town is {} based?", "Where is the head office of {}?"),
                     ("the town where {} is based", "the home town of {}")),
            Relation("founding_year", "year", "founding year",
                     ("When was {} founded?", "In which year was {} founded?")),
            Relation("product", "product", "product", ("What does {} make?", "Which product does {} make?")),
        ),
        sentences=(
            "{name} was founded by {founder} in {founding_year}, makes {product} and is based in {headquarters}.",
            "Based in {headquarters}, {name} makes {product}. The founder in {founding_year} was {founder}.",
            "{founder} founded {name} in {founding_year}. The company makes {product} in {headquarters}.",
        ),
        year_of="founding_year",
        compares=(
            ("Which company was founded earlier, {} or {}?", False),
            ("Which company is older, {} or {}?", False),
            ("Which company was founded later, {} or {}?", True),
        ),
    ),
    "town": Kind(
        share=0.14,
        name=("qualifier", "place"),
        middle="place",
        relations=(
            Relation("country", "country", "country",
                     ("In which country is {}?", "Which country is {} in?"),
                     ("the country of {}", "the country where {} lies")),
            Relation("mayor", "person", "mayor",
                     ("Who is the mayor of {}?", "Who governs {} as mayor?"), ("the mayor of {}",)),
        ),
        sentences=(
            "{name} is a town in {country}. The mayor is {mayor}.",
            "{name}, governed by mayor {mayor}, lies in {country}.",
            "The mayor of {name}, a town in {country}, is {mayor}.",
        ),
    ),
    "work": Kind(
        share=0.16,
        name=("adjective", "noun"),
        middle="adjective",
        relations=(
            Relation("author", "person", "author",
                     ("Who wrote {}?", "Who is the author of {}?"), ("the author of {}", "the writer of {}")),
            Relation("publication_year", "year", "year",
                     ("When was {} published?", "In which year was {} published?")),
        ),
        sentences=(
            "{name} is a novel written by {author} and published in {publication_year}.",
            "Published in {publication_year}, {name} is a novel by {author}.",
            "The novel {name} appeared in {publication_year}. The author is {author}.",
        ),
        year_of="publication_year",
        compares=(
            ("Which novel was published first, {} or {}?", False),
            ("Which novel is older, {} or {}?", False),
            ("Which novel was published later, {} or {}?", True),
        ),
    ),
    "country": Kind(
        share=0.02,
        name=("nation", "realm"),
        middle="nation",
        relations=(
            Relation("capital", "town", "capital",
                     ("What is the capital of {}?", "Which town is the capital of {}?"), ("the capital of {}",)),
            Relation("currency", "currency", "currency",
                     ("What is the currency of {}?", "Which currency is used in {}?")),
        ),
        sentences=(
            "{name} is a country with the capital {capital}. People pay with the {currency}.",
            "The capital of {name} is {capital} and the currency is the {currency}.",
        ),
    ),
    # Nothing is asked about a gathering: its passage names entities and states no fact about them.
    "gathering": Kind(
        share=0.12,
        name=("adjective", "gathering"),
        middle="place",
        relations=(
            Relation("guest", "person", "guest"),
            Relation("sponsor", "company", "sponsor"),
            Relation("venue", "town", "venue"),
        ),
        sentences=(
            "{guest} gave a speech at the {name} in {venue}, paid for by {sponsor}.",
            "{sponsor} invited {guest} to the {name} in {venue}.",
            "In {venue} the {name} was opened by {guest} and {sponsor}.",
        ),
    ),
}  # fmt: skip

RELATIONS: dict[str, Relation] = {relation.name: relation for kind in KINDS.values() for relation in kind.relations}
