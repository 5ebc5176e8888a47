"""A network of machines that are namespaces on this one, and a switch between them that can be slow, stall, or be cut.

The switch is a process that carries packets between the namespaces' TUN devices; needs root. Each namespace has an
address, and a /dev/shm, of its own. `python -m tests.wires NAMESPACE=ADDRESS ...` is the switch: it is told on its
standard input what to do, and answers when it does so.
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
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_MTU = 60_000
_NEWNET = 0x40000000
HERE = ""
"""The namespace that tests run in."""


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
        machines: by name; `HERE` is where tests run.
    """

    def __init__(self, process: subprocess.Popen[str], machines: dict[str, Machine]):
        self._process, self.machines = process, machines

    def be(
        self, delay_ms: float = 0.0, stall_s: float = 0.0, stalls_per_s: float = 0.0, cut: str = HERE
    ) -> None:
        """Carry packets so from now on.

        Args:
            delay_ms: one way.
            stall_s, stalls_per_s: nothing is carried for so long, about so often, at random.
            cut: a machine that nobody reaches.
        """
        said = {"delay_ms": delay_ms, "stall_s": stall_s, "stalls_per_s": stalls_per_s, "cut": cut}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(said) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "so\n", "the switch works"


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
            [sys.executable, "-m", "tests.wires", *ends],
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


def _carry(ends: dict[bytes, tuple[str, int]]) -> None:
    """Packets between ``ends``: by address, a namespace and its device."""
    how: dict[str, Any] = {"delay_ms": 0.0, "stall_s": 0.0, "stalls_per_s": 0.0, "cut": ""}
    on_the_way: list[tuple[float, int, int, bytes]] = []
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
            how = json.loads(line)
            print("so", flush=True)
        if random.random() < how["stalls_per_s"] * (now - looked):
            stalled_until = now + how["stall_s"]
        looked = now
        for device in devices:
            if device not in ready:
                continue
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet = os.read(device, 1 << 16)
                    end = ends.get(packet[16:20])
                    if end is None or (how["cut"] and how["cut"] in (names[device], names[end[1]])):
                        continue
                    count += 1
                    heapq.heappush(on_the_way, (now + how["delay_ms"] / 1e3, count, end[1], packet))
        now = time.monotonic()
        while on_the_way and now >= stalled_until and on_the_way[0][0] <= now:
            _, _, device, packet = heapq.heappop(on_the_way)
            with contextlib.suppress(OSError):  # its queue is full: the packet is lost, and sent again
                os.write(device, packet)


def _main() -> None:
    ends = {}
    for argument in sys.argv[1:]:
        namespace, _, address = argument.partition("=")
        ends[bytes(map(int, address.split(".")))] = (namespace, _open_tun(namespace, address))
    _carry(ends)


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
