"""An engine as an actor of Ray's. Knows Ray and vLLM's engine core.

Ray gives the actor its place and its resources, and says when it has ended. To vLLM's client in the gateway,
`ActorManager` is what manages engine processes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import zmq
from vllm.v1.engine.core import EngineCoreActor
from vllm.v1.engine.utils import EngineZmqAddresses
from vllm.v1.executor import Executor

from decar.router.errors import StartError
from decar.server.vllm_adapter.failures import last_line

logger = logging.getLogger("decar")

_LOOK_S = 0.5


class EngineActor(EngineCoreActor):
    """vLLM's engine core, in an actor's process."""

    def pid(self) -> int:
        return os.getpid()


def begin(
    config: Any, hears: str, speaks: str, log_stats: bool, options: Mapping[str, Any]
) -> tuple[Any, int, Any]:
    """An engine with vLLM's ``config``, once it can be asked: its actor, its process id there, and what becomes ready
    when it ends.

    Args:
        hears, speaks: sockets that it connects to.
        options: of the actor, for Ray.

    Raises:
        StartError: it does not come up; says why.
    """
    import ray

    addresses = EngineZmqAddresses(inputs=[hears], outputs=[speaks])
    remote = ray.remote(EngineActor).options(max_restarts=0, **options)
    actor = remote.remote(config, False, addresses, Executor.get_class(config), log_stats)
    try:
        return actor, ray.get(actor.pid.remote()), actor.run.remote()
    except Exception as error:
        with suppress(Exception):
            ray.kill(actor)
        raise StartError(last_line(error)) from None


class ActorProcess:
    """An actor, as far as it is a process.

    Attributes:
        name: of its expert.
        pid: on its host.
        files: there, see `gateway.engine.FilesElsewhere`; None: that is the gateway's.

    Args:
        end: ends it; may take long, or fail.
    """

    def __init__(self, name: str, pid: int, files: Any, end: Callable[[], None]):
        self.name, self.pid, self.files = name, pid, files
        self.ended = threading.Event()
        self._end = end

    def is_alive(self) -> bool:
        return not self.ended.is_set()

    def kill(self) -> None:
        """End it, without waiting: its host may not be reached just now."""
        self.ended.set()
        threading.Thread(target=self._kill, daemon=True).start()

    def _kill(self) -> None:
        with suppress(Exception):  # who cannot be reached is ended before another takes its place
            self._end()


class ActorManager:
    """What vLLM's client asks of whoever manages its engine's process.

    Attributes:
        processes: the one.
        failed_proc_name: None: its log says why.
        heard_of: set when its client has heard of it.

    Args:
        run: becomes ready when it ends.
        heard: up to when its host has been heard; without end where that need not be.
        gone_s: a host that is silent for so long is given up.
    """

    failed_proc_name = None

    def __init__(self, process: ActorProcess, run: Any, heard: Callable[[], float], gone_s: float):
        self.processes = [process]
        self._run, self._heard, self._gone_s = run, heard, gone_s
        self.heard_of = threading.Event()

    def watch_until_heard(self, address: str) -> None:
        """Have vLLM's client, which waits for long at ``address`` to hear of its engine, be woken when that ends first:
        by a stranger, whom it takes for an error."""
        import ray

        def watch() -> None:
            process = self.processes[0]
            while not self.heard_of.is_set():
                if process.ended.is_set() or ray.wait([self._run], timeout=_LOOK_S)[0]:
                    with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
                        stranger.setsockopt(zmq.LINGER, 1000)
                        stranger.connect(address)
                        stranger.send(b"it has ended")
                    return

        threading.Thread(target=watch, daemon=True).start()

    def monitor_engine_liveness(self) -> None:
        """Return when it has ended, or its host has been silent: by how often it was looked, as all may have stood
        still."""
        import ray

        process = self.processes[0]
        last, looks = -1.0, 0
        while not process.ended.is_set():
            done, _ = ray.wait([self._run], timeout=_LOOK_S)
            heard = self._heard()
            looks = looks + 1 if heard == last < float("inf") else 0
            last = heard
            if looks > self._gone_s / _LOOK_S:
                logger.error("the host of expert %r is not heard: its engine is given up", process.name)
                break
            if done:
                break
        self.shutdown()

    def shutdown(self, timeout: float | None = None) -> None:
        if self.processes[0].is_alive():
            self.processes[0].kill()
