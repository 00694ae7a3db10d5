"""Vector indexes over FAISS: chosen by a word, sized beforehand, built in little memory, calibrated, opened mapped.

plans.py         the words, and what each costs
build.py         vectors in, one FAISS file out, in slices
calibrate.py     recall@3 against exact search, and the setting that reaches it
open.py          a file becomes a `VectorSearch`, on CPU or GPUs
search.py        `VectorSearch`; FAISS on CPU
exact.py         exact search by torch; gpu.py, gpu_kernel.py: on GPUs
faiss_setup.py   the one import of FAISS

print(plan("small", 21_000_000, 768).describe())
build_vectors(folder, vectors, index="small")
scores, rows = open_vectors(folder).search(queries, k=3)
"""

from trl_search.retrieval.dense.vectors.build import build_vectors
from trl_search.retrieval.dense.vectors.faiss_setup import faiss_module
from trl_search.retrieval.dense.vectors.open import open_faiss_file, open_vectors
from trl_search.retrieval.dense.vectors.plans import VECTOR_INDEXES, VectorPlan, plan
from trl_search.retrieval.dense.vectors.search import VectorSearch

__all__ = [
    "VECTOR_INDEXES",
    "VectorPlan",
    "VectorSearch",
    "build_vectors",
    "faiss_module",
    "open_faiss_file",
    "open_vectors",
    "plan",
]
