"""`decar bench serve --hosts`: what links between hosts cost an ensemble. Knows networks, servers and loads.

Hosts are machines of a simulated network, each with a node of Ray's, and an engine on it; the client has a way of its
own. All of them compute on this machine's cores, and so does the switch between them: so what is compared is one link
with another, and with one expert's plain server under the same load in the same quarter of an hour.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from decar.benchmarks.load import Load, Target
from decar.benchmarks.network import forget_proxies, network, no_network, probe
from decar.benchmarks.nodes import NAMES, RayCluster, ray_cluster
from decar.benchmarks.servers import Bench, turn_of
from decar.clients.child import Server, free_port, launched

WHOLE = 0
"""In place of how many logits of a row go to another host: all."""
SAMPLED = 8
"""Answers whose bound on what `--wire-rows` changes is looked at."""


@dataclass(frozen=True)
class Link:
    """Between each two hosts.

    Attributes:
        delay_ms: one way.
        gbit_s: each way; 0: as much as the switch carries.
    """

    delay_ms: float
    gbit_s: float


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        systems: what each request of a system says of how it is to be mixed.
        wire_rows: `WHOLE` or N, a server each.
    """

    hosts: int
    links: tuple[Link, ...]
    wire_rows: tuple[int, ...]
    systems: dict[str, dict[str, Any]]


def cannot(hosts: int) -> str:
    """Why so many hosts cannot be had here; "": they can."""
    if not 2 <= hosts <= len(NAMES):
        return f"from 2 to {len(NAMES)} hosts can be simulated"
    return no_network()


def measure(bench: Bench, case: Case, load: Load, repeats: int) -> dict[str, Any]:
    """Put ``load`` on each system over each link, and in between on one expert's plain server.

    Fills ``bench.runs``, whose entries say ``link`` and ``wire_rows`` besides.

    Returns:
        "probes", what each link is like as a program sees it; and "bounds", of each N on the wire the most that a
        token's distribution has moved, in total variation.
    """
    forget_proxies()
    task = bench.progress.add_task("", total=None)

    def say(what: str) -> None:
        bench.progress.update(task, description=what)

    probes: list[dict[str, Any]] = []
    bounds: list[dict[str, Any]] = []
    with bench.plain() as (plain, model), network(NAMES[: case.hosts]) as switch:
        single = bench.target(plain, model)
        first, second = (switch.machines[name] for name in NAMES[:2])
        for link in case.links:
            switch.be(link.delay_ms, gbit_s=link.gbit_s)
            gbit_s, round_trip_ms = probe(second, first)
            probes.append({"link": asdict(link), "gbit_s": gbit_s, "round_trip_ms": round_trip_ms})
        switch.be()
        for wire_rows in case.wire_rows:
            rows = _rows(wire_rows)
            say(f"{rows}: starting")
            with (
                ray_cluster(case.hosts, switch) as cluster,
                served(bench, cluster, wire_rows) as server,
            ):
                targets = {
                    system: bench.target(server, bench.name, decar=options)
                    for system, options in case.systems.items()
                }
                short = replace(load, requests=load.concurrency, output_tokens=8)
                for target in (single, *targets.values()):
                    bench.measured([target], short)  # no measured request pays for a first time
                if wire_rows:
                    bounds += [
                        _bound(bench, system, target, wire_rows, load) for system, target in targets.items()
                    ]
                for repeat in range(repeats):
                    for link in case.links:
                        say(f"{rows}, {_name(link)}: one expert's plain server")
                        measured = bench.measured([single], load)
                        bench.keep("single", load, repeat, measured | {"wire_rows": wire_rows})
                        switch.be(link.delay_ms, gbit_s=link.gbit_s)
                        with turn_of(targets.values(), [plain]):
                            for system, target in targets.items():
                                say(f"{rows}, {_name(link)}: {system}, repeat {repeat + 1} of {repeats}")
                                measured = bench.measured([target], load)
                                said = {"wire_rows": wire_rows, "link": asdict(link)}
                                bench.keep(system, load, repeat, measured | said)
                        switch.be()
    return {"probes": probes, "bounds": bounds}


@contextlib.contextmanager
def served(bench: Bench, cluster: RayCluster, wire_rows: int) -> Iterator[Server]:
    """The ensemble on ``cluster``: its experts dealt out over the nodes in turn."""
    nodes = cluster.nodes
    wish = ",".join(f"{name}=node:{nodes[i % len(nodes)].name}" for i, name in enumerate(bench.experts))
    rows = ["--wire-rows", str(wire_rows)] if wire_rows else []
    command = [
        *cluster.head.inside,
        *(sys.executable, "-m", "decar.server", "serve", str(bench.directory)),
        *("--ray", cluster.address, "--placement", wish, *rows),
        *("--log-file", str(bench.logs / f"hosts-{wire_rows}.log"), *bench.all_flags()),
    ]
    printed = bench.logs / f"hosts-{wire_rows}.out"
    with launched(
        command, free_port(), printed, host=cluster.head.address, environment=cluster.environment
    ) as started:
        yield started()


def _bound(bench: Bench, system: str, target: Target, wire_rows: int, load: Load) -> dict[str, Any]:
    """The mean and the most of what tokens' distributions have moved by at most, over `SAMPLED` answers."""
    answers = []
    for prompt in bench.random_prompts(SAMPLED, load.input_tokens):
        body = {"model": target.model, "prompt": prompt, "max_tokens": load.output_tokens, "ignore_eos": True}
        response = httpx.post(f"{target.base_url}/v1/completions", json=body | target.extra_body, timeout=600)
        response.raise_for_status()
        answers.append(response.json()["decar"]["wire"])
    return {
        "system": system,
        "wire_rows": wire_rows,
        "mean_token": mean(answer["answer"] for answer in answers) / load.output_tokens,
        "worst_token": max(answer["token"] for answer in answers),
    }


