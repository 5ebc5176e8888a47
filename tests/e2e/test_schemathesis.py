"""schemathesis asks whatever /openapi.json describes, in every wrong way that it knows: the server never fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import LOADED, running
from tests.helpers import ADMIN_KEY, Server, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1_500)]


def test_no_server_error(duo_server: Server, tmp_path: Path) -> None:
    ask(duo_server, tmp_path, "--phases", "examples,fuzzing", "--max-examples", "3")


@pytest.mark.soak
def test_no_server_error_for_long(duo: Reference, tmp_path: Path) -> None:
    # Five prompts of 11,000 answers each are work for an hour, which is no fault.
    bounded = {"VLLM_MAX_N_SEQUENCES": "16"}
    with running(duo, tmp_path / "duo.log", LOADED, bounded) as server:
        phases = "examples,coverage,fuzzing"
        ask(server, tmp_path, "--phases", phases, "--max-time", "600", "--max-examples", "60")


def ask(server: Server, work: Path, *options: str) -> None:
    """Have schemathesis ask, by one worker: several parse sources at once, which CPython 3.11 cannot (gh-106905)."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", *options]
    command += ["--seed", "17", "--workers", "1", "--request-timeout", "120", "--no-shrink"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-color", "--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {ADMIN_KEY}"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=1_400, check=False)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "not_a_server_error" not in done.stdout.partition("SUMMARY")[0]
    print(done.stdout.partition("SUMMARY")[2])
    wait_until(server.is_idle, 60, "nothing is left of its requests")
    assert server.health() == 200
