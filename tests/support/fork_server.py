"""Imports modules once, then forks a process for each request. `forked.py` starts it and speaks with it.

    python -m tests.support.fork_server REQUESTS REPLIES MODULE ...      # two file descriptors

    request   {"module": "trl_search", "arguments": ["eval", ...], "environment": {...}, "folder": "...", "log": "..."}
    reply     {"started": 4711}, later {"ended": 4711, "code": 0}

It has one thread and computes nothing, because a fork takes only one thread along.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import traceback
from typing import Any


def main(requests: int, replies: int, modules: list[str]) -> dict[str, Any] | None:
    """Serves until the tests end. In a forked process it returns what that process is to run."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # what is imported is never looked at again, so its memory stays shared
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread, running = b"", set[int]()

    def reply(**values: int) -> None:
        os.write(replies, json.dumps(values).encode() + b"\n")

    while True:
        ready, _, _ = select.select([requests, wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            while running and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                running.discard(ended[0])
                reply(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
        if requests in ready:
            more = os.read(requests, 1 << 20)
            if not more:  # the tests have ended
                for pid in running:
                    os.killpg(pid, signal.SIGKILL)
                return None
            *lines, unread = (unread + more).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    os.setsid()
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (requests, replies, wake_read, wake_write):
                        os.close(descriptor)
                    request: dict[str, Any] = json.loads(line)
                    return request
                running.add(pid)
                reply(started=pid)


def run(module: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    """What `python -m MODULE ARGUMENTS` would do, with its output in a file."""
    for stream, path in ((0, os.devnull), (1, log), (2, log)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = [place for place in sys.path if place] + [folder]
    sys.argv[1:] = arguments
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking all that was imported apart would take longer than most tests


if __name__ == "__main__":
    asked = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    if asked is not None:
        run(**asked)
