"""`decar bench ttft`: its ratios, and one whole run on real servers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from decar.benchmarks import ttft
from tests.reference import Reference


def test_ratios_are_of_the_same_prompts_and_repeat() -> None:
    times = {"single": (10.0, 4.0), "posterior": (15.0, 5.0)}
    runs = [
        {
            "phase": phase,
            "system": system,
            "repeat": repeat,
            "p50_ttft_ms": ms[i] * (1 + repeat * (system == "single")),
        }
        for repeat in range(2)
        for system, ms in times.items()
        for i, phase in enumerate(ttft.PHASES)
    ]
    assert ttft.ratios(runs) == {"new": [1.5, 0.75], "cached": [1.25, 0.625]}


@pytest.mark.engines
def test_a_whole_run_on_real_servers(duo: Reference, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "decar.server",
        "bench",
        "ttft",
        str(duo.directory),
        "--output",
        str(tmp_path),
    ]
    command += ["--repeats", "1", "--requests", "3", "--input-len", "40", "--dtype", "float32"]
    command += ["--vllm", "--enforce-eager"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*-ttft-duo.json")
    result = json.loads(path.read_text())
    assert [(run["phase"], run["system"]) for run in result["runs"]] == [
        (phase, system) for phase in ttft.PHASES for system in ("single", "posterior")
    ]
    assert all(ratio > 0 for ratios in result["ratios"].values() for ratio in ratios)
