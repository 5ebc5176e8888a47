"""Ray clusters to try things on: nodes on this machine, all in one place or each in a network namespace of its own.

In namespaces, nodes share nothing but a switch: each has an address, and a /dev/shm, of its own. That needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from decar.benchmarks.network import Machine, Switch
from decar.clients.child import free_port

UP_WITHIN_S = 60
POLL_S = 0.2
NAMES = ("ada", "grace", "mary")


class NodeDidNotStart(Exception):
    """Ray's process ended, or was not up in time; the message has its log."""


@dataclass
class RayNode:
    """One node, named as its machine.

    Attributes:
        core: the one that it keeps to.
        process: `ray start`, whose end is the node's.
    """

    machine: Machine
    core: int
    process: subprocess.Popen[bytes]

    @property
    def name(self) -> str:
        return self.machine.name

    @property
    def address(self) -> str:
        return self.machine.address

    @property
    def inside(self) -> tuple[str, ...]:
        """What a command begins with to run there."""
        return (*self.machine.inside, "taskset", "--cpu-list", str(self.core))

    def processes(self) -> list[psutil.Process]:
        """All that the node has started, itself included."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        return []

    def shared_memory(self) -> list[str]:
        """What decar has under /dev/shm there."""
        listed = subprocess.run([*self.inside, "ls", "/dev/shm"], capture_output=True, text=True, check=True)
        return [name for name in listed.stdout.split() if name.startswith("decar-")]

    def kill(self) -> None:
        """At once, as when its machine loses power."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(processes, 10)


@dataclass
class RayCluster:
    """Nodes that know each other; the first is the head.

    Attributes:
        folder: for Ray's files; short, since they include sockets.
        token: that nodes prove to each other to have.
    """

    folder: Path
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    port: int = field(default_factory=free_port)
    nodes: list[RayNode] = field(default_factory=list)

    @property
    def head(self) -> RayNode:
        return self.nodes[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever is to be in the cluster."""
        # No proxy is asked the way from one machine to another.
        direct = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        return {**direct, **_SETTINGS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def start(self, machine: Machine, cpus: int = 4, gpus: int = 0) -> RayNode:
        """Add a node, and wait until the cluster knows it. Each has a core of its own, if there are enough.

        Args:
            cpus, gpus: that Ray takes it to have.
        """
        cores, name = sorted(os.sched_getaffinity(0)), machine.name
        core = cores[NAMES.index(name) % len(cores)]
        joins = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        if self.nodes:
            joins = [f"--address={self.address}"]
        command = [
            *machine.inside,
            *("taskset", "--cpu-list", str(core)),
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *joins, f"--node-name={name}"),
            *(f"--node-ip-address={machine.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"),
            "--block",
            *("--object-store-memory=200000000", "--disable-usage-stats", f"--temp-dir={self.folder}/{name}"),
        ]
        (self.folder / f"{name}.log").unlink(missing_ok=True)  # of an earlier one that had this name
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self.environment,
            )
        node = RayNode(machine, core, process)
        self.nodes = [other for other in self.nodes if other.name != name] + [node]

        deadline = time.monotonic() + UP_WITHIN_S
        while "Ray runtime started" not in self.log_of(name):
            if process.poll() is not None or time.monotonic() > deadline:
                raise NodeDidNotStart(f"node {name!r} of Ray's did not start:\n{self.log_of(name)}")
            time.sleep(POLL_S)
        return node

    def links_port(self, gateway_pid: int) -> int:
        """Where hosts connect to that of a gateway on the head: a process of its own listens."""
        children = {child.pid for child in psutil.Process(gateway_pid).children()}
        listening = subprocess.run(
            [*self.head.inside, "ss", "-Hltnp"], capture_output=True, text=True, check=True
        )
        [port] = {
            int(line.split()[3].rpartition(":")[2])
            for line in listening.stdout.splitlines()
            if any(f"pid={pid}," in line for pid in children)
        }
        return port

    def log_of(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


_SETTINGS = {
    # Ray soon takes nodes that it has not heard for dead, and those end when they hear of that.
    "RAY_health_check_failure_threshold": "30",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
    "RAY_worker_niceness": "0",  # else engines give way to whatever else runs
}


@contextlib.contextmanager
def ray_cluster(count: int, switch: Switch | None = None) -> Iterator[RayCluster]:
    """So many nodes: in one place, where they share what a machine has, or on the machines of a ``switch``."""
    cluster = RayCluster(Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")))
    try:
        for name in NAMES[:count]:
            machine = switch.machines[name] if switch else Machine(name, "127.0.0.1", ())
            cluster.start(machine)
        yield cluster
    finally:
        cluster.stop()
