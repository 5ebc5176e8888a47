"""Which engine runs where, and what memory it needs there. Knows sizes and devices, no vLLM.

One engine per GPU when there are enough; else GPUs are shared, and every engine on a shared one is given an
explicit KV size, because engines that measure free memory side by side count each other's.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Sequence
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
    """One device, by the index that CUDA gives it in this process."""

    index: int
    name: str
    total_bytes: int


@dataclass(frozen=True)
class Place:
    """Where one expert's engine runs.

    Attributes:
        expert: its name, or `NOBODY`.
        gpu: device index; None on CPU.
        weight_bytes: of its checkpoint.
        kv_bytes: its KV cache; None where it has a GPU to itself, and takes what is left.
        overhead_bytes: everything else, estimated.
        devices: CUDA_VISIBLE_DEVICES of its process, its own GPU first; empty on CPU.
    """

    expert: str
    gpu: int | None
    weight_bytes: int
    kv_bytes: int | None
    overhead_bytes: int
    devices: str = ""

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + (self.kv_bytes or SMALLEST_KV_BYTES) + self.overhead_bytes


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
    chosen = list(rows)
    if wanted is not None:
        chosen = []
        for device in filter(None, (part.strip() for part in wanted.split(","))):
            match = [row for row in rows if device == row[0] or row[1].startswith(device)]
            if not match:
                raise StartError(f"CUDA_VISIBLE_DEVICES names {device!r}, which nvidia-smi does not list")
            chosen.append(match[0])
    return [Gpu(i, name, int(mib) << 20) for i, (_, _, name, mib) in enumerate(chosen)]


def place(
    ensemble: Ensemble,
    gpus: Sequence[Gpu],
    wish: str | None = None,
    kv_bytes: int | None = None,
    rows_bytes: int = 0,
    utilisation: float = 0.9,
    seats: int = 0,
) -> list[Place]:
    """Plan where the ensemble's engines run, in manifest order; then where there is to be room for more.

    Args:
        gpus: none means CPU.
        wish: "EXPERT=GPU,..." for every expert; else experts are dealt out in turn.
        kv_bytes: a KV size to use for every engine, as the user set it.
        rows_bytes: one engine's rows on its device.
        utilisation: share of a GPU's memory that engines may use.
        seats: how many places there are to be in all, if more than experts.

    Raises:
        StartError: the wish does not fit, or a GPU is too small for what it would hold.
    """
    names = ensemble.expert_names
    sizes = [(expert.name, expert.weight_bytes) for expert in ensemble.experts]
    room = range(len(names), seats)
    if not gpus:
        if wish:
            raise StartError("--placement names GPUs, and there is none here")
        sizes += [(NOBODY, 0) for _ in room]
        return [Place(name, None, size, kv_bytes or CPU_KV_BYTES, CPU_OVERHEAD_BYTES) for name, size in sizes]
    where = _wished(names, len(gpus), wish) if wish else [k % len(gpus) for k in range(len(names))]
    where += [k % len(gpus) for k in room]
    sizes += [(NOBODY, max(size for _, size in sizes)) for _ in room]
    places = []
    for (expert, weight_bytes), gpu in zip(sizes, where, strict=True):
        sharing = [other for other, at in zip(sizes, where, strict=True) if at == gpu]
        overhead = GPU_OVERHEAD_BYTES + rows_bytes
        weights = sum(size for _, size in sharing)
        left = int(gpus[gpu].total_bytes * utilisation) - weights - overhead * len(sharing)
        share = left // len(sharing)
        if (kv_bytes or max(share, SMALLEST_KV_BYTES)) > share:
            raise StartError(
                f"GPU {gpu} ({gpus[gpu].name}, {gib(gpus[gpu].total_bytes)}) is too small for "
                f"{', '.join(name or 'another expert' for name, _ in sharing)}: weights {gib(weights)}, "
                f"about {gib(overhead)} besides for each engine, and {gib(share * len(sharing))} left for "
                "KV caches; use another --placement, more GPUs, or lower --kv-cache-memory-bytes or --max-num-seqs"
            )
        own = kv_bytes or (None if len(sharing) == 1 else share)
        devices = device_order(gpu, len(gpus))
        places.append(Place(expert, gpu, weight_bytes, own, overhead, devices))
    return places


def exchanged(places: Sequence[Place], ensemble: Ensemble) -> list[Place]:
    """The places of an ensemble's experts where each takes the one of ``places`` [K], with its memory: larger weights
    leave less for the KV cache.

    Raises:
        StartError: they leave too little, or on CPU too little is free.
    """
    free = psutil.virtual_memory().available
    found = []
    for expert, before in zip(ensemble.experts, places, strict=True):
        now = replace(before, expert=expert.name, weight_bytes=expert.weight_bytes)
        growth = now.weight_bytes - before.weight_bytes
        if before.gpu is None:
            missing = (now.needed_bytes if before.expert == NOBODY else growth) - free
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
    needed = sum(placed.needed_bytes for placed in places)
    if needed > available:
        raise StartError(
            f"not enough memory: {len(places)} experts need about {gib(needed)} "
            f"({gib(places[0].kv_bytes or 0)} of it for each one's KV cache), {gib(available)} are free; "
            "lower --kv-cache-memory-bytes"
        )


def device_order(gpu: int, gpus: int) -> str:
    """CUDA_VISIBLE_DEVICES of an engine on ``gpu``: its own first, and the others, whose rows it maps."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = [part.strip() for part in given.split(",")] if given else [str(i) for i in range(gpus)]
    return ",".join([ids[gpu], *ids[:gpu], *ids[gpu + 1 :]])


def _wished(names: Sequence[str], gpus: int, wish: str) -> list[int]:
    chosen: dict[str, int] = {}
    for part in wish.split(","):
        name, _, gpu = part.strip().partition("=")
        if name not in names:
            raise StartError(f"--placement: {name!r} is none of the experts {', '.join(names)}")
        if not gpu.isdigit() or int(gpu) >= gpus:
            raise StartError(f"--placement: {part.strip()!r} does not name a GPU from 0 to {gpus - 1}")
        chosen[name] = int(gpu)
    missing = [name for name in names if name not in chosen]
    if missing:
        raise StartError(
            f"--placement says nothing of {', '.join(missing)}: write EXPERT=GPU for each expert"
        )
    return [chosen[name] for name in names]


def gib(size_bytes: int, digits: int = 1) -> str:
    return f"{size_bytes / 2**30:,.{digits}f} GiB"
