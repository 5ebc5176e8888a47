"""The hosts that an ensemble's engines are on: a plane on each, and a process there that keeps it like the others'.

Others are nodes of a Ray cluster, see `cluster`, or simulated: parts of this machine that share no memory for rows, and
tell each other over TCP what they write. Knows planes and processes, no engines.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING

from decar.server.protocol.links import Address, Mirror, make_bell
from decar.server.protocol.member import end_with
from decar.server.protocol.mirror import GATEWAY, Hosts
from decar.server.protocol.plane import Plane, PlaneSpec
from decar.server.protocol.runtime import ignore_stops

if TYPE_CHECKING:
    from decar.server.cluster.hosts import ClusterHosts

logger = logging.getLogger("decar")

LOOPBACK = "127.0.0.1"
MIRROR = "mirror"
"""With which the names of their processes begin."""
_AGAIN_S = 1.0


@dataclass(frozen=True)
class Planes:
    """Where each expert's engine finds its plane.

    Attributes:
        gateways: the one that the gateway reads.
        of: [K], by place, what each expert's engine attaches to.
        hosts: where those are.
        heard: a pipe that can be read when other hosts have told the gateway's something; "" where there are none.
    """

    gateways: Plane
    of: tuple[PlaneSpec, ...]
    hosts: Hosts
    heard: str = ""


def dealt(experts: int, hosts: int) -> Hosts:
    """Experts on so many hosts, in turn; the gateway is on the first."""
    return Hosts(tuple(expert % hosts for expert in range(experts)))


@contextlib.contextmanager
def planes_on(hosts: Hosts, make: Callable[[str], Plane], folder: Path) -> Iterator[Planes]:
    """A plane for each host, and mirrors between them that are started again when they die. Removed at the end.

    Args:
        make: a plane with this bell.
        folder: of the server, for pipes.
    """
    if hosts.all == [GATEWAY]:
        plane = make("")
        try:
            yield Planes(plane, (plane.spec,) * len(hosts.of), hosts)
        finally:
            plane.unlink()
        return
    planes: dict[int, Plane] = {}
    with contextlib.ExitStack() as stack:
        for host in hosts.all:
            planes[host] = make(make_bell(folder, f"host-{host}"))
            stack.callback(planes[host].unlink)
        planes[GATEWAY].mirrored[[k for k, host in enumerate(hosts.of) if host != GATEWAY]] = 0.0
        key, heard = secrets.token_bytes(32), make_bell(folder, "heard")
        listeners = {host: stack.enter_context(socket.create_server((LOOPBACK, 0))) for host in hosts.all}
        addresses = {host: listener.getsockname() for host, listener in listeners.items()}
        for host in hosts.all:
            arguments = _Arguments(
                planes[host].spec,
                host,
                hosts,
                key,
                listeners[host],
                addresses,
                heard if host == GATEWAY else "",
                os.getpid(),
            )
            keeper = _Keeper(arguments)
            keeper.start()
            stack.callback(keeper.end)
        yield Planes(planes[GATEWAY], tuple(planes[host].spec for host in hosts.of), hosts, heard)


@contextlib.contextmanager
def planes_in(
    cluster: ClusterHosts, key: bytes, make: Callable[[str], Plane], folder: Path
) -> Iterator[Planes]:
    """The same for hosts that are nodes of a Ray cluster; what has begun there ends with it."""
    from decar.server.cluster.host import listen_at

    hosts = cluster.hosts
    alone = hosts.all == [GATEWAY]
    with contextlib.ExitStack() as stack:
        plane = make("" if alone else make_bell(folder, f"host-{GATEWAY}"))
        stack.callback(plane.unlink)
        stack.callback(cluster.close)
        if alone:
            cluster.begin(plane.spec, (cluster.address, 0))
            yield Planes(plane, (plane.spec,) * len(hosts.of), hosts)
            return
        plane.mirrored[[k for k, host in enumerate(hosts.of) if host != GATEWAY]] = 0.0
        heard = make_bell(folder, "heard")
        listener = stack.enter_context(listen_at(cluster.address))
        address = listener.getsockname()[:2]
        channels = Path(cluster.own.facts().folder)
        arguments = _Arguments(
            plane.spec, GATEWAY, hosts, key, listener, {GATEWAY: address}, heard, os.getpid(), channels
        )
        keeper = _Keeper(arguments)
        keeper.start()
        stack.callback(keeper.end)
        cluster.begin(plane.spec, address)
        yield Planes(plane, (plane.spec,) * len(hosts.of), hosts, heard)


@dataclass(frozen=True)
class _Arguments:
    """Of a `Mirror`, for its process."""

    spec: PlaneSpec
    host: int
    hosts: Hosts
    key: bytes
    listener: socket.socket
    addresses: Mapping[int, Address]
    heard: str
    gateway_pid: int
    channels: Path | None = None


class _Keeper(threading.Thread):
    """Has a mirror's process run until `end`."""

    def __init__(self, arguments: _Arguments):
        super().__init__(name=f"{MIRROR}-{arguments.host}", daemon=True)
        self._arguments = arguments
        self._ended = threading.Event()
        self._starting = threading.Lock()
        self._process: BaseProcess | None = None

    def run(self) -> None:
        while True:
            with self._starting:
                if self._ended.is_set():
                    return
                spawn = multiprocessing.get_context("spawn")
                process = spawn.Process(target=_mirror, args=(self._arguments,), name=self.name, daemon=True)
                try:
                    process.start()
                except OSError as error:
                    logger.error("the mirror of host %d does not start: %s", self._arguments.host, error)
                else:
                    self._process = process
            if self._process is not None:
                self._process.join()
            if not self._ended.wait(_AGAIN_S):
                logger.error("the mirror of host %d has ended: it is started again", self._arguments.host)

    def end(self) -> None:
        self._ended.set()
        with self._starting:
            if self._process is not None:
                self._process.kill()
        self.join()


def _mirror(arguments: _Arguments) -> None:
    """A mirror's process."""
    ignore_stops()
    end_with(arguments.gateway_pid, arguments.spec.name)
    logging.basicConfig(level=logging.INFO, format="decar: %(message)s")
    plane = Plane.attach(arguments.spec)
    mirror = Mirror(
        plane,
        arguments.host,
        arguments.hosts,
        arguments.key,
        arguments.listener,
        arguments.addresses,
        arguments.heard,
        arguments.channels,
    )
    mirror.start()
    threading.Event().wait()
