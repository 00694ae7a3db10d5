"""A retriever behind `POST /retrieve`: `trl-search serve`, or `make_app(retriever, ServerConfig())` in yours.

config.py      limits, queue, cache, token
app.py         the routes, the token, the order in which a request is refused
service.py     one request: cache, bounded queue, batches across requests, errors as data
cache.py       results by (query, k), least recently used out first
connection.py  a connection under uvicorn: a head read within limits
body.py        a body read within limits
observe.py     one log line and one measurement per request
metrics.py     the page for Prometheus
run.py         a process: socket, loading, signals
"""

from trl_search.retrieval.server.app import make_app
from trl_search.retrieval.server.config import ServerConfig

__all__ = ["ServerConfig", "make_app"]
