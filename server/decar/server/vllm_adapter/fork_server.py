"""Where engines' processes come from on CPUs: each is a fork of a process that has imported vLLM, which takes longer
than all the rest of a small engine's start. So a server starts sooner, and an engine that has died is back in seconds.

Python's own fork server does it. It gets its environment when it starts, libraries read theirs when they are imported,
and vLLM sets some of it when it knows what is to be served: so what it has set the last time is kept in the user's
cache, which lets the fork server begin to import while the gateway does. If vLLM sets something else this time, the
fork server is started anew.

With GPUs an engine's process is started by vLLM's own means: nobody has seen yet that nothing that is imported there
touches CUDA, which no fork survives.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import psutil

from decar.server.protocol.runtime import become
from decar.server.vllm_adapter.cache import cache_file, keep

_PRELOADED = "decar.server.vllm_adapter.preloaded"
_KIND = "environment"


class ForkServer:
    """Python's fork server of this process, with what engines need.

    Args:
        folder: for its socket.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._before = dict(os.environ)
        self._given: dict[str, str] | None = None

    def start_early(self) -> None:
        """Let it import beside this process, if it is known in which environment."""
        changes = _kept()
        if changes is not None:
            given = {**self._before, **changes}
            self._launch({name: value for name, value in given.items() if value is not None})

    def use(self) -> None:
        """Have it right, from when vLLM knows what is to be served."""
        now = dict(os.environ)
        if now != self._given:
            self.end()
            self._launch(now)
            changed = {name for name in {*now, *self._before} if now.get(name) != self._before.get(name)}
            keep(_KIND, json.dumps({name: now.get(name) for name in sorted(changed)}))

    def _launch(self, environment: Mapping[str, str]) -> None:
        before = dict(os.environ)
        multiprocessing.set_forkserver_preload([_PRELOADED])
        # Python would make a folder in /tmp, and remove it at the end, if it gets there.
        multiprocessing.current_process()._config["tempdir"] = str(self._folder)  # type: ignore[attr-defined]
        try:
            become(environment)
            forkserver.ensure_running()
        finally:
            become(before)
        self._given = dict(environment)

    def end(self) -> None:
        """It is not needed, or not as it is."""
        pid = _pid()
        if pid is not None:
            os.kill(pid, signal.SIGKILL)  # it imports, and hears nothing else
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # else it might be taken for alive
        self._given = None


def fork_engines() -> None:
    """Have vLLM take engines' processes from this process's fork server."""
    from vllm.v1.engine import utils

    utils.get_mp_context = lambda: multiprocessing.get_context("forkserver")


def _pid() -> int | None:
    """Of this process's fork server."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            while not (arguments := child.cmdline()):
                time.sleep(0)  # it is about to run: the kernel has not put its arguments in their place yet
            if "forkserver" in " ".join(arguments):
                return child.pid
    return None


def _kept() -> dict[str, str | None] | None:
    """What vLLM has changed of the environment the last time; None: not known."""
    try:
        kept: dict[str, str | None] = json.loads(cache_file(_KIND).read_text())
        known = all(value is None or isinstance(value, str) for value in kept.values())
    except (OSError, ValueError, AttributeError):
        return None
    return kept if known else None
