"""schemathesis asks whatever /openapi.json describes, in every wrong way that it knows: the server never fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ADMIN_KEY, Server, wait_until

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1_500)]


@pytest.mark.parametrize(
    ("options", "examples"),
    [
        (["--phases", "examples,fuzzing"], 3),
        pytest.param(
            ["--phases", "examples,coverage,fuzzing", "--max-time", "600"], 60, marks=pytest.mark.soak
        ),
    ],
    ids=["short", "long"],
)
def test_no_server_error(duo_server: Server, tmp_path: Path, options: list[str], examples: int) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{duo_server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", *options, "--max-examples", str(examples)]
    command += ["--seed", "17", "--workers", "4", "--request-timeout", "120", "--no-shrink"]
    command += ["--suppress-health-check", "all", "--warnings", "off", "--no-color", "--continue-on-failure"]
    command += ["--header", f"Authorization: Bearer {ADMIN_KEY}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1_400, check=False)
    assert done.returncode == 0, done.stdout[-6_000:] + done.stderr[-2_000:]
    assert "not_a_server_error" not in done.stdout.partition("SUMMARY")[0]
    wait_until(duo_server.is_idle, 60, "nothing is left of its requests")
    assert duo_server.health() == 200
