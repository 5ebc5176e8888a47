"""The hosts of a server whose engines are Ray's: a `Host` on each, begun anew when its node was lost and is back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from decar.router.errors import StartError
from decar.server.cluster.host import Facts, Host
from decar.server.cluster.nodes import Cluster, Node, Plan
from decar.server.cluster.shipping import files_of, ship
from decar.server.protocol.channels import channel_names
from decar.server.protocol.links import Address
from decar.server.protocol.mirror import GATEWAY, Hosts
from decar.server.protocol.plane import PlaneSpec
from decar.server.vllm_adapter.failures import last_line

logger = logging.getLogger("decar")

BEGINS_WITHIN_S = 120.0
ANSWERS_WITHIN_S = 30.0
"""A host that does not is not there."""


@dataclass(frozen=True)
class At:
    """A host that has begun.

    Attributes:
        node: Ray's.
        host: what it is asked by: a `Host`, here or as an actor.
        facts: what it is like.
        spec: of its plane.
    """

    node: Node
    host: Host
    facts: Facts
    spec: PlaneSpec


class HostGone(StartError):
    """An actor has ended."""


class HostElsewhere:
    """A `Host` that is an actor: its methods, called from here.

    Raises:
        HostGone: it has ended.
        StartError: it does not answer, or could not do it.
    """

    def __init__(self, actor: Any, name: str):
        self._actor, self._name = actor, name
        self._within_s = BEGINS_WITHIN_S

    def __getattr__(self, method: str) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError

        def ask(*args: Any) -> Any:
            try:
                said = ray.get(getattr(self._actor, method).remote(*args), timeout=self._within_s)
            except GetTimeoutError:
                raise StartError(f"node {self._name!r} does not answer") from None
            except RayActorError as error:
                raise HostGone(f"node {self._name!r}: {last_line(error)}") from None
            except RayError as error:
                raise StartError(f"node {self._name!r}: {last_line(error)}") from None
            self._within_s = ANSWERS_WITHIN_S
            return said

        return ask


def wrong_with(
    node: Node,
    host: Host,
    facts: Facts,
    gateway: Facts,
    checkpoints: Iterable[Path] = (),
    ships: bool = False,
) -> list[str]:
    """What would keep engines of ``checkpoints`` from running on a node.

    Args:
        facts, gateway: of its host, and of the gateway's.
        ships: what was missing has been brought there.

    Raises:
        StartError: it does not answer.
    """
    found = [
        f"node {node.name!r} has {name} {version}, and the gateway {gateway.versions[name]}: install the same there"
        for name, version in facts.versions.items()
        if version != gateway.versions[name]
    ]
    for checkpoint in checkpoints:
        wrong = host.wrong(str(checkpoint.resolve()), files_of(checkpoint))
        if wrong is not None:
            fix = (
                "remove it there: what decar has not copied it does not write over"
                if ships
                else "copy them, or have `decar serve --ship-weights` do so"
            )
            found.append(
                f"node {node.name!r}: {wrong}; weights have to be at the same path on every node that serves them: "
                f"{fix}"
            )
    return found


class ClusterHosts:
    """The hosts of one server.

    Args:
        plan: who is where.
        shape: of the planes, for `Plane.create`.
        key: that hosts prove to each other to have.
        given: the GPUs of each host that Ray has given, see `Held`; (): engines compute on CPUs.
        ship: hosts are brought the weights that they lack; None: they have to have them. It is told how far it is,
            see `ship`, of which expert.
    """

    def __init__(
        self,
        cluster: Cluster,
        plan: Plan,
        shape: Mapping[str, Any],
        key: bytes,
        given: Sequence[tuple[str, ...]] = (),
        ship: Callable[[int, str], None] | None = None,
    ):
        self._given, self._ship = given, ship
        self._cluster, self._plan, self._shape, self._key = cluster, plan, shape, key
        self.hosts = Hosts(plan.of)
        self.own = Host()
        self._at: dict[int, At] = {}
        self._actors: dict[int, Any] = {}
        self._addresses: dict[int, Address] = {}
        self._untold: set[tuple[int, int]] = set()  # (who, of whom): hosts that have begun anew since
        self._one_at_a_time = threading.RLock()

    def number(self, expert: int) -> int:
        """Of an expert's host."""
        return self.hosts.of[expert]

    def experts_on(self, expert: int) -> list[int]:
        """All that are to be on the host of ``expert``."""
        return self.hosts.experts_on(self.number(expert))

    @property
    def address(self) -> str:
        """The gateway's, for others."""
        return self._plan.nodes[GATEWAY].address

    def begin(self, spec: PlaneSpec, address: Address) -> None:
        """Begin on all hosts: the gateway's has the plane of ``spec``, and its mirror listens at ``address``.

        Raises:
            StartError: one of them cannot, or differs from the gateway's.
        """
        self._at[GATEWAY] = At(self._plan.nodes[GATEWAY], self.own, self.own.facts(), spec)
        self._addresses[GATEWAY] = address
        begun = {number: self._begun(number) for number in self.hosts.all[1:]}
        for number, at in begun.items():
            self._connect(number, at)

    def ready(self, expert: int) -> At:
        """The host of an expert, which is begun anew if it has been lost and can be.

        Raises:
            StartError: it cannot, or does not answer just now.
        """
        number = self.number(expert)
        with self._one_at_a_time:
            if number != GATEWAY and not self._lives(number):
                name = self._plan.nodes[number].name
                node = self._cluster.node(name)
                if node is None:
                    raise StartError(f"its node {name!r} is not in the cluster")
                if node.id != self._plan.nodes[number].id:
                    self._hold_again(number, node)
                nodes = tuple(node if i == number else other for i, other in enumerate(self._plan.nodes))
                self._plan = replace(self._plan, nodes=nodes)
                self._at.pop(number, None)
                at = self._begun(number)
                self._connect(number, at)
                self._untold = {told for told in self._untold if number not in told}
                self._untold |= {(other, number) for other in self.hosts.all[number + 1 :]}
                logger.info("node %r is back", name)
            self._tell_who_moved()
            return self._at[number]

    def _hold_again(self, number: int, node: Node) -> None:
        """Have the GPUs of a node that is back. Its engines have been told which they are: those that were given
        before, but where they are named.

        Raises:
            StartError: others have them.
        """
        if not self._given or not self._given[number]:
            return
        before = self._given[number]
        now = self._cluster.hold(node, len(before)).given
        are_named = all(expert in self._plan.wished for expert in self.hosts.experts_on(number))
        if set(now) != set(before) and not are_named:
            raise StartError(
                f"node {node.name!r}: Ray has given GPU {', '.join(now)} there, and its engines are to use "
                f"{', '.join(before)}: end what has those (`ray status`), or start the server anew"
            )

    def _tell_who_moved(self) -> None:
        for other, number in list(self._untold):
            with suppress(StartError):  # later, then
                if other in self._at:
                    self._at[other].host.moved(number, self._addresses[number])
                    self._untold.discard((other, number))

    def open(self, expert: int, start: int, at: At) -> tuple[list[str], list[str]]:
        """The sockets for an expert's engine that is started as the ``start``-th, ``at`` its host: the gateway's ends,
        and its own."""
        gateway = self._at[GATEWAY]
        mine = [f"ipc://{gateway.facts.folder}/{name}" for name in channel_names(expert, start)]
        if self.number(expert) == GATEWAY:
            at.host.end(expert)
            return mine, mine
        return mine, at.host.open(expert, start)

    def check(self, expert: int, at: At, checkpoint: Path, ranks: int) -> None:
        """Look whether an expert's checkpoint is on its host as it is here, and as many CPUs are free as it has ranks.
        What is missing is brought there, if that is wished.

        Raises:
            StartError: says what is missing there.
        """
        node = self._cluster.node(at.node.name)
        if node is not None and node.cpus < ranks:
            raise StartError(
                f"node {node.name!r} has {node.cpus:g} free CPUs of Ray's, and {ranks} are needed: end what runs "
                "there, or give it more (`ray start --num-cpus`)"
            )
        if self._ship is not None:
            ship(self._cluster, at.host, at.node.name, checkpoint, partial(self._ship, expert))
        gateway, ships = self._at[GATEWAY].facts, self._ship is not None
        wrong = wrong_with(at.node, at.host, at.facts, gateway, [checkpoint], ships)
        if wrong:
            raise StartError("; ".join(wrong))

    def files(self, expert: int) -> Host | None:
        """Of an expert's host, see `Host.make_rows`; None: it is the gateway's."""
        number = self.number(expert)
        return None if number == GATEWAY else self._at[number].host

    def started(self, expert: int, pid: int) -> None:
        self._at[self.number(expert)].host.started(expert, pid)

    def end(self, expert: int, pid: int, actor: Any) -> None:
        """End an expert's engine, if it is still process ``pid``, and its actor."""
        try:
            self._at[self.number(expert)].host.end(expert, pid)
        finally:
            self._cluster.end(actor)

    def close(self) -> None:
        """End what there is on all hosts."""
        for number, actor in self._actors.items():
            try:
                if number in self._at:
                    self._at[number].host.close()
            except StartError as error:
                logger.warning("%s: what decar has there goes when Ray ends it", error)
            finally:
                self._cluster.end(actor)
        self.own.close()

    def _lives(self, number: int) -> bool:
        """Whether a host is there, or has ended.

        Raises:
            StartError: it does not answer, and may yet.
        """
        node = self._plan.nodes[number]
        if number not in self._at or not any(node.id == other.id for other in self._cluster.nodes()):
            return False
        try:
            self._at[number].host.facts()
        except HostGone:
            return False
        return True

    def _begun(self, number: int) -> At:
        node = self._plan.nodes[number]
        if number in self._actors:
            self._cluster.end(self._actors[number])  # though its node be lost: two must not have one number
        actor = self._actors[number] = self._cluster.begin(node)
        host = cast(Host, HostElsewhere(actor, node.name))
        facts = host.facts()
        wrong = wrong_with(node, host, facts, self._at[GATEWAY].facts)
        if wrong:
            raise StartError("; ".join(wrong))
        spec, address = host.begin(self._shape, node.address)
        self._addresses[number] = (address[0], address[1])
        return At(node, host, facts, spec)

    def _connect(self, number: int, at: At) -> None:
        at.host.connect(number, self.hosts, self._key, self._addresses)
        self._at[number] = at
