"""Which engine runs where, and what memory it needs there. Knows sizes and devices, no vLLM.

An engine has as many GPUs as it has ranks, to itself when there are enough; else GPUs are shared, and every engine on a
shared one is given an explicit KV size, because engines that measure free memory side by side count each other's.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import psutil

from decar.router import Ensemble
from decar.router.errors import StartError

CPU_KV_BYTES = 1 << 30
CPU_OVERHEAD_BYTES = 700 << 20  # a CPU engine's code and buffers, measured
GPU_OVERHEAD_BYTES = 3 << 30  # CUDA context, graphs and activations: an allowance, not measured
SMALLEST_KV_BYTES = 64 << 20
NOBODY = ""
"""In the place of an expert that may come later."""


@dataclass(frozen=True)
class Gpu:
    """One device.

    Attributes:
        index: that CUDA gives it, in a process that may use what this one may.
        device: what CUDA_VISIBLE_DEVICES calls it.
    """

    index: int
    name: str
    total_bytes: int
    device: str


@dataclass(frozen=True)
class Place:
    """Where one expert's engine runs.

    Attributes:
        expert: its name, or `NOBODY`.
        gpus: device indices, one for each of its ranks; empty on CPU.
        ranks: processes that hold its weights together, each an equal part.
        weight_bytes: of its checkpoint.
        kv_bytes: a rank's part of its KV cache; None where it has its GPUs to itself, and takes what is left.
        overhead_bytes: everything else, estimated, of each rank.
        devices: CUDA_VISIBLE_DEVICES of its processes, its own GPUs first; empty on CPU.
        gpu_bytes: memory of the smallest of its GPUs; 0 on CPU.
    """

    expert: str
    gpus: tuple[int, ...]
    ranks: int
    weight_bytes: int
    kv_bytes: int | None
    overhead_bytes: int
    devices: str = ""
    gpu_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """By each of its ranks."""
        weight_bytes = -(-self.weight_bytes // self.ranks)
        return weight_bytes + (self.kv_bytes or SMALLEST_KV_BYTES) + self.overhead_bytes


def visible_gpus() -> list[Gpu]:
    """GPUs that this process may use, asked of nvidia-smi: asking CUDA would claim memory on each.

    Raises:
        StartError: CUDA_VISIBLE_DEVICES names what is not there.
    """
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines()) if row]
    return _visible(rows, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _visible(rows: Sequence[Sequence[str]], wanted: str | None) -> list[Gpu]:
    """``rows`` of index, uuid, name, MiB in the order of ``wanted`` (CUDA_VISIBLE_DEVICES), numbered from 0."""
    chosen = [(row[0], row) for row in rows]
    if wanted is not None:
        chosen = []
        for device in filter(None, (part.strip() for part in wanted.split(","))):
            match = [row for row in rows if device == row[0] or row[1].startswith(device)]
            if not match:
                raise StartError(f"CUDA_VISIBLE_DEVICES names {device!r}, which nvidia-smi does not list")
            chosen.append((device, match[0]))
    return [Gpu(i, name, int(mib) << 20, device) for i, (device, (_, _, name, mib)) in enumerate(chosen)]


def refuse_nodes(wish: str) -> None:
    """
    Raises:
        StartError: a --placement without --ray names nodes.
    """
    for part in wish.split(","):
        if "@" in part or "node:" in part:
            raise StartError(
                f"--placement: {part.strip()!r} names a node, which a Ray cluster has: add --ray, or write EXPERT=GPU"
            )


def place(
    ensemble: Ensemble,
    gpus: Sequence[Gpu],
    wish: str | None = None,
    kv_bytes: int | None = None,
    rows_bytes: int = 0,
    utilisation: float = 0.9,
    seats: int = 0,
    ranks: int = 1,
) -> list[Place]:
    """Plan where the ensemble's engines run, in manifest order; then where there is to be room for more.

    Args:
        gpus: none means CPU.
        wish: "EXPERT=GPU,..." for every expert, "EXPERT=GPU+GPU" for one of two ranks; else GPUs are dealt out in turn.
        kv_bytes: a KV size to use for every rank, as the user set it.
        rows_bytes: one engine's rows on its device.
        utilisation: share of a GPU's memory that engines may use.
        seats: how many places there are to be in all, if more than experts.
        ranks: of each expert whose options do not say.

    Raises:
        StartError: the wish does not fit, or a GPU is too small for what it would hold.
    """
    names = ensemble.expert_names
    sizes = [(expert.name, expert.weight_bytes) for expert in ensemble.experts]
    counts = [expert.options.tensor_parallel_size or ranks for expert in ensemble.experts]
    room = range(len(names), seats)
    counts += [ranks for _ in room]
    if not gpus:
        if wish:
            raise StartError("--placement names GPUs, and there is none here")
        sizes += [(NOBODY, 0) for _ in room]
        return [
            Place(name, (), count, size, kv_bytes or CPU_KV_BYTES // count, CPU_OVERHEAD_BYTES)
            for (name, size), count in zip(sizes, counts, strict=True)
        ]
    sizes += [(NOBODY, max(size for _, size in sizes)) for _ in room]
    chosen = _wished(names, counts, len(gpus), wish) if wish else {}
    return place_on(gpus, sizes, counts, chosen, kv_bytes, rows_bytes, utilisation)


def place_on(
    gpus: Sequence[Gpu],
    sizes: Sequence[tuple[str, int]],
    counts: Sequence[int],
    chosen: Mapping[int, tuple[int, ...]],
    kv_bytes: int | None = None,
    rows_bytes: int = 0,
    utilisation: float = 0.9,
) -> list[Place]:
    """Plan which of one host's GPUs each of n engines has.

    Args:
        gpus: at least one.
        sizes: [n], names, `NOBODY` for one that may come, and bytes of their weights.
        counts: [n], their ranks.
        chosen: of some of them, by number, places in ``gpus``; the others are dealt out in turn, first over those that
            nobody has chosen.
        kv_bytes: as for `place`, and what follows.

    Raises:
        StartError: a GPU is too small for what it would hold, or there are fewer than an engine has ranks.
    """
    where = _dealt(sizes, counts, len(gpus), chosen)
    overhead = GPU_OVERHEAD_BYTES + rows_bytes
    shares, sharing = {}, {}
    for gpu in {gpu for theirs in where for gpu in theirs}:
        there = [
            (name, -(-size // count))
            for (name, size), count, theirs in zip(sizes, counts, where, strict=True)
            if gpu in theirs
        ]
        weights = sum(size for _, size in there)
        left = int(gpus[gpu].total_bytes * utilisation) - weights - overhead * len(there)
        shares[gpu], sharing[gpu] = left // len(there), len(there)
        if (kv_bytes or max(shares[gpu], SMALLEST_KV_BYTES)) > shares[gpu]:
            raise StartError(
                f"GPU {gpus[gpu].index} ({gpus[gpu].name}, {gib(gpus[gpu].total_bytes)}) is too small for "
                f"{', '.join(name or 'another expert' for name, _ in there)}: weights {gib(weights)}, "
                f"about {gib(overhead)} besides for each engine, and {gib(shares[gpu] * len(there))} left for "
                "KV caches; use another --placement, more GPUs, --tensor-parallel-size, or lower "
                "--kv-cache-memory-bytes or --max-num-seqs"
            )
    places = []
    for (expert, weight_bytes), count, theirs in zip(sizes, counts, where, strict=True):
        alone = all(sharing[gpu] == 1 for gpu in theirs)
        own = kv_bytes or (None if alone else min(shares[gpu] for gpu in theirs))
        indices = tuple(gpus[gpu].index for gpu in theirs)
        smallest = min(gpus[gpu].total_bytes for gpu in theirs)
        devices = device_order(theirs, gpus)
        places.append(Place(expert, indices, count, weight_bytes, own, overhead, devices, smallest))
    return places


def _dealt(
    sizes: Sequence[tuple[str, int]], counts: Sequence[int], gpus: int, chosen: Mapping[int, tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """GPUs for each engine, as many as it has ranks: those that are ``chosen`` for it, else in turn.

    Raises:
        StartError: one has more ranks than there are GPUs.
    """
    taken = {gpu for theirs in chosen.values() for gpu in theirs}
    order = sorted(range(gpus), key=lambda gpu: gpu in taken)
    where, begin = [], 0
    for i, ((name, _), count) in enumerate(zip(sizes, counts, strict=True)):
        if i in chosen:
            where.append(chosen[i])
            continue
        if count > gpus:
            raise StartError(
                f"expert {name or 'that may come'!r} is to be on {count} GPUs (tensor_parallel_size), and {gpus} can "
                "be seen here"
            )
        where.append(tuple(order[(begin + rank) % gpus] for rank in range(count)))
        begin += count
    return where


def exchanged(places: Sequence[Place], ensemble: Ensemble, ranks: int = 1) -> list[Place]:
    """The places of an ensemble's experts where each takes the one of ``places`` [K], with its memory: larger weights
    leave less for the KV cache.

    Args:
        ranks: of each expert whose options do not say.

    Raises:
        StartError: they leave too little, or on CPU too little is free.
    """
    free = psutil.virtual_memory().available
    found = []
    for expert, before in zip(ensemble.experts, places, strict=True):
        count = expert.options.tensor_parallel_size or ranks
        if count != before.ranks:
            raise StartError(
                f"expert {expert.name!r} would have another tensor_parallel_size ({count}) than its place has "
                f"({before.ranks}): start the server anew"
            )
        now = replace(before, expert=expert.name, weight_bytes=expert.weight_bytes)
        growth = now.needed_bytes - before.needed_bytes
        if not before.gpus:
            missing = count * (now.needed_bytes if before.expert == NOBODY else growth) - free
        elif now.kv_bytes is not None:
            now = replace(now, kv_bytes=now.kv_bytes - max(growth, 0))
            missing = SMALLEST_KV_BYTES - (now.kv_bytes or 0)
        else:
            missing = 0
        if missing > 0:
            raise StartError(
                f"expert {expert.name!r} would need {gib(missing)} more than there is in its place: start the server "
                "anew, and it finds all experts their places"
            )
        found.append(now)
    return found


def check_memory(places: Sequence[Place]) -> None:
    """On CPU, refuse before anything starts what cannot fit.

    Raises:
        StartError: says how much is needed and how much is free.
    """
    available = psutil.virtual_memory().available
    needed = sum(placed.ranks * placed.needed_bytes for placed in places)
    if needed > available:
        raise StartError(
            f"not enough memory: {len(places)} experts need about {gib(needed)} "
            f"({gib(places[0].ranks * (places[0].kv_bytes or 0))} of it for each one's KV cache), {gib(available)} are "
            "free; lower --kv-cache-memory-bytes"
        )


def device_order(own: Sequence[int], gpus: Sequence[Gpu]) -> str:
    """CUDA_VISIBLE_DEVICES of an engine on ``own`` of the ``gpus``: those first, and the others, whose rows it maps."""
    others = [gpu for gpu in range(len(gpus)) if gpu not in own]
    return ",".join(gpus[gpu].device for gpu in (*own, *others))


def _wished(names: Sequence[str], counts: Sequence[int], gpus: int, wish: str) -> dict[int, tuple[int, ...]]:
    ranks = dict(zip(names, counts, strict=False))
    chosen: dict[str, tuple[int, ...]] = {}
    for part in wish.split(","):
        name, _, where = part.strip().partition("=")
        if name not in names:
            raise StartError(f"--placement: {name!r} is none of the experts {', '.join(names)}")
        for gpu in where.split("+"):
            if not gpu.isdigit() or int(gpu) >= gpus:
                raise StartError(f"--placement: {part.strip()!r} does not name a GPU from 0 to {gpus - 1}")
        chosen[name] = tuple(map(int, where.split("+")))
        if len(set(chosen[name])) != ranks[name] or len(chosen[name]) != ranks[name]:
            raise StartError(
                f"--placement: {part.strip()!r} does not name {ranks[name]} different GPUs, which is the expert's "
                "tensor_parallel_size: as in EXPERT=0+1"
            )
    missing = [name for name in names if name not in chosen]
    if missing:
        raise StartError(
            f"--placement says nothing of {', '.join(missing)}: write EXPERT=GPU for each expert"
        )
    return {expert: chosen[name] for expert, name in enumerate(names)}


def gib(size_bytes: int, digits: int = 1) -> str:
    return f"{size_bytes / 2**30:,.{digits}f} GiB"
