"""`decar bench failures`: what clients see, second by second, while hosts and the links between them fail.

Knows networks, servers and HTTP. Every client asks the same greedily again and again, so that an answer that is wrong
is known to be: it differs from the one of the time before, and names no expert that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import transformers
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from decar.benchmarks.hosts import cannot, served
from decar.benchmarks.machine import environment, slug
from decar.benchmarks.models import SHAPES, given_or_random
from decar.benchmarks.network import Switch, forget_proxies, network
from decar.benchmarks.nodes import NAMES, NodeDidNotStart, RayCluster, ray_cluster
from decar.benchmarks.report import wide_console, write
from decar.benchmarks.servers import Bench
from decar.clients.child import Server, ServerDidNotStart, end_on_sigterm

CLIENTS, PROMPT_TOKENS, ANSWER_TOKENS = 8, 16, 200
BEFORE_S, AFTER_S, MOST_S, LATER_S = 5, 5, 240, 0.2
ADMIN_KEY = "of-this-benchmark"


@dataclass
class World:
    """What can fail."""

    switch: Switch
    cluster: RayCluster
    server: Server
    experts: list[str]

    def asked(self) -> list[dict[str, Any]]:
        """Of each expert, what the server says."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        said = httpx.get(
            f"{self.server.base_url}/v1/ensemble", headers=headers, timeout=30
        ).raise_for_status()
        experts: list[dict[str, Any]] = said.json()["experts"]
        return experts


@dataclass
class Seen:
    """By second since a scenario began.

    Attributes:
        tokens: that clients have got.
        answers, degraded, wrong, failed: that have ended: all, those that name a lost expert, those that differ
            from what they should be and name none, and those that did not come whole.
        up: experts that live.
        held: from when to when it was made to fail.
    """

    began: float
    tokens: Counter[int] = field(default_factory=Counter)
    answers: Counter[int] = field(default_factory=Counter)
    degraded: Counter[int] = field(default_factory=Counter)
    wrong: Counter[int] = field(default_factory=Counter)
    failed: Counter[int] = field(default_factory=Counter)
    up: dict[int, int] = field(default_factory=dict)
    held: tuple[float, float] = (0.0, 0.0)

    @property
    def now(self) -> float:
        return time.monotonic() - self.began


# --- what fails ---------------------------------------------------------------------------------------------------


async def slow_links(world: World) -> None:
    world.switch.be(delay_ms=50, stall_s=0.5, stalls_per_s=0.5)
    await asyncio.sleep(15)
    world.switch.be()


def partition(seconds: float) -> Callable[[World], Awaitable[None]]:
    async def cut(world: World) -> None:
        world.switch.be(cut=world.cluster.nodes[-1].name)
        await asyncio.sleep(seconds)
        world.switch.be()

    return cut


async def reset(world: World) -> None:
    node, head = world.cluster.nodes[-1], world.cluster.head
    port = world.cluster.links_port(world.server.pid)
    kill = ["ss", "--kill", "--no-header", "dst", head.address, "dport", "=", str(port)]
    subprocess.run([*node.inside, *kill], check=True, capture_output=True)


async def engine_killed(world: World) -> None:
    os.kill((await asyncio.to_thread(world.asked))[-1]["pid"], signal.SIGKILL)


async def node_killed(world: World) -> None:
    node = world.cluster.nodes[-1]
    await asyncio.to_thread(node.kill)
    await asyncio.sleep(10)
    await asyncio.to_thread(world.cluster.start, node.machine)


SCENARIOS: dict[str, Callable[[World], Awaitable[None]]] = {
    "links take 50 ms and stand still for 0.5 s now and then": slow_links,
    "a node is not reached for 5 s": partition(5),
    "connections to a node are reset": reset,
    "an engine is killed": engine_killed,
    "a node is not reached for 60 s": partition(60),
    "a node is killed, and begun again after 10 s": node_killed,
}


# --- who watches --------------------------------------------------------------------------------------------------


