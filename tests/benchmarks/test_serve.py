"""`decar bench serve`: its report, and one whole run on real servers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from decar.benchmarks import report, serve, today
from decar.benchmarks.load import Load
from tests.reference import Reference, mixture_decode, stdlib_text

LOAD = {"concurrency": 2, "requests": 4, "input_tokens": 8, "output_tokens": 8, "rate_per_s": None}


def run(system: str, tokens_per_s: float, repeat: int = 0, **load: Any) -> dict[str, Any]:
    return {
        "system": system,
        "load": {**LOAD, **load},
        "repeat": repeat,
        "output_throughput": tokens_per_s,
        "mean_tpot_ms": 5.0,
        "failed": 0,
    }


def test_ratios_are_of_the_same_load_and_repeat() -> None:
    runs = [run("single", 100), run("single", 50, 1), run("dense", 90), run("dense", 40, 1), run("http", 15)]
    runs.append(run("dense", 70, concurrency=64))  # nothing to compare with
    found = [(entry["system"], entry["repeat"], entry["ratio"]) for entry in report.ratios(runs)]
    assert found == [("dense", 0, 0.9), ("dense", 1, 0.8), ("http", 0, 0.2)]


def test_what_the_ensemble_does_is_compared_with_its_experts_plain_servers() -> None:
    runs = [
        run("single", 100),
        run("independent", 180),
        run("split", 160),
        run("pruned", 150),
        run("http", 15),
    ]
    runs += [run("single", 100, 1), run("pruned", 120, 1)]  # whatever of this repeat is missing is left out
    by_run = {(entry["system"], entry["repeat"]): entry for entry in report.ratios(runs)}
    assert by_run["pruned", 0]["over_independent"] == pytest.approx(150 / 180)
    assert by_run["pruned", 0]["over_split"] == pytest.approx(150 / 160)
    assert by_run["pruned", 0]["ratio"] == 1.5
    for system, repeat in (("independent", 0), ("split", 0), ("http", 0), ("pruned", 1)):
        assert set(by_run[system, repeat]) == {"system", "load", "repeat", "ratio"}


def test_a_load_is_dealt_out_evenly_or_not_at_all() -> None:
    load = Load(16, 32, 8, 8, rate_per_s=3.0)
    assert load.dealt(2) == Load(8, 16, 8, 8, rate_per_s=1.5)
    assert load.dealt(3) is None


def test_a_report_is_readable_and_never_overwritten(tmp_path: Path) -> None:
    runs = [run("single", 100), run("dense", 90), run("dense", 80, rate_per_s=1.5), run("independent", 180)]
    runs.append({**run("pruned", 150), "active_experts": 1.23})
    result = {
        "environment": {"gpus": [], "cores": 2, "cpu": "some CPU", "date": "2026-01-02T03:04:05"},
        "ensemble": {"name": "duo", "experts": 2, "dtype": "float32"},
        "checked": {"tokens": 128, "largest_difference_nats": 1e-5},
        "runs": runs,
        "ratios": report.ratios(runs),
        "steps": [{"load": LOAD, "ms": dict.fromkeys(report.PHASES, 1.0)}],
    }
    first, second = (report.write(result, tmp_path / "2026-01-02-cpu", report.plot) for _ in range(2))
    assert (first.name, second.name) == ("2026-01-02-cpu", "2026-01-02-cpu-2")
    assert json.loads((tmp_path / "2026-01-02-cpu-2.json").read_text()) == result
    assert (tmp_path / "2026-01-02-cpu-2.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=140, record=True)
    report.show(result, console)
    text = console.export_text()
    assert "0.90" in text
    assert all(word in text for word in ("1.50", "0.83", "1.23"))  # pruned: ÷ single, ÷ independent, active
    assert "1.50 req/s" in text
    assert "128 greedy tokens" in text


def test_json_has_a_line_for_each_record() -> None:
    rows = [{"n": 1, "ms": {"p50": 0.5}, "each": [1, 2]}, {"n": 2, "ε": []}]
    result = {"date": "today", "flags": ["a", "b"], "runs": [*rows, {"seed": 0, "rows": rows[:1]}]}
    text = report.lines_of(result)
    assert json.loads(text) == result
    assert (
        text
        == """{
 "date": "today",
 "flags": ["a", "b"],
 "runs": [
  {"n": 1, "ms": {"p50": 0.5}, "each": [1, 2]},
  {"n": 2, "ε": []},
  {
   "seed": 0,
   "rows": [
    {"n": 1, "ms": {"p50": 0.5}, "each": [1, 2]}
   ]
  }
 ]
}
"""
    )


def test_what_people_do_today_decodes_the_mixture(duo: Reference) -> None:
    prompts = [duo.encode("import os, sys")[:4], duo.encode("The value of it is")[:4]]
    experts = [duo.directory / "experts" / name for name in ("code", "prose")]
    decoded = today.Mixture(experts, [0.5, 0.5], "float32").decode(prompts, 8)
    assert decoded.duration_s > 0
    expected = mixture_decode(duo, prompts, max_tokens=8, weights={"code": 0.5, "prose": 0.5})
    for tokens, answer in zip(decoded.tokens, expected, strict=True):
        assert tokens == answer.tokens


def test_a_wrong_answer_is_not_timed(duo: Reference) -> None:
    experts = [duo.directory / "experts" / name for name in ("code", "prose")]
    mixture = today.Mixture(experts, [0.5, 0.5], "float32")
    prompt = duo.encode("import os")
    tokens = mixture.decode([prompt], 4).tokens[0]
    off, allowed = serve._hold("float32", mixture, prompt, tokens)
    assert off <= allowed
    with pytest.raises(serve.WrongAnswer, match="token 0 of an answer"):
        serve._hold("float32", mixture, prompt, [(tokens[0] + 1) % 100, *tokens[1:]])
    with pytest.raises(serve.WrongAnswer, match="log-probability 0"):
        serve._hold("float32", mixture, prompt, tokens, [0.0] * 4)


def test_an_answer_of_the_posterior_is_held_to_the_posterior(duo: Reference) -> None:
    prompt = duo.encode("import os, sys; from pathlib import")
    (answer,) = mixture_decode(duo, [prompt], max_tokens=24)
    experts = [duo.directory / "experts" / name for name in ("code", "prose")]
    mixture = today.Mixture(experts, duo.prior, "float32")
    off, _ = serve._hold("float32", mixture, prompt, answer.tokens, answer.logprobs, posterior=True)
    assert off < 1e-4
    (pruned,) = mixture_decode(duo, [prompt], max_tokens=24, prune=0.1)
    assert pruned.logprobs != answer.logprobs
    serve._hold("float32", mixture, prompt, pruned.tokens, pruned.logprobs, posterior=True, prune=0.1)
    with pytest.raises(serve.WrongAnswer):
        serve._hold("float32", mixture, prompt, pruned.tokens, pruned.logprobs, posterior=True)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--systems", "dense,vapour"], "vapour"),
        (["--systems", "draw"], "add --temperature 1"),
        (["--shape", "7B"], "3M, 40M"),
    ],
)
def test_unknown_names_are_refused(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "decar.server", "bench", "serve", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())  # the message is wrapped, in a box


@pytest.mark.engines
def test_a_whole_run_on_real_servers(duo: Reference, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "decar.server",
        "bench",
        "serve",
        str(duo.directory),
        "--output",
        str(tmp_path),
    ]
    command += ["--concurrency", "2", "--repeats", "1", "--input-len", "8", "--output-len", "8"]
    command += ["--poisson", "0.5", "--dtype", "float32", "--vllm", "--enforce-eager"]
    command += ["--systems", ",".join(serve.SYSTEMS), "--temperature", "1"]
    for module in ("string", "heapq"):
        text = tmp_path / f"{module}.txt"
        text.write_text(stdlib_text(module))
        command += ["--prompts", str(text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = tmp_path.glob("*-serve-duo.json")
    result = json.loads(path.read_text())
    assert path.with_suffix(".png").exists()
    systems = [run["system"] for run in result["runs"]]
    under_load = ["single", "independent", "split", "dense", "pruned", "draw", "top-1"]
    assert sorted(systems) == sorted([*under_load * 2, "http", "transformers"])
    assert all(run["failed"] == 0 for run in result["runs"])
    assert result["checked"]["largest_difference_nats"] < 1e-3
    assert {entry["system"] for entry in result["ratios"]} == set(serve.SYSTEMS)
    active = {run["system"]: run["active_experts"] for run in result["runs"] if "active_experts" in run}
    assert (active["dense"], active["top-1"], active["draw"]) == (2, 1, 1)
    assert 1 <= active["pruned"] <= 2
    pruned = next(entry for entry in result["ratios"] if entry["system"] == "pruned")
    assert pruned["over_split"] > pruned["over_independent"] > 0
    step = result["steps"][0]
    assert step["steps"] >= 8
    assert all(ms > 0 for phase, ms in step["ms"].items() if phase != "other")
    assert "vllm" in " ".join(result["environment"]["versions"])
