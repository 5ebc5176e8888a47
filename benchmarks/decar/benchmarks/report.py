"""A serve benchmark's result as JSON, as a table and as plots. Knows results, not how they were measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PHASES = {
    "forward": "the expert's own forward pass",
    "post": "post rows",
    "wait": "wait for other engines",
    "mix": "mix",
    "sample": "vLLM's sampling",
    "other": "schedule, stream, gateway",
}
COLOURS = ("#4c72b0", "#dd8452", "#c44e52", "#55a868", "#8172b3", "#b8b8b8")


PLAIN = ("single", "independent", "split")
"""Systems of plain servers; those after the first are compared with as well."""


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Output throughput of each run over that of the single engine under the same load and repeat: ``ratio``.

    Systems that were run once are compared with the mean of the single engine's repeats. What the ensemble does is
    also compared with its experts' plain servers, where these were run: ``over_independent``, ``over_split``.
    """
    rates = {(_key(run), run["system"], run["repeat"]): run["output_throughput"] for run in runs}
    found = []
    for run in runs:
        key, system, repeat, rate = _key(run), run["system"], run["repeat"], run["output_throughput"]
        singles = [value for (other, name, _), value in rates.items() if (other, name) == (key, "single")]
        if system == "single" or not singles:
            continue
        once = system in ("http", "transformers")
        entry = {"system": system, "load": run["load"], "repeat": repeat}
        entry["ratio"] = rate / (mean(singles) if once else rates[key, "single", repeat])
        for plain in PLAIN[1:]:
            if not once and system not in PLAIN and (key, plain, repeat) in rates:
                entry[f"over_{plain}"] = rate / rates[key, plain, repeat]
        found.append(entry)
    return found


def write(
    result: dict[str, Any], path: Path, plot: Callable[[dict[str, Any], Path], None] | None = None
) -> Path:
    """Write ``path``.json and, by ``plot``, ``path``.png, with a number in the name where that is taken; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free, number = path, 1
    while free.with_name(f"{free.name}.json").exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    free.with_name(f"{free.name}.json").write_text(lines_of(result))
    if plot is not None:
        plot(result, free.with_name(f"{free.name}.png"))
    return free


def wide_console() -> Console:
    """One that cuts no table to 80 columns where it is written to a file: it would lose its ratios."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console


def lines_of(result: Any) -> str:
    """``result`` as JSON with each record on a line of its own: what holds no list of records is one."""
    return _lines_of(result, "") + "\n"


def _lines_of(value: Any, indent: str) -> str:
    if not _holds_records(value):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + " "
    if isinstance(value, dict):
        first, last = "{}"
        items = [f"{json.dumps(key)}: {_lines_of(item, deeper)}" for key, item in value.items()]
    else:
        first, last = "[]"
        items = [_lines_of(item, deeper) for item in value]
    body = f",\n{deeper}".join(items)
    return f"{first}\n{deeper}{body}\n{indent}{last}"


def _holds_records(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_records, value.values()))
    return isinstance(value, list) and any(isinstance(item, dict) or _holds_records(item) for item in value)


def show(result: dict[str, Any], console: Console) -> None:
    """Print one line for each system under each load, repeats folded."""
    environment = result["environment"]
    hardware = ", ".join(environment["gpus"]) or f"{environment['cores']} cores of {environment['cpu']}"
    checked = result["checked"]
    console.print(
        f"[bold]{result['ensemble']['name']}[/bold], {result['ensemble']['experts']} experts, "
        f"{result['ensemble']['dtype']}, on {hardware}; {checked['tokens']} greedy tokens are the mixture's by "
        f"transformers, log-probabilities within {checked['largest_difference_nats']:.2g} nats"
    )
    columns = ("load", "system", "tokens/s", *(f"÷ {plain}" for plain in PLAIN), "active")
    table = Table(*columns, "TTFT p50/p99", "TPOT p50/p99", "goodput", box=box.SIMPLE_HEAD)
    entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in result["ratios"]:
        entries.setdefault((_key(entry), entry["system"]), []).append(entry)
    previous = ""
    for (key, system), runs in _grouped(result["runs"]).items():
        mine = entries.get((key, system), [])
        table.add_row(
            key if key != previous else "",
            system,
            f"{mean(run['output_throughput'] for run in runs):,.0f}",
            *(
                _range([e[name] for e in mine if name in e])
                for name in ("ratio", "over_independent", "over_split")
            ),
            f"{mean(run['active_experts'] for run in runs):.2f}" if "active_experts" in runs[0] else "",
            _times(runs, "ttft"),
            _times(runs, "tpot"),
            f"{mean(run['request_goodput'] for run in runs):.2f}/s" if "request_goodput" in runs[0] else "",
        )
        previous = key
    console.print(table)
    console.print(
        "times in ms; repeats: throughput and times are means, ratios the range; active: experts a token"
    )


