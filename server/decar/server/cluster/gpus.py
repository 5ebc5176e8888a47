"""Which GPUs of its node each engine has. Knows sizes and devices, and what Ray has given; knows no vLLM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from decar.router import Ensemble
from decar.router.errors import StartError
from decar.server.cluster.nodes import Cluster, Held, Node, Plan
from decar.server.placement import NOBODY, Gpu, Place, place_on, visible_gpus


def check_gateway() -> None:
    """
    Raises:
        StartError: vLLM's build for GPUs cannot be asked here what it makes of flags.
    """
    if not visible_gpus():
        raise StartError(
            "vLLM here is its build for GPUs, which needs one also where the gateway runs, and nvidia-smi shows none: "
            "start the server on a node that has one"
        )


def hold(cluster: Cluster, plan: Plan) -> list[Held]:
    """The GPUs of each host of a ``plan``, from now on this server's.

    Raises:
        StartError: others have them, or a node has other GPUs than Ray has counted.
    """
    return [
        cluster.hold(node, count) if count else Held((), ())
        for node, count in zip(plan.nodes, plan.held, strict=True)
    ]


def places_on(
    plan: Plan,
    held: Sequence[Held],
    ensemble: Ensemble,
    kv_bytes: int | None = None,
    utilisation: float = 0.9,
    ranks: int = 1,
) -> list[Place]:
    """Where on its node each engine of a ``plan`` runs, and those that may come later: [K].

    A GPU that is named is used though Ray has given others: its books count GPUs, so they are right, but whoever names
    one has to know that nothing else uses it. All others are of those that Ray has given.

    Args:
        held: of each host.
        kv_bytes, utilisation, ranks: as for `placement.place`.

    Raises:
        StartError: a GPU is not there, or too small for what it would hold.
    """
    sizes = [(expert.name, expert.weight_bytes) for expert in ensemble.experts]
    counts = [expert.options.tensor_parallel_size or ranks for expert in ensemble.experts]
    more = len(plan.of) - len(sizes)
    sizes += [(NOBODY, max(size for _, size in sizes))] * more
    counts += [ranks] * more
    found: dict[int, Place] = {}
    for host, node in enumerate(plan.nodes):
        there = [expert for expert, its in enumerate(plan.of) if its == host]
        if not there:
            continue
        wished = {i: plan.wished[expert] for i, expert in enumerate(there) if expert in plan.wished}
        gpus = _usable(
            node, plan.held[host], held[host], {gpu for theirs in wished.values() for gpu in theirs}
        )
        at = {gpu.index: place for place, gpu in enumerate(gpus)}
        chosen = {i: tuple(at[gpu] for gpu in theirs) for i, theirs in wished.items()}
        own_sizes, own_counts = [sizes[i] for i in there], [counts[i] for i in there]
        try:
            places = place_on(gpus, own_sizes, own_counts, chosen, kv_bytes, utilisation=utilisation)
        except StartError as error:
            raise StartError(f"node {node.name!r}: {error}") from None
        devices = {gpu.index: gpu.device for gpu in gpus}
        for expert, placed in zip(there, places, strict=True):
            own = ",".join(devices[gpu] for gpu in placed.gpus)  # rows lie in host memory: it maps no others
            found[expert] = replace(placed, devices=own)
    return [found[expert] for expert in range(len(plan.of))]


def shared(plan: Plan, places: Sequence[Place]) -> dict[str, list[str]]:
    """The experts that share a GPU, by which one that is."""
    names = defaultdict(list)
    for host, placed in zip(plan.of, places, strict=True):
        for gpu in placed.gpus:
            if placed.expert != NOBODY:
                names[f"GPU {gpu} of node {plan.nodes[host].name!r}"].append(placed.expert)
    return {gpu: theirs for gpu, theirs in names.items() if len(theirs) > 1}


def _usable(node: Node, count: int, held: Held, named: set[int]) -> list[Gpu]:
    """The ``count`` GPUs of a node that its engines have: those that are ``named``, and else of those that Ray has
    given.

    Raises:
        StartError: the node does not show them.
    """
    seen = {gpu.index: gpu for gpu in held.seen}
    for index in sorted(named):
        if index not in seen:
            raise StartError(f"node {node.name!r} has no GPU {index}: {_shown(held)}")
    given = [gpu for gpu in held.seen if gpu.device in held.given]
    if len(given) < len(held.given):
        raise StartError(
            f"node {node.name!r}: Ray has given GPU {', '.join(held.given)} there, and {_shown(held)}; begin the node "
            "with as many as it has (`ray start --num-gpus`)"
        )
    others = [gpu for gpu in given if gpu.index not in named][: count - len(named)]
    return sorted([*(seen[index] for index in named), *others], key=lambda gpu: gpu.index)


def _shown(held: Held) -> str:
    return f"nvidia-smi shows {', '.join(gpu.device for gpu in held.seen) or 'none'} there"
