"""Serves a retriever over HTTP, with the protocol of Search-R1 and verl.

    trl-search serve indexes/wiki --port 8000
    trl-search serve dense --retriever_options '{"faiss_file": "e5_Flat.index", "corpus": "wiki-18.jsonl"}'

One process holds one index; --ray serves several processes behind one address. Trainers that expect a retrieval server
of Search-R1 or verl can use http://127.0.0.1:8000/retrieve; in our recipes, set

    retriever: http://127.0.0.1:8000

Queries of different requests are searched in one batch, results are cached in memory, and requests beyond the queue
limit get 503. `GET /ready` returns 200 once the index is loaded, `GET /metrics` is for Prometheus, and every request
is logged as one line of JSON on stderr. On SIGTERM or Ctrl-C, running requests are answered before the server ends.

It listens on this machine alone. For others to reach it, give it a token (the environment variable TRL_SEARCH_TOKEN,
or --token_file) and --host 0.0.0.0; behind a proxy with TLS where the network is not yours.
"""

from __future__ import annotations

import argparse
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
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--token_file", metavar="FILE", help=f"holds the token clients must send (or set {TOKEN})")
    parser.add_argument("--allow_anonymous", action="store_true", help="serve other machines without a token")
    parser.add_argument("--no_access_log", action="store_true", help="do not write a line for each request")
    several = parser.add_argument_group("several processes, on Ray Serve (docs/scaling.md)")
    several.add_argument("--ray", action="store_true", help="serve from several processes, behind one address")
    several.add_argument("--replicas", type=int, help="of them (default: 2)")
    several.add_argument("--replica_cpus", type=float, help="CPUs of each (default: 1)")
    several.add_argument("--replica_gpus", type=float, help="GPUs of each; 0.25 puts four on one (default: 0)")
    several.add_argument("--ray_address", metavar="HOST:PORT", help="a cluster that runs; by default one is started")
    size = parser.add_argument_group("limits")
    for name, default, said in (
        ("passages_per_query", limits.default_topk, "passages where a request does not say how many"),
        ("max_passages_per_query", limits.max_topk, "a request that wants more is refused"),
        ("max_queries", limits.max_queries, "queries per request"),
        ("max_queued", config.max_queued, "queries under way at once"),
        ("max_batch", config.max_batch, "queries searched together"),
        ("cache_mb", config.cache_bytes >> 20, "for results, 0: none"),
        ("search_timeout_s", config.search_timeout_s, "of one search"),
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
    if ray is not None:
        return _run_on_ray(args, searched, config, ray)
    listening = listen(args.host, args.port)
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    started = time.monotonic()
    print(f"loading {config.name} ...", flush=True)
    serve(searched.load, config, listening, lambda: _say_ready(url, config, started))
    print("stopped; what was under way is answered", flush=True)
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
        raise UserError(f"--{options[next(iter(given))]} is for several processes: give --ray, or leave it out")
    return RayConfig(**given) if args.ray else None


def _run_on_ray(args: argparse.Namespace, searched: Searched, config: ServerConfig, settings: RayConfig) -> int:
    from trl_search.retrieval.server.ray_serve import serve_on_ray

    started = time.monotonic()
    print(f"starting {settings.replicas} replicas ...", flush=True)
    serve_on_ray(
        searched.kind,
        searched.load_options(),
        config,
        settings,
        host=args.host,
        port=args.port,
        loaded=lambda url: _say_ready(url, config, started),
    )
    print("stopped; what was under way is answered", flush=True)
    return 0


def _say_ready(url: str, config: ServerConfig, started: float) -> None:
    secret = f' -H "Authorization: Bearer ${TOKEN}"' if config.token is not None else ""
    request = '{"queries": ["who founded Orlune?"], "topk": 3, "return_scores": true}'
    token = "with" if config.token is not None else "without"
    print(f"serving {config.name} at {url}, {token} a token", flush=True)
    print(f"ready after {time.monotonic() - started:.1f} s; try\n", flush=True)
    print(f"  curl -s {url}/retrieve{secret} -d '{request}'\n", flush=True)


def _token(args: argparse.Namespace) -> str | None:
    """From the file, else from the environment; never from the command line, which every user of a machine sees."""
    file: str | None = args.token_file
    if file is not None:
        if not Path(file).is_file():
            raise UserError(f"there is no file {file}: --token_file holds the token")
        return bearer_token(Path(file).read_text(encoding="utf-8"), f"the file {file}")
    # A variable that is set and empty is a mistake, and not a server without a token.
    if TOKEN in os.environ:
        return bearer_token(os.environ[TOKEN], TOKEN)
    if not is_loopback(args.host) and not args.allow_anonymous:
        raise UserError(
            f"--host {args.host} lets other machines in, and there is no token: set {TOKEN} or give --token_file; "
            "or say --allow_anonymous where everybody who can connect may search"
        )
    return None


def fingerprint_of(searched: Searched) -> str:
    """A short name for what is searched: indexes by what they hold, anything else by its options."""
    return hashlib.sha256(json.dumps(searched.content(), sort_keys=True).encode()).hexdigest()[:16]
