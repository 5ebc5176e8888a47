"""`decar bench ttft`: how much later the first token comes when every expert scores the prompt first.

Knows servers by their commands and HTTP. One request at a time, by turns on one expert's plain server and on the
ensemble under the posterior: first prompts that neither has seen, then the same ones again.
"""

from __future__ import annotations

import contextlib
import shlex
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import transformers
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from decar.benchmarks import report
from decar.benchmarks.load import Load, LoadFailed
from decar.benchmarks.machine import environment, slug
from decar.benchmarks.models import SHAPES, given_or_random
from decar.benchmarks.servers import Bench, limits, turn_of
from decar.benchmarks.texts import BadPrompts, Texts
from decar.clients.child import ServerDidNotStart, end_on_sigterm

OUTPUT_TOKENS = 2  # the first, and one that shows that the answer goes on
PHASES = ("new", "cached")


def ttft(
    directory: Annotated[
        Path | None, typer.Argument(help="An ensemble directory; without one, --shape makes random weights.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Size of random-weight experts: {', '.join(SHAPES)}.")] = "3M",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 256,
    requests: Annotated[int, typer.Option(min=1, help="Prompts a repeat.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="How often, each time with new prompts.")] = 5,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text to cut prompts from (jsonl, parquet, plain); again for more. Default: random."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of both servers.")] = "bfloat16",
    vllm: Annotated[str, typer.Option(help="vLLM flags for both servers, in one string.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("benchmarks/results"),
) -> None:
    """Measure the time to the first token under posterior routing against one expert on plain vLLM."""
    console = Console(highlight=False)
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r} is none of {', '.join(SHAPES)}", param_hint="--shape")
    load = Load(1, requests, input_len, OUTPUT_TOKENS)
    end_on_sigterm()
    transformers.utils.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(given_or_random(directory, shape))
        logs = Path(tempfile.mkdtemp(prefix="decar-bench-logs-"))
        progress = stack.enter_context(Progress(console=console, transient=True))
        flags = [*limits(load, at_once=4), "--dtype", dtype, *shlex.split(vllm)]
        bench = Bench(directory, dtype, flags, ["ttft:2000"], logs, progress)
        try:
            if prompts:
                bench.texts = Texts(prompts, bench.experts[bench.first], input_len)
                bench.texts.check((repeats + 1) * requests)
            _measure(bench, load, repeats)
        except (BadPrompts, LoadFailed, ServerDidNotStart) as error:
            console.print(f"decar bench: error: {error}", style="red", markup=False)
            raise typer.Exit(1) from None
    result = {
        "environment": environment(),
        "ensemble": {"name": bench.name, "experts": len(bench.experts), "dtype": dtype, "flags": bench.flags},
        "prompts": [str(path) for path in prompts or ()],
        "runs": bench.runs,
        "ratios": ratios(bench.runs),
    }
    path = report.write(result, output / f"{slug()}-ttft-{bench.name}")
    _show(result, console)
    console.print(f"report: {path}.json; logs: {logs}")


def _measure(bench: Bench, load: Load, repeats: int) -> None:
    """Fill ``bench.runs``."""
    task = bench.progress.add_task("starting", total=None)
    with bench.servers(1) as ([(single, name)], ensemble):
        systems = {
            "single": bench.target(single, name),
            "posterior": bench.target(ensemble, bench.name, decar={"route": "posterior"}),
        }
        for repeat in range(-1, repeats):  # the one before the first warms up
            seen = bench.new_prompts(load)
            for phase in PHASES:
                for system, target in systems.items():
                    bench.progress.update(task, description=f"{system}: {phase} prompts, repeat {repeat + 1}")
                    with turn_of([target], [single, ensemble]):
                        measured = bench.measured([target], load, seen)
                    if repeat >= 0:
                        bench.keep(system, load, repeat, {"phase": phase, **measured})


def ratios(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per phase, the median time to the first token over the single engine's: one number a repeat."""
    times = {(run["phase"], run["system"], run["repeat"]): run["p50_ttft_ms"] for run in runs}
    return {
        phase: [
            time / times[phase, "single", repeat]
            for (run_phase, system, repeat), time in times.items()
            if (run_phase, system) == (phase, "posterior")
        ]
        for phase in PHASES
    }


def _show(result: dict[str, Any], console: Console) -> None:
    ensemble = result["ensemble"]
    table = Table("prompts", "single, ms", "posterior, ms", "ratio", "of each repeat", box=box.SIMPLE_HEAD)
    for phase, values in result["ratios"].items():
        table.add_row(
            phase,
            *(
                f"{median(run['p50_ttft_ms'] for run in result['runs'] if (run['phase'], run['system']) == key):.1f}"
                for key in ((phase, "single"), (phase, "posterior"))
            ),
            f"{median(values):.2f}",
            ", ".join(f"{value:.2f}" for value in values),
        )
    console.print(
        f"[bold]{ensemble['name']}[/bold], {ensemble['experts']} experts, {ensemble['dtype']}: time to the first token"
    )
    console.print(table)
    console.print("medians of each repeat's median; one request at a time")
