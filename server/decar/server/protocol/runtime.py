"""What a server has on this machine while it runs: names under /dev/shm that tell whose they are, and what it says of
itself. Knows processes and files.

A name has the process id of its maker, and when that process started, which tells a reused id apart.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

DIRECTORY = Path("/dev/shm")
PREFIX = "decar-"
RECORD = "server.json"
"""In a server's folder: a `Record`."""


@dataclass(frozen=True)
class Record:
    """What a running server says of itself, for `decar ps`.

    Attributes:
        name: of its ensemble.
        directory: of its ensemble.
        url: where it listens, or will; "" while vLLM still has to read that from a file.
        pid: of its gateway.
        started: when, in seconds since the epoch.
        experts: how many it has been started with.
        log: the file that has vLLM's log; None: the terminal.
        state: "starting" or "ready".
    """

    name: str
    directory: str
    url: str
    pid: int
    started: float
    experts: int
    log: str | None
    state: str = "starting"

    def write(self, folder: Path) -> None:
        """Into the folder of its server, in one go: others may read it now."""
        new = folder / f"{RECORD}.new"
        new.write_text(json.dumps(asdict(self)))
        new.replace(folder / RECORD)


def records() -> list[Record]:
    """Of the servers that run now, the oldest first: those that this user may ask, within this container."""
    found = []
    for path in DIRECTORY.glob(f"{PREFIX}{_pid_namespace()}-*-*-*/{RECORD}"):
        # One whose server has just gone, or is another version's, is none.
        with suppress(OSError, ValueError, TypeError):
            if _lives(path.parent.name):
                found.append(Record(**json.loads(path.read_text())))
    return sorted(found, key=lambda record: record.started)


def new_name() -> str:
    """A name for what this process makes, by which `remove_all_of` and `remove_stale` find it once that is gone."""
    return f"{PREFIX}{_pid_namespace()}-{os.getpid()}-{_start_time(os.getpid())}-{secrets.token_hex(4)}"


def make_folder() -> Path:
    """Make a folder that its owner alone can enter, for what else has to go when this process does."""
    folder = DIRECTORY / new_name()
    folder.mkdir(0o700)
    return folder


def become(environment: Mapping[str, str]) -> None:
    """Have this process's environment be that one, and nothing else."""
    for name in {*os.environ, *environment}:
        if name not in environment:
            del os.environ[name]
        elif os.environ.get(name) != environment[name]:
            os.environ[name] = environment[name]


def ignore_stops() -> None:
    """Leave it to the gateway to end this process: a whole group may be told to stop, and answers are to finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def remove_all_of(name: str) -> None:
    """Remove all that the process has made which `new_name` made ``name`` for: segments, folders."""
    for path in DIRECTORY.glob(f"{name.rpartition('-')[0]}-*"):
        _remove(path)


def remove_stale() -> list[str]:
    """Remove what processes have made that are gone (killed with -9, say); return the names."""
    stale = []
    for path in DIRECTORY.glob(f"{PREFIX}{_pid_namespace()}-*-*-*"):
        if not _lives(path.name) and _remove(path):
            stale.append(path.name)
    return stale


def _lives(name: str) -> bool:
    """Whether the process runs that `new_name` made ``name`` for; so it may, where that is no such name."""
    pid, started = name.removeprefix(PREFIX).split("-")[1:3]
    return not pid.isdigit() or _start_time(int(pid)) == started


def _remove(path: Path) -> bool:
    """Whether there was something there that could be removed."""
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError:
        return False
    return True


def _pid_namespace() -> int:
    """Containers may share /dev/shm but not process ids: each looks after its own segments."""
    return os.stat("/proc/self/ns/pid").st_ino


def _start_time(pid: int) -> str:
    """When process ``pid`` started, in clock ticks since boot; "" if it has ended, whether its parent has heard of that
    or not. Tells a reused pid apart."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] == "Z" else after_name[19]
