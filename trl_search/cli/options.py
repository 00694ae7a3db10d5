"""Options that several commands share, so that they have the same name and meaning everywhere."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from trl_search.common.bounds import check_not_negative, check_positive_share
from trl_search.common.errors import UserError
from trl_search.common.files import parse_object
from trl_search.common.launched import launched_rank

if TYPE_CHECKING:
    from trl_search.config.searched import Searched
    from trl_search.data import QuestionFields
    from trl_search.retrieval.corpus.fields import Fields
    from trl_search.types import Sampling

# What `serve`, `search`, `eval` and `chat` can search (`config/searched.py`).
SEARCHED = "an index folder, a server's address, a run's folder, a kind of retriever (bm25, dense, web ...), or world"


def add_retriever_options(parser: Any) -> None:
    """Adds `--retriever_options`; `parser` may be a group."""
    parser.add_argument(
        "--retriever_options",
        default="{}",
        metavar="JSON",
        help="""options of the retriever: '{"index": "indexes/wiki"}'""",
    )


def add_world_options(parser: Any) -> None:
    """Adds the size and the seed of the embedded world."""
    parser.add_argument(
        "--world_passages", type=int, default=2000, metavar="N", help="passages of the embedded world (default: 2000)"
    )
    parser.add_argument(
        "--world_seed", type=int, default=0, metavar="N", help="seed of the embedded world (default: 0)"
    )


def searched_of(args: argparse.Namespace, word: str) -> Searched:
    """Resolves what a word tells a command to search, with `--retriever_options` and the size of the world."""
    from trl_search.config.searched import resolve_searched

    options = parse_object(args.retriever_options, "--retriever_options", '{"index": "indexes/wiki"}')
    return resolve_searched(word, options, world_size=(args.world_passages, args.world_seed))


def asked_questions(words: Iterable[str]) -> list[str]:
    """The questions of a command line, or of stdin, as text.

    Bytes that the locale's encoding lacks reach Python as halves of surrogate pairs, which no search matches and no
    tokenizer reads. They are read as UTF-8, also in an ASCII locale.

    Raises:
        UserError: for a question that is not UTF-8.
    """
    try:
        return [word.encode("utf-8", "surrogateescape").decode("utf-8") for word in words]
    except UnicodeError as error:
        raise UserError(f"a question is not UTF-8 ({error}): write it in UTF-8") from None


@contextlib.contextmanager
def explained_interrupt(how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Gives a `KeyboardInterrupt` inside a message that says how to resume; `trl-search` prints it."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on()) from None


def tell_of_imports() -> None:
    """Tells a user at a terminal why nothing happens: torch and TRL take 5 to 10 s to import."""
    if sys.stderr.isatty() and "torch" not in sys.modules and launched_rank() == 0:
        print("importing torch and TRL ...", file=sys.stderr, flush=True)


def add_sampling_options(parser: Any, temperature: float, note: str = "0 is greedy") -> None:
    """Adds the sampling options that [`sampling_of`] reads; `parser` may be a group."""
    parser.add_argument("--temperature", type=float, default=temperature, help=f"{note} (default: %(default)g)")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="tokens are sampled from the likeliest ones with this total probability (default: 1)",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, help="tokens are sampled from this many likeliest ones; 0: all (default: 0)"
    )


def sampling_of(args: argparse.Namespace, *, seed: int = 0) -> Sampling:
    """The sampling settings of `--temperature`, `--top_p` and `--top_k`."""
    from trl_search.types import Sampling

    check_not_negative(temperature=args.temperature, top_k=args.top_k)
    check_positive_share(top_p=args.top_p)
    return Sampling(args.temperature, args.top_p, args.top_k, seed=seed)


def add_question_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the columns of a question file."""
    columns = parser.add_argument_group(
        "columns of a question file", "The columns of FlashRAG, Search-R1 and verl are found without these options."
    )
    columns.add_argument("--question_field", metavar="COLUMN", help="column of the question")
    columns.add_argument(
        "--answers_field",
        metavar="COLUMN",
        help="column of the golden answers: a string, a list, or an object as in TriviaQA or SQuAD",
    )
    columns.add_argument("--id_field", metavar="COLUMN", help="column of the id")


def question_fields(args: argparse.Namespace) -> QuestionFields:
    from trl_search.data import QuestionFields

    return QuestionFields(args.question_field, args.answers_field, args.id_field)


def add_passage_fields(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name the fields of a corpus."""
    for part in ("id", "title", "text"):
        parser.add_argument(f"--{part}_field", metavar="NAME", help=f"the field or column that holds the {part}")


def passage_fields(args: argparse.Namespace) -> Fields:
    from trl_search.retrieval.corpus.fields import Fields

    return Fields(args.id_field, args.title_field, args.text_field)
