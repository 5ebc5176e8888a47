"""MPS daemons for engines that share a GPU: what NVIDIA's control program is told, by one that behaves like it."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from decar.server import mps as module
from decar.server.mps import CONTROL, LOGS, PIPES, mps
from decar.server.protocol.member import LockstepConfig
from decar.server.protocol.plane import Plane
from tests.helpers import wait_until

DAEMON = """#!{python}
import os, pathlib, subprocess, sys
pipes = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
control, behaviour = pipes / "control", os.environ.get("FAKE_MPS", "")
if sys.argv[1:] == ["-f"]:
    if behaviour == "fails":
        sys.exit(1)
    server = subprocess.Popen(["sleep", "600"])  # as nvidia-cuda-mps-server, which comes with the first client
    os.mkfifo(control)
    (pipes / "environment").write_text(repr(dict(os.environ)))
    (pipes / "pids").write_text(f"{{os.getpid()}} {{server.pid}}")
    while True:
        with open(control) as told:
            if "quit" in told.read().split() and behaviour != "deaf":
                server.kill()
                server.wait()
                sys.exit(0)
command = sys.stdin.read()
try:
    with os.fdopen(os.open(control, os.O_WRONLY | os.O_NONBLOCK), "w") as daemon:
        daemon.write(command)
except OSError:
    print("Cannot find MPS control daemon process")
    sys.exit(1)
"""


@pytest.fixture(autouse=True)
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The control program, on PATH, and a machine without other daemons."""
    program = tmp_path / "bin" / CONTROL
    program.parent.mkdir()
    program.write_text(DAEMON.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(module, "DEFAULT_PIPES", str(tmp_path / "default"))
    yield program
    for pids in tmp_path.rglob("pids"):  # of a test that has failed
        for pid in map(int, pids.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pids_of(pipes: Path) -> list[int]:
    """Of a daemon and of its server."""
    wait_until((pipes / "pids").exists, 10, "a daemon starts")
    return [*map(int, (pipes / "pids").read_text().split())]


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


@pytest.mark.parametrize("gpus", [[(0,), (0,)], [(0, 1), (2,), (1,)]])
def test_engines_that_share_a_gpu_have_a_daemon_while_they_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: list[tuple[int, ...]],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    caplog.set_level(logging.INFO)
    with mps(gpus, tmp_path) as pipes:
        assert Path(pipes).is_relative_to(tmp_path)
        assert PIPES not in os.environ
        pids = pids_of(Path(pipes))
        environment = eval((Path(pipes) / "environment").read_text())
        assert environment[PIPES] == pipes
        assert Path(environment[LOGS]).is_relative_to(tmp_path)
        assert "CUDA_VISIBLE_DEVICES" not in environment
        assert not gone(pids)
        assert "started an MPS daemon" in caplog.text
    assert gone(pids)


@pytest.mark.parametrize("gpus", [[], [()], [(), ()], [(0,), (1,)], [(0, 1), (2, 3)]], ids=str)
def test_others_have_none(tmp_path: Path, gpus: list[tuple[int, ...]]) -> None:
    with mps(gpus, tmp_path) as pipes:
        assert pipes == ""
    assert not list(tmp_path.rglob("pids"))


def test_none_is_started_where_the_user_wants_none(tmp_path: Path) -> None:
    with mps([(0,), (0,)], tmp_path, wanted=False) as pipes:
        assert pipes == ""
    assert not list(tmp_path.rglob("pids"))


def test_without_the_program_engines_take_turns(
    tmp_path: Path, control: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control.unlink()
    with mps([(0,), (0,)], tmp_path) as pipes:
        assert pipes == ""
    assert f"take turns on it: there is no {CONTROL} on PATH" in caplog.text


def test_a_daemon_that_does_not_start_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_MPS", "fails")
    monkeypatch.setattr(module, "_START_S", 0.5)
    with mps([(0,), (0,)], tmp_path) as pipes:
        assert pipes == ""
    assert "take turns on it: nvidia-cuda-mps-control does not start" in caplog.text


@pytest.mark.parametrize("named", [True, False], ids=["named", "default"])
def test_the_users_own_daemon_is_used_and_left_alone(
    tmp_path: Path,
    control: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    named: bool,
) -> None:
    caplog.set_level(logging.INFO)
    theirs = tmp_path / "default"
    theirs.mkdir()
    daemon = subprocess.Popen([control, "-f"], env={**os.environ, PIPES: str(theirs)})
    try:
        pids_of(theirs)
        if named:
            monkeypatch.setenv(PIPES, str(theirs))
        with mps([(0,), (0,)], tmp_path) as pipes:
            assert pipes == ""
        assert f"use the MPS daemon at {theirs}, which decar leaves running" in caplog.text
        assert daemon.poll() is None
        assert len(list(tmp_path.rglob("pids"))) == 1
    finally:
        subprocess.run([control], input=b"quit", env={**os.environ, PIPES: str(theirs)}, check=True)
        daemon.wait(10)


def test_one_that_does_not_quit_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_MPS", "deaf")
    monkeypatch.setattr(module, "_QUIT_S", 0.2)
    with mps([(0,), (0,)], tmp_path) as pipes:
        pids = pids_of(Path(pipes))
    assert gone(pids)


@pytest.mark.parametrize("folder_is_left", [True, False])
def test_none_outlives_a_gateway_that_is_killed(tmp_path: Path, folder_is_left: bool) -> None:
    """Its engines may have removed its folder by the time."""
    gateway = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from decar.server.mps import mps\n"
            "with mps([(0,), (0,)], Path(sys.argv[1])) as pipes: print(pipes, flush=True); time.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert gateway.stdout is not None
    pipes = Path(gateway.stdout.readline().strip())
    pids = pids_of(pipes)
    if not folder_is_left:
        (pipes / "control").unlink()
    gateway.send_signal(signal.SIGKILL)
    gateway.wait()
    gateway.stdout.close()
    wait_until(lambda: gone(pids), 10, "the daemon ends")


def test_an_engine_finds_it(tmp_path: Path) -> None:
    """As CUDA will look for it, in a process that has the gateway's environment and has not begun with CUDA."""
    plane = Plane.create(experts=2, slots=1, vocab_size=5, positions=4)
    try:
        config = LockstepConfig(0, plane.spec, (), "1,0", os.getpid(), mps_pipes="/pipes of decar")
        wire = tmp_path / "config"
        wire.write_bytes(pickle.dumps(config))
        look = f"import os, pickle; pickle.load(open({str(wire)!r}, 'rb')); print(os.environ[{PIPES!r}])"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "/pipes of decar"
        assert PIPES not in os.environ
    finally:
        plane.unlink()
