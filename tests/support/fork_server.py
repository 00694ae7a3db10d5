"""Imports modules once, then forks a process for each request. `forked.py` starts it and sends the requests.

    python -m tests.support.fork_server STARTER LISTENING MODULE ...      # two sockets, as file descriptors

    request   {"module": "trl_search", "arguments": ["eval", ...], "environment": {...}, "folder": "..."}, with three
              descriptors: stdin, stdout and stderr of the new process. With "code" in place of "module" it runs
              `python -c CODE`.
    reply     {"started": 4711}, and later {"ended": 4711, "code": 0}

Other processes of the same test session may share it: they connect to LISTENING (-1 if there are none). When one
disconnects, its processes are killed; when the starter disconnects, the server ends. The server has only one thread
and computes nothing, because a fork copies only one thread.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import termios
import threading
import traceback
import types
import weakref
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Client:
    """A client, and those of its processes that still run."""

    socket: socket.socket
    unread: bytes = b""
    descriptors: list[int] = field(default_factory=list)
    running: set[int] = field(default_factory=set)

    def read(self) -> dict[str, Any] | None:
        """A complete request, or `None` until one has arrived. A client waits for "started" before the next request.

        Raises:
            EOFError: if the client has disconnected.
        """
        try:
            more, descriptors, _, _ = socket.recv_fds(self.socket, 1 << 20, 3)
        except ConnectionResetError:
            more, descriptors = b"", []
        if not more:
            raise EOFError
        self.descriptors += descriptors
        self.unread += more
        if not self.unread.endswith(b"\n"):
            return None
        request: dict[str, Any] = json.loads(self.unread)
        self.unread = b""
        return request

    def tell(self, **values: int) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the next read reports the disconnect
            self.socket.sendall(json.dumps(values).encode() + b"\n")

    def forget_descriptors(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []


def main(starter: int, listening: int, modules: list[str]) -> tuple[dict[str, Any], list[int]] | None:
    """Serves until the tests end. In a forked process it returns the request and its descriptors."""
    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # the garbage collector skips imported objects, so their memory stays shared
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    doors = [socket.socket(fileno=listening)] if listening >= 0 else []
    first = Client(socket.socket(fileno=starter))
    clients = [first]
    while True:
        ready, _, _ = select.select([wake_read, *doors, *(client.socket for client in clients)], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            while any(client.running for client in clients) and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                for client in clients:
                    if ended[0] in client.running:
                        client.running.discard(ended[0])
                        client.tell(ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
        for client in [client for client in clients if client.socket in ready]:
            try:
                request = client.read()
            except EOFError:
                kill(client)
                clients.remove(client)
                if client is first:
                    for other in clients:
                        kill(other)
                    return None
                continue
            if request is None:
                continue
            pid = os.fork()
            if not pid:
                os.setsid()
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                keep_folders()
                for own in (*doors, *(one.socket for one in clients)):
                    own.close()
                os.close(wake_read)
                os.close(wake_write)
                return request, client.descriptors
            client.forget_descriptors()
            client.running.add(pid)
            client.tell(started=pid)
        clients += [Client(door.accept()[0]) for door in doors if door in ready]


def keep_folders() -> None:
    """Prevents a forked process from deleting the server's temporary folders when it ends: others use them too."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.detach()
    if media := sys.modules.get("wandb.sdk.data_types._private"):
        atexit.unregister(media.MEDIA_TMP.cleanup)


def kill(client: Client) -> None:
    """Ends the processes of a client that has disconnected."""
    for pid in client.running:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it is not a session leader yet
            os.kill(pid, signal.SIGKILL)
    client.forget_descriptors()
    client.socket.close()


def run(request: dict[str, Any], descriptors: list[int]) -> None:
    """Does what `python -m MODULE ARGUMENTS` or `python -c CODE` would do."""
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    if os.isatty(0):  # its new session has no terminal yet
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:] = [place for place in sys.path if place] + [request["folder"]]
    sys.argv[1:] = request["arguments"]
    try:
        if code := request.get("code"):
            sys.modules["__main__"] = types.ModuleType("__main__")
            exec(code, sys.modules["__main__"].__dict__)
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # deleting all imported objects would take longer than most tests


if __name__ == "__main__":
    asked = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    if asked is not None:
        run(*asked)
