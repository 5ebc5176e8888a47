"""The plane: shared memory in which engines exchange tokens, what they are doing, and on CPU their rows.

Knows slots, stamps and experts; knows nothing about vLLM. Every word is written by one process only, so
nothing here needs a lock.

Shapes: K experts, S slots, V vocabulary, T positions, R positions of a ring, U units of a prompt.

A *stamp* is ``generation << 32 | position + 1``: the slot's tenant and how many tokens it has produced.
Data is written first and stamped after; x86 and the interpreter keep that order. A row, once stamped, is
never rewritten. Two buffers per slot, by the position's parity, are enough: the leader needs every
follower's row at t + 1 before it publishes token t + 1, so nobody is ever two positions ahead.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from decar.router.errors import StartError
from decar.router.manifest import MAX_EXPERTS
from decar.server.protocol.runtime import DIRECTORY, new_name

NOTHING = 0
COUNTERS = (
    "steps",
    "mixed_tokens",
    "leader_holds",
    "follower_holds",
    "yielded",
    "pruned",
    "handed_over",
    "scored_tokens",
    "forward_ns",
    "score_ns",
    "post_ns",
    "row_wait_ns",
    "mix_ns",
    "sample_ns",  # token_wait_ns included
    "token_wait_ns",
)
HANDLE_BYTES = 128  # of memory on a device, as CUDA IPC names it
RING_POSITIONS = 256
"""R: how far the weights of a request may run ahead of the gateway, which reads them as the tokens come."""
WHOLE = 1 << 16
"""Of `row_for`: a row that is needed to the last logit, whatever `PlaneSpec.wire_rows` says."""
PROMPT_UNITS = 512
"""U: places in a prompt up to which its log-likelihood is given, so that a longer one may begin there."""
_ALIGNMENT = 64


Words = TypeVar("Words", int, np.ndarray)
"""One, or those of many requests."""


def entry_of(slot: Words, stamp: Words) -> Words:
    """Index of the (slot, parity) buffer that ``stamp`` uses."""
    return 2 * slot + (stamp & 1)


def stamp_of(generation: Words, position: Words) -> Words:
    """The stamp of ``position`` (tokens generated so far) for a slot's tenant."""
    return generation << 32 | (position + 1)


