"""The nodes of a Ray cluster, and which expert goes where. Knows Ray; knows no vLLM."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from decar.router import Ensemble
from decar.router.errors import StartError

_NODE = "node:"


@dataclass(frozen=True)
class Node:
    """One of Ray's.

    Attributes:
        id: Ray's; another one when the node comes back.
        name: as `ray start --node-name` gives it, or its address.
        address: its IP.
        cpus: what nobody has taken.
    """

    id: str
    name: str
    address: str
    cpus: float

    def strategy(self) -> Any:
        """For an actor to be there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.id, soft=False)


class Cluster:
    """A Ray cluster that this process is part of.

    Args:
        address: of its head; "auto" for the one that this machine is part of.

    Raises:
        StartError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str):
        os.environ.setdefault(
            "RAY_ENABLE_AUTO_CONNECT", "0"
        )  # else it would begin anew for whoever is late at the end
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise StartError("--ray needs Ray: pip install 'decar[ray]'") from None
        self._ray = ray
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, log_to_driver=True, logging_level="warning", namespace="decar")
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
            reason = " ".join(str(error).split())[:400]
            raise StartError(
                f"--ray: no cluster at {address!r}: {reason}; `ray start --head` begins one, and `ray start "
                "--address=HOST:PORT` on this machine joins it"
            ) from None
        finally:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has one of its own

    def nodes(self) -> list[Node]:
        """Those that live, this one first, then by name."""
        from ray._private.state import available_resources_per_node

        left = available_resources_per_node()
        here = self._ray.get_runtime_context().get_node_id()
        found = [
            Node(
                node["NodeID"],
                node.get("NodeName") or node["NodeManagerAddress"],
                node["NodeManagerAddress"],
                left.get(node["NodeID"], {}).get("CPU", 0.0),
            )
            for node in self._ray.nodes()
            if node["Alive"]
        ]
        return sorted(found, key=lambda node: (node.id != here, node.name))

    def node(self, name: str) -> Node | None:
        """The one of this name; None: it does not live."""
        return next((node for node in self.nodes() if node.name == name), None)

    def begin(self, node: Node) -> Any:
        """A `Host` on a node, as an actor."""
        from decar.server.cluster.host import Host

        options = {"num_cpus": 0, "max_concurrency": 16, "scheduling_strategy": node.strategy()}
        return self._ray.remote(Host).options(**options).remote(guarded=True)

    def put(self, part: bytes) -> Any:
        """Bytes that actors get where they are asked with this in their place; kept for as long as this is."""
        return self._ray.put(part)

    def end(self, actor: Any) -> None:
        """End an actor, if it has not ended."""
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(actor)

    def close(self) -> None:
        self._ray.shutdown()


@dataclass(frozen=True)
class Plan:
    """Which expert is to be on which node.

    Attributes:
        nodes: the hosts, by number; the gateway's is the first.
        of: [K], the host of each expert.
    """

    nodes: tuple[Node, ...]
    of: tuple[int, ...]


def plan_on(
    nodes: Sequence[Node], ensemble: Ensemble, wish: str | None, ranks: int = 1, seats: int = 0
) -> Plan:
    """Experts on nodes that have a CPU for each of their processes: as ``wish`` says, and else dealt out in turn.

    Args:
        nodes: the gateway's first.
        wish: "EXPERT=node:NAME,...", for every expert or some of them.
        ranks: of each expert whose options do not say.
        seats: how many places there are to be in all, if more than experts.

    Raises:
        StartError: no node fits an expert, or there is no such node or expert.
    """
    wished = _wished(ensemble, nodes, wish)
    free = [node.cpus for node in nodes]
    needs = [expert.options.tensor_parallel_size or ranks for expert in ensemble.experts]
    chosen: dict[int, int] = {}
    for expert, at in wished.items():
        if free[at] < needs[expert]:
            raise StartError(_does_not_fit(ensemble, expert, needs[expert], [(nodes[at], free[at])]))
        free[at] -= needs[expert]
        chosen[expert] = at
    turn = 0
    for expert, needed in enumerate(needs):
        if expert in chosen:
            continue
        fits = [i % len(nodes) for i in range(turn, turn + len(nodes)) if free[i % len(nodes)] >= needed]
        if not fits:
            raise StartError(_does_not_fit(ensemble, expert, needed, list(zip(nodes, free, strict=True))))
        chosen[expert] = fits[0]
        free[fits[0]] -= needed
        turn = fits[0] + 1
    used = sorted({0, *chosen.values()})
    of = [used.index(chosen[expert]) for expert in range(len(needs))]
    of += [i % len(used) for i in range(len(needs), seats)]
    return Plan(tuple(nodes[i] for i in used), tuple(of))


def _does_not_fit(ensemble: Ensemble, expert: int, needed: int, left: Sequence[tuple[Node, float]]) -> str:
    there = ", ".join(f"{node.name} has {cpus:g} left" for node, cpus in left)
    return (
        f"expert {ensemble.expert_names[expert]!r} needs {needed} free CPU{'s' if needed > 1 else ''} of Ray's on one "
        f"node; {there}: add a node (`ray start --address=HOST:PORT`), give one more (--num-cpus), or end what runs "
        "there"
    )


def _wished(ensemble: Ensemble, nodes: Sequence[Node], wish: str | None) -> dict[int, int]:
    names = [node.name for node in nodes]
    chosen: dict[int, int] = {}
    for part in filter(None, (part.strip() for part in (wish or "").split(","))):
        expert, _, where = part.partition("=")
        if expert not in ensemble.expert_names:
            raise StartError(
                f"--placement: {expert!r} is none of the experts {', '.join(ensemble.expert_names)}"
            )
        if not where.startswith(_NODE):
            raise StartError(
                f"--placement: {part!r} names no node: with --ray it is EXPERT=node:NAME; Ray gives out the GPUs there"
            )
        at = [i for i, node in enumerate(nodes) if where.removeprefix(_NODE) in (node.name, node.address)]
        if not at:
            raise StartError(
                f"--placement: there is no node {where.removeprefix(_NODE)!r} in the cluster; there are "
                f"{', '.join(names)}"
            )
        if len(at) > 1:
            raise StartError(
                f"--placement: several nodes are called {where.removeprefix(_NODE)!r}: give them names "
                "(`ray start --node-name=NAME`)"
            )
        chosen[ensemble.expert_names.index(expert)] = at[0]
    return chosen
