"""A plane on each host, and what keeps them alike: a host tells the others what its engines write, in the order of
writing. Knows the plane and bytes; knows no sockets.

What is told is the difference between a block and what a peer has of it, found when there is room on the way: so a slow
link has no queue that grows, and one that was broken goes on with what is the case now. What makes that right is that
a block's words may be read at any moment: data is written first and stamped after. So they are read the other way
round, stamps first, and told data first.

A message is a head and some writes; a write is a field, indices [n] of its cells and their values [n, ...]. Everybody
gets the words; a row goes to its leader's host alone, the weights that mixed go to the gateway's.

Where `PlaneSpec.wire_rows` is N, a row is its N best logits, its log-normaliser, and its *tail*, the probability of
the other tokens, over which it is spread evenly at the other end. So a row stays a distribution, at most its tail away
from what it was, and a mixture of such rows at most the weighted sum of their tails: total variation is convex.

Shapes: K experts, S slots, V vocabulary, R positions of a ring, U units of a prompt.
"""

from __future__ import annotations

import math
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decar.kernels import Rule
from decar.server.protocol.plane import NOTHING, WHOLE, Plane, PlaneSpec

GATEWAY = 0
"""The gateway's host."""
LENGTH = struct.Struct("<I")  # of what follows
_HEAD = struct.Struct(
    "<HHd"
)  # whose block (K: the gateway's own part), how many writes, and when: by that host's clock
_WRITE = struct.Struct("<HI")  # which field, how many cells
_INDEX = np.dtype("<u4")
_BEST = "best of a row"
_LEAST = 1e-30

Write = tuple[str, np.ndarray, np.ndarray]
"""Field, indices [n], values [n, ...]."""


class WireError(Exception):
    """What has come is no message of a peer."""


@dataclass(frozen=True)
class Hosts:
    """Which host each expert's engine is on.

    Attributes:
        of: [K], by place in the plane; the gateway is on host `GATEWAY`.
    """

    of: tuple[int, ...]

    @property
    def all(self) -> list[int]:
        return sorted({GATEWAY, *self.of})

    def experts_on(self, host: int) -> list[int]:
        return [expert for expert, its in enumerate(self.of) if its == host]


def best_of(spec: PlaneSpec) -> np.dtype[Any]:
    """What is told of a row that does not go whole."""
    n = (spec.wire_rows,)
    return np.dtype([("ids", "<u4", n), ("logits", "<f4", n), ("log_normaliser", "<f4"), ("tail", "<f4")])


def row_bytes(spec: PlaneSpec, rule: Rule) -> int:
    """Of a row on its way to another host, which the logit rule wants whole."""
    return best_of(spec).itemsize if spec.wire_rows and rule == "velocity" else 4 * spec.vocab_size


def cells_of(plane: Plane, expert: int) -> dict[str, np.ndarray]:
    """The fields of a block as cells [n] or [n, width], in place; for expert K, what is the gateway's own."""
    if expert == plane.spec.experts:
        return {"alive": plane.alive, "weights_read": plane.weights_read}
    spec, cells = plane.spec, {}
    for name, (shape, _) in spec.fields().items():
        width = int(name in ("membership_weights", "log_weights", "prompt_sums", "rows"))
        flat = (math.prod(shape[: len(shape) - width]), *shape[len(shape) - width :])
        cells[name] = plane.fields[name][expert].reshape(flat)
    return cells


def _names(spec: PlaneSpec) -> list[str]:
    """Of fields, by number on the wire."""
    return [*spec.fields(), "alive", "weights_read", _BEST]


def _numbers(spec: PlaneSpec) -> dict[str, int]:
    return {name: number for number, name in enumerate(_names(spec))}


