"""What every expert's worker does before it computes anything: its name, its cores, where its ranks meet.

Knows vLLM's worker and the process that it is in, and nothing of what is computed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import torch
from tqdm import tqdm
from vllm.platforms import current_platform

from decar.server.protocol.cores import take_long_slices
from decar.server.protocol.member import end_with
from decar.server.protocol.runtime import ignore_stops
from decar.server.vllm_adapter.executor import own_segments
from decar.server.vllm_adapter.failures import ReportingConfig
from decar.server.vllm_adapter.ranks import share_of
from decar.server.vllm_adapter.versions import name_process

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class ExpertWorker(_Worker):
    """A vLLM worker in a process of decar's."""

    def init_device(self) -> None:
        config: ReportingConfig = self.vllm_config.additional_config
        self._name_process()
        if config.cpus:
            cores = share_of(config.cpus, self.rank, self.parallel_config.tensor_parallel_size)
            torch.set_num_threads(len(cores))  # before the base class disables it
            os.sched_setaffinity(0, cores)
            take_long_slices()
        self._meet_ranks(config)
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        tqdm.set_lock(threading.RLock())  # its own would leave a named semaphore in /dev/shm
        ignore_stops()
        self._name_process()  # again: vLLM gives a rank a name of its own
        super().load_model(*args, **kwargs)

    def _meet_ranks(self, config: ReportingConfig) -> None:
        """Where ranks find each other, though there be one: in no file that stays when they are killed."""
        folder = os.environ["VLLM_RPC_BASE_PATH"]
        scheme, _, path = self.distributed_init_method.partition("://")  # type: ignore[has-type]
        name = config.engine or os.path.basename(path)  # on CPUs, ranks' common memory has it too
        if config.engine or scheme == "file":
            self.distributed_init_method = f"file://{folder}/{name}"
        engine = multiprocessing.parent_process()
        if config.engine and engine is not None and engine.pid is not None:
            own_segments()
            end_with(engine.pid, config.engine)

    def _name_process(self) -> None:
        name, ranks = self.vllm_config.additional_config.name, self.parallel_config.tensor_parallel_size
        name_process(name if ranks == 1 else f"{name}_TP{self.rank}")
