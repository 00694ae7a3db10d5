"""Finds the fields of a row that hold the id, the title and the text of a passage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trl_search.common.errors import UserError
from trl_search.types import Passage

# In search order: wiki-18's and ours; BEIR's; those of ir_datasets, Pyserini and Tevatron.
ID_NAMES = ("id", "_id", "doc_id", "docid")
TEXT_NAMES = ("contents", "text")
TITLE, URL = "title", "url"


@dataclass(frozen=True)
class Fields:
    """The names of a corpus's fields, if they are not the usual ones.

    Args:
        id_field (`str`, *optional*): By default the first of "id", "_id", "doc_id" and "docid" that the row has.
        title_field (`str`, *optional*): By default "title", which may be missing.
        text_field (`str`, *optional*): By default "contents" (a quoted title in its first line, then the text), else
            "text".
    """

    id_field: str | None = None
    title_field: str | None = None
    text_field: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        return [name for name in (self.id_field, self.title_field, self.text_field) if name is not None]

    def check_use(self, corpus: object) -> None:
        """Rejects field names if no corpus is read: an index records its own.

        Raises:
            UserError: if fields are named for a corpus that has none.
        """
        if self.given and corpus is None:
            raise UserError("id_field, title_field and text_field apply only when a corpus is read: leave them out")

    def choose(self, names: Iterable[str], where: str) -> list[str]:
        """The columns of a table to read.

        Raises:
            UserError: if no column holds the id or the text, or a named one is missing.
        """
        there = list(names)
        for name in self.given:
            if name not in there:
                raise UserError(f"{where}: {name!r} is missing; {_listed(there)}")
        self.id_name(dict.fromkeys(there, ""), where)
        self.text_name(dict.fromkeys(there, ""), where)
        known = {*ID_NAMES, *TEXT_NAMES, TITLE, URL, *self.given}
        return [name for name in there if name in known]

    def id_name(self, row: Mapping[str, Any], where: str) -> str:
        """The field of the id. A null field counts as missing, because every row of a table has every column."""
        missing = "'id' is missing (and _id, doc_id, docid)"
        return self.id_field or _first(ID_NAMES, row, where, missing, "id_field")

    def text_name(self, row: Mapping[str, Any], where: str) -> str:
        """The field of the text, chosen in the same way."""
        return self.text_field or _first(
            TEXT_NAMES, row, where, "neither 'contents' nor 'text' is there", "text_field"
        )


def _first(names: Iterable[str], row: Mapping[str, Any], where: str, missing: str, option: str) -> str:
    found = next((name for name in names if row.get(name) is not None), None)
    if found is None:
        raise UserError(f"{where}: {missing}; {_listed(row)}; name yours with --{option} ({option}=...), or add one")
    return found


def _listed(names: Iterable[str]) -> str:
    return f"the fields are: {', '.join(map(str, names))[:300]}"


USUAL_FIELDS = Fields()


def passage_row(passage: Passage) -> dict[str, str]:
    """A passage as a row with the usual fields, without its score."""
    row = {"id": passage.id, "title": passage.title, "text": passage.text}
    return row if passage.url is None else {**row, URL: passage.url}