def _name(link: Link) -> str:
    return f"{link.delay_ms:g} ms, {_bandwidth(link.gbit_s)}"


def _bandwidth(gbit_s: float) -> str:
    return f"{gbit_s:g} Gb/s" if gbit_s else "no limit"


def _rows(kind: int) -> str:
    return f"N = {kind}" if kind else "whole rows"


# --- what was found -------------------------------------------------------------------------------------------


def show(result: dict[str, Any], console: Console) -> None:
    """Print a table for each system: a line for each link, a column for each kind of rows."""
    kinds = list(dict.fromkeys(run["wire_rows"] for run in result["runs"]))
    for system in dict.fromkeys(run["system"] for run in result["runs"] if run["system"] != "single"):
        table = Table("one way", "bandwidth", *map(_rows, kinds), title=system, box=box.SIMPLE_HEAD)
        for probe_of in result["probes"]:
            link = probe_of["link"]
            cells = [_cell(*_of(result["runs"], system, kind, link)) for kind in kinds]
            table.add_row(f"{link['delay_ms']:g} ms", _bandwidth(link["gbit_s"]), *cells)
        console.print(table)
    console.print("tokens/s (÷ one expert's plain server), TTFT p50, ITL p50 in ms; means of the repeats")
    seen = Table("one way", "bandwidth", "seen: Gb/s", "round trip", box=box.SIMPLE_HEAD)
    for found in result["probes"]:
        link = found["link"]
        seen.add_row(
            f"{link['delay_ms']:g} ms",
            _bandwidth(link["gbit_s"]),
            f"{found['gbit_s']:.2f}",
            f"{found['round_trip_ms']:.2f} ms",
        )
    console.print(seen)
    for bound in result["bounds"]:
        console.print(
            f"{bound['system']}, N = {bound['wire_rows']}: a token's distribution moves by at most "
            f"{bound['worst_token']:.2g}, on average {bound['mean_token']:.2g}"
        )


def _of(
    runs: Sequence[dict[str, Any]], system: str, kind: int, link: dict[str, float]
) -> tuple[list[dict[str, Any]], float]:
    """Runs of a system over a link, and the plain server's mean rate beside them."""
    mine = [
        run for run in runs if run["system"] == system and run["wire_rows"] == kind and run["link"] == link
    ]
    singles = [
        run["output_throughput"] for run in runs if run["system"] == "single" and run["wire_rows"] == kind
    ]
    return mine, mean(singles)


def _cell(runs: list[dict[str, Any]], single: float) -> str:
    rate = mean(run["output_throughput"] for run in runs)
    first, between = (mean(run[f"p50_{time}_ms"] for run in runs) for time in ("ttft", "itl"))
    return f"{rate:,.0f} ({rate / single:.2f}), {first:,.0f}, {between:.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput and time between tokens: against delay where bandwidth is largest, and the other way round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    links = [Link(**found["link"]) for found in result["probes"]]
    widest = max((link.gbit_s for link in links), key=lambda gbit_s: gbit_s or float("inf"))
    least = min(link.delay_ms for link in links)
    by_delay = sorted((link for link in links if link.gbit_s == widest), key=lambda link: link.delay_ms)
    by_width = sorted(
        (link for link in links if link.delay_ms == least), key=lambda link: link.gbit_s or float("inf")
    )
    systems = list(dict.fromkeys(run["system"] for run in result["runs"] if run["system"] != "single"))
    kinds = list(dict.fromkeys(run["wire_rows"] for run in result["runs"]))
    figure, axes = plt.subplots(
        2, 2, figsize=(12, 8), layout="constrained", sharex="col", sharey="row", squeeze=False
    )
    for column, chosen in enumerate((by_delay, by_width)):
        names = [f"{link.delay_ms:g} ms" if column == 0 else _bandwidth(link.gbit_s) for link in chosen]
        for s, system in enumerate(systems):
            for k, kind in enumerate(kinds):
                found = [_of(result["runs"], system, kind, asdict(link)) for link in chosen]
                style: dict[str, Any] = {
                    "color": f"C{s}",
                    "linestyle": ("-", "--", "-.", ":")[k % 4],
                    "marker": "os^v"[k % 4],
                    "label": f"{system}, {_rows(kind)}",
                }
                ratios = [mean(run["output_throughput"] for run in runs) / single for runs, single in found]
                axes[0][column].plot(names, ratios, **style)
                axes[1][column].plot(
                    names, [mean(run["p50_itl_ms"] for run in runs) for runs, _ in found], **style
                )
        axes[0][column].set_title(
            f"links of {_bandwidth(widest)}" if column == 0 else f"{least:g} ms one way"
        )
        axes[1][column].set_xlabel("delay, one way" if column == 0 else "bandwidth")
        for row in axes:
            row[column].grid(alpha=0.3)
    axes[0][0].set(ylabel="throughput ÷ one expert's plain server", ylim=(0, None))
    axes[1][0].set(ylabel="ms between tokens, p50", ylim=(0, None))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    environment, ensemble = result["environment"], result["ensemble"]
    figure.suptitle(
        f"{ensemble['name']}: {ensemble['experts']} experts on {result['hosts']} simulated hosts, "
        f"{result['load']['concurrency']} at once, {environment['cores']} cores of {environment['cpu']}, "
        f"{environment['date'][:10]}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
