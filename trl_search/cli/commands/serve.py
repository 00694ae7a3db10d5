"""Serves a retriever over HTTP, with the protocol of Search-R1 and verl.

    trl-search serve indexes/wiki --port 8000
    trl-search serve dense --retriever_options '{"faiss_file": "e5_Flat.index", "corpus": "wiki-18.jsonl"}'

One process holds one index; --ray puts several processes behind one address. Trainers that expect the retrieval server
of Search-R1 or verl use http://127.0.0.1:8000/retrieve. A recipe of trl-search needs

    retriever: http://127.0.0.1:8000

Queries of concurrent requests are searched in one batch, results are cached in memory, and requests get status 503
when the queue is full. `GET /ready` is 200 once the index is loaded, `GET /metrics` is for Prometheus, and stderr gets
one line of JSON per request. On SIGTERM or Ctrl-C the server answers the requests in progress, then exits.

By default, only this machine can connect. To admit others, set a token (the environment variable TRL_SEARCH_TOKEN, or
--token_file) and --host 0.0.0.0. In a network that you do not control, put the server behind a proxy with TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trl_search.cli.options import SEARCHED, add_retriever_options, add_world_options, searched_of
from trl_search.cli.retriever_checks import retriever_checks
from trl_search.cli.start_checks import StartChecks
from trl_search.common.credentials import bearer_token
from trl_search.common.errors import UserError
from trl_search.config.searched import Searched
from trl_search.retrieval.remote.wire import Limits
from trl_search.retrieval.server.config import ServerConfig, need_packages
from trl_search.retrieval.server.run import is_loopback, listen, serve

if TYPE_CHECKING:
    from trl_search.retrieval.server.ray_serve import RayConfig

TOKEN = "TRL_SEARCH_TOKEN"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    limits, config = Limits(), ServerConfig()
    parser.add_argument("retriever", metavar="WHAT", help=SEARCHED)
    add_retriever_options(parser)
    add_world_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any free one (default: 8000)")
    parser.add_argument(
        "--token_file", metavar="FILE", help=f"file with the token that clients must send (or set {TOKEN})"
    )
    parser.add_argument("--allow_anonymous", action="store_true", help="serve other machines without a token")
    parser.add_argument("--no_access_log", action="store_true", help="do not log requests")
    several = parser.add_argument_group("several processes, on Ray Serve (docs/scaling.md)")
    several.add_argument("--ray", action="store_true", help="serve from several processes, behind one address")
    several.add_argument("--replicas", type=int, help="number of replicas (default: 2)")
    several.add_argument("--replica_cpus", type=float, help="CPUs per replica (default: 1)")
    several.add_argument(
        "--replica_gpus", type=float, help="GPUs per replica; with 0.25, four share one GPU (default: 0)"
    )
    several.add_argument(
        "--ray_address", metavar="HOST:PORT", help="address of a running cluster (default: start one)"
    )
    size = parser.add_argument_group("limits")
    for name, default, said in (
        ("passages_per_query", limits.default_topk, "passages per query if a request does not say"),
        ("max_passages_per_query", limits.max_topk, "most passages per query that a request may ask for"),
        ("max_queries", limits.max_queries, "most queries per request"),
        ("max_queued", config.max_queued, "most queries waiting or being searched"),
        ("max_batch", config.max_batch, "most queries per search batch"),
        ("cache_mb", config.cache_bytes >> 20, "MB of memory for cached results; 0: no cache"),
        ("search_timeout_s", config.search_timeout_s, "timeout of one search, in seconds"),
    ):
        told = f"{said} (default: %(default)s)"
        size.add_argument(f"--{name}", type=type(default), default=default, metavar="N", help=told)


def run(args: argparse.Namespace) -> int:
    found = StartChecks()
    token = found.see("token", lambda: _token(args))
    searched = found.see("retriever", lambda: searched_of(args, args.retriever))
    found.add(retriever_checks(searched) if searched is not None else ())
    config = found.see("limits", lambda: _config(args, searched, token))
    ray = found.see("ray", lambda: _ray_config(args))
    found.see("packages", lambda: need_packages(on_ray=args.ray))
    found.see("address", lambda: listen(args.host, args.port).close())
    found.refuse()
    assert searched is not None and config is not None
    started = time.monotonic()
    _tell(f"starting {ray.replicas} replicas ..." if ray else f"loading {config.name} ...")

    def loaded(url: str) -> None:
        _say_ready(url, config, started)

    if ray is None:
        serve(searched.load, config, listen(args.host, args.port), loaded)
    else:
        from trl_search.retrieval.server.ray_serve import serve_on_ray

        options = searched.load_options()
        serve_on_ray(searched.kind, options, config, ray, host=args.host, port=args.port, loaded=loaded)
    _tell("stopped; what was under way is answered")
    return 0


def _config(args: argparse.Namespace, searched: Searched | None, token: str | None) -> ServerConfig:
    kind = "" if searched is None else searched.kind
    return ServerConfig(
        limits=Limits(
            max_queries=args.max_queries, max_topk=args.max_passages_per_query, default_topk=args.passages_per_query
        ),
        max_queued=args.max_queued,
        max_batch=args.max_batch,
        search_timeout_s=args.search_timeout_s,
        cache_bytes=args.cache_mb << 20,
        fingerprint="" if searched is None else fingerprint_of(searched),
        name=kind if kind in ("", args.retriever) else f"{kind} from {args.retriever}",
        token=token,
        access_log=not args.no_access_log,
    )


def _ray_config(args: argparse.Namespace) -> RayConfig | None:
    from trl_search.retrieval.server.ray_serve import RayConfig

    options = {"replicas": "replicas", "cpus": "replica_cpus", "gpus": "replica_gpus", "address": "ray_address"}
    given = {name: value for name, option in options.items() if (value := getattr(args, option)) is not None}
    if given and not args.ray:
        raise UserError(f"--{options[next(iter(given))]} needs --ray: add --ray, or leave the option out")
    return RayConfig(**given) if args.ray else None


def _say_ready(url: str, config: ServerConfig, started: float) -> None:
    secret = f' -H "Authorization: Bearer ${TOKEN}"' if config.token is not None else ""
    request = '{"queries": ["who founded Orlune?"], "topk": 3, "return_scores": true}'
    token = "with" if config.token is not None else "without"
    _tell(f"serving {config.name} at {url}, {token} a token")
    _tell(f"ready after {time.monotonic() - started:.1f} s; try:\n")
    _tell(f"  curl -s {url}/retrieve{secret} -d '{request}'\n")


def _tell(line: str) -> None:
    """Prints a line. A script that started the server may read until it serves, and then close the pipe: the server
    goes on."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _token(args: argparse.Namespace) -> str | None:
    """The token from the file, else from the environment. Every user of a machine can see its command lines."""
    file: str | None = args.token_file
    if file is not None:
        if not Path(file).exists() or Path(file).is_dir():  # a pipe is fine: --token_file <(pass show token)
            raise UserError(f"there is no file {file}: give --token_file a file that holds the token")
        return bearer_token(Path(file).read_bytes().decode("utf-8", "replace"), f"the file {file}")
    # An empty variable is a mistake of the user, not a request for a server without a token.
    if TOKEN in os.environ:
        return bearer_token(os.environ[TOKEN], TOKEN)
    if not is_loopback(args.host) and not args.allow_anonymous:
        raise UserError(
            f"--host {args.host} admits other machines, but there is no token: set {TOKEN} or give --token_file, "
            "or give --allow_anonymous if everybody who can connect may search"
        )
    return None


def fingerprint_of(searched: Searched) -> str:
    """A short hash of what is searched: of an index's content, else of the options."""
    return hashlib.sha256(json.dumps(searched.content(), sort_keys=True).encode()).hexdigest()[:16]
