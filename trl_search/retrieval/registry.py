"""The registries of retrievers and index kinds. Register a new kind here, or from an installed package.

A kind of retriever is a function `load(**options) -> Retriever`, or a subclass of `Retriever`; [`load_retriever`]
calls it. A kind of index is a `Builder` (`index/folder.py`), which `trl-search index --kind NAME` runs; the retriever
of the same name opens the index. A package registers both through entry points:

    [project.entry-points."trl_search.retrievers"]
    elastic = "my_package.elastic:load"

    [project.entry-points."trl_search.index_kinds"]
    elastic = "my_package.elastic:ElasticBuilder"
"""

from __future__ import annotations

from trl_search.common.registry import Registry

RETRIEVERS = Registry(
    "retriever",
    "trl_search.retrievers",
    {
        "bm25": "trl_search.retrieval.bm25.retriever:load",
        "dense": "trl_search.retrieval.dense.retriever:load",
        "http": "trl_search.retrieval.remote.http_retriever:HttpRetriever",
        "hybrid": "trl_search.retrieval.combine.hybrid:load",
        "opensearch": "trl_search.retrieval.engines.opensearch:load",
        "qdrant": "trl_search.retrieval.engines.qdrant:load",
        "rerank": "trl_search.retrieval.combine.rerank:load",
        "web": "trl_search.retrieval.web.retriever:load",
    },
)
INDEX_KINDS = Registry(
    "kind of index",
    "trl_search.index_kinds",
    {
        "bm25": "trl_search.retrieval.bm25.retriever:BM25Builder",
        "dense": "trl_search.retrieval.dense.retriever:DenseBuilder",
        "opensearch": "trl_search.retrieval.engines.opensearch_build:OpenSearchBuilder",
        "qdrant": "trl_search.retrieval.engines.qdrant_build:QdrantBuilder",
    },
)
