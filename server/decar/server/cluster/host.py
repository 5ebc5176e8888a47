"""What decar has on a host beside its engines: the plane there, what keeps it like the others', and their way to the
gateway. On the gateway's host it is an object there, on others an actor of Ray's. Knows no Ray and no vLLM.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import socket
import threading
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import decar
from decar.router.errors import StartError
from decar.server.cluster.guard import guard
from decar.server.placement import gib
from decar.server.protocol.channels import Channel, channel_names
from decar.server.protocol.links import SILENT_S, Address, Mirror, introduce, key_for, make_bell
from decar.server.protocol.mirror import GATEWAY, Hosts
from decar.server.protocol.plane import Plane, PlaneSpec, create_segment, unlink
from decar.server.protocol.runtime import DIRECTORY, PREFIX, make_folder, new_name, remove_stale
from decar.server.vllm_adapter.versions import installed_version, is_cpu_build

logger = logging.getLogger("decar")

GONE_WITHIN_S = 10.0
Stamp = tuple[int, int]
"""Of a file: bytes, and when it was changed, in ns since the epoch."""
SHIPPED = ".decar-shipped.json"
"""In a checkpoint's folder: which files have been copied there, with the gateway's stamps."""


@dataclass(frozen=True)
class Facts:
    """What a host is like.

    Attributes:
        pid: of the process that has its part; engines there end with it.
        cores: that engines there may compute on.
        folder: for its sockets and pipes.
        versions: of what has to be the same everywhere, by name.
    """

    pid: int
    cores: tuple[int, ...]
    folder: str
    versions: Mapping[str, str]


class Host:
    """One host's part of a server. Its methods are called by the gateway.

    Args:
        guarded: what it has made is removed when its process is gone.
    """

    def __init__(self, guarded: bool = False) -> None:
        remove_stale()  # of one before this, whose node was lost
        self._folder = make_folder()
        if guarded:
            guard(self._folder.name)
        self._plane: Plane | None = None
        self._mirror: Mirror | None = None
        self._engines: dict[int, psutil.Process] = {}  # by expert
        self._channels: dict[int, list[Channel]] = {}
        self._one_at_a_time: defaultdict[int, threading.RLock] = defaultdict(threading.RLock)  # by expert
        self._starts: dict[int, int] = {}
        self._listener: socket.socket | None = None
        self._arriving: set[Path] = set()  # files of which there are parts
        self._naming = threading.Lock()

    def facts(self) -> Facts:
        versions = {
            "decar": decar.__version__,
            "vLLM": str(installed_version()),
            "vLLM for": "CPUs" if is_cpu_build() else "GPUs",
            "Python": ".".join(platform.python_version_tuple()[:2]),
        }
        cores = tuple(sorted(os.sched_getaffinity(0)))
        return Facts(os.getpid(), cores, str(self._folder), versions)

    def wrong(self, directory: str, files: Mapping[str, Stamp]) -> str | None:
        """What is wrong with a checkpoint here; None: nothing.

        Args:
            files: the gateway's, by name.
        """
        shipped = _shipped_to(Path(directory))
        for name, stamp in files.items():
            path = Path(directory) / name
            try:
                found = path.stat().st_size
            except OSError:
                return f"there is no {path}"
            if found != stamp[0]:
                return f"{path} has {found} bytes, and {stamp[0]} at the gateway"
            if shipped.get(name, stamp) != stamp:
                return f"{path} was copied from the gateway, where there is another by now"
        return None

    def absent(self, directory: str, files: Mapping[str, Stamp]) -> list[str]:
        """Which files of a checkpoint are not here, or have been copied here and are others by now.

        Raises:
            StartError: there is too little room for them.
        """
        there = Path(directory)
        for path in there.glob(f".*.{PREFIX}*"):  # parts of a file, of a host that is gone
            if not (DIRECTORY / path.name.split(".")[-2]).exists():
                path.unlink(missing_ok=True)
        shipped = _shipped_to(there)
        names = [
            name
            for name, stamp in files.items()
            if not (there / name).exists() or shipped.get(name, stamp) != stamp
        ]
        needed = sum(files[name][0] for name in names)
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
        if needed > free:
            raise StartError(f"{there} has {gib(free)} free, and {directory} needs {gib(needed)}")
        return names

    def receive(self, path: str, attempt: str, offset: int, part: bytes, stamp: Stamp | None) -> None:
        """Write a part of a file, which gets its name with the last: there is no file here that is half written. One
        that is here and has not been copied is left as it is.

        Args:
            attempt: to copy this checkpoint; what an earlier one still says does no harm to a later one's.
            stamp: the gateway's, with the last part.

        Raises:
            StartError: it cannot be written.
        """
        target = Path(path)
        hidden = target.with_name(f".{target.name}.{self._folder.name}.{attempt}")
        self._arriving.add(hidden)
        try:
            hidden.parent.mkdir(parents=True, exist_ok=True)
            with hidden.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(part)
                if stamp is not None:
                    os.fsync(file.fileno())
            if stamp is not None:
                self._name(hidden, target, stamp)
        except OSError as error:
            hidden.unlink(missing_ok=True)
            raise StartError(f"{path} cannot be written: {error.strerror}") from None
        if stamp is not None:
            self._arriving.discard(hidden)

    def _name(self, hidden: Path, target: Path, stamp: Stamp) -> None:
        with self._naming:
            shipped = _shipped_to(target.parent)
            if target.exists() and target.name not in shipped:
                hidden.unlink()
                return
            hidden.replace(target)
            record = target.with_name(f".{SHIPPED}.{self._folder.name}.new")
            record.write_text(json.dumps({**shipped, target.name: stamp}))
            record.replace(target.with_name(SHIPPED))

    def begin(self, shape: Mapping[str, Any], address: str) -> tuple[PlaneSpec, Address]:
        """Make its plane, of ``shape``: arguments of `Plane.create`. Returns what engines attach to, and where others
        connect to.

        Raises:
            StartError: there is too little room, or it has another address.
        """
        self._plane = Plane.create(**shape, bell=make_bell(self._folder, "bell"))
        self._listener = listen_at(address)
        return self._plane.spec, self._listener.getsockname()[:2]

    def connect(self, host: int, hosts: Hosts, key: bytes, addresses: Mapping[int, Address]) -> None:
        """Begin to keep the plane like the others', as host number ``host``."""
        assert self._plane is not None
        assert self._listener is not None
        self._host, self._key = host, key_for(key, self._plane.spec)
        self._gateway = addresses[GATEWAY]
        self._mirror = Mirror(self._plane, host, hosts, key, self._listener, addresses)
        self._mirror.start()

    def moved(self, peer: int, address: Address) -> None:
        """Another host has begun anew, and listens there."""
        assert self._mirror is not None
        self._mirror.moved(peer, address)

    def open(self, expert: int, start: int) -> list[str]:
        """Where the engine of ``expert`` that is started as the ``start``-th hears its client and speaks to it. One
        that it had before has ended by then."""
        with self._one_at_a_time[expert]:
            self._end(expert)
            names = channel_names(expert, start)
            self._channels[expert] = [
                Channel(self._folder / name, partial(self._dial, name), partial(self._lost, expert, start))
                for name in names
            ]
            self._starts[expert] = start
        return [f"ipc://{self._folder / name}" for name in names]

    def started(self, expert: int, pid: int) -> None:
        with self._one_at_a_time[expert]:
            self._engines[expert] = psutil.Process(pid)

    def end(self, expert: int, pid: int | None = None) -> None:
        """End an expert's engine and its ranks, if there is one and if it is still ``pid``, and wait until they are
        gone."""
        with self._one_at_a_time[expert]:
            if pid is None or (expert in self._engines and self._engines[expert].pid == pid):
                self._end(expert)

    def make_rows(self, size_bytes: int) -> str:
        """A file under /dev/shm for a prompt's rows; its name."""
        name = new_name()
        create_segment(name, size_bytes).close()
        return name

    def take_rows(self, name: str) -> np.ndarray:
        """The bytes [size] of such a file."""
        return np.fromfile(DIRECTORY / name, np.uint8)

    def drop_rows(self, name: str) -> None:
        unlink(name)

    def close(self) -> None:
        """End all of it, and remove what it has made."""
        for expert in list(self._one_at_a_time):
            self.end(expert)
        if self._mirror is not None:
            self._mirror.close()
        if self._plane is not None:
            self._plane.unlink()
        for path in self._arriving:
            path.unlink(missing_ok=True)
        remove_stale()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _dial(self, channel: str) -> socket.socket:
        sock = socket.create_connection(self._gateway, SILENT_S)
        try:
            introduce(sock, self._key, self._host, channel)
        except BaseException:
            sock.close()
            raise
        return sock

    def _lost(self, expert: int, start: int) -> None:
        """What an engine and its client say to each other has been cut off."""
        with self._one_at_a_time[expert]:
            if self._starts.get(expert) == start and expert in self._engines:
                logger.warning("expert %d's engine has lost the gateway: it is ended", expert)
                self._kill(expert)

    def _end(self, expert: int) -> None:
        self._kill(expert)
        for channel in self._channels.pop(expert, ()):
            channel.close()

    def _kill(self, expert: int) -> None:
        engine = self._engines.pop(expert, None)
        if engine is None or not engine.is_running():  # by then, another process may have its number
            return
        with suppress(psutil.NoSuchProcess):
            processes = [engine, *engine.children(recursive=True)]
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, GONE_WITHIN_S)
        remove_stale()


def _shipped_to(directory: Path) -> dict[str, Stamp]:
    """Files there that have been copied from a gateway, and that one's stamps of them."""
    try:
        record = json.loads((directory / SHIPPED).read_text())
        return {name: (int(size), int(changed)) for name, (size, changed) in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def listen_at(address: str) -> socket.socket:
    """Listen for other hosts, at a port that is free.

    Raises:
        StartError: this machine does not have that address.
    """
    try:
        return socket.create_server((address, 0))
    except OSError as error:
        raise StartError(
            f"nobody can be listened for at {address}, which Ray has as this node's address ({error}): begin the node "
            "with --node-ip-address=ADDRESS, an address of its own"
        ) from None
