"""`decar bench protocol`: what the lockstep itself costs: a leader's own work in a step, and the plane's memory.

Knows the protocol, which needs no vLLM: no engine runs, and peers' rows are there before anybody waits. So what is
timed is bookkeeping and mixing a small vocabulary, on one core.

Shapes: K experts, B requests, V vocabulary, S slots, T positions.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from decar.benchmarks.machine import environment, slug
from decar.benchmarks.report import COLOURS, write
from decar.server.protocol.lockstep import Lockstep
from decar.server.protocol.member import Member
from decar.server.protocol.plane import Plane, PlaneSpec, prompt_unit, stamp_of
from decar.server.protocol.transport import HostTransport

PHASES = ("turns", "announce", "post", "wait", "mix", "publish", "finish")
VOCABULARY = 64
WARM_UP, STEPS = 5, 60
TOLERANCE = 1e-4
"""Of a mixed log-probability: float32 numbers below 16 that went through K + 8 roundings, K at most 16."""


@dataclass(frozen=True)
class StepCase:
    """B ``requests`` that one of K ``experts`` leads, all in one step; each follows the posterior."""

    requests: int
    experts: int


@dataclass(frozen=True)
class PlaneCase:
    """A plane for K ``experts``, and whether rows lie in GPU memory."""

    experts: int
    slots: int
    vocabulary: int
    positions: int
    on_device: bool


STEP_CASES = (StepCase(16, 2), StepCase(64, 2), StepCase(256, 2), StepCase(256, 8), StepCase(1024, 8))
PLANE_CASES = (
    PlaneCase(2, 256, 32_000, 4_096, on_device=False),
    PlaneCase(2, 256, 32_000, 4_096, on_device=True),
    PlaneCase(8, 1_024, 128_256, 131_072, on_device=True),
    PlaneCase(16, 1_024, 128_256, 131_072, on_device=True),
)


class WrongResult(Exception):
    """The lockstep does not do what it is timed for."""


def measure_step(case: StepCase, steps: int = STEPS) -> dict[str, float]:
    """Median milliseconds of each phase of a leader's step.

    Raises:
        WrongResult: a follower adopts another token, or rows are not mixed as the velocity rule says.
    """
    count, experts = case.requests, case.experts
    plane = Plane.create(experts, count, VOCABULARY, WARM_UP + steps)
    plane.unlink()
    plane.weights_read[:] = stamp_of(2, 0)  # as if the gateway had read all that will be written
    engines = [Lockstep(plane, expert, HostTransport(plane, expert)) for expert in range(experts)]
    for engine in engines:
        for slot in range(count):
            engine.join(_member(slot, experts))
    leader, followers = engines[0], engines[1:]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(experts, count, VOCABULARY, generator=generator)
    weights = torch.randn(count, experts, generator=generator).double().log_softmax(-1).numpy()
    slots, rows = np.arange(count), np.arange(count)
    tokens = np.arange(count) % VOCABULARY
    times = []
    for step in range(WARM_UP + steps):
        for engine, own in zip(followers, logits[1:], strict=True):
            turns = engine.turns(slots, engine.produced[slots])
            turns.rows = rows
            engine.announce(turns)
            engine.post(turns, own)
        leader.log_weights[:] = (
            weights  # always the same: weights that drift apart meet slow denormal numbers
        )
        seconds, mixed = _timed_step(leader, slots, rows, logits[0], tokens)
        times.append(seconds)
        _check(mixed, logits, weights)
        for engine in followers:
            turns = engine.turns(slots, engine.produced[slots])
            if engine.adopt(turns).tolist() != tokens.tolist():
                raise WrongResult(f"{case}: a follower adopts other tokens at step {step}")
            engine.finish(turns)
    medians = [1e3 * statistics.median(phase) for phase in zip(*times[WARM_UP:], strict=True)]
    return dict(zip(PHASES, medians, strict=True))


def _member(slot: int, experts: int) -> Member:
    return Member(
        slot=slot,
        generation=1,
        leader=0,
        active=tuple(range(experts)),
        rule="velocity",
        log_weights=[-float(np.log(experts))] * experts,
        posterior=True,
    )


@torch.inference_mode()
def _timed_step(
    leader: Lockstep,
    slots: np.ndarray,
    rows: np.ndarray,
    logits: torch.Tensor,
    tokens: np.ndarray,
) -> tuple[list[float], torch.Tensor]:
    """Seconds of each of `PHASES`, in the order of a worker's step; and what was mixed [B, V]."""
    marks = [time.perf_counter()]

    def mark() -> None:
        marks.append(time.perf_counter())

    leader.take_part(slots)
    turns = leader.turns(slots, leader.produced[slots])
    turns.rows = rows
    mark()
    leader.announce(turns)
    mark()
    leader.post(turns, logits)
    mark()
    ready = leader.wait_for_rows(turns)
    mark()
    leader.weigh(ready)
    mixed = leader.mixed(ready)
    mark()
    leader.publish(ready, tokens)
    mark()
    leader.finish(turns)
    mark()
    return np.diff(marks).tolist(), mixed


