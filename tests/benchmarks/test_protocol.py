"""`decar bench protocol`: what it reports is checked, and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from decar.benchmarks import protocol
from decar.benchmarks.cli import bench
from decar.server.protocol.lockstep import Lockstep


def test_every_phase_of_a_checked_step_is_timed() -> None:
    ms = protocol.measure_step(protocol.StepCase(requests=3, experts=2), steps=2)
    assert list(ms) == list(protocol.PHASES)
    assert all(value > 0 for value in ms.values())


def test_nothing_is_reported_of_a_wrong_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lockstep, "mixed", lambda self, turns: torch.zeros(len(turns), protocol.VOCABULARY))
    with pytest.raises(protocol.WrongResult, match="velocity rule"):
        protocol.measure_step(protocol.StepCase(requests=3, experts=2), steps=2)


def test_the_planes_memory_depends_little_on_the_context() -> None:
    short, long = (
        protocol.measure_plane(protocol.PlaneCase(8, 1_024, 128_256, positions, on_device=True))
        for positions in (8_192, 131_072)
    )
    assert short == long
    assert long <= 256 * 2**20


def test_the_command_writes_json_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "STEP_CASES", (protocol.StepCase(2, 2),))
    monkeypatch.setattr("os._exit", lambda code: None)
    done = CliRunner().invoke(bench, ["protocol", "--quick", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    [report] = tmp_path.glob("*-protocol.json")
    result = json.loads(report.read_text())
    assert [step["requests"] for step in result["steps"]] == [2]
    assert report.with_suffix(".png").exists()
