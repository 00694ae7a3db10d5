"""`trl-search chat` for a test that types into it. While the file SLOW exists, searches take two minutes.

python -m tests.support.chat_terminal SLOW chat tiny ...
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from typing import Any

from trl_search.cli.main import main
from trl_search.retrieval.bm25.retriever import BM25Retriever

search = BM25Retriever.search


def slowly(self: BM25Retriever, queries: list[str], k: int) -> Any:
    time.sleep(120 if os.path.exists(sys.argv[1]) else 0)
    return search(self, queries, k)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(150)  # for the case that it hangs
    BM25Retriever.search = slowly  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