def prompt_unit(positions: int, block_sizes: Sequence[int]) -> int:
    """Tokens between two places of `PROMPT_UNITS`: a multiple of every engine's KV block, which is what may be read
    from its cache, and large enough for prompts of ``positions`` tokens."""
    block_size = math.lcm(*block_sizes)
    return block_size * max(-(-positions // (block_size * PROMPT_UNITS)), 1)


def membership_word(generation: int, leader: int, active: Iterable[int]) -> int:
    """Who takes part in a slot's tenant, in one word, so that nobody reads half of it."""
    return generation << 32 | leader << 16 | sum(1 << expert for expert in active)


def read_membership_word(word: int) -> tuple[int, tuple[int, ...]]:
    """(leader, active) of a `membership_word`."""
    return word >> 16 & 0xFFFF, tuple(k for k in range(MAX_EXPERTS) if word >> k & 1)


@dataclass(frozen=True)
class PlaneSpec:
    """What an engine needs to attach: sent to it as JSON.

    Attributes:
        name: file name under /dev/shm.
        experts: K.
        slots: S, requests that can be mixed at once.
        vocab_size: V.
        positions: T, tokens one request can have.
        prompt_unit: tokens between the places of a prompt up to which its log-likelihood is given.
        on_device: rows lie in GPU memory, and the plane holds only where.
        dtype: of rows on a device; in the plane they are float32.
        bell: a pipe that is written to when there is something new, where other hosts have planes that are to learn of
            it: see `decar.server.protocol.mirror`; "" where this is the only one.
        wire_rows: how many of a row's logits go to another host, the best ones, unless it has to be whole; 0: all.
        hosts: [K], which each expert's engine is on, by number; (): all on one.
    """

    name: str
    experts: int
    slots: int
    vocab_size: int
    positions: int
    prompt_unit: int = 16
    on_device: bool = False
    dtype: str = "float32"
    bell: str = ""
    wire_rows: int = 0
    hosts: tuple[int, ...] = ()

    def far_from(self, expert: int) -> np.ndarray:
        """Which experts [K] are on another host than ``expert``."""
        hosts = np.array(self.hosts or (0,) * self.experts)
        return hosts != hosts[expert]

    @property
    def ring(self) -> int:
        """R."""
        return min(self.positions, RING_POSITIONS)

    def fields(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name, shape and dtype of one engine's block."""
        s, v, k = self.slots, self.vocab_size, self.experts
        rows: dict[str, tuple[tuple[int, ...], type]] = {
            "log_normaliser": ((2 * s,), np.float32),
            "rows": ((2 * s, v), np.float32),
        }
        handle: dict[str, tuple[tuple[int, ...], type]] = {
            "handle": ((HANDLE_BYTES,), np.uint8),
            "handles": (
                (1,),
                np.int64,
            ),  # how many there have been: one for each engine that the expert has had
        }
        # Of a row that has come in part, its probability beyond that; and what that makes of each position's mixture.
        parts: dict[str, tuple[tuple[int, ...], type]] = {
            "row_tail": ((2 * s,), np.float32),
            "tails": ((s, self.ring), np.float32),
        }
        return {
            "running": ((s,), np.int64),  # the stamp whose row this engine is computing now
            "row_stamp": ((2 * s,), np.int64),
            "row_for": ((2 * s,), np.int64),  # the expert that needs it, as its leader; see `WHOLE`
            "token_stamp": ((2 * s,), np.int64),
            "token": ((2 * s,), np.int64),
            "counters": ((len(COUNTERS),), np.int64),
            "beats": ((1,), np.int64),  # grows while this engine is alive and has work
            # The weights that mixed each position, leaders write them: a ring, since the gateway reads along.
            "log_weights": ((s, self.ring, k), np.float32),
            # Who takes part from a position on, see `membership_word`; leaders write it.
            "membership": ((s,), np.int64),
            "membership_from": ((s,), np.int64),
            "membership_weights": ((s, k + 1), np.float64),  # log weights there, and what may still be pruned
            # Σ log p of a prompt's tokens, as far as it had to be computed, up to each unit's end and one token more;
            # and up to its own end, which is there before the row of position 0.
            "prompt_sums": ((s, -(-self.positions // self.prompt_unit)), np.float64),
            "prompt_sum": ((s,), np.float64),
            "prompt_of": ((s,), np.int64),  # the slot's generation whose prompt that is
            **(handle if self.on_device else rows),
            **(parts if self.wire_rows else {}),
        }

    @property
    def header_bytes(self) -> int:
        """The gateway's own part, one word per expert, 1 while its engine lives, and one per slot; and what tells how
        far other hosts' blocks have been brought here, one per expert."""
        return _whole_pages(8 * (2 * self.experts + self.slots))

    def offsets(self) -> tuple[dict[str, int], int]:
        """Byte offset of each field in an engine's block, and the block's size in bytes."""
        offsets, end = {}, 0
        for name, (shape, dtype) in self.fields().items():
            offsets[name] = end
            size = math.prod(shape) * np.dtype(dtype).itemsize
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        return offsets, _whole_pages(end)

    @property
    def size_bytes(self) -> int:
        return self.header_bytes + self.experts * self.offsets()[1]


def _whole_pages(size_bytes: int) -> int:
    return -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


class Block:
    """One engine's part of the plane, word by word. Its fields are flat memoryviews, the fastest scalar access that
    Python has: for waits, which look at one word again and again, and for schedulers, which ask about one request."""

    def __init__(self, plane: Plane, expert: int):
        self._fields = {name: field[expert] for name, field in plane.fields.items()}
        self.running = self._fields["running"].data
        self.row_stamp = self._fields["row_stamp"].data
        self.token_stamp = self._fields["token_stamp"].data
        self.token = self._fields["token"].data
        self.membership = self._fields["membership"].data
        self.membership_from = self._fields["membership_from"].data
        self.membership_weights = self._fields["membership_weights"]
        self.log_weights = self._fields["log_weights"]
        self.tails = self._fields.get("tails")
        self.prompt_sums = self._fields["prompt_sums"]
        self._prompt_sum = self._fields["prompt_sum"].data
        self._prompt_of = self._fields["prompt_of"].data
        self._counters = self._fields["counters"]
        self.beats = self._fields["beats"].data

    def offer(self, handle: bytes) -> None:
        """Tell the peers where on its device this engine's rows lie."""
        self._fields["handle"][: len(handle)] = np.frombuffer(handle, np.uint8)
        self._fields["handles"][0] += 1

    def say_of_prompt(self, slot: int, generation: int, total: float) -> None:
        """Leave what this engine says of a whole prompt, Σ log p of the tokens that had to be scored."""
        self._prompt_sum[slot] = total
        self._prompt_of[slot] = generation

    def beat(self) -> None:
        """Say that this engine gets on, if only with waiting."""
        self.beats[0] += 1

    def count(self, name: str, by: int = 1) -> None:
        self._counters[COUNTERS.index(name)] += by

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add what the block takes, in ns, to ``name``."""
        started = time.perf_counter_ns()
        yield
        self.count(name, time.perf_counter_ns() - started)

    def counted(self) -> dict[str, int]:
        """What this engine has counted since it started."""
        return dict(zip(COUNTERS, self._counters.tolist(), strict=True))

    def has_row(self, slot: int, stamp: int) -> bool:
        """Whether this engine's row for ``stamp`` is there."""
        return self.row_stamp[entry_of(slot, stamp)] == stamp

    def published(self, slot: int, stamp: int) -> int | None:
        """The token this engine, as leader, decided for ``stamp``."""
        entry = entry_of(slot, stamp)
        return self.token[entry] if self.token_stamp[entry] == stamp else None


class Plane:
    """The shared memory of one ensemble. The gateway creates it; every engine attaches.

    Attributes:
        alive: [K], 1 while an expert's engine lives; the gateway writes it.
        weights_read: [S], the stamp up to which the gateway has read a slot's weights; it writes it.
        mirrored: [K], up to when all that an expert's engine has written is here, in seconds by its host's clock
            (`time.monotonic`); without end for those that write here themselves.
        fields: by name of `PlaneSpec.fields`, all experts' [K, ...], in place: a step looks at many words at once.
        blocks: the same by expert, word by word.
    """

    def __init__(self, spec: PlaneSpec, memory: mmap.mmap):
        self.spec = spec
        words = np.frombuffer(memory, np.int64, 2 * spec.experts + spec.slots)
        self.alive, self.mirrored = words[: spec.experts], words[-spec.experts :].view(np.float64)
        self.weights_read = words[spec.experts : -spec.experts]
        self._bell = os.open(spec.bell, os.O_RDWR | os.O_NONBLOCK) if spec.bell else None
        offsets, block_bytes = spec.offsets()
        self.fields = {}
        for name, (shape, dtype) in spec.fields().items():
            within = tuple(math.prod(shape[i + 1 :]) * np.dtype(dtype).itemsize for i in range(len(shape)))
            self.fields[name] = np.ndarray(
                (spec.experts, *shape),
                dtype,
                memory,
                offset=spec.header_bytes + offsets[name],
                strides=(block_bytes, *within),
            )
        self.blocks = [Block(self, expert) for expert in range(spec.experts)]

    @classmethod
    def create(
        cls,
        experts: int,
        slots: int,
        vocab_size: int,
        positions: int,
        *,
        prompt_unit: int = 16,
        device_dtype: str | None = None,
        bell: str = "",
        wire_rows: int = 0,
        hosts: Sequence[int] = (),
    ) -> Plane:
        """Make the segment, owner-only readable; with ``device_dtype``, for rows of that dtype in GPU memory.

        Raises:
            StartError: /dev/shm has too little room; says how much is needed.
        """
        name = new_name()
        on_device = device_dtype is not None
        spec = PlaneSpec(
            name,
            experts,
            slots,
            vocab_size,
            positions,
            prompt_unit,
            on_device,
            device_dtype or "float32",
            bell,
            wire_rows if wire_rows < vocab_size else 0,
            tuple(hosts),
        )
        free = os.statvfs(DIRECTORY).f_bavail * os.statvfs(DIRECTORY).f_frsize
        if spec.size_bytes > free:
            raise StartError(
                f"the engines exchange rows through {DIRECTORY}, which has {_mib(free)} free of the "
                f"{_mib(spec.size_bytes)} needed; lower --max-num-seqs (now {slots}) or --max-model-len (now "
                f"{positions}), or enlarge it (docker run --shm-size)"
            )
        plane = cls(spec, create_segment(name, spec.size_bytes))
        plane.alive[:] = 1
        plane.mirrored[:] = np.inf
        return plane

    @classmethod
    def attach(cls, spec: PlaneSpec) -> Plane:
        descriptor = os.open(DIRECTORY / spec.name, os.O_RDWR)
        try:
            return cls(spec, mmap.mmap(descriptor, spec.size_bytes))
        finally:
            os.close(descriptor)

    @classmethod
    def of_nobody(cls, spec: PlaneSpec) -> Plane:
        """Memory of this process alone, in which rows would lie on the host; what nobody touches of it takes none."""
        spec = replace(spec, on_device=False, bell="")
        return cls(spec, mmap.mmap(-1, spec.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def tell_others(self) -> None:
        """Have other hosts' planes learn of what has been written here, if there are any."""
        if self._bell is not None:
            with contextlib.suppress(BlockingIOError):  # who is to listen is behind, and will look
                os.write(self._bell, b"!")

    def unlink(self) -> None:
        """Remove the segment's name; memory goes when the last engine does. Safe to call twice."""
        unlink(self.spec.name)


def create_segment(name: str, size_bytes: int) -> mmap.mmap:
    """Make shared memory that its owner alone can read.

    Raises:
        OSError: there is no room for it.
    """
    descriptor = os.open(DIRECTORY / name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)  # sparse, it could end in SIGBUS later
        return mmap.mmap(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def unlink(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(DIRECTORY / name)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.0f} MiB"
