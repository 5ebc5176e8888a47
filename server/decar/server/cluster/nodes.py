"""The nodes of a Ray cluster, and which expert goes where. Knows Ray; knows no vLLM."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from decar.router import Ensemble
from decar.router.errors import StartError
from decar.server.placement import Gpu, visible_gpus

KEEP_DEVICES = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
"""Of an actor's environment: Ray does not set its CUDA_VISIBLE_DEVICES, and CUDA counts as nvidia-smi does."""
_HELD_WITHIN_S = 120.0
_WISH = re.compile(r"(?:node:|gpu:(?P<gpus>\d+(?:\+\d+)*)@)(?P<node>.+)")


@dataclass(frozen=True)
class Node:
    """One of Ray's.

    Attributes:
        id: Ray's; another one when the node comes back.
        name: as `ray start --node-name` gives it, or its address.
        address: its IP.
        cpus, gpus: what nobody has taken.
        all_gpus: how many it has.
    """

    id: str
    name: str
    address: str
    cpus: float
    gpus: float = 0.0
    all_gpus: int = 0

    def strategy(self) -> Any:
        """For an actor to be there."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        return NodeAffinitySchedulingStrategy(self.id, soft=False)


def options_of(node: Node, ranks: int, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ray's, of an engine's actor. Its GPUs are those that `LockstepConfig` names, which the server has: see
    `Cluster.hold`."""
    return {
        "num_cpus": ranks,
        "num_gpus": 0,
        "scheduling_strategy": node.strategy(),
        "runtime_env": {"env_vars": {**environment, **KEEP_DEVICES}},
    }


@dataclass(frozen=True)
class Held:
    """GPUs of a node that are this server's in Ray's books.

    Attributes:
        seen: all that the node shows.
        given: those that Ray has given, as CUDA_VISIBLE_DEVICES calls them.
    """

    seen: tuple[Gpu, ...]
    given: tuple[str, ...]


