"""A GPU's memory, mapped between processes by CUDA IPC, as the transport wants it. Knows vLLM's binding of CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class CudaMemory:
    """A GPU's memory, by vLLM's binding of the CUDA runtime. Not torch's allocator: CUDA maps whole allocations."""

    def __init__(self, device: torch.device):
        from vllm.distributed.device_communicators.cuda_wrapper import CudaRTLibrary, cudaIpcMemHandle_t

        self.device = device
        self._library = CudaRTLibrary()
        self._handle_type = cudaIpcMemHandle_t
        self._written = torch.cuda.Event()

    def allocate(self, size_bytes: int) -> tuple[torch.Tensor, bytes]:
        address = self._library.cudaMalloc(size_bytes)
        self._library.cudaMemset(address, 0, size_bytes)
        return self._tensor(address, size_bytes), bytes(self._library.cudaIpcGetMemHandle(address))

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        # Also maps memory of another GPU, where the two have peer access.
        address = self._library.cudaIpcOpenMemHandle(self._handle_type.from_buffer_copy(handle))
        return self._tensor(address, size_bytes)

    def settle(self) -> None:
        # An event, and not the stream: what is launched after this need not have run.
        self._written.record(torch.cuda.current_stream(self.device))
        self._written.synchronize()

    def staging(self, count: int) -> torch.Tensor:
        return torch.empty(count, pin_memory=True)

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        # Only from pinned memory does a copy leave the host alone; torch keeps that until the copy is done.
        return values.pin_memory().to(self.device, non_blocking=True)

    def download(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        copies = [torch.empty(values.shape, dtype=values.dtype, pin_memory=True) for values in tensors]
        for copy, values in zip(copies, tensors, strict=True):
            copy.copy_(values, non_blocking=True)
        self.settle()
        return [copy.numpy() for copy in copies]

    def _tensor(self, address: ctypes.c_void_p, size_bytes: int) -> torch.Tensor:
        return torch.as_tensor(_CudaBytes(address, size_bytes), device=self.device)


class _CudaBytes:
    """What torch asks of memory that it did not allocate."""

    def __init__(self, address: ctypes.c_void_p, size_bytes: int):
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address.value, False),
            "version": 3,
        }
