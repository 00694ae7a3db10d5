"""The named question sets: their repositories on the hub, their splits, and their default splits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets

from trl_search.common.errors import UserError
from trl_search.common.hub import refuse_unreachable_dataset
from trl_search.common.table_files import Row

FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubSet:
    """A dataset on the hub."""

    repository: str
    config: str | None
    split: str  # the default split, on which published numbers were measured
    splits: Mapping[str, int] = field(default_factory=dict)  # how many questions each split had when it was published

    @property
    def rows(self) -> int | None:
        return self.splits.get(self.split)

    @property
    def evaluation_split(self) -> str:
        """The split to evaluate on. The default split of a training set would be the training data."""
        if self.split != "train":
            return self.split
        return "test" if "test" in self.splits or "dev" not in self.splits else "dev"


HUB_SETS: dict[str, HubSet] = {
    # Its test split combines the seven sets below, distinguished by data_source.
    "nq_hotpotqa": HubSet("PeterJinGo/nq_hotpotqa_train", None, "train", {"train": 169_615, "test": 51_713}),
    "nq": HubSet(FLASHRAG, "nq", "test", {"train": 79_168, "dev": 8_757, "test": 3_610}),
    "triviaqa": HubSet(FLASHRAG, "triviaqa", "test", {"train": 78_785, "dev": 8_837, "test": 11_313}),
    "popqa": HubSet(FLASHRAG, "popqa", "test", {"test": 14_267}),
    "hotpotqa": HubSet(FLASHRAG, "hotpotqa", "dev", {"train": 90_447, "dev": 7_405}),
    # A training set, with the titles of the passages that hold the answers.
    "hotpotqa_train": HubSet(FLASHRAG, "hotpotqa", "train", {"train": 90_447, "dev": 7_405}),
    "2wikimultihopqa": HubSet(FLASHRAG, "2wikimultihopqa", "dev", {"train": 15_000, "dev": 12_576}),
    "musique": HubSet(FLASHRAG, "musique", "dev", {"train": 19_938, "dev": 2_417}),
    "bamboogle": HubSet(FLASHRAG, "bamboogle", "test", {"test": 125}),
}
EVALUATION_SETS = tuple(
    name for name, held in HUB_SETS.items() if held.repository == FLASHRAG and held.split != "train"
)


def is_hub_set(name_or_path: str | Path) -> bool:
    """Whether a name is that of a hub set. A file or folder of the same name takes precedence."""
    return str(name_or_path) in HUB_SETS and not Path(name_or_path).expanduser().exists()


def read_hub_set(name: str, split: str, choose: Callable[[Sequence[str], str], Sequence[str]]) -> Iterator[Row]:
    """Reads a set's rows from the hub. `choose` takes their columns and the name of the set; it returns the columns to
    read, or raises.

    Raises:
        UserError: if the hub, the set or its split cannot be reached.
    """
    hub_set = HUB_SETS[name]
    said = f"dataset {name!r} ({hub_set.repository})"
    refuse_unreachable_dataset(hub_set.repository, hub_set.config, said)
    try:
        dataset = datasets.load_dataset(hub_set.repository, hub_set.config, split=split)
    except Exception as error:  # the hub's client raises the errors of half a dozen libraries
        raise UserError(
            f"{said} cannot be loaded from the hub: {error}. Without a network, "
            "bring its files here and give their path."
        ) from error
    published = hub_set.splits.get(split, len(dataset))
    if len(dataset) != published:
        logger.warning(
            "%s (%s) holds %s questions, and published numbers are for %s: they are not comparable",
            name,
            split,
            f"{len(dataset):,}",
            f"{published:,}",
        )
    columns = choose(dataset.column_names, f"dataset {name!r}")
    for number, row in enumerate(dataset.select_columns(list(columns)), start=1):
        yield f"dataset {name!r}, row {number}", row
