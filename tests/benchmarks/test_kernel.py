"""`decar bench kernel`: it refuses wrong implementations, and what it writes can be read. No test looks at a time."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from decar.benchmarks import kernel as bench

CASES = [
    bench.Case(operation, rule, dtype, rows=3, vocabulary=257, experts=2)
    for operation in bench.OPERATIONS
    for rule in bench.RULES
    for dtype in bench.DTYPES
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def label(case: bench.Case) -> str:
    return case.label


@pytest.mark.parametrize("case", CASES, ids=label)
def test_right_implementations_pass(case: bench.Case) -> None:
    inputs = bench.make_inputs(case, DEVICE)
    for implementation in (bench.ours(case), bench.naive(case, compiled=False)):
        assert bench.check(case, inputs, implementation) <= 2 * bench.tolerance(case, inputs)


def broken(case: bench.Case, how: Callable[[Any], Any]) -> bench.Implementation:
    right = bench.ours(case)
    return bench.Implementation("broken", lambda inputs: how(right.run(inputs)), anchored=True)


@pytest.mark.parametrize("rule", bench.RULES)
@pytest.mark.parametrize(
    "how",
    [
        lambda mixed: mixed + 1e-4,
        lambda mixed: mixed.bfloat16(),
        lambda mixed: mixed.log_softmax(-1),
        lambda mixed: mixed.where(mixed < mixed.max(), math.nan),
        lambda mixed: mixed[:1],
    ],
    ids=["shifted", "half precision", "another anchor", "NaN", "one row for all"],
)
def test_wrong_rows_are_refused(rule: bench.Rule, how: Callable[[Any], Any]) -> None:
    case = bench.Case("mix", rule, "float32", rows=3, vocabulary=257, experts=2)
    with pytest.raises(
        bench.WrongResult, match=rf"mix {rule} float32 B=3 V=257 K=2: broken gives rows off by"
    ):
        bench.check(case, bench.make_inputs(case, DEVICE), broken(case, how))


@pytest.mark.parametrize("rule", bench.RULES)
@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda decision: ((decision[0] + 1) % 257, decision[1]), "below the best"),
        (lambda decision: (decision[0] + 257, decision[1]), "outside the vocabulary"),
        (lambda decision: (decision[0][:1], decision[1]), "wrong shape"),
        (lambda decision: (decision[0], decision[1] + 1e-4), "log weights off by"),
        (lambda decision: (decision[0], decision[1] * math.nan), "log weights off by"),
    ],
    ids=["token", "no token", "too few", "weights", "NaN"],
)
def test_wrong_decisions_are_refused(rule: bench.Rule, how: Callable[[Any], Any], what: str) -> None:
    case = bench.Case("decide", rule, "float32", rows=3, vocabulary=257, experts=2)
    with pytest.raises(bench.WrongResult, match=what):
        bench.check(case, bench.make_inputs(case, DEVICE), broken(case, how))


def test_bytes_that_must_move() -> None:
    sizes = {"rows": 3, "vocabulary": 100, "experts": 2}
    assert bench.Case("mix", "logit", "bfloat16", **sizes).bytes == 2 * 3 * 100 * 2 + 3 * 100 * 4
    assert bench.Case("decide", "logit", "float32", **sizes).bytes == 2 * 3 * 100 * 4 + 3 * 8 + 3 * 2 * 8


def test_a_run_writes_numbers_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(bench, "CPU_SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["decar", "bench", "kernel"])
    bench.kernel(
        rows=[1, 2],
        vocabulary=[64],
        experts=[2, 3],
        dtype=["bfloat16"],
        compile=False,
        output=tmp_path / "new",
    )
    (written,) = (tmp_path / "new").glob("*-kernel.json")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(written.read_text())
    assert written.name.startswith(report["environment"]["date"][:10])
    assert report["environment"]["command"] == "decar bench kernel"
    assert report["copy"]["bytes_per_s"] > 0
    if DEVICE == "cpu":
        assert report["implementation"] == "torch"
        assert "Triton kernel was NOT run" in " ".join(capsys.readouterr().out.split())
    assert len(report["results"]) == 2 * 2 * 2 * 2  # B, K, rules, operations
    for result in report["results"]:
        assert result["dtype"] == "bfloat16"
        assert result["speedup_over_eager"] > 0
        assert result["speedup_over_compiled"] is None
        assert set(result["implementations"]) == {"decar", "eager"}
        for timing in result["implementations"].values():
            assert timing["p20_us"] <= timing["time_us"] <= timing["p80_us"]
            assert timing["error"] <= 2 * result["tolerance"]
            share = result["bytes"] / timing["time_us"] * 1e6 / report["copy"]["bytes_per_s"]
            assert timing["share_of_copy"] == pytest.approx(share)
            assert timing["share_of_same_copy"] == pytest.approx(
                result["copy"]["time_us"] / timing["time_us"]
            )
        assert result["copy"]["bytes"] == result["bytes"]


def test_a_wrong_kernel_ends_the_run_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(bench, "CPU_SECONDS", 0.0)
    right = bench.mix_rows
    monkeypatch.setattr(bench, "mix_rows", lambda *args: right(*args) + 1)
    with pytest.raises(typer.Exit) as ended:
        bench.kernel(rows=[1], vocabulary=[64], experts=[2], dtype=["float32"], output=tmp_path)
    assert ended.value.exit_code == 1
    assert "mix velocity float32 B=1 V=64 K=2: decar" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_busy_machine_and_unsteady_times_are_told() -> None:
    steady = {"implementations": {"decar": {"p20_us": 1.0, "p80_us": 1.1}}}
    unsteady = {"implementations": {"decar": {"p20_us": 1.0, "p80_us": 9.0}}}
    assert bench.doubts([steady], busy_percent=1.0) == ""
    assert "1 of 2 times" in bench.doubts([steady, unsteady], busy_percent=1.0)
    assert "60% of the processors" in bench.doubts([steady], busy_percent=60.0)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="float8"):
        bench.kernel(dtype=["float8"], output=tmp_path)
