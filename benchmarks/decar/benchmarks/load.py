"""Load on a server, by vLLM's own `vllm bench serve`, run in this process: its start-up is paid once."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

PERCENTILES = (50, 90, 99)
TIMES = ("ttft", "tpot", "itl", "e2el")
"""Time to first token, time per output token after it, time between chunks, end to end."""


Measured = dict[str, Any]


class LoadFailed(Exception):
    """A request failed or came back short: its server's speed means nothing."""


@dataclass(frozen=True)
class Load:
    """What is sent.

    Attributes:
        concurrency: requests at any time (closed loop); with a rate, the most at any time.
        requests: how many in all.
        input_tokens, output_tokens: exact lengths of each request.
        rate_per_s: Poisson arrivals; None sends the next request as soon as one ends.
    """

    concurrency: int
    requests: int
    input_tokens: int
    output_tokens: int
    rate_per_s: float | None = None

    @property
    def label(self) -> str:
        return f"{self.concurrency} at once" if self.rate_per_s is None else f"{self.rate_per_s:.2f} req/s"

    def dealt(self, servers: int) -> Load | None:
        """What each of ``servers`` gets when the load is dealt out among them; None where it cannot be, evenly."""
        if self.concurrency % servers or self.requests % servers:
            return None
        return replace(
            self,
            concurrency=self.concurrency // servers,
            requests=self.requests // servers,
            rate_per_s=None if self.rate_per_s is None else self.rate_per_s / servers,
        )


@dataclass(frozen=True)
class Target:
    """Where it is sent: a model of an OpenAI-compatible server, and what each request says besides."""

    base_url: str
    model: str
    tokenizer: Path
    extra_body: dict[str, Any]


class Prompts(NamedTuple):
    """Which prompts are sent: those of a file in its order, or else random tokens picked by the seed."""

    seed: int
    file: Path | None = None


def measure(
    targets: Sequence[Target], load: Load, goodput: list[str], log: Path, prompts: Prompts
) -> list[Measured]:
    """Put ``load`` on each of ``targets`` at the same time; what vLLM's client prints goes to ``log``.

    Returns:
        of each target duration_s, completed, failed, request_throughput, output_throughput (tokens/s),
        request_goodput (requests/s that kept the ``goodput`` promises), and for each of TIMES mean, p50, p90, p99
        in ms.

    Raises:
        LoadFailed: not every request came back whole.
    """
    from vllm.benchmarks.serve import main_async

    async def all_at_once() -> list[dict[str, Any]]:
        arguments = [_arguments(target, load, goodput, prompts) for target in targets]
        return await asyncio.gather(*map(main_async, arguments))

    with log.open("a") as output, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        results = asyncio.run(all_at_once())
    return [_measured(target, load, result, log) for target, result in zip(targets, results, strict=True)]


def _arguments(target: Target, load: Load, goodput: list[str], prompts: Prompts) -> argparse.Namespace:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    options = {
        "backend": "openai",
        "base-url": target.base_url,
        "endpoint": "/v1/completions",
        "model": target.model,
        "tokenizer": target.tokenizer,
        "num-prompts": load.requests,
        "max-concurrency": load.concurrency,
        "request-rate": "inf" if load.rate_per_s is None else load.rate_per_s,
        "seed": prompts.seed,
        "percentile-metrics": ",".join(TIMES),
        "metric-percentiles": ",".join(map(str, PERCENTILES)),
        "extra-body": json.dumps(target.extra_body),
    }
    if prompts.file is None:
        options |= {
            "dataset-name": "random",
            "random-input-len": load.input_tokens,
            "random-output-len": load.output_tokens,
            "random-range-ratio": 0,
        }
    else:
        options |= {
            "dataset-name": "custom",
            "dataset-path": prompts.file,
            "custom-output-len": load.output_tokens,
        }
    flags = [item for key, value in options.items() for item in (f"--{key}", str(value))]
    flags += ["--ignore-eos", "--disable-tqdm", "--skip-chat-template", "--disable-shuffle"]
    flags += ["--goodput", *goodput]
    arguments: argparse.Namespace = parser.parse_args(flags)
    return arguments


def _measured(target: Target, load: Load, result: dict[str, Any], log: Path) -> Measured:
    produced, wanted = result["total_output_tokens"], load.requests * load.output_tokens
    if result["failed"] or result["completed"] != load.requests or produced != wanted:
        raise LoadFailed(
            f"{target.model} at {load.label}: {result['completed']} of {load.requests} requests came back, with "
            f"{produced} of {wanted} tokens; see {log}"
        )
    measured: Measured = {
        "duration_s": result["duration"],
        "completed": result["completed"],
        "failed": result["failed"],
        "request_throughput": result["request_throughput"],
        "output_throughput": result["output_throughput"],
        "request_goodput": result["request_goodput"],
        "slowest_over_median_e2el": result["p99_e2el_ms"] / result["median_e2el_ms"],
    }
    for time in TIMES:
        measured[f"mean_{time}_ms"] = result[f"mean_{time}_ms"]
        measured |= {f"p{p}_{time}_ms": result[f"p{p}_{time}_ms"] for p in PERCENTILES}
    return measured


def together(results: Sequence[Measured]) -> Measured:
    """Several servers' results as one: what they get through adds up, times are the mean, the slowest counts."""
    whole: Measured = {}
    for key in results[0]:
        values = [result[key] for result in results]
        if key in ("completed", "failed") or key.endswith(("_throughput", "_goodput")):
            whole[key] = sum(values)
        elif key in ("duration_s", "slowest_over_median_e2el"):
            whole[key] = max(values)
        else:
            whole[key] = sum(values) / len(values)
    return whole
