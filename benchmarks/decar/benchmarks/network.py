"""A network of machines that are namespaces on this one, and a switch between them that can be slow, stall, or be cut.

The switch is a process that carries packets between the namespaces' TUN devices; needs root. Each namespace has an
address, and a /dev/shm, of its own. `python -m decar.benchmarks.network NAMESPACE=ADDRESS ...` is the switch: it is
told on its standard input what to do, and answers when it does so.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import heapq
import json
import os
import random
import select
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_libc = ctypes.CDLL(None, use_errno=True)
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_MTU = 60_000
_NEWNET = 0x40000000
HERE = ""
"""The namespace of this process; what machines and it say to each other is carried at once, whatever links are like."""


@dataclass(frozen=True)
class Machine:
    """One namespace.

    Attributes:
        address: its IP.
        inside: what a command begins with to run there.
    """

    name: str
    address: str
    inside: tuple[str, ...]


class Switch:
    """Between machines.

    Attributes:
        machines: by name; `HERE` is where this process runs.
    """

    def __init__(self, process: subprocess.Popen[str], machines: dict[str, Machine]):
        self._process, self.machines = process, machines

    def be(
        self,
        delay_ms: float = 0.0,
        stall_s: float = 0.0,
        stalls_per_s: float = 0.0,
        cut: str = HERE,
        gbit_s: float = 0.0,
    ) -> None:
        """Carry packets between machines so from now on.

        Args:
            delay_ms: one way.
            stall_s, stalls_per_s: nothing is carried for so long, about so often, at random.
            cut: a machine that nobody reaches.
            gbit_s: what a link from one machine to another carries; 0: as much as the switch can.
        """
        said = {
            "delay_ms": delay_ms,
            "stall_s": stall_s,
            "stalls_per_s": stalls_per_s,
            "cut": cut,
            "gbit_s": gbit_s,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "so\n", "the switch works"


def forget_proxies() -> None:
    """Which clients in this process would ask the way to machines of a network."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[Switch]:
    """Machines of these names, and this one; removed at the end."""
    net = f"10.{os.getpid() % 200 + 20}.{os.getpid() // 200 % 250}"
    machines = {HERE: Machine(HERE, f"{net}.1", ())}
    with contextlib.ExitStack() as stack:
        for i, name in enumerate(names):
            namespace = f"decar-{os.getpid()}-{name}"
            _run("ip", "netns", "add", namespace)
            stack.callback(_run, "ip", "netns", "del", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            script = "mount -t tmpfs -o size=6g tmpfs /dev/shm && echo there && exec sleep infinity"
            holder = subprocess.Popen(
                ["ip", "netns", "exec", namespace, "sh", "-c", script], stdout=subprocess.PIPE, text=True
            )
            stack.callback(holder.wait)
            stack.callback(holder.kill)
            assert holder.stdout is not None
            assert holder.stdout.readline() == "there\n", "a namespace with a /dev/shm of its own"
            inside = ("nsenter", f"--target={holder.pid}", "--net", "--mount")
            machines[name] = Machine(name, f"{net}.{i + 2}", inside)
        ends = [
            f"{f'decar-{os.getpid()}-{name}' if name else ''}={machine.address}"
            for name, machine in machines.items()
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *ends],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        switch = Switch(process, machines)
        switch.be()
        yield switch


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


# --- the switch's process -------------------------------------------------------------------------------------


def _open_tun(namespace: str, address: str) -> int:
    """A TUN device in a namespace: what is written to it arrives there."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    if namespace:
        there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
        if _libc.setns(there, _NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"decar{os.getpid() % 100000}"
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _run("ip", "address", "add", f"{address}/24", "dev", name)
    _run("ip", "link", "set", name, "mtu", str(_MTU), "up")
    _libc.setns(own, _NEWNET)
    return tun


@dataclass
class _How:
    """See `Switch.be`."""

    delay_ms: float = 0.0
    stall_s: float = 0.0
    stalls_per_s: float = 0.0
    cut: str = HERE
    gbit_s: float = 0.0


def _carry(ends: dict[bytes, tuple[str, int]]) -> None:
    """Packets between ``ends``: by address, a namespace and its device."""
    how = _How()
    on_the_way: list[tuple[float, int, int, bytes]] = []  # when one is due, ..., where to
    free_from: dict[tuple[int, int], float] = {}  # of each link
    count, stalled_until, looked = 0, 0.0, time.monotonic()
    devices = [device for _, device in ends.values()]
    names = {device: namespace.rpartition("-")[2] for namespace, device in ends.values()}
    while True:
        now = time.monotonic()
        due = max(on_the_way[0][0], stalled_until) if on_the_way else now + 0.05
        ready, _, _ = select.select([*devices, sys.stdin], [], [], max(due - now, 0.0))
        now = time.monotonic()
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            how, free_from = _How(**json.loads(line)), {}
            print("so", flush=True)
        if random.random() < how.stalls_per_s * (now - looked):
            stalled_until = now + how.stall_s
        looked = now
        for device in devices:
            if device not in ready:
                continue
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(device, 1 << 16)
                    end = ends.get(packet[16:20])
                    if end is None or (how.cut and how.cut in (names[device], names[end[1]])):
                        continue
                    if HERE in (names[device], names[end[1]]):
                        _hand_over(end[1], packet)
                        continue
                    leaves = now
                    if how.gbit_s:
                        leaves = max(now, free_from.get((device, end[1]), 0.0))
                        leaves += 8e-9 * len(packet) / how.gbit_s
                        free_from[device, end[1]] = leaves
                    count += 1
                    heapq.heappush(on_the_way, (leaves + how.delay_ms / 1e3, count, end[1], packet))
        now = time.monotonic()
        while on_the_way and now >= stalled_until and on_the_way[0][0] <= now:
            _, _, device, packet = heapq.heappop(on_the_way)
            _hand_over(device, packet)


def _hand_over(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # its queue is full: the packet is lost, and sent again
        os.write(device, packet)


def _main() -> None:
    if sys.argv[1] == "answer":
        return _answer(sys.argv[2])
    if sys.argv[1] == "ask":
        return _ask(sys.argv[2], int(sys.argv[3]))
    ends = {}
    for argument in sys.argv[1:]:
        namespace, _, address = argument.partition("=")
        ends[bytes(map(int, address.split(".")))] = (namespace, _open_tun(namespace, address))
    return _carry(ends)


# --- what a link is like, as programs on two machines see it ----------------------------------------------------

_PROBE_BYTES, _PROBE_PINGS, _ALL_HAS_COME = 64 << 20, 50, b"."


def probe(there: Machine, here: Machine) -> tuple[float, float]:
    """(Gb/s, ms for a word and its answer) between two machines, by one TCP connection."""
    module = [sys.executable, "-m", __spec__.name]
    with subprocess.Popen(
        [*there.inside, *module, "answer", there.address], stdout=subprocess.PIPE, text=True
    ) as answering:
        assert answering.stdout is not None
        port = answering.stdout.readline().strip()
        asking = [*here.inside, *module, "ask", there.address, port]
        found = json.loads(subprocess.run(asking, check=True, capture_output=True, text=True).stdout)
    return found["gbit_s"], found["round_trip_ms"]


def _answer(address: str) -> None:
    with socket.create_server((address, 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_PROBE_PINGS):
            connection.sendall(connection.recv(1))
        left = _PROBE_BYTES
        while left:
            left -= len(connection.recv(1 << 20))
        connection.sendall(_ALL_HAS_COME)


def _ask(address: str, port: int) -> None:
    with socket.create_connection((address, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pings = []
        for _ in range(_PROBE_PINGS):
            start = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            pings.append(time.perf_counter() - start)
        start = time.perf_counter()
        connection.sendall(bytes(_PROBE_BYTES))
        connection.recv(1)
        seconds = time.perf_counter() - start
    found = {"gbit_s": 8e-9 * _PROBE_BYTES / seconds, "round_trip_ms": 1e3 * statistics.median(pings)}
    print(json.dumps(found))


@functools.cache
def no_network() -> str:
    """Why this process cannot make networks; "": it can."""
    missing = [name for name in ("ip", "ss", "nsenter", "taskset") if shutil.which(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (iproute2 and util-linux)"
    try:
        with network(["one"]):
            return ""
    except (OSError, AssertionError, subprocess.CalledProcessError) as error:
        return f"needs root, network namespaces and /dev/net/tun: {error!r}"


if __name__ == "__main__":
    _main()
