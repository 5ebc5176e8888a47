"""The executor: an engine's worker in its own process. Knows vLLM's executor."""

from __future__ import annotations

import multiprocessing

from vllm.v1.executor import uniproc_executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor


class InProcessExecutor(UniProcExecutor):
    """The worker in the engine's own process. vLLM's CPU platform refuses "uni" only because it sets OpenMP
    up through the environment of a new process; `LockstepWorker` binds its threads itself."""

    def _init_executor(self) -> None:
        # vLLM's lock for the worker; of the fork context, it has no name in /dev/shm to leave behind.
        uniproc_executor.Lock = multiprocessing.get_context("fork").Lock
        super()._init_executor()
