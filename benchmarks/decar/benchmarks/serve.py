"""`decar bench serve`: what an ensemble costs beside one expert and beside what people do today, in one run.

Knows servers by their commands and HTTP. Systems that are compared:

single        one expert's whole plain vLLM server, on one engine's share of the cores (or on one GPU)
independent   such a server for every expert, each under the load, all at once: what the machine allows
split         the same servers, the load dealt out among them: one expert a request, and nothing to decide
dense         the ensemble, all experts active with equal weights, on all cores (or GPUs)
pruned        the ensemble under the posterior, which drops experts of less than PRUNE's weight
draw          the ensemble, one expert for each request drawn by the posterior
top-1         the ensemble's server, with one expert's weight 1
http          log-probabilities of the whole vocabulary from K plain vLLM servers, mixed by the client
transformers  a static batch through every expert in turn, mixed, in one process on all cores
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import shlex
import tempfile
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import transformers
import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import Progress

from decar.benchmarks import hosts as over_hosts
from decar.benchmarks import report, today
from decar.benchmarks.load import Load, LoadFailed, Target
from decar.benchmarks.machine import environment, slug
from decar.benchmarks.models import SHAPES, given_or_random
from decar.benchmarks.nodes import NodeDidNotStart
from decar.benchmarks.servers import Bench, limits, turn_of
from decar.benchmarks.texts import BadPrompts, Texts
from decar.clients.child import ServerDidNotStart, end_on_sigterm

HTTP_TOKENS = 4  # one token over HTTP costs as much as hundreds in an engine
TIMED = ("forward", "post", "row_wait", "mix", "sample", "token_wait")
SYSTEMS = ("independent", "split", "dense", "pruned", "draw", "top-1", "http", "transformers")
OVER_HOSTS = ("dense", "pruned", "draw")
DEFAULT_SYSTEMS = ("independent", "dense", "top-1", "http", "transformers")
PRUNE = 0.001
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 32


class WrongAnswer(Exception):
    """The server does not give the mixture's tokens: how fast it does so is of no interest."""


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
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Of all requests; http and transformers are always greedy.")
    ] = 0.0,
    dtype: Annotated[str, typer.Option(help="Of all systems.")] = "bfloat16",
    goodput: Annotated[str, typer.Option(help="Promises in ms that goodput counts.")] = "ttft:2000 tpot:200",
    systems: Annotated[
        str,
        typer.Option(
            help=f"What is compared with one expert: of {', '.join(SYSTEMS)}.",
            show_default=f"{','.join(DEFAULT_SYSTEMS)}; with --hosts {','.join(OVER_HOSTS[:2])}",
        ),
    ] = "",
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to cut prompts from (jsonl, parquet, plain); again for more. Default: random."
        ),
    ] = None,
    hosts: Annotated[
        int,
        typer.Option(
            min=1,
            help="What links between so many simulated hosts cost; needs root. Takes the most --concurrency.",
        ),
    ] = 1,
    delays: Annotated[str, typer.Option(help="With --hosts: of links, in ms, one way.")] = "0,0.1,1,10",
    gbits: Annotated[
        str, typer.Option(help="With --hosts: of links, in Gb/s; 0: as much as the simulation carries.")
    ] = "0.1,1,10",
    wire_rows: Annotated[
        str, typer.Option(help="With --hosts: how many logits of a row are sent; 0: all.")
    ] = "0,1024,256,64",
    quick: Annotated[
        bool, typer.Option(help="Within two minutes on two cores: one load, one repeat, eager mode.")
    ] = False,
    vllm: Annotated[str, typer.Option(help="vLLM flags for every server, in one string.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("benchmarks/results"),
) -> None:
    """Measure an ensemble against one expert on plain vLLM, and against what people do today.

    Load comes from vLLM's own `vllm bench serve`. Answers are checked against a transformers mixture first.
    """
    console = report.wide_console()
    known, usual = (SYSTEMS, DEFAULT_SYSTEMS) if hosts == 1 else (OVER_HOSTS, OVER_HOSTS[:2])
    compared = [name for name in systems.split(",") if name] or list(usual)
    for name in compared:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}", param_hint="--systems")
    if "draw" in compared and temperature != 1:
        raise typer.BadParameter(
            "draw is exact at temperature 1: add --temperature 1", param_hint="--systems"
        )
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    loads = [int(c) for c in concurrency.split(",")]
    shares = [float(share) for share in poisson.split(",") if share]
    if quick:
        loads, shares, repeats, requests, output_len = [16], [], 1, 1, 64
        compared = ["dense", "top-1"] if hosts == 1 else ["dense"]
        vllm += " --enforce-eager"  # compiling three small models takes longer than all the rest
    closed = [Load(c, max(requests * c, 4), input_len, output_len) for c in loads]
    if hosts > 1 and (reason := over_hosts.cannot(hosts)):
        raise typer.BadParameter(reason, param_hint="--hosts")
    end_on_sigterm()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(given_or_random(directory, shape))
        logs = Path(tempfile.mkdtemp(prefix="decar-bench-logs-"))
        progress = stack.enter_context(Progress(console=console, transient=True))
        flags = [*limits(closed[0], max(loads)), "--dtype", dtype, *shlex.split(vllm)]
        bench = Bench(directory, dtype, flags, goodput.split(), logs, progress, temperature)
        steps: list[dict[str, Any]] = []
        found: dict[str, Any]
        try:
            if prompts:
                bench.texts = Texts(prompts, bench.experts[bench.first], input_len)
                bench.texts.check(max(load.requests for load in closed))
            if hosts > 1:
                load = max(closed, key=lambda load: load.concurrency)
                links = [
                    over_hosts.Link(float(d), float(g)) for d in delays.split(",") for g in gbits.split(",")
                ]
                mixed = {system: options for system, options in _options(bench).items() if system in compared}
                case = over_hosts.Case(hosts, tuple(links), tuple(map(int, wire_rows.split(","))), mixed)
                found = {
                    "hosts": hosts,
                    "load": asdict(load),
                    **over_hosts.measure(bench, case, load, repeats),
                }
            else:
                found = {"checked": _measure_all(bench, closed, shares, repeats, compared, steps)}
                found |= {"ratios": report.ratios(bench.runs), "steps": steps}
        except (BadPrompts, LoadFailed, NodeDidNotStart, ServerDidNotStart, WrongAnswer) as error:
            console.print(f"decar bench: error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
    result = {
        "environment": environment(),
        "ensemble": {"name": bench.name, "experts": len(bench.experts), "dtype": dtype, "flags": bench.flags},
        "temperature": temperature,
        "prompts": [str(path) for path in prompts or ()],
        "goodput": bench.goodput,
        "runs": bench.runs,
        **found,
    }
    said = over_hosts if hosts > 1 else report
    what = f"serve-{bench.name}" + (f"-{hosts}-hosts" if hosts > 1 else "")
    path = report.write(result, output / f"{slug()}-{what}", said.plot)
    said.show(result, console)
    console.print(f"\nreport: {path}.json, {path}.png; logs: {logs}")


def _measure_all(
    bench: Bench,
    closed: list[Load],
    shares: list[float],
    repeats: int,
    compared: list[str],
    steps: list[dict[str, Any]],
) -> dict[str, Any]:
    """Fill ``bench.runs`` and ``steps``; returns what was checked."""
    most = max(closed, key=lambda load: load.concurrency)
    task = bench.progress.add_task("", total=None)

    def say(system: str, load: Load | None = None, repeat: int = 0) -> None:
        what = "starting" if load is None else f"{load.label}, repeat {repeat + 1} of {repeats}"
        bench.progress.update(task, description=f"{system}: {what}")

    with contextlib.ExitStack() as servers:
        # The client's imports take seconds: while a plain server starts, the other cores have nothing to do.
        threading.Thread(target=importlib.import_module, args=("vllm.benchmarks.serve",)).start()
        say("all servers")
        count = len(bench.experts) if {"independent", "split", "http"} & set(compared) else 1
        plain, ensemble = servers.enter_context(bench.servers(count))
        base = ensemble.base_url
        decar = _options(bench)
        ensemble_targets = {
            system: [bench.target(ensemble, bench.name, decar=options)] for system, options in decar.items()
        }
        checked = _check(bench, ensemble_targets["pruned" if "pruned" in compared else "dense"][0])
        loaded = {  # the systems that vLLM's client puts load on
            "single": [bench.target(*plain[0])],
            "independent": [bench.target(*each) for each in plain],
            "split": [bench.target(*each) for each in plain],
            **ensemble_targets,
        }
        under = {system: targets for system, targets in loaded.items() if system in ("single", *compared)}
        short = replace(most, requests=most.concurrency, output_tokens=8)
        for targets in under.values():
            bench.measured(targets, short)  # so that no measured request pays for a first time
        everyone = [ensemble, *(server for server, _ in plain)]

        def measure_each(load: Load) -> None:
            for repeat in range(repeats):
                for system, targets in under.items():
                    each = load.dealt(len(plain)) if system == "split" else load
                    if each is None:
                        continue
                    say(system, load, repeat)
                    before, seen = _counted(base), _active(base)
                    with turn_of(targets, everyone):
                        measured = bench.measured(targets, each)
                    if system in decar:
                        tokens, experts = (new - old for new, old in zip(_active(base), seen, strict=True))
                        measured["active_experts"] = experts / tokens
                    if system == "dense":
                        steps.append(_step(load, before, _counted(base), measured["duration_s"]))
                    bench.keep(system, load, repeat, measured)

        for load in closed:
            measure_each(load)
        best = max(run["request_throughput"] for run in bench.runs if run["system"] == "single")
        for share in shares:
            measure_each(replace(most, rate_per_s=share * best))
        over_http = []
        endpoints = [(server.base_url, name) for server, name in plain]
        weights = list(decar["dense"]["weights"].values())
        for load in closed if "http" in compared else []:
            say("http", load)
            prompts = bench.random_prompts(load.concurrency, load.input_tokens)
            decoded = asyncio.run(today.over_http(endpoints, weights, prompts, HTTP_TOKENS))
            over_http.append((load, prompts, decoded))
    if {"http", "transformers"} & set(compared):
        mixture = today.Mixture(list(bench.experts.values()), weights, bench.dtype)
        for load, prompts, decoded in over_http:
            _today(bench, mixture, "http", load, prompts, decoded)
        for load in closed if "transformers" in compared else []:
            say("transformers", load)
            prompts = bench.random_prompts(load.concurrency, load.input_tokens)
            decoded = mixture.decode(prompts, min(load.output_tokens, 32))
            _today(bench, mixture, "transformers", load, prompts, decoded)
    return checked


def _options(bench: Bench) -> dict[str, dict[str, Any]]:
    """What requests of each of the ensemble's systems say of how they are to be mixed."""
    return {
        "dense": {"weights": dict.fromkeys(bench.experts, 1 / len(bench.experts))},
        "pruned": {"route": "posterior", "prune": PRUNE},
        "draw": {"route": "posterior", "sampling": "draw"},
        "top-1": {"weights": {bench.first: 1.0}},
    }


def _check(bench: Bench, target: Target) -> dict[str, Any]:
    """Hold greedy answers of the ensemble to the mixture, see `_hold`; returns what was seen."""
    worst, allowed = 0.0, 0.0
    options = target.extra_body["decar"]
    posterior, prune = "weights" not in options, options.get("prune", 0.0)
    start = bench.priors if posterior else list(options["weights"].values())
    mixture = today.Mixture(list(bench.experts.values()), start, bench.dtype)
    for prompt in bench.random_prompts(CHECKED_PROMPTS, 16):
        body = {
            "model": target.model,
            "prompt": prompt,
            "max_tokens": CHECKED_TOKENS,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **target.extra_body,
            "temperature": 0,
        }
        response = httpx.post(f"{target.base_url}/v1/completions", json=body, timeout=600)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        log_probs = choice["logprobs"]["token_logprobs"]
        off, allowed = _hold(
            bench.dtype, mixture, prompt, choice["token_ids"], log_probs, posterior=posterior, prune=prune
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
    *,
    posterior: bool = False,
    prune: float = 0.0,
) -> tuple[float, float]:
    """Compare a greedy answer with a transformers mixture: is each token the best, are its log-probabilities right?

    Two right implementations round differently. Allowed are 16 units in the last place of the largest logit:
    both sides, over the layers of a model. ``prune`` changes a token's probability by so much at most.

    Returns:
        the largest difference and the allowed one without pruning, in nats.

    Raises:
        WrongAnswer: it is further off.
    """
    expected, best, largest = mixture.scores(prompt + tokens, len(prompt), posterior)
    allowed = max(16 * torch.finfo(getattr(torch, dtype)).eps / 2 * largest, 1e-3)
    worst = 0.0
    for i, (ours, theirs, highest) in enumerate(zip(log_probs or expected, expected, best, strict=True)):
        off = max(abs(ours - theirs), highest - theirs)
        worst = max(worst, off)
        limit = allowed + 2 * prune * math.exp(
            -theirs
        )  # twice: the best token's may have been raised as well
        if not off <= limit:
            raise WrongAnswer(
                f"token {i} of an answer has log-probability {ours:.4f}; the mixture's is {theirs:.4f}, and its "
                f"best token's {highest:.4f}: further off than rounding explains ({limit:.4f})"
            )
    return worst, allowed


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


def _active(base: str) -> tuple[float, float]:
    """(Tokens, experts that mixed them) so far: their quotient is how many experts a token has cost."""
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(httpx.get(f"{base}/metrics").text)
        for sample in family.samples
        if family.name == "decar:active_experts"
    }
    return samples["decar:active_experts_count"], samples["decar:active_experts_sum"]


def _counted(base: str) -> list[dict[str, int]]:
    return [expert["lockstep"] for expert in httpx.get(f"{base}/v1/ensemble").json()["experts"]]


def _step(
    load: Load, before: list[dict[str, int]], after: list[dict[str, int]], duration_s: float
) -> dict[str, Any]:
    """Where an average decode step's time went, in ms, mean over the engines; holds are counted, not timed."""
    spent = [{k: new[k] - old[k] for k in new} for old, new in zip(before, after, strict=True)]
    steps = sum(engine["steps"] for engine in spent)
    ms = {k: sum(engine[f"{k}_ns"] for engine in spent) / steps / 1e6 for k in TIMED}
    phases = {k: ms[k] for k in ("forward", "post", "mix")}
    phases["wait"] = ms["row_wait"] + ms["token_wait"]
    phases["sample"] = ms["sample"] - ms["token_wait"]  # the wait happens in there
    whole = 1000 * duration_s * len(spent) / steps
    holds = sum(engine["leader_holds"] + engine["follower_holds"] for engine in spent)
    return {
        "load": asdict(load),
        "steps": steps / len(spent),
        "holds": holds,
        "ms": {**phases, "other": whole - sum(phases.values())},
    }