def _range(values: list[float]) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}–{high}"


def _times(runs: list[dict[str, Any]], name: str) -> str:
    if f"p50_{name}_ms" in runs[0]:
        return " / ".join(f"{mean(run[f'p{p}_{name}_ms'] for run in runs):,.0f}" for p in (50, 99))
    return f"mean {runs[0]['mean_tpot_ms']:,.0f}" if name == "tpot" else ""


def _key(run: dict[str, Any]) -> str:
    load = run["load"]
    if load["rate_per_s"] is None:
        return f"{load['concurrency']} at once"
    return f"{load['rate_per_s']:.2f} req/s"


def _grouped(runs: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs by load and system: closed loops first, by concurrency, then arrivals, by rate."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: (run["load"]["rate_per_s"] or 0, run["load"]["concurrency"])):
        groups.setdefault((_key(run), run["system"]), []).append(run)
    return groups


def plot(result: dict[str, Any], path: Path) -> None:
    """Throughput and latency against concurrency, and where a step's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((throughput, token), (first, steps)) = plt.subplots(
        2, 2, figsize=(12, 8.5), layout="constrained"
    )
    closed = [run for run in result["runs"] if run["load"]["rate_per_s"] is None]
    systems = list(dict.fromkeys(run["system"] for run in closed))
    for i, system in enumerate(systems):
        mine: dict[int, list[dict[str, Any]]] = {}
        for run in closed:
            if run["system"] == system:
                mine.setdefault(run["load"]["concurrency"], []).append(run)
        at = sorted(mine)
        style = {"marker": "o", "color": f"C{i}"}
        throughput.plot(
            at, [mean(run["output_throughput"] for run in mine[c]) for c in at], label=system, **style
        )
        repeats = [(c, run["output_throughput"]) for c in at for run in mine[c]]
        throughput.scatter(*zip(*repeats, strict=True), s=12, color=f"C{i}", alpha=0.4)
        for axis, name in ((token, "tpot"), (first, "ttft")):
            if f"p50_{name}_ms" in mine[at[0]][0]:
                p50, p99 = (
                    [mean(run[f"{p}_{name}_ms"] for run in mine[c]) for c in at] for p in ("p50", "p99")
                )
                axis.plot(at, p50, **style)
                axis.plot(at, p99, linestyle=":", fillstyle="none", **style)
            elif name == "tpot":
                axis.plot(at, [mine[c][0]["mean_tpot_ms"] for c in at], **style)
    for axis, title, unit in (
        (throughput, "output throughput", "tokens/s"),
        (token, "time per output token", "ms"),
        (first, "time to first token", "ms"),
    ):
        axis.set(title=title, xlabel="requests at once", ylabel=unit)
        lowest, highest = axis.dataLim.intervaly
        if highest > 10 * lowest:
            axis.set_yscale("log")
        elif axis.has_data():  # a difference looks as large as it is
            axis.set_ylim(0, 1.1 * highest)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks := sorted({run["load"]["concurrency"] for run in closed}), map(str, ticks))
        axis.grid(alpha=0.3, which="both")
    handles, labels = throughput.get_legend_handles_labels()
    token.legend(
        handles,
        labels,
        title="circles: means of all repeats\ndots: each repeat\ntimes: p50, dotted p99;\nhttp, transformers: mean",
        fontsize="small",
        title_fontsize="small",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    _plot_steps(steps, result)
    environment = result["environment"]
    hardware = ", ".join(environment["gpus"]) or f"{environment['cores']} cores of {environment['cpu']}"
    ensemble, day = result["ensemble"], environment["date"][:10]
    figure.suptitle(
        f"{ensemble['name']}: {ensemble['experts']} experts, {ensemble['dtype']}, {hardware}, {day}"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_steps(axis: Any, result: dict[str, Any]) -> None:
    groups: dict[str, list[dict[str, float]]] = {}
    for step in result["steps"]:
        groups.setdefault(_key(step), []).append(step["ms"])
    bottoms = [0.0] * len(groups)
    for (phase, meaning), colour in zip(PHASES.items(), COLOURS, strict=True):
        heights = [mean(ms[phase] for ms in steps) for steps in groups.values()]
        axis.bar(list(groups), heights, bottom=bottoms, label=meaning, color=colour, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for i, key in enumerate(groups):
        alone = [
            run["mean_tpot_ms"]
            for run in result["runs"]
            if run["system"] == "single" and _key(run) == key and run["load"]["rate_per_s"] is None
        ]
        if alone:
            axis.hlines(
                mean(alone), i - 0.38, i + 0.38, color="black", label="" if i else "single: a whole step"
            )
    axis.set(title="where a step of the dense ensemble goes", ylabel="ms")
    axis.tick_params(axis="x", labelrotation=20)
    axis.margins(x=0.6 / max(len(groups), 1))
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
