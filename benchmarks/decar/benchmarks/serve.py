"""`decar bench serve`: what an ensemble costs beside one expert and beside what people do today, in one run.

Knows servers by their commands and HTTP. Systems that are compared:

single        one expert's whole plain vLLM server, on one engine's share of the cores (or on one GPU)
independent   such a server for every expert, each under the load, all at once: what the machine allows
dense         the ensemble, all experts active with equal weights, on all cores (or GPUs)
top-1         the ensemble's server, with one expert's weight 1
http          log-probabilities of the whole vocabulary from K plain vLLM servers, mixed by the client
transformers  a static batch through every expert in turn, mixed, in one process on all cores
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import shlex
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress

from decar.benchmarks import report, today
from decar.benchmarks.load import Load, LoadFailed, Target, measure, together
from decar.benchmarks.machine import environment, slug
from decar.benchmarks.models import SHAPES, build_ensemble
from decar.clients.child import Server, ServerDidNotStart, end_on_sigterm, free_port, serving

HTTP_TOKENS = 4  # one token over HTTP costs as much as hundreds in an engine
TIMED = ("forward", "post", "row_wait", "mix", "sample", "token_wait")
SYSTEMS = ("independent", "dense", "top-1", "http", "transformers")
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 32


class WrongAnswer(Exception):
    """The server does not give the mixture's tokens: how fast it does so is of no interest."""


@dataclass
class Bench:
    """Everything that one run shares."""

    directory: Path
    dtype: str
    flags: list[str]
    goodput: list[str]
    logs: Path
    progress: Progress
    runs: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        manifest = json.loads((self.directory / "ensemble.json").read_text())
        self.name: str = manifest["name"]
        self.experts: dict[str, Path] = {e["name"]: self.directory / e["path"] for e in manifest["experts"]}
        self.first = next(iter(self.experts))
        self.weights = [1 / len(self.experts)] * len(self.experts)
        self.cores = sorted(os.sched_getaffinity(0))
        self.on_gpu = torch.cuda.is_available()

    def target(self, server: Server, model: str, weights: dict[str, float] | None = None) -> Target:
        extra = {"decar": {"weights": weights}} if weights else {}
        return Target(server.base_url, model, self.experts[self.first], extra)

    def mixture(self) -> today.Mixture:
        return today.Mixture(list(self.experts.values()), self.weights, self.dtype)

    def run(self, system: str, targets: list[Target], load: Load, repeat: int) -> None:
        results = measure(targets, load, self.goodput, self.logs / "client.log", seed=repeat)
        self.runs.append({"system": system, "load": asdict(load), "repeat": repeat, **together(results)})


