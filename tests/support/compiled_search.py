"""Compiles BM25's search on import: two seconds that no process pays which is forked from one that imported this."""

from __future__ import annotations

import numpy as np

from trl_search.retrieval.bm25.postings import Postings

ONE_POSTING = (np.zeros(1, np.int32), np.ones(1, np.float32), np.array([0, 1], np.int64))
Postings(*ONE_POSTING, passages=1, backend="numba")
for array in ONE_POSTING:  # as those of an index that is opened; numba compiles once more for them
    array.flags.writeable = False
Postings(*ONE_POSTING, passages=1, backend="numba")
