"""Where rows lie and how peers read them: in the plane's shared memory, or in GPU memory mapped by CUDA IPC. Engines on
GPUs whose peers are on other hosts have them in the plane, and bring to their own GPU what a step mixes.

All keep one promise: when `post` returns, every engine that sees a stamp set afterwards sees the row. Stamps
and tokens are words of host memory in any case, so the protocol is the same.

Shapes: K experts, S slots, V vocabulary, n rows of one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from decar.kernels import Rows
from decar.server.protocol.plane import Plane

ROW_ALIGNMENT = 64  # elements: rows of any vocabulary start where a GPU's widest loads may


class Transport(Protocol):
    """Where an engine posts its rows and finds its peers'."""

    device: torch.device

    @property
    def rows(self) -> Rows:
        """Every expert's rows [2S, V], where they lie; entry 2 * slot + parity."""

    def rows_of(self, entries: np.ndarray, log_weights: np.ndarray) -> tuple[Rows, np.ndarray]:
        """What to mix ``entries`` [n] of `rows` from, on ``device``, and which entries [n] of that they are.

        Args:
            log_weights: [n, K]; a row whose weight is -inf may be any.
        """

    def post(self, entries: np.ndarray, logits: torch.Tensor) -> None:
        """Write ``logits`` [n, V] and their log-normalisers as this engine's rows in ``entries`` [n]."""

    def log_likelihoods(self, entries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """log p_k(token) [n, K] float64; not finite where a row allows no such token, or is broken."""

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        """Arrays of int64 and float64 where rows are mixed, in one transfer that the host does not wait for."""

    def to_host(self, *tensors: torch.Tensor) -> list[np.ndarray]:
        """Tensors as arrays, all after one wait."""


def transport_of(plane: Plane, expert: int, memory: DeviceMemory | None) -> Transport:
    """The transport that ``plane`` was made for.

    Args:
        memory: of the device that the engine computes on; None: that is the host.
    """
    if plane.spec.on_device:
        assert memory is not None, "rows on a device need its memory"
        return DeviceTransport(plane, expert, memory)
    return HostTransport(plane, expert) if memory is None else StagedTransport(plane, expert, memory)


class HostTransport:
    """Rows in the plane itself, float32."""

    device = torch.device("cpu")

    def __init__(self, plane: Plane, expert: int):
        self._logits, self._log_normalisers = plane.fields["rows"], plane.fields["log_normaliser"]
        self.rows = Rows(
            [torch.from_numpy(logits) for logits in self._logits],
            [torch.from_numpy(log_normalisers) for log_normalisers in self._log_normalisers],
        )
        self._own = self.rows.logits[expert], self.rows.log_normalisers[expert]

    def rows_of(self, entries: np.ndarray, log_weights: np.ndarray) -> tuple[Rows, np.ndarray]:
        return self.rows, entries

    def post(self, entries: np.ndarray, logits: torch.Tensor) -> None:
        places, values = torch.from_numpy(entries), logits.float().cpu()
        self._own[0].index_copy_(0, places, values)
        self._own[1].index_copy_(0, places, values.logsumexp(dim=-1))

    def log_likelihoods(self, entries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        found = self._logits[:, entries, tokens] - self._log_normalisers[:, entries]
        return found.T.astype(np.float64)

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return [torch.from_numpy(values) for values in arrays]

    def to_host(self, *tensors: torch.Tensor) -> list[np.ndarray]:
        return [values.numpy() for values in tensors]


def buffer_bytes(slots: int, vocab_size: int, dtype: str) -> int:
    """Memory on its device that one engine's rows and log-normalisers take."""
    itemsize: int = getattr(torch, dtype).itemsize
    return 2 * slots * (_stride(vocab_size) * itemsize + 4)


def _stride(vocab_size: int) -> int:
    return -(-vocab_size // ROW_ALIGNMENT) * ROW_ALIGNMENT


class DeviceMemory(Protocol):
    """Memory that another process can map by a handle of at most 128 bytes."""

    device: torch.device

    def allocate(self, size_bytes: int) -> tuple[torch.Tensor, bytes]:
        """Zeroed bytes [size_bytes] uint8, and their handle."""

    def open(self, handle: bytes, size_bytes: int) -> torch.Tensor:
        """Another process's bytes [size_bytes] uint8."""

    def settle(self) -> None:
        """Return when all that was written is visible to whoever has mapped it."""

    def staging(self, count: int) -> torch.Tensor:
        """Host memory [count] float32, still to be written, which `upload` copies from at once."""

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy on the device of ``values`` on the host, which does not wait for it."""

    def download(self, tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """Copies of ``tensors``, all after one wait."""


class DeviceTransport:
    """Rows in one buffer per expert on its own device, in the model's dtype, mapped by its peers.

    A buffer is [2S] rows of V elements, padded to ROW_ALIGNMENT, then [2S] float32 log-normalisers. Its handle is
    in its engine's block; peers map it when they first need it, and again when the expert has a new engine.
    """

    def __init__(self, plane: Plane, expert: int, memory: DeviceMemory):
        spec = plane.spec
        self.device = memory.device
        self._plane, self._memory = plane, memory
        self._expert = expert
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._entries, self._vocab_size = 2 * spec.slots, spec.vocab_size
        self._stride = _stride(spec.vocab_size)
        self._size_bytes = buffer_bytes(spec.slots, spec.vocab_size, spec.dtype)
        self._offers = plane.fields["handles"][:, 0]
        self._mapped = np.full_like(self._offers, -1)  # which offer of each expert is mapped; 0: it is gone
        self._buffer, handle = memory.allocate(self._size_bytes)
        self._own = self._views(self._buffer)
        self._buffers = [self._buffer] * len(self._offers)  # in place of one that is gone: nobody reads it
        self._rows: Rows | None = None
        plane.blocks[expert].offer(handle)

    def rows_of(self, entries: np.ndarray, log_weights: np.ndarray) -> tuple[Rows, np.ndarray]:
        return self.rows, entries

    @property
    def rows(self) -> Rows:
        offers = self._offers * self._plane.alive
        if (offers != self._mapped).any():
            self._rows = self._mapped_rows(offers)
        assert self._rows is not None, "an engine has at least its own"
        return self._rows

    def _mapped_rows(self, offers: np.ndarray) -> Rows:
        """Everybody's rows, by these offers [K]."""
        for k in np.flatnonzero(offers != self._mapped).tolist():
            if k == self._expert or not self._plane.alive[k]:
                self._buffers[k] = self._buffer
            elif not offers[k]:
                raise RuntimeError(f"expert {k} is asked for rows before its engine has started")
            else:
                handle = self._plane.fields["handle"][k].tobytes()
                self._buffers[k] = self._memory.open(handle, self._size_bytes)
        self._mapped = offers
        views = [self._views(buffer) for buffer in self._buffers]
        return Rows([logits for logits, _ in views], [log_normalisers for _, log_normalisers in views])

    def post(self, entries: np.ndarray, logits: torch.Tensor) -> None:
        (places,), values = self.to_device(entries), logits.to(self._dtype)
        self._own[0].index_copy_(0, places, values)
        self._own[1].index_copy_(0, places, values.float().logsumexp(dim=-1))
        self._memory.settle()

    def log_likelihoods(self, entries: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        places, ids = self.to_device(entries, tokens)
        logits = torch.stack([rows[places, ids].float() for rows in self.rows.logits], dim=1)
        log_normalisers = torch.stack([values[places] for values in self.rows.log_normalisers], dim=1)
        (found,) = self.to_host((logits - log_normalisers).double())
        return found

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return _uploaded(self._memory, arrays)

    def to_host(self, *tensors: torch.Tensor) -> list[np.ndarray]:
        return self._memory.download(tensors)

    def _views(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [2S, V] and log-normalisers [2S] of a buffer."""
        end = self._entries * self._stride * self._dtype.itemsize
        rows = buffer[:end].view(self._dtype).view(self._entries, self._stride)
        return rows[:, : self._vocab_size], buffer[end:].view(torch.float32)


class StagedTransport(HostTransport):
    """Rows in the plane, float32, of an engine that computes on a device: there it mixes copies of those that a step
    needs. For engines whose peers are on other hosts, which tell each other what is in their planes. Not run on a GPU.
    """

    def __init__(self, plane: Plane, expert: int, memory: DeviceMemory):
        super().__init__(plane, expert)
        self.device = memory.device
        self._memory, self._expert = memory, expert
        self._stride = _stride(plane.spec.vocab_size)

    def rows_of(self, entries: np.ndarray, log_weights: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Copies, brought in one transfer, of the rows of all experts that have a weight in one of the entries."""
        n, stride, vocab_size = len(entries), self._stride, self.rows.vocab_size
        part = np.flatnonzero((log_weights > -np.inf).any(axis=0)).tolist() or [self._expert]
        places = torch.from_numpy(entries)
        staged = self._memory.staging(len(part) * n * (stride + 1))
        rows, log_normalisers = _staged_views(staged, len(part), n, stride)
        for i, k in enumerate(part):
            rows[i, :, :vocab_size] = self.rows.logits[k].index_select(0, places)
            log_normalisers[i] = self.rows.log_normalisers[k][places]
        rows, log_normalisers = _staged_views(self._memory.upload(staged), len(part), n, stride)
        found = {k: (rows[i, :, :vocab_size], log_normalisers[i]) for i, k in enumerate(part)}
        anyone = found[part[0]]  # in place of who has no weight, and is not read
        views = [found.get(k, anyone) for k in range(self.rows.experts)]
        return Rows([logits for logits, _ in views], [values for _, values in views]), np.arange(n)

    def post(self, entries: np.ndarray, logits: torch.Tensor) -> None:
        values = logits.float()
        rows, log_normalisers = self._memory.download([values, values.logsumexp(dim=-1)])
        self._logits[self._expert, entries] = rows
        self._log_normalisers[self._expert, entries] = log_normalisers

    def to_device(self, *arrays: np.ndarray) -> list[torch.Tensor]:
        return _uploaded(self._memory, arrays)

    def to_host(self, *tensors: torch.Tensor) -> list[np.ndarray]:
        return self._memory.download(tensors)


def _staged_views(staged: torch.Tensor, part: int, n: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [part, n, stride] and log-normalisers [part, n], which lie one behind the other in ``staged``."""
    end = part * n * stride
    return staged[:end].view(part, n, stride), staged[end:].view(part, n)


def _uploaded(memory: DeviceMemory, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """``arrays`` of int64 and float64 on a device, in one transfer."""
    # Each begins at a multiple of 16 bytes: for one that does not, Triton would compile another kernel.
    starts = np.cumsum([0, *(values.size + values.size % 2 for values in arrays)])
    packed = np.zeros(starts[-1], np.int64)
    for start, values in zip(starts, arrays, strict=False):
        packed[start : start + values.size] = values.ravel().view(np.int64)
    moved = memory.upload(torch.from_numpy(packed))
    found = []
    for start, values in zip(starts.tolist(), arrays, strict=False):
        part = moved[start : start + values.size]
        found.append((part.view(torch.float64) if values.dtype == np.float64 else part).view(values.shape))
    return found