class _Holder:
    """An actor that has GPUs, so that Ray gives them to nobody else."""

    def held(self) -> Held:
        import ray

        given = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return Held(tuple(visible_gpus()), tuple(map(str, given)))


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
        self._holders: dict[str, Any] = {}  # by the node's id
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
                left.get(node["NodeID"], {}).get("GPU", 0.0),
                int(node["Resources"].get("GPU", 0)),
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

    def hold(self, node: Node, gpus: int) -> Held:
        """Have so many GPUs of a node for as long as this cluster is open, in place of those that it has there.

        One actor has all of a node's, and engines, which use them, have none: Ray packs parts of GPUs as it likes, so
        engines that share some would leave in its books a GPU free that they use; and the GPU of an engine that is
        started again would be free meanwhile.

        Raises:
            StartError: others have them.
        """
        if node.id in self._holders:
            self.end(self._holders.pop(node.id))
        options = {
            "num_cpus": 0,
            "num_gpus": gpus,
            "scheduling_strategy": node.strategy(),
            "runtime_env": {"env_vars": KEEP_DEVICES},
        }
        actor = self._holders[node.id] = self._ray.remote(_Holder).options(**options).remote()
        try:
            held: Held = self._ray.get(actor.held.remote(), timeout=_HELD_WITHIN_S)
        except self._ray.exceptions.GetTimeoutError:
            raise StartError(
                f"node {node.name!r} has not given {gpus} GPU{'s' if gpus > 1 else ''} in {_HELD_WITHIN_S:.0f} s: it "
                "does not answer, or somebody else has taken one meanwhile (`ray status`)"
            ) from None
        except self._ray.exceptions.RayError as error:
            raise StartError(f"node {node.name!r}: {str(error).strip().splitlines()[-1]}") from None
        return held

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
        held: of each host, how many GPUs its engines have together; (): they compute on CPUs.
        wished: of experts for which they are named, their GPUs, by CUDA's numbers on their nodes.
    """

    nodes: tuple[Node, ...]
    of: tuple[int, ...]
    held: tuple[int, ...] = ()
    wished: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def plan_on(
    nodes: Sequence[Node],
    ensemble: Ensemble,
    wish: str | None,
    ranks: int = 1,
    seats: int = 0,
    gpus: bool = False,
) -> Plan:
    """Experts on nodes that have a CPU for each of their processes, and with ``gpus`` as many GPUs: as ``wish`` says,
    and else dealt out in turn, where there are GPUs to first over those that nobody has.

    Args:
        nodes: the gateway's first.
        wish: "EXPERT=node:NAME,...", for every expert or some of them; with ``gpus`` also "EXPERT=gpu:N@NAME", and
            "EXPERT=gpu:N+N@NAME" for one of two ranks.
        ranks: of each expert whose options do not say.
        seats: how many places there are to be in all, if more than experts.
        gpus: engines compute on GPUs, which they share where there are too few.

    Raises:
        StartError: no node fits an expert, or there is no such node, GPU or expert.
    """
    wished, indices = _wished(ensemble, nodes, wish, gpus)
    free = [node.cpus for node in nodes]
    needs = [expert.options.tensor_parallel_size or ranks for expert in ensemble.experts]
    left = _gpus_left(ensemble, nodes, wished, indices, needs)

    def fits(expert: int, at: int) -> bool:
        return free[at] >= needs[expert] and (not gpus or int(nodes[at].gpus) >= needs[expert])

    chosen: dict[int, int] = {}
    for expert, at in wished.items():
        if not fits(expert, at):
            raise StartError(_does_not_fit(ensemble, expert, needs[expert], [(nodes[at], free[at])], gpus))
        free[at] -= needs[expert]
        left[at] -= 0 if expert in indices else needs[expert]
        chosen[expert] = at
    turn = 0
    for expert, needed in enumerate(needs):
        if expert in chosen:
            continue
        in_turn = [i % len(nodes) for i in range(turn, turn + len(nodes)) if fits(expert, i % len(nodes))]
        if not in_turn:
            there = list(zip(nodes, free, strict=True))
            raise StartError(_does_not_fit(ensemble, expert, needed, there, gpus))
        at = next((at for at in in_turn if not gpus or left[at] >= needed), in_turn[0])
        chosen[expert] = at
        free[at] -= needed
        left[at] -= needed
        turn = at + 1
    used = sorted({0, *chosen.values()})
    of = [used.index(chosen[expert]) for expert in range(len(needs))]
    room = sorted(set(of)) if gpus else range(len(used))
    of += [room[i % len(room)] for i in range(len(needs), seats)]
    needs += [ranks] * (len(of) - len(needs))
    held = [_held(nodes[used[host]], host, of, needs, indices) for host in range(len(used))]
    return Plan(tuple(nodes[i] for i in used), tuple(of), tuple(held) if gpus else (), indices)


def _gpus_left(
    ensemble: Ensemble,
    nodes: Sequence[Node],
    wished: Mapping[int, int],
    indices: Mapping[int, tuple[int, ...]],
    needs: Sequence[int],
) -> list[int]:
    """How many GPUs of each node nobody has, once experts have those that are named for them.

    Raises:
        StartError: there is no such GPU, or their number is wrong, or others have some of them.
    """
    left = []
    for at, node in enumerate(nodes):
        named: set[int] = set()
        for expert in (expert for expert, where in wished.items() if where == at and expert in indices):
            name, theirs = ensemble.expert_names[expert], indices[expert]
            missing = [gpu for gpu in theirs if gpu >= node.all_gpus]
            if missing:
                raise StartError(
                    f"--placement: node {node.name!r} has no GPU {missing[0]}, which expert {name!r} is to be on: "
                    f"{_counted(node)}"
                )
            if len(set(theirs)) != needs[expert] or len(theirs) != needs[expert]:
                raise StartError(
                    f"--placement: expert {name!r} is to be on {needs[expert]} different GPU"
                    f"{'s, as in gpu:0+1@NAME' if needs[expert] > 1 else ''} (tensor_parallel_size), and "
                    f"{'+'.join(map(str, theirs))} is named"
                )
            named |= set(theirs)
        if len(named) > int(node.gpus):
            raise StartError(
                f"--placement names {len(named)} GPUs of node {node.name!r}, of which {int(node.gpus)} are free in "
                "Ray's books: name fewer, or end what has them (`ray status`)"
            )
        left.append(int(node.gpus) - len(named))
    return left


def _counted(node: Node) -> str:
    return f"by Ray's books it has {f'0 to {node.all_gpus - 1}' if node.all_gpus else 'none'}"


def _held(
    node: Node, host: int, of: Sequence[int], needs: Sequence[int], indices: Mapping[int, tuple[int, ...]]
) -> int:
    """How many GPUs the engines of a host have together."""
    named = {gpu for expert, theirs in indices.items() if of[expert] == host for gpu in theirs}
    others = sum(needs[expert] for expert, its in enumerate(of) if its == host and expert not in indices)
    return min(len(named) + others, int(node.gpus))


def _does_not_fit(
    ensemble: Ensemble, expert: int, needed: int, left: Sequence[tuple[Node, float]], gpus: bool
) -> str:
    name, many = ensemble.expert_names[expert], "s" if needed > 1 else ""
    if not gpus:
        there = ", ".join(f"{node.name} has {cpus:g} left" for node, cpus in left)
        return (
            f"expert {name!r} needs {needed} free CPU{many} of Ray's on one node; {there}: add a node (`ray start "
            "--address=HOST:PORT`), give one more (--num-cpus), or end what runs there"
        )
    there = ", ".join(
        f"{node.name} has {cpus:g} CPUs left and {node.gpus:g} of {node.all_gpus} GPUs free"
        for node, cpus in left
    )
    return (
        f"expert {name!r} needs {needed} free GPU{many} and CPU{many} of Ray's on one node, since vLLM here is its "
        f"build for GPUs, and has to be the same everywhere; {there}: add a node (`ray start --address=HOST:PORT`), "
        "give one more (--num-gpus, --num-cpus), or end what runs there"
    )


def _wished(
    ensemble: Ensemble, nodes: Sequence[Node], wish: str | None, gpus: bool
) -> tuple[dict[int, int], dict[int, tuple[int, ...]]]:
    """By expert, which of the ``nodes`` is named for it, and which GPUs there.

    Raises:
        StartError: there is no such expert or node, or ``wish`` is none.
    """
    names = [node.name for node in nodes]
    chosen: dict[int, int] = {}
    indices: dict[int, tuple[int, ...]] = {}
    for part in filter(None, (part.strip() for part in (wish or "").split(","))):
        name, _, where = part.partition("=")
        if name not in ensemble.expert_names:
            raise StartError(
                f"--placement: {name!r} is none of the experts {', '.join(ensemble.expert_names)}"
            )
        found = _WISH.fullmatch(where)
        if found is None:
            raise StartError(
                f"--placement: {part!r} names no node: with --ray it is EXPERT=node:NAME, or EXPERT=gpu:N@NAME for the "
                "GPU of number N there (gpu:0+1@NAME for two)"
            )
        at = [i for i, node in enumerate(nodes) if found["node"] in (node.name, node.address)]
        if not at:
            raise StartError(
                f"--placement: there is no node {found['node']!r} in the cluster; there are {', '.join(names)}"
            )
        if len(at) > 1:
            raise StartError(
                f"--placement: several nodes are called {found['node']!r}: give them names "
                "(`ray start --node-name=NAME`)"
            )
        expert = ensemble.expert_names.index(name)
        chosen[expert] = at[0]
        if found["gpus"] is not None:
            if not gpus:
                raise StartError(
                    f"--placement: {part!r} names a GPU, and vLLM here is its build for CPUs: write EXPERT=node:NAME, "
                    "or install the one for GPUs on every node"
                )
            indices[expert] = tuple(map(int, found["gpus"].split("+")))
    return chosen, indices