def _check(mixed: torch.Tensor, logits: torch.Tensor, log_weights: np.ndarray) -> None:
    weighted = logits.double().log_softmax(-1) + torch.from_numpy(log_weights).T[:, :, None]
    error = (mixed.double().log_softmax(-1) - weighted.logsumexp(0)).abs().max().item()
    if not error <= TOLERANCE:
        raise WrongResult(f"rows are mixed {error:.1e} from what the velocity rule says; nothing is reported")


def measure_plane(case: PlaneCase, block_size: int = 16) -> int:
    """Bytes of shared memory."""
    return PlaneSpec(
        "",
        case.experts,
        case.slots,
        case.vocabulary,
        case.positions,
        prompt_unit=prompt_unit(case.positions, [block_size]),
        on_device=case.on_device,
    ).size_bytes


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar for each case, of the phases of its step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    labels = [f"B={step['requests']}\nK={step['experts']}" for step in result["steps"]]
    bottoms = [0.0] * len(labels)
    for phase, colour in zip(PHASES, (*COLOURS, "#ccb974"), strict=True):
        heights = [step["ms"][phase] for step in result["steps"]]
        axis.bar(labels, heights, bottom=bottoms, label=phase, color=colour, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for place, total in enumerate(bottoms):
        axis.annotate(f"{total:.2f}", (place, total), ha="center", va="bottom")
    axis.set(title=f"a leader's own work in a step, V={VOCABULARY}, one core", ylabel="ms")
    axis.margins(y=0.1)
    axis.legend(reverse=True, fontsize="small", loc="upper left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("B", "K", *PHASES, "in all", title="A leader's step, ms", box=box.SIMPLE_HEAD)
    for step in result["steps"]:
        sizes = (step["requests"], step["experts"])
        ms = [*(step["ms"][phase] for phase in PHASES), step["total_ms"]]
        table.add_row(*map(str, sizes), *(f"{value:.3f}" for value in ms))
    console.print(table)
    table = Table("K", "slots", "V", "positions", "rows", "MiB", title="The plane", box=box.SIMPLE_HEAD)
    for plane in result["planes"]:
        numbers = [plane[name] for name in ("experts", "slots", "vocabulary", "positions")]
        place = "on the GPU" if plane["on_device"] else "in the plane"
        table.add_row(*(f"{number:,}" for number in numbers), place, f"{plane['bytes'] / 2**20:,.0f}")
    console.print(table)


def protocol(
    quick: Annotated[bool, typer.Option(help="Fewer steps.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Time a leader's own work in a step, and size the plane, without engines.

    Every step's tokens and mixtures are checked before a time is reported. Runs on one core.
    """
    console = Console(highlight=False)
    with _one_core():
        try:
            steps = [
                _step_result(case, measure_step(case, 10 if quick else STEPS))
                for case in track(STEP_CASES, "steps", console=console, transient=True)
            ]
        except WrongResult as error:
            print(f"decar: error: {error}", file=sys.stderr)
            raise typer.Exit(1) from error
    planes = [{**asdict(case), "bytes": measure_plane(case)} for case in PLANE_CASES]
    result = {
        "benchmark": "protocol",
        "environment": environment(),
        "vocabulary": VOCABULARY,
        "steps": steps,
        "planes": planes,
    }
    show(result, console)
    drawn: Callable[[dict[str, Any], Path], None] | None = plot
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        console.print(f"No plot: {error}; install decar[bench]")
        drawn = None
    written = write(result, output / f"{slug()}-protocol", drawn)
    console.print(f"Wrote {written}.json", soft_wrap=True)


def _step_result(case: StepCase, ms: dict[str, float]) -> dict[str, Any]:
    return {**asdict(case), "ms": ms, "total_ms": sum(ms.values())}


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """This process on one core, with one thread."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
