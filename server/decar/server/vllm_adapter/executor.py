"""The executors: an engine's worker in its own process, or its ranks in one each. Knows vLLM's executors."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from types import SimpleNamespace
from typing import Any

from vllm.distributed.device_communicators import shm_broadcast
from vllm.v1.executor import uniproc_executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from decar.server.protocol.runtime import ignore_stops, new_name
from decar.server.vllm_adapter.failures import ReportingConfig
from decar.server.vllm_adapter.versions import name_process


class InProcessExecutor(UniProcExecutor):
    """The worker in the engine's own process. vLLM's CPU platform refuses "uni" only because it sets OpenMP
    up through the environment of a new process; `LockstepWorker` binds its threads itself."""

    def _init_executor(self) -> None:
        # vLLM's lock for the worker; of the fork context, it has no name in /dev/shm to leave behind.
        uniproc_executor.Lock = multiprocessing.get_context("fork").Lock
        super()._init_executor()


class RanksExecutor(MultiprocExecutor):
    """A worker for each rank, in processes that end when the engine's does, and that the engine does not survive."""

    def _init_executor(self) -> None:
        config: ReportingConfig = self.vllm_config.additional_config
        name_process(config.name)
        ignore_stops()
        if config.cpus:
            os.sched_setaffinity(0, config.cpus)  # those of its ranks, which compute on them; it schedules
        self.vllm_config.additional_config = replace(config, engine=new_name())
        own_segments()
        super()._init_executor()

    @staticmethod
    def _ensure_worker_termination(worker_procs: Sequence[BaseProcess]) -> None:
        """At once: a rank whose peer has died waits in the midst of a layer, where it hears nothing."""
        for process in worker_procs:
            process.kill()


class _Segment(SharedMemory):
    """Shared memory named after the process that makes it, which whoever outlives that removes: Python's tracker would
    keep it until the server ends, and then complain."""

    def __init__(self, name: str | None = None, create: bool = False, size: int = 0, **kwargs: Any):
        super().__init__(new_name() if create else name, create, size, **kwargs)
        if create:
            resource_tracker.unregister(f"/{self.name}", "shared_memory")

    def unlink(self) -> None:
        resource_tracker.register(f"/{self.name}", "shared_memory")
        super().unlink()


def own_segments() -> None:
    """Have vLLM's message queues in this process lie in memory that is found again by `runtime.remove_all_of`."""
    shm_broadcast.shared_memory = SimpleNamespace(SharedMemory=_Segment)
