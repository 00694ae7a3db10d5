"""Compiles BM25's search on import, so that processes forked after this import save two seconds."""

from __future__ import annotations

import numpy as np

from trl_search.retrieval.bm25.postings import Postings

ONE_POSTING = (np.zeros(1, np.int32), np.ones(1, np.float32), np.array([0, 1], np.int64))
Postings(*ONE_POSTING, passages=1, backend="numba")
for array in ONE_POSTING:  # like the arrays of an opened index, for which numba compiles again
    array.flags.writeable = False
Postings(*ONE_POSTING, passages=1, backend="numba")
