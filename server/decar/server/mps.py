"""CUDA's multi-process service (MPS) for engines that share a GPU: their kernels run side by side, else by turns.

The daemon is decar's own, unless the user has one. It is a child of a *guard*, a process of this file that ends it when
its own standard input ends: when the gateway has closed that, or is gone, however it went. Knows processes, no engines.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import psutil

from decar.server.protocol.runtime import ignore_stops

logger = logging.getLogger(__name__)

CONTROL = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"
DEFAULT_PIPES = "/tmp/nvidia-mps"  # where CUDA looks if nothing else is said
_START_S, _ANSWER_S, _LOOK_S = 10.0, 5.0, 0.2
_QUIT_S = 10.0
"""What a daemon has to quit, which waits for the engines that still use it."""


@contextlib.contextmanager
def mps(gpus: Iterable[tuple[int, ...]], folder: Path, wanted: bool = True) -> Iterator[str]:
    """A daemon for as long as this lasts, where engines share a GPU.

    Args:
        gpus: of each engine.
        folder: for its pipes and logs.
        wanted: False: leave it out.

    Yields:
        CUDA_MPS_PIPE_DIRECTORY for every engine; "": it stays what it is.
    """
    if not wanted or max(Counter(gpu for theirs in gpus for gpu in theirs).values(), default=0) < 2:
        yield ""
        return
    theirs = os.environ.get(PIPES, DEFAULT_PIPES)
    if _ask("get_server_list", theirs):
        logger.info("engines share a GPU: they use the MPS daemon at %s, which decar leaves running", theirs)
        yield ""
        return
    if PIPES in os.environ:
        logger.warning(
            "engines share a GPU, and take turns on it: no MPS daemon answers at %s (%s); unset it for one of decar's",
            theirs,
            PIPES,
        )
        yield ""
        return
    if shutil.which(CONTROL) is None:
        logger.warning("engines share a GPU, and take turns on it: there is no %s on PATH", CONTROL)
        yield ""
        return
    pipes, logs = folder / "mps", folder / "mps-logs"
    for made in (pipes, logs):
        made.mkdir(mode=0o700)
    with _guarded(pipes, logs) as guard:
        if _answers_soon(str(pipes), guard):
            logger.info("engines share a GPU: started an MPS daemon for them (--no-mps: they take turns)")
            yield str(pipes)
            return
    logger.warning("engines share a GPU, and take turns on it: %s does not start", CONTROL)
    yield ""


@contextlib.contextmanager
def _guarded(pipes: Path, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A guard with a daemon; both are gone afterwards."""
    environment = {**os.environ, PIPES: str(pipes), LOGS: str(logs)}
    # The daemon sees all GPUs, as nvidia-smi numbers them: its clients choose, and count as the server does.
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    guard = subprocess.Popen(
        [sys.executable, "-m", "decar.server.mps", str(_QUIT_S)],
        stdin=subprocess.PIPE,
        env={**environment, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
        start_new_session=True,  # Ctrl-C is for the gateway, which still has answers to finish
    )
    try:
        yield guard
    finally:
        guard.communicate()


def _answers_soon(pipes: str, guard: subprocess.Popen[bytes]) -> bool:
    end = time.monotonic() + _START_S
    while not _ask("get_server_list", pipes):
        if time.monotonic() > end or guard.poll() is not None:
            return False
        time.sleep(0.05)
    return True


def guard(quit_s: float) -> None:
    """Have a daemon in this process's environment while there is standard input, and none once that has ended.

    If it ends by itself, so does this.
    """
    daemon = psutil.Popen([CONTROL, "-f"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    ignore_stops()  # from here on: the daemon would inherit it
    while daemon.poll() is None:
        ready, _, _ = select.select([0], [], [], _LOOK_S)
        if ready and not os.read(0, 1):
            break
    quits = _ask(
        "quit", os.environ[PIPES]
    )  # not where engines have removed the folder of a gateway that is gone
    with contextlib.suppress(psutil.TimeoutExpired):
        daemon.wait(quit_s if quits else 0)
        return
    for process in [*daemon.children(recursive=True), daemon]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    daemon.wait()


def _ask(command: str, pipes: str) -> bool:
    """Whether the daemon with these pipes does what it is told."""
    environment: Mapping[str, str] = {**os.environ, PIPES: pipes}
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n".encode(),
            env=environment,
            capture_output=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


if __name__ == "__main__":
    guard(float(sys.argv[1]))
