"""`trl-search index` with small shards, as one of several processes; it writes how many passages it encoded.

COUNTS=FOLDER SHARD_ROWS=200 python -m tests.support.shared_build --corpus ...
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_search.cli.main import main
from trl_search.retrieval.dense.corpus_vectors import encode_corpus
from trl_search.retrieval.dense.encoder import Encoder

encode = Encoder.encode_passages


def encode_and_count(self: Encoder, texts: Sequence[str], **options: Any) -> Any:
    with open(Path(os.environ["COUNTS"], os.environ.get("RANK", "0")), "a") as file:
        file.write(f"{len(texts)}\n")
    return encode(self, texts, **options)


if __name__ == "__main__":
    Encoder.encode_passages = encode_and_count  # type: ignore[method-assign]
    encode_corpus.__kwdefaults__["shard_rows"] = int(os.environ["SHARD_ROWS"])
    sys.exit(main())