def failures(
    directory: Annotated[
        Path | None, typer.Argument(help="An ensemble directory; without one, --shape makes random weights.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Size of random-weight experts: {', '.join(SHAPES)}.")] = "3M",
    hosts: Annotated[int, typer.Option(help="How many.")] = 2,
    vllm: Annotated[str, typer.Option(help="vLLM flags, in one string.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("benchmarks/results"),
) -> None:
    """Record what clients see, second by second, while simulated hosts and their links fail. Needs root."""
    console = wide_console()
    if reason := cannot(hosts):
        raise typer.BadParameter(reason, param_hint="--hosts")
    end_on_sigterm()
    forget_proxies()
    transformers.utils.logging.disable_progress_bar()
    os.environ["DECAR_ADMIN_KEY"] = ADMIN_KEY
    logs = Path(tempfile.mkdtemp(prefix="decar-bench-logs-"))
    flags = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager"]
    with given_or_random(directory, shape) as made, Progress(console=console, transient=True) as progress:
        bench = Bench(made, "float32", [*flags, *shlex.split(vllm)], [], logs, progress)
        try:
            seen = asyncio.run(_watch_all(bench, hosts))
        except (NodeDidNotStart, ServerDidNotStart) as error:
            console.print(f"decar bench: error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
    result = {
        "environment": environment(),
        "ensemble": {"name": bench.name, "experts": len(bench.experts), "flags": bench.flags},
        "hosts": hosts,
        "clients": CLIENTS,
        "scenarios": [_by_second(name, each) for name, each in seen.items()],
    }
    path = write(result, output / f"{slug()}-failures-{hosts}-hosts", plot)
    show(result, console)
    console.print(f"\nreport: {path}.json, {path}.png; logs: {logs}")


async def _watch_all(bench: Bench, hosts: int) -> dict[str, Seen]:
    task = bench.progress.add_task("starting", total=len(SCENARIOS))
    seen = {}
    with (
        network(NAMES[:hosts]) as switch,
        ray_cluster(hosts, switch) as cluster,
        served(bench, cluster, 0) as server,
    ):
        world = World(switch, cluster, server, list(bench.experts))
        prompts = bench.random_prompts(CLIENTS, PROMPT_TOKENS)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=180, trust_env=False) as client:
            clients = [_Client(client, bench.name, prompt) for prompt in prompts]
            for each in clients:
                await each.ask(Seen(time.monotonic()))  # undisturbed: that is what it should be
            for name, fail in SCENARIOS.items():
                bench.progress.update(task, description=name)
                seen[name] = await _watch(world, clients, fail)
                bench.progress.advance(task)
    return seen


class _Client:
    """Asks the same again and again."""

    def __init__(self, client: httpx.AsyncClient, model: str, prompt: list[int]):
        self._client = client
        self._body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        self._expected: list[int] = []

    async def ask(self, seen: Seen) -> None:
        tokens: list[int] = []
        degraded: list[str] = []
        with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
            async for chunk in self._chunks():
                new = [
                    token for choice in chunk.get("choices", ()) for token in choice.get("token_ids") or ()
                ]
                seen.tokens[int(seen.now)] += len(new)
                tokens += new
                degraded = chunk.get("decar", {}).get("degraded", degraded)
        second = int(seen.now)
        seen.answers[second] += 1
        if len(tokens) != ANSWER_TOKENS:
            seen.failed[second] += 1
            await asyncio.sleep(LATER_S)  # whoever is refused does not ask again at once
        elif degraded:
            seen.degraded[second] += 1
        elif self._expected and tokens != self._expected:
            seen.wrong[second] += 1
        self._expected = self._expected or tokens

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        async with self._client.stream("POST", "/v1/completions", json=self._body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))


async def _watch(world: World, clients: list[_Client], fail: Callable[[World], Awaitable[None]]) -> Seen:
    """One scenario, until all experts have been back for a while."""
    seen, over = Seen(time.monotonic()), asyncio.Event()

    async def keep_asking(client: _Client) -> None:
        while not over.is_set():
            await client.ask(seen)

    async def keep_looking() -> None:
        while not over.is_set():
            with contextlib.suppress(httpx.HTTPError):
                up = sum(expert["up"] for expert in await asyncio.to_thread(world.asked))
                seen.up[int(seen.now)] = up
            await asyncio.sleep(0.25)

    async with asyncio.TaskGroup() as everyone:
        for work in (keep_looking(), *map(keep_asking, clients)):
            everyone.create_task(work)
        await asyncio.sleep(BEFORE_S)
        began = seen.now
        await fail(world)
        ended = seen.now
        seen.held = began, ended
        quiet_since = ended
        while seen.now < MOST_S and seen.now - quiet_since < AFTER_S:
            if not seen.up or seen.up[max(seen.up)] < len(world.experts):
                quiet_since = seen.now
            await asyncio.sleep(0.25)
        over.set()
    return seen


# --- what was seen ------------------------------------------------------------------------------------------------


def _by_second(name: str, seen: Seen) -> dict[str, Any]:
    seconds = range(max(seen.tokens | seen.answers, default=0) + 1)
    counted = ("tokens", "answers", "degraded", "wrong", "failed")
    up, last = [], 0
    for second in seconds:
        last = seen.up.get(second, last)
        up.append(last)
    columns = {column: [getattr(seen, column)[second] for second in seconds] for column in counted}
    return {"name": name, "held_s": list(seen.held), **columns, "up": up}


def show(result: dict[str, Any], console: Console) -> None:
    """Print a line for each scenario."""
    columns = ("answers", "failed", "wrong", "without an expert", "longest silence", "without an expert for")
    table = Table("what fails", *columns, box=box.SIMPLE_HEAD)
    experts = result["ensemble"]["experts"]
    for each in result["scenarios"]:
        silence = longest = 0
        for tokens in each["tokens"]:
            silence = 0 if tokens else silence + 1
            longest = max(longest, silence)
        away = sum(up < experts for up in each["up"])
        counts = [str(sum(each[column])) for column in ("answers", "failed", "wrong", "degraded")]
        table.add_row(each["name"], *counts, f"{longest} s", f"{away} s")
    console.print(table)
    console.print("longest silence: whole seconds in which no client got a token")


def plot(result: dict[str, Any], path: Path) -> None:
    """Tokens of each second, and when an expert was away."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scenarios, experts = result["scenarios"], result["ensemble"]["experts"]
    rows = (len(scenarios) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(12, 2.6 * rows), layout="constrained", squeeze=False)
    for axis, each in zip(axes.flat, scenarios, strict=False):
        seconds = range(len(each["tokens"]))
        axis.bar(seconds, each["tokens"], width=1.0, align="edge", color="#4c72b0", label="tokens")
        begins, ends = each["held_s"]
        axis.axvspan(begins, max(ends, begins + 0.3), color="#c44e52", alpha=0.25, label="it fails")
        away = [up < experts for up in each["up"]]
        top = 1.05 * max(each["tokens"])
        axis.fill_between(
            [*seconds, len(away)],
            top,
            1.05 * top,
            where=[*away, False],
            step="post",
            color="#dd8452",
            label="an expert is away",
        )
        ended = [second + 0.5 for second in seconds if each["degraded"][second]]
        axis.plot(ended, [0.97 * top] * len(ended), "v", color="#8172b3", label="answers that say so end")
        axis.set(title=each["name"], xlabel="s", ylabel="tokens in a second", xlim=(0, len(each["tokens"])))
    axes[0][0].legend(fontsize="small", loc="lower right")
    here = result["environment"]
    figure.suptitle(
        f"{result['clients']} clients, {experts} experts on {result['hosts']} simulated hosts, "
        f"{here['cores']} cores of {here['cpu']}, {here['date'][:10]}"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
