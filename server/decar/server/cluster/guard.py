"""Removes what a process has made under /dev/shm when that process is gone: `python -m decar.server.cluster.guard PID
NAME`. For an actor, which Ray may end at any time, and without a word."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from contextlib import suppress

from decar.server.protocol.runtime import remove_all_of


def guard(name: str) -> None:
    """Have all that this process makes by `runtime.new_name`, which made ``name``, removed after its end.

    By a process that is no child of this one: Ray ends children along with an actor.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid()), name]
    subprocess.run(["setsid", "--fork", *command], check=True, stdin=subprocess.DEVNULL)


def _main() -> None:
    pid, name = int(sys.argv[1]), sys.argv[2]
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    remove_all_of(name)


if __name__ == "__main__":
    _main()