def longest_message(spec: PlaneSpec) -> int:
    """Bytes that no message is longer than."""
    cells = 2 * spec.slots + 1
    words = sum(
        (_WRITE.size + _INDEX.itemsize * math.prod(shape) + np.dtype(dtype).itemsize * math.prod(shape))
        for name, (shape, dtype) in spec.fields().items()
        if name != "rows"
    )
    return (
        _HEAD.size
        + 8 * (spec.experts + spec.slots)
        + 12 * cells
        + words
        + 4 * spec.vocab_size
        + best_of(spec).itemsize
    )


class Outgoing:
    """What one peer has of one block, and so what it is still to be told.

    Args:
        expert: whose block; it is on this host.
        peer: who is told.
    """

    def __init__(self, plane: Plane, expert: int, hosts: Hosts, peer: int):
        self._spec, self._expert = plane.spec, expert
        self._numbers = _numbers(plane.spec)
        self._cells = cells_of(plane, expert)
        self._to_gateway = peer == GATEWAY
        self._decided = plane.fields["token_stamp"]  # after a new connection, most rows are old
        self._leads_there = np.array([host == peer for host in hosts.of])
        slots = plane.spec.slots
        self._running = np.full(slots, -1)
        self._row_stamps = np.zeros(2 * slots, np.int64)
        self._token_stamps = np.zeros(2 * slots, np.int64)
        self._members = np.zeros(slots, np.int64)
        self._weighed = np.zeros(slots, np.int64)  # the last stamp whose weights have been told
        self._begun = np.zeros(slots, np.int64)  # the generation whose first row has been seen

    def news(self, due: bool) -> tuple[bytes, list[int]]:
        """A message with all that is new but rows, and the entries whose rows are still to go to this peer.

        The gateway's host is always told something, since it waits for what it has been told until when; another one,
        where there is nothing new, only if that is ``due``.

        What an engine is running is told as long as it is true, and no longer before its row is there: whoever sees
        that an engine no longer runs a step takes it that its row does not come.
        """
        now, cells = time.monotonic(), self._cells
        running, token_stamps = cells["running"].copy(), cells["token_stamp"].copy()
        tokens = cells["token"].copy()
        steady = cells["token_stamp"] == token_stamps
        row_stamps = cells["row_stamp"].copy()
        row_for = cells["row_for"].copy()
        members = cells["membership"].copy()
        writes: list[Write] = [("beats", _FIRST, cells["beats"]), ("counters", *_all_of(cells["counters"]))]

        changed = np.flatnonzero(members != self._members)
        if len(changed):
            for name in ("membership_weights", "membership_from"):
                writes.append((name, changed, cells[name][changed]))
            writes.append(("membership", changed, members[changed]))
            self._members = members

        new_rows = np.flatnonzero(row_stamps != self._row_stamps)
        if len(new_rows):
            writes += self._prompts(new_rows, row_stamps)
            leaders, stamps = row_for[new_rows] & ~WHOLE, row_stamps[new_rows]
            needed = self._leads_there[leaders] & (self._decided[leaders, new_rows] != stamps)
            self._row_stamps[new_rows[~needed]] = stamps[~needed]
            waited_for = running[new_rows // 2] == stamps
            new_rows = np.concatenate([new_rows[needed & waited_for], new_rows[needed & ~waited_for]])

        said = np.flatnonzero(steady & (token_stamps != self._token_stamps))
        if len(said):
            if self._to_gateway:
                writes += self._weights(token_stamps)
            writes.append(("token", said, tokens[said]))
            writes.append(("token_stamp", said, token_stamps[said]))
            self._token_stamps[said] = token_stamps[said]

        moved = running != self._running
        for entry in new_rows.tolist():
            slot = entry // 2
            moved[slot] &= running[slot] == row_stamps[entry]
        moved_slots = np.flatnonzero(moved)
        if len(moved_slots):
            writes.append(("running", moved_slots, running[moved_slots]))
            self._running[moved_slots] = running[moved_slots]
        message = (
            message_of(self._numbers, self._expert, now, writes)
            if due or self._to_gateway or len(writes) > 2
            else b""
        )
        return message, new_rows.tolist()

    def row(self, entry: int) -> bytes | None:
        """A message with the row of ``entry``; None where it has been overwritten meanwhile, and nobody needs it."""
        cells, stamp = self._cells, int(self._cells["row_stamp"][entry])
        at, one = np.array([entry]), slice(entry, entry + 1)
        log_normaliser = cells["log_normaliser"][entry]
        whole = not self._spec.wire_rows or cells["row_for"][entry] & WHOLE or not np.isfinite(log_normaliser)
        writes: list[Write] = [("log_normaliser", at, cells["log_normaliser"][one])]
        if whole:
            writes.append(("rows", at, cells["rows"][one]))
            if self._spec.wire_rows:
                writes.append(("row_tail", at, np.zeros(1, np.float32)))
        else:
            writes = [(_BEST, at, self._best(cells["rows"][entry], log_normaliser))]
        writes.append(("row_stamp", at, np.array([stamp])))
        message = message_of(self._numbers, self._expert, 0.0, writes)
        if cells["row_stamp"][entry] != stamp:
            return None
        self._row_stamps[entry] = stamp
        return message

    def _best(self, row: np.ndarray, log_normaliser: np.float32) -> np.ndarray:
        """What is told of a ``row`` [V], as one value of `best_of`."""
        best = np.zeros(1, best_of(self._spec))
        ids = np.argpartition(row, -self._spec.wire_rows)[-self._spec.wire_rows :]
        others = np.exp(row - log_normaliser)
        others[ids] = 0.0
        # Nobody loses an expert for good over a token that is merely unlikely to it.
        tail = max(others.sum(dtype=np.float64), _LEAST) if np.isfinite(row).sum() > len(ids) else 0.0
        best["ids"], best["logits"] = ids, row[ids]
        best["log_normaliser"], best["tail"] = log_normaliser, tail
        return best

    def _prompts(self, entries: np.ndarray, row_stamps: np.ndarray) -> Iterator[Write]:
        """What the prompts said whose first rows are new: it is there before those."""
        slots, generations = entries // 2, row_stamps[entries] >> 32
        slots = np.unique(slots[generations != self._begun[slots]])
        if not len(slots):
            return
        self._begun[slots] = row_stamps.reshape(-1, 2)[slots].max(axis=1) >> 32
        if self._to_gateway:
            yield "prompt_sums", slots, self._cells["prompt_sums"][slots]
        generations = self._cells["prompt_of"][slots]
        yield "prompt_sum", slots, self._cells["prompt_sum"][slots]
        yield "prompt_of", slots, generations

    def _weights(self, token_stamps: np.ndarray) -> Iterator[Write]:
        """The weights of positions that have been decided since they were last told."""
        latest = token_stamps.reshape(-1, 2).max(axis=1)
        slots = np.flatnonzero(latest != self._weighed)
        if not len(slots):
            return
        ring, stamps, before = self._spec.ring, latest[slots], self._weighed[slots]
        ends = stamps & 0xFFFFFFFF  # one more than the last position
        begins = np.where(stamps >> 32 == before >> 32, before & 0xFFFFFFFF, 0)
        begins = np.maximum(begins, ends - ring)
        counts = ends - begins
        positions = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(slots * ring, counts) + (np.repeat(begins, counts) + positions) % ring
        self._weighed = latest
        yield "log_weights", places, self._cells["log_weights"][places]
        if self._spec.wire_rows:
            yield "tails", places, self._cells["tails"][places]


class OutgoingHeader:
    """The same of the gateway's own part: who lives, and how far weights have been read."""

    def __init__(self, plane: Plane):
        self._cells = cells_of(plane, plane.spec.experts)
        self._numbers = _numbers(plane.spec)
        self._expert = plane.spec.experts
        self._told = {name: np.full_like(cells, -1) for name, cells in self._cells.items()}

    def news(self, due: bool) -> bytes:
        """A message with what is new; where there is nothing, only if one is ``due``."""
        writes: list[Write] = []
        for name, cells in self._cells.items():
            now = cells.copy()
            changed = np.flatnonzero(now != self._told[name])
            if len(changed):
                writes.append((name, changed, now[changed]))
            self._told[name] = now
        if not writes and not due:
            return b""
        return message_of(self._numbers, self._expert, time.monotonic(), writes)


def message_of(numbers: dict[str, int], expert: int, now: float, writes: Sequence[Write]) -> bytes:
    parts = [b"", _HEAD.pack(expert, len(writes), now)]
    for name, indices, values in writes:
        parts += [
            _WRITE.pack(numbers[name], len(indices)),
            indices.astype(_INDEX).tobytes(),
            values.tobytes(),
        ]
    parts[0] = LENGTH.pack(sum(map(len, parts)))
    return b"".join(parts)


class Incoming:
    """Takes in what a peer tells, into this host's plane.

    Args:
        peer: who tells: of its own experts, and where it is the gateway's host, what is the gateway's.
    """

    def __init__(self, plane: Plane, hosts: Hosts, peer: int):
        self._plane, self._names = plane, _names(plane.spec)
        self._experts = hosts.experts_on(peer)
        theirs = [*self._experts, *([plane.spec.experts] if peer == GATEWAY else [])]
        self._cells = {expert: cells_of(plane, expert) for expert in theirs}
        self._best = best_of(plane.spec)

    def apply(self, message: memoryview) -> None:
        """Write what a message says, in its order.

        Raises:
            WireError: it is none; what came before the mistake is written.
        """
        try:
            expert, count, told = _HEAD.unpack_from(message)
            end = _HEAD.size
            for _ in range(count):
                number, length = _WRITE.unpack_from(message, end)
                name = self._names[number]
                cells = self._cells[expert]["row_stamp" if name == _BEST else name]
                end += _WRITE.size
                indices = np.frombuffer(message, _INDEX, length, end)
                end += indices.nbytes
                width, dtype = math.prod(cells.shape[1:]), self._best if name == _BEST else cells.dtype
                values = np.frombuffer(message, dtype, length * width, end)
                end += values.nbytes
                if name == _BEST:
                    self._spread(self._cells[expert], indices, values)
                    continue
                if name == "alive":
                    self._bury(indices[(values == 0) & (cells[indices] != 0)])
                cells[indices] = values.reshape(length, *cells.shape[1:])
        except (struct.error, ValueError, LookupError) as error:
            raise WireError(f"no message of a peer: {error}") from error
        if end != len(message):
            raise WireError(f"a message is longer than it says, by {len(message) - end} bytes")
        if told and expert < self._plane.spec.experts:
            self._plane.mirrored[expert] = told

    def _spread(self, cells: dict[str, np.ndarray], entries: np.ndarray, bests: np.ndarray) -> None:
        """Make whole rows of their best logits."""
        others = self._plane.spec.vocab_size - self._plane.spec.wire_rows
        for entry, best in zip(entries, bests, strict=True):
            with np.errstate(divide="ignore"):  # without a tail, there is nothing to spread
                least = best["log_normaliser"] + np.log(best["tail"] / others)
            row = np.full(self._plane.spec.vocab_size, least, np.float32)
            row[best["ids"]] = best["logits"]
            cells["rows"][entry] = (
                row  # at once: one that is told again, being read, gets the bits that it has
            )
            cells["log_normaliser"][entry], cells["row_tail"][entry] = best["log_normaliser"], best["tail"]

    def _bury(self, experts: np.ndarray) -> None:
        """What these were running does not come."""
        self._plane.fields["running"][experts] = NOTHING

    def lost(self) -> None:
        """The peer is not heard: nobody waits for its engines until it is again."""
        self._plane.fields["running"][self._experts] = NOTHING


_FIRST = np.zeros(1, np.int64)


def _all_of(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(cells)), cells
