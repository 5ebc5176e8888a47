"""`decar bench serve --hosts` and `decar bench failures`: their reports, the switch, and whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decar.benchmarks import failures, hosts
from decar.benchmarks.network import network, no_network, probe

needs_network = pytest.mark.skipif(bool(no_network()), reason=no_network())
ENVIRONMENT = {"gpus": [], "cores": 2, "cpu": "some CPU", "date": "2026-01-02T03:04:05"}
LINKS = [{"delay_ms": delay, "gbit_s": width} for delay in (0.0, 10.0) for width in (0.1, 0.0)]


def run(system: str, wire_rows: int, rate: float, link: dict[str, float] | None = None) -> dict[str, Any]:
    times = {"p50_ttft_ms": 30.0, "p50_itl_ms": 5.0}
    return {
        "system": system,
        "wire_rows": wire_rows,
        "link": link,
        "repeat": 0,
        "output_throughput": rate,
        **times,
    }


def shown(show: Any, result: dict[str, Any]) -> str:
    console = Console(width=140, record=True)
    show(result, console)
    return console.export_text()


def test_a_report_of_links(tmp_path: Path) -> None:
    runs = []
    for wire_rows, rate in ((0, 100.0), (64, 200.0)):
        runs.append(run("single", wire_rows, 400.0))
        runs += [run("dense", wire_rows, rate + i, link) for i, link in enumerate(LINKS)]
    result = {
        "environment": ENVIRONMENT,
        "ensemble": {"name": "duo", "experts": 2},
        "hosts": 2,
        "load": {"concurrency": 4},
        "runs": runs,
        "probes": [{"link": link, "gbit_s": 0.09, "round_trip_ms": 20.1} for link in LINKS],
        "bounds": [{"system": "dense", "wire_rows": 64, "mean_token": 0.001, "worst_token": 0.02}],
    }
    text = shown(hosts.show, result)
    [line] = [line for line in text.splitlines() if "10 ms" in line and "no limit" in line and "(" in line]
    assert line.split() == [
        *("10", "ms", "no", "limit"),
        *("103", "(0.26),", "30,", "5.0", "203", "(0.51),", "30,", "5.0"),
    ]
    assert "0.09" in text
    assert "20.10 ms" in text
    assert "moves by at most 0.02, on average 0.001" in text
    hosts.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_of_failures(tmp_path: Path) -> None:
    seen = failures.Seen(time.monotonic(), held=(1.0, 2.0))
    seen.tokens.update({0: 100, 1: 50, 4: 80})
    seen.answers.update({0: 2, 4: 3})
    seen.degraded[4] = 2
    seen.failed[4] = 1
    seen.up = {0: 2, 2: 1, 4: 2}
    each = failures._by_second("an engine is killed", seen)
    assert each["tokens"] == [100, 50, 0, 0, 80]
    assert each["up"] == [2, 2, 1, 1, 2]
    result = {
        "environment": ENVIRONMENT,
        "ensemble": {"name": "duo", "experts": 2},
        "hosts": 2,
        "clients": 8,
        "scenarios": [each],
    }
    [line] = [line for line in shown(failures.show, result).splitlines() if "an engine is killed" in line]
    assert line.split()[4:] == ["5", "1", "0", "2", "2", "s", "2", "s"]
    failures.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@needs_network
def test_links_are_as_slow_as_they_are_told_to_be() -> None:
    with network(["one", "two"]) as switch:
        one, two = switch.machines["one"], switch.machines["two"]
        switch.be(delay_ms=10)
        _, round_trip_ms = probe(one, two)
        assert round_trip_ms >= 20
        switch.be(gbit_s=0.5)
        gbit_s, _ = probe(one, two)
        assert gbit_s <= 0.5
        switch.be(delay_ms=10)
        _, round_trip_ms = probe(one, switch.machines[""])
        assert round_trip_ms < 10, "this process has a way of its own"


@pytest.mark.soak
@pytest.mark.engines
@needs_network
def test_a_whole_run_over_links(tmp_path: Path) -> None:
    options = [*("--hosts", "2", "--delays", "0,10", "--gbits", "0", "--wire-rows", "0,64")]
    options += ["--concurrency", "2", "--repeats", "1", "--output-len", "8", "--systems", "dense,pruned"]
    command = [sys.executable, "-m", "decar", "bench", "serve", *options, "--output", str(tmp_path)]
    subprocess.run([*command, "--vllm", "--enforce-eager"], check=True, timeout=600)
    [report] = tmp_path.glob("*-2-hosts.json")
    runs = json.loads(report.read_text())["runs"]
    assert len(runs) == 2 * 2 * (1 + 2)
    assert all(found["completed"] == 4 for found in runs)


@pytest.mark.soak
@pytest.mark.engines
@needs_network
@pytest.mark.timeout(1500)
def test_a_whole_run_of_failures(tmp_path: Path) -> None:
    """No answer is lost or wrong, and whoever lost an expert says so."""
    command = [sys.executable, "-m", "decar", "bench", "failures", "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=1400)
    [report] = tmp_path.glob("*-failures-2-hosts.json")
    scenarios = {each["name"]: each for each in json.loads(report.read_text())["scenarios"]}
    assert list(scenarios) == list(failures.SCENARIOS)
    for each in scenarios.values():
        assert sum(each["failed"]) == sum(each["wrong"]) == 0
        assert each["up"][-1] == 2
    lost = {name for name, each in scenarios.items() if sum(each["degraded"])}
    assert lost == set(scenarios) - {
        "links take 50 ms and stand still for 0.5 s now and then",
        "a node is not reached for 5 s",
    }
