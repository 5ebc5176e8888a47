"""A server as a child process that never outlives its parent. Knows commands, ports and /health; no decar."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import httpx

START_DEADLINE_S = 300.0
STOP_DEADLINE_S = 60.0
POLL_S = 0.2


class ServerDidNotStart(Exception):
    """The server ended, or was not healthy in time; the message has the end of its log."""


class Server(NamedTuple):
    """A running server: its base URL, and the id of its first process."""

    base_url: str
    pid: int


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, log: Path, *, cores: Collection[int] = ()) -> Iterator[Server]:
    """Run a server until the block ends, see `launched`.

    Yields:
        the server, once /health answers 200.

    Raises:
        ServerDidNotStart: see there.
    """
    with launched(command, port, log, cores=cores) as started:
        yield started()


@contextlib.contextmanager
def launched(
    command: Sequence[str],
    port: int,
    log: Path,
    *,
    cores: Collection[int] = (),
    host: str = "127.0.0.1",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Callable[[], Server]]:
    """Run a server until the block ends, without waiting for it.

    Args:
        command: what to run, without --host and --port.
        port: where it shall listen, at ``host``.
        log: gets what it prints; it is written at its end, so that the server itself may write to it as well.
        cores: confines it to these; empty leaves it free.
        host: its address.
        environment: in place of this process's.

    Yields:
        a function that gives the server, once /health answers 200; it raises `ServerDidNotStart`.
    """
    base = f"http://{host}:{port}"
    command = [*command, "--host", host, "--port", str(port)]
    if cores:
        command = ["taskset", "-c", ",".join(map(str, sorted(cores))), *command]
    environment = {**(environment or os.environ), "VLLM_NO_USAGE_STATS": "1"}
    log.unlink(missing_ok=True)
    with (
        log.open("ab") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process,
        httpx.Client(
            timeout=5, verify=False, trust_env=False
        ) as client,  # no TLS: certificates are slow to load; and no proxy
    ):
        deadline = time.monotonic() + START_DEADLINE_S

        def started() -> Server:
            while not _healthy(client, f"{base}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ServerDidNotStart(f"the server did not start; the end of {log}:\n{_tail(log)}")
                time.sleep(POLL_S)
            return Server(base, process.pid)

        try:
            yield started
        finally:
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()


def end_on_sigterm() -> None:
    """From here on SIGTERM unwinds this process as Ctrl-C does, so that its servers end with it."""

    def end(*_: int | FrameType | None) -> None:
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == 200
    except httpx.TransportError:
        return False


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