def serve(
    directory: Annotated[
        Path | None, typer.Argument(help="An ensemble directory; without one, --shape makes random weights.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Size of random-weight experts: {', '.join(SHAPES)}.")] = "3M",
    concurrency: Annotated[str, typer.Option(help="Closed loops: requests at once.")] = "1,4,16,64",
    poisson: Annotated[
        str,
        typer.Option(
            help="Poisson arrivals, as shares of the requests/s that one expert reached; '' for none."
        ),
    ] = "0.4,0.8",
    repeats: Annotated[int, typer.Option(min=1, help="How often each load is put on each system.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests for each one at once.")] = 2,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 32,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of all systems.")] = "bfloat16",
    goodput: Annotated[str, typer.Option(help="Promises in ms that goodput counts.")] = "ttft:2000 tpot:200",
    systems: Annotated[str, typer.Option(help="What is compared with one expert.")] = ",".join(SYSTEMS),
    quick: Annotated[
        bool, typer.Option(help="Within two minutes on two cores: one load, one repeat, eager mode.")
    ] = False,
    vllm: Annotated[str, typer.Option(help="vLLM flags for every server, in one string.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("benchmarks/results"),
) -> None:
    """Measure an ensemble against one expert on plain vLLM, and against what people do today.

    Load comes from vLLM's own `vllm bench serve`. Answers are checked against a transformers mixture first.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a table cut to 80 columns would lose its ratios
    compared = [name for name in systems.split(",") if name]
    for name in compared:
        if name not in SYSTEMS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(SYSTEMS)}", param_hint="--systems")
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    loads = [int(c) for c in concurrency.split(",")]
    shares = [float(share) for share in poisson.split(",") if share]
    if quick:
        loads, shares, repeats, requests, output_len, compared = [16], [], 1, 1, 64, ["dense", "top-1"]
        vllm += " --enforce-eager"  # compiling three small models takes longer than all the rest
    closed = [Load(c, max(requests * c, 4), input_len, output_len) for c in loads]
    end_on_sigterm()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        if directory is None:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="decar-bench-")))
            directory = build_ensemble(made, shape)
        logs = Path(tempfile.mkdtemp(prefix="decar-bench-logs-"))
        size = input_len + output_len
        limits = ["--max-model-len", str(size + 32), "--max-num-seqs", str(max(loads))]
        progress = stack.enter_context(Progress(console=console, transient=True))
        flags = [*limits, "--dtype", dtype, *shlex.split(vllm)]
        bench = Bench(directory, dtype, flags, goodput.split(), logs, progress)
        try:
            checked = _measure_all(bench, closed, shares, repeats, compared)
        except (LoadFailed, ServerDidNotStart, WrongAnswer) as error:
            console.print(f"decar bench: error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
    result = {
        "environment": environment(),
        "ensemble": {"name": bench.name, "experts": len(bench.experts), "dtype": dtype, "flags": bench.flags},
        "goodput": bench.goodput,
        "checked": checked,
        "runs": bench.runs,
        "ratios": report.ratios(bench.runs),
        "steps": bench.steps,
    }
    path = report.write(result, output / f"{slug()}-serve-{bench.name}")
    report.show(result, console)
    console.print(f"\nreport: {path}.json, {path}.png; logs: {logs}")


def _measure_all(
    bench: Bench, closed: list[Load], shares: list[float], repeats: int, compared: list[str]
) -> dict[str, Any]:
    """Fill ``bench.runs``; returns what was checked.

    All servers are up throughout, and take turns: a machine that slows down slows all of them. Those whose turn
    it is not are stopped: an idle engine still wakes a thousand times a second.
    """
    most = max(closed, key=lambda load: load.concurrency)
    task = bench.progress.add_task("", total=None)

    def say(system: str, load: Load | None = None, repeat: int = 0) -> None:
        what = "starting" if load is None else f"{load.label}, repeat {repeat + 1} of {repeats}"
        bench.progress.update(task, description=f"{system}: {what}")

    with contextlib.ExitStack() as servers:
        # The client's imports take seconds: while a plain server starts, the other cores have nothing to do.
        threading.Thread(target=importlib.import_module, args=("vllm.benchmarks.serve",)).start()
        say("plain vLLM")
        count = len(bench.experts) if {"independent", "http"} & set(compared) else 1
        plain = servers.enter_context(_plain_servers(bench, count))
        say("the ensemble")
        ensemble = servers.enter_context(_ensemble_server(bench))
        base = ensemble.base_url
        dense = bench.target(ensemble, bench.name, dict(zip(bench.experts, bench.weights, strict=True)))
        checked = _check(bench, dense)
        loaded = {  # the systems that vLLM's client puts load on
            "single": [bench.target(*plain[0])],
            "independent": [bench.target(*of) for of in plain],
            "dense": [dense],
            "top-1": [bench.target(ensemble, bench.name, {bench.first: 1.0})],
        }
        under = {system: targets for system, targets in loaded.items() if system in ("single", *compared)}
        for targets in under.values():
            _warm(bench, targets, most)
        everyone = [ensemble, *(server for server, _ in plain)]

        def measure_each(load: Load) -> None:
            for repeat in range(repeats):
                for system, targets in under.items():
                    busy = {target.base_url for target in targets}
                    say(system, load, repeat)
                    before = _counted(base)
                    with _stopped(server.pid for server in everyone if server.base_url not in busy):
                        bench.run(system, targets, load, repeat)
                    if system == "dense":
                        step = _step(load, before, _counted(base), bench.runs[-1]["duration_s"])
                        bench.steps.append(step)

        for load in closed:
            measure_each(load)
        best = max(run["request_throughput"] for run in bench.runs if run["system"] == "single")
        for share in shares:
            measure_each(replace(most, rate_per_s=share * best))
        over_http = []
        experts = [(server.base_url, name) for server, name in plain]
        for load in closed if "http" in compared else []:
            say("http", load)
            prompts = _prompts(bench, load.concurrency, load.input_tokens)
            decoded = asyncio.run(today.over_http(experts, bench.weights, prompts, HTTP_TOKENS))
            over_http.append((load, prompts, decoded))
    if {"http", "transformers"} & set(compared):
        mixture = bench.mixture()
        for load, prompts, decoded in over_http:
            _today(bench, mixture, "http", load, prompts, decoded)
        for load in closed if "transformers" in compared else []:
            say("transformers", load)
            prompts = _prompts(bench, load.concurrency, load.input_tokens)
            decoded = mixture.decode(prompts, min(load.output_tokens, 32))
            _today(bench, mixture, "transformers", load, prompts, decoded)
    return checked


@contextlib.contextmanager
def _plain_servers(bench: Bench, count: int) -> Iterator[list[tuple[Server, str]]]:
    """The first ``count`` experts' plain vLLM servers, each on its share of the cores, with their model ids."""
    share = max(len(bench.cores) // len(bench.experts), 1)
    with contextlib.ExitStack() as stack:
        servers = []
        for i, (name, path) in enumerate(list(bench.experts.items())[:count]):
            command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
            command += ["--served-model-name", name, "--max-logprobs", "-1", *_kv(bench), *bench.flags]
            of = bench.cores[i * share % len(bench.cores) :][:share]
            cores = () if bench.on_gpu else of
            log = bench.logs / f"{name}.log"
            servers.append((stack.enter_context(serving(command, free_port(), log, cores=cores)), name))
        yield servers


@contextlib.contextmanager
def _ensemble_server(bench: Bench) -> Iterator[Server]:
    command = [sys.executable, "-m", "decar.server", "serve", str(bench.directory), *_kv(bench), *bench.flags]
    cores = () if bench.on_gpu else bench.cores
    with serving(command, free_port(), bench.logs / "ensemble.log", cores=cores) as server:
        yield server


@contextlib.contextmanager
def _stopped(pids: Iterable[int]) -> Iterator[None]:
    """Stop these processes and their children as Ctrl-Z would, until the block ends."""
    roots = [psutil.Process(pid) for pid in pids]
    family = [process for root in roots for process in (root, *root.children(recursive=True))]
    try:
        for process in family:
            process.suspend()
        yield
    finally:
        for process in family:
            process.resume()


def _kv(bench: Bench) -> list[str]:
    """The same KV cache for every engine: otherwise a plain server would take what K engines share."""
    return [] if "--kv-cache-memory-bytes" in bench.flags else ["--kv-cache-memory-bytes", str(1 << 29)]


def _warm(bench: Bench, targets: list[Target], most: Load) -> None:
    """A short burst, so that no measured request pays for a first time."""
    load = Load(most.concurrency, most.concurrency, most.input_tokens, 8)
    measure(targets, load, bench.goodput, bench.logs / "client.log", seed=1000)


def _check(bench: Bench, dense: Target) -> dict[str, Any]:
    """Hold greedy answers of the ensemble to the mixture, see `_hold`; returns what was seen."""
    worst, allowed = 0.0, 0.0
    mixture = bench.mixture()
    for prompt in _prompts(bench, CHECKED_PROMPTS, 16):
        body = {
            "model": dense.model,
            "prompt": prompt,
            "max_tokens": CHECKED_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **dense.extra_body,
        }
        response = httpx.post(f"{dense.base_url}/v1/completions", json=body, timeout=600)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        off, allowed = _hold(
            bench.dtype, mixture, prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"]
        )
        worst = max(worst, off)
    tokens = CHECKED_PROMPTS * CHECKED_TOKENS
    return {"tokens": tokens, "largest_difference_nats": worst, "allowed_nats": allowed}


def _hold(
    dtype: str,
    mixture: today.Mixture,
    prompt: list[int],
    tokens: list[int],
    log_probs: list[float] | None = None,
) -> tuple[float, float]:
    """Compare a greedy answer with a transformers mixture: is each token the best, are its log-probabilities right?

    Two right implementations round differently. Allowed are 16 units in the last place of the largest logit:
    both sides, over the layers of a model.

    Returns:
        the largest difference and the allowed one, in nats.

    Raises:
        WrongAnswer: it is further off.
    """
    expected, best, largest = mixture.scores(prompt + tokens, len(prompt))
    allowed = max(16 * torch.finfo(getattr(torch, dtype)).eps / 2 * largest, 1e-3)
    worst = 0.0
    for i, (ours, theirs, highest) in enumerate(zip(log_probs or expected, expected, best, strict=True)):
        off = max(abs(ours - theirs), highest - theirs)
        worst = max(worst, off)
        if not off <= allowed:
            raise WrongAnswer(
                f"token {i} of an answer has log-probability {ours:.4f}; the mixture's is {theirs:.4f}, and its "
                f"best token's {highest:.4f}: further off than rounding explains ({allowed:.4f})"
            )
    return worst, allowed


def _prompts(bench: Bench, count: int, length: int) -> list[list[int]]:
    """Random token ids that every expert knows."""
    vocabulary = min(
        json.loads((p / "config.json").read_text())["vocab_size"] for p in bench.experts.values()
    )
    generator = torch.Generator().manual_seed(0)
    ids: list[list[int]] = torch.randint(2, vocabulary, (count, length), generator=generator).tolist()
    return ids


def _today(
    bench: Bench,
    mixture: today.Mixture,
    system: str,
    load: Load,
    prompts: list[list[int]],
    decoded: today.Decoded,
) -> None:
    """These have no server whose requests vLLM's client could time: throughput, and the mean time of a token."""
    _hold(bench.dtype, mixture, prompts[0], decoded.tokens[0])
    tokens = sum(map(len, decoded.tokens))
    each = 1000 * decoded.duration_s * len(prompts) / tokens
    bench.runs.append(
        {
            "system": system,
            "load": asdict(load),
            "repeat": 0,
            "duration_s": decoded.duration_s,
            "failed": 0,
            "output_throughput": tokens / decoded.duration_s,
            "mean_tpot_ms": each,
        }
    )


def _counted(base: str) -> list[dict[str, int]]:
    return [expert["lockstep"] for expert in httpx.get(f"{base}/v1/ensemble").json()["experts"]]


def _step(
    load: Load, before: list[dict[str, int]], after: list[dict[str, int]], duration_s: float
) -> dict[str, Any]:
    """Where an average decode step's time went, in ms, mean over the engines; holds are counted, not timed."""
    spent = [{k: new[k] - old[k] for k in new} for old, new in zip(before, after, strict=True)]
    steps = sum(of["steps"] for of in spent)
    ms = {k: sum(of[f"{k}_ns"] for of in spent) / steps / 1e6 for k in TIMED}
    phases = {k: ms[k] for k in ("forward", "post", "mix")}
    phases["wait"] = ms["row_wait"] + ms["token_wait"]
    phases["sample"] = ms["sample"] - ms["token_wait"]  # the wait happens in there
    whole = 1000 * duration_s * len(spent) / steps
    holds = sum(of["leader_holds"] + of["follower_holds"] for of in spent)
    return {
        "load": asdict(load),
        "steps": steps / len(spent),
        "holds": holds,
        "ms": {**phases, "other": whole - sum(phases.values())},
    }
