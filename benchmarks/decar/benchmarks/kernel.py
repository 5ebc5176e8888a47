"""`decar bench kernel`: what mixing costs, next to torch and to a bare copy of the bytes that it must move.

Knows the mixing operations and their definition; nothing of servers, engines or requests.

Tolerance. With u = 2^-24, X the largest |logit|, Z = X + log V a bound on log-normalisers and W the largest
|log weight|, nothing between an input and a result exceeds M = X + 2Z + W. On the way to one number an
implementation rounds at most K such values while it sums over the experts and eight others (log Z as posted,
and again in the anchor, log w - log Z, its sum with x, the exponent, its scaling to base 2, the logarithm, the
result), and adds up V exponentials, whose roundings grow like the root of V. So `tolerance` is
u((K + 8)M + sqrt(V)). Inputs in bfloat16 and float16 are exact in float32.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import psutil
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from decar.benchmarks.machine import environment, slug
from decar.benchmarks.report import lines_of
from decar.kernels import MAX_EXPERTS, Rows, Rule, decide, mix_rows

Operation = Literal["mix", "decide"]
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
RULES: tuple[Rule, ...] = get_args(Rule)
COPY_BYTES = {"cuda": 1 << 28, "cpu": 1 << 26}
"""One buffer of the copy that shows a machine's bandwidth: far more than any cache holds."""
CPU_SECONDS, CPU_REPEATS = 0.2, 9
"""A CPU time is the median of at least so many repeats and so many seconds of them."""
BUSY_PERCENT, UNSTEADY = 10.0, 1.5
"""Others' use of the processors, and a 80th over a 20th percentile, from which on numbers are not trusted."""
BYTES = "K B V element_size read once; written: mix 4 B V (float32), decide 8 B (token) + 8 B K (log weights)"


class WrongResult(Exception):
    """An implementation is not what the definition says: its speed means nothing."""


@dataclass(frozen=True)
class Case:
    """One thing to measure. Shapes: K ``experts``, B ``rows``, V ``vocabulary``."""

    operation: Operation
    rule: Rule
    dtype: Dtype
    rows: int
    vocabulary: int
    experts: int

    @property
    def label(self) -> str:
        return f"{self.operation} {self.rule} {self.dtype} B={self.rows} V={self.vocabulary} K={self.experts}"

    @property
    def bytes(self) -> int:
        """What must move at the least (BYTES); weights and normalisers, K numbers a row, are not counted."""
        read = self.experts * self.rows * self.vocabulary * DTYPES[self.dtype].itemsize
        written = 4 * self.vocabulary if self.operation == "mix" else 8 + 8 * self.experts
        return read + self.rows * written


@dataclass(frozen=True)
class Grid:
    """The cases to measure: every combination."""

    rows: list[int]
    vocabularies: list[int]
    experts: list[int]
    dtypes: list[Dtype]
    rules: list[Rule]
    operations: list[Operation]

    @property
    def cases(self) -> list[Case]:
        return [
            Case(operation, rule, dtype, rows, vocabulary, experts)
            for operation, rule, dtype, vocabulary, rows, experts in itertools.product(
                self.operations, self.rules, self.dtypes, self.vocabularies, self.rows, self.experts
            )
        ]


@dataclass(frozen=True)
class Inputs:
    """Random rows of one case, laid out as each implementation likes them best."""

    stack: torch.Tensor  # [K, B, V]
    rows: Rows  # the same memory
    entries: torch.Tensor  # [B]
    log_weights: torch.Tensor  # [B, K] float64
    single_log_weights: torch.Tensor  # the same in float32; float64 would make torch mix in float64
    zeros: torch.Tensor  # [B] int64: seeds and positions
    temperatures: torch.Tensor  # [B] float32: greedy


Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
"""Mixed rows [B, V]; or tokens [B] and log weights [B, K] after them."""


@dataclass(frozen=True)
class Implementation:
    """``run`` does a case. Rows of ``anchored`` ones are mixture logits, as of `mix_rows`, and not log p."""

    name: str
    run: Callable[[Inputs], Result]
    anchored: bool = False


def make_inputs(case: Case, device: str, seed: int = 0) -> Inputs:
    """Logits like a language model's in scale, and weights that no expert dominates."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.experts, case.rows, case.vocabulary)
    stack = torch.randn(shape, generator=generator, device=device).mul_(4).to(DTYPES[case.dtype])
    weights = torch.randn(case.rows, case.experts, generator=generator, device=device).log_softmax(-1)
    # In float64 first: a long sum in float32 would charge its rounding to whoever reads the result.
    normalisers = torch.stack([row.double().logsumexp(-1).float() for row in stack])
    zeros = torch.zeros(case.rows, dtype=torch.int64, device=device)
    return Inputs(
        stack=stack,
        rows=Rows.stacked(stack, normalisers),
        entries=torch.arange(case.rows, device=device),
        log_weights=weights.double(),
        single_log_weights=weights,
        zeros=zeros,
        temperatures=zeros.float(),
    )


def ours(case: Case) -> Implementation:
    """decar's operation: Triton on a GPU, plain torch elsewhere."""
    if case.operation == "mix":
        return Implementation(
            "decar",
            lambda inputs: mix_rows(inputs.rows, inputs.entries, inputs.log_weights, case.rule),
            anchored=True,
        )

    def run(inputs: Inputs) -> Result:
        greedy = inputs.temperatures, inputs.zeros, inputs.zeros
        return decide(inputs.rows, inputs.entries, inputs.log_weights, case.rule, *greedy)

    return Implementation("decar", run, anchored=True)


def naive_mix(stack: torch.Tensor, log_weights: torch.Tensor, rule: Rule) -> torch.Tensor:
    """The rule as one would write it down: [K, B, V], [B, K] -> log p [B, V] float32."""
    weights = log_weights.T[:, :, None]
    if rule == "velocity":
        return (torch.log_softmax(stack, -1, dtype=torch.float32) + weights).logsumexp(0)
    return (weights.exp() * stack).sum(0).log_softmax(-1)


def naive_decide(
    stack: torch.Tensor, log_weights: torch.Tensor, rule: Rule
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the posterior after them, as one would write them down."""
    log_probs = torch.log_softmax(stack, -1, dtype=torch.float32)
    weights = log_weights.T[:, :, None]
    if rule == "velocity":
        mixed = (log_probs + weights).logsumexp(0)
    else:
        mixed = (weights.exp() * log_probs).sum(0)
    tokens = mixed.argmax(-1)
    given = log_probs[:, torch.arange(len(tokens), device=tokens.device), tokens].T
    return tokens, (log_weights + given).log_softmax(-1)


def naive(case: Case, compiled: bool) -> Implementation:
    """Torch, either eager or compiled for exactly this case's shape."""
    function: Callable[..., Any] = naive_mix if case.operation == "mix" else naive_decide
    if compiled:
        torch.compiler.reset()  # past its limit of recompilations it would quietly run eagerly
        function = torch.compile(function, dynamic=False, fullgraph=True)
    name = "compiled" if compiled else "eager"
    return Implementation(name, lambda inputs: function(inputs.stack, inputs.single_log_weights, case.rule))


def exact(inputs: Inputs, rule: Rule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, in float64: log p [B, V], the anchor [B, 1], and the experts' log p_k [K, B, V].

    log p plus the anchor is what `mix_rows` gives: under the logit rule sum_k w_k logits_k.
    """
    logits = inputs.stack.double()
    normalisers = logits.logsumexp(-1, keepdim=True)  # [K, B, 1]
    log_probs = logits - normalisers
    weights = inputs.log_weights.log_softmax(-1).T[:, :, None]
    anchor = (weights.exp() * normalisers).sum(0)
    if rule == "velocity":
        return (log_probs + weights).logsumexp(0), anchor, log_probs
    mixed = (weights.exp() * log_probs).sum(0)
    total = mixed.logsumexp(-1, keepdim=True)
    return mixed - total, anchor + total, log_probs


def tolerance(case: Case, inputs: Inputs) -> float:
    """How far rounding may take a result from the definition: the module says why."""
    largest = inputs.stack.abs().max().item()
    normaliser = largest + math.log(case.vocabulary)
    magnitude = largest + 2 * normaliser + inputs.log_weights.abs().max().item()
    return 2**-24 * ((case.experts + 8) * magnitude + math.sqrt(case.vocabulary))


def check(case: Case, inputs: Inputs, implementation: Implementation) -> float:
    """Hold one implementation to the definition.

    Returns:
        The largest error. For tokens, how much less probable than the best one they are: between tokens as
        close as rounding, either is right.

    Raises:
        WrongResult: it is off by more than the tolerance.
    """
    allowed = tolerance(case, inputs)
    expected, anchor, log_probs = exact(inputs, case.rule)
    result = implementation.run(inputs)
    if isinstance(result, tuple):
        tokens, log_weights = result
        _demand(case, implementation, tokens.shape == (case.rows,), "tokens of a wrong shape")
        inside = bool(((tokens >= 0) & (tokens < case.vocabulary)).all())
        _demand(case, implementation, inside, "tokens outside the vocabulary")
        lost = (expected.max(-1).values - expected.gather(1, tokens[:, None])[:, 0]).max().item()
        # Two scores are compared, each with its own error.
        _demand(case, implementation, lost <= 2 * allowed, f"tokens {lost:.2e} below the best", 2 * allowed)
        given = log_probs.gather(2, tokens.expand(case.experts, -1)[:, :, None])[:, :, 0].T
        after = (inputs.log_weights + given).log_softmax(-1)
        error, what = _distance(log_weights, after), "log weights"
    else:
        lost = 0.0
        error, what = _distance(result, expected + anchor if implementation.anchored else expected), "rows"
    # So that a NaN, which no comparison holds for, is refused as well.
    _demand(case, implementation, error <= allowed, f"{what} off by {error:.2e}", allowed)
    return max(lost, error)


def _distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    if result.shape != expected.shape:
        return math.inf
    return (result.double() - expected).abs().max().item()


def _demand(
    case: Case, implementation: Implementation, held: bool, what: str, allowed: float | None = None
) -> None:
    if not held:
        limit = "" if allowed is None else f", more than rounding explains ({allowed:.2e})"
        raise WrongResult(f"{case.label}: {implementation.name} gives {what}{limit}; nothing was timed")


def time_of(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Median, 20th and 80th percentile in µs; on a GPU with its L2 cache cleared before each repeat."""
    if device == "cuda":
        from triton.testing import do_bench

        low, middle, high = (1e3 * ms for ms in do_bench(run, quantiles=[0.2, 0.5, 0.8]))
    else:
        run()
        times: list[float] = []
        while len(times) < CPU_REPEATS or sum(times) < CPU_SECONDS:
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        low, _, _, high = (1e6 * seconds for seconds in statistics.quantiles(times, n=5))
        middle = 1e6 * statistics.median(times)
    return {"time_us": middle, "p20_us": low, "p80_us": high}


def measure_copy(device: str, moved: int) -> dict[str, float]:
    """Time, and bytes/s, of a copy that reads half of ``moved`` bytes and writes the other half."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = time_of(lambda: target.copy_(source), device)
    return {"bytes": moved, **times, "bytes_per_s": moved / times["time_us"] * 1e6}


def measure(case: Case, device: str, bandwidth: float, compiled: bool) -> dict[str, Any]:
    """Check every implementation of a case, then time them.

    Raises:
        WrongResult: one of them is wrong.
    """
    inputs = make_inputs(case, device)
    implementations = [ours(case), naive(case, compiled=False)]
    if compiled:
        implementations.append(naive(case, compiled=True))
    errors = [check(case, inputs, implementation) for implementation in implementations]
    copy = measure_copy(device, case.bytes)
    measured: dict[str, dict[str, float]] = {}
    for implementation, error in zip(implementations, errors, strict=True):
        run = implementation.run
        times = time_of(lambda run=run: run(inputs), device)  # type: ignore[misc]
        rate = case.bytes / times["time_us"] * 1e6
        measured[implementation.name] = {
            **times,
            "bytes_per_s": rate,
            "share_of_copy": rate / bandwidth,
            "share_of_same_copy": copy["time_us"] / times["time_us"],
            "error": error,
        }
    us = {name: timing["time_us"] for name, timing in measured.items()}
    return {
        **asdict(case),
        "bytes": case.bytes,
        "tolerance": tolerance(case, inputs),
        "copy": copy,
        "implementations": measured,
        "speedup_over_eager": us["eager"] / us["decar"],
        "speedup_over_compiled": us["compiled"] / us["decar"] if compiled else None,
    }


def default_grid(device: str, quick: bool) -> Grid:
    if quick:
        dtypes: list[Dtype] = ["bfloat16"] if device == "cuda" else ["float32"]
        return Grid([1, 8], [4096], [2], dtypes, [*RULES], [*OPERATIONS])
    if device == "cuda":
        return Grid([1, 8, 64], [32000, 128256], [2, 4, 8], ["bfloat16"], [*RULES], [*OPERATIONS])
    return Grid([1, 8, 32], [4096, 32000], [2, 4], ["float32", "bfloat16"], [*RULES], [*OPERATIONS])


def doubts(results: list[dict[str, Any]], busy_percent: float) -> str:
    """Signs that something else ran on the machine, which moves medians as well."""
    times = [timing for result in results for timing in result["implementations"].values()]
    unsteady = sum(timing["p80_us"] > UNSTEADY * timing["p20_us"] for timing in times)
    found = []
    if busy_percent > BUSY_PERCENT:
        found.append(f"others used {busy_percent:.0f}% of the processors as this began")
    if unsteady:
        found.append(f"{unsteady} of {len(times)} times differ over {UNSTEADY}-fold between their repeats")
    return f"DO NOT TRUST THESE NUMBERS: {', and '.join(found)}." if found else ""


def caption(device: str, copy: dict[str, float]) -> str:
    """What the numbers are, and what was not measured."""
    speed = (
        f"A large copy moves {copy['bytes_per_s'] / 1e9:,.1f} GB/s here, read and written, and 'of copy' is a "
        "share of that; 'of same' is the time of a copy that moves as many bytes, with its launch, over decar's. "
    )
    given = (
        "decar is given each row's log-normaliser, which experts post with their rows; eager and compiled torch "
        "start from the rows alone. "
    )
    if device == "cuda":
        return speed + given + "decar ran its Triton kernel; L2 cleared before each repeat."
    return (
        "No GPU here: the Triton kernel was NOT run; decar is its plain torch implementation. "
        + speed
        + given
        + "Caches are not cleared, so small cases can beat a copy, which is too large for them."
    )


def table_of(results: list[dict[str, Any]], text: str) -> Table:
    compiled = any(result["speedup_over_compiled"] is not None for result in results)
    table = Table(
        title="Mixing kernels", caption=text, caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in ("", "rule", "rows in"):
        table.add_column(name)
    for name in (
        "B",
        "V",
        "K",
        "MB",
        "µs",
        "of copy",
        "of same",
        "×eager",
        *(["×compiled"] if compiled else []),
    ):
        table.add_column(name, justify="right")
    for result in results:
        timing = result["implementations"]["decar"]
        row = [result["operation"], result["rule"], result["dtype"]]
        row += [str(result[size]) for size in ("rows", "vocabulary", "experts")]
        row += [
            f"{result['bytes'] / 1e6:,.2f}",
            f"{timing['time_us']:,.1f}",
            f"{timing['share_of_copy']:.0%}",
            f"{timing['share_of_same_copy']:.0%}",
        ]
        row += [f"{result['speedup_over_eager']:.2f}"]
        table.add_row(*row, *([f"{result['speedup_over_compiled']:.2f}"] if compiled else []))
    return table


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """Share of a copy's bandwidth: a panel per operation, rule and dtype, a bar per size and K."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")

    def kinds(*names: str) -> list[tuple[Any, ...]]:
        return list(dict.fromkeys(tuple(result[name] for name in names) for result in results))

    operations, columns = kinds("operation"), kinds("rule", "dtype")
    sizes, experts = sorted(kinds("vocabulary", "rows")), sorted(kinds("experts"))
    width = 0.8 / len(experts)
    figure, axes = plt.subplots(
        len(operations),
        len(columns),
        figsize=(max(4.0, 0.35 * len(sizes) * len(experts) + 1) * len(columns), 3.2 * len(operations) + 1),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (i, (operation,)), (j, (rule, dtype)) in itertools.product(enumerate(operations), enumerate(columns)):
        axis = axes[i, j]
        axis.axhline(100, color="black", linestyle="--", linewidth=1, label="a copy: 100%")
        for k, (count,) in enumerate(experts):
            chosen = {
                (result["vocabulary"], result["rows"]): result["implementations"]
                for result in results
                if (result["operation"], result["rule"], result["dtype"], result["experts"])
                == (operation, rule, dtype, count)
            }
            places = [n + (k - (len(experts) - 1) / 2) * width for n in range(len(sizes))]

            def shares(name: str, by_size: dict[Any, Any] = chosen) -> list[float]:
                return [100 * by_size[size][name]["share_of_copy"] for size in sizes]

            axis.bar(places, shares("decar"), 0.9 * width, color=f"C{k}", label=f"decar, K={count}")
            for name, mark, colour in (("eager", "v", "white"), ("compiled", "o", "gold")):
                if all(name in timings for timings in chosen.values()):
                    style = {"s": 24, "marker": mark, "color": colour, "edgecolors": "black", "zorder": 3}
                    label = f"torch, {name}" if k == len(experts) - 1 else None
                    axis.scatter(places, shares(name), label=label, **style)
        axis.set_title(f"{operation}, {rule}, {dtype}", fontsize=10)
        axis.set_xticks(
            range(len(sizes)),
            [f"V={f'{v // 1000}k' if v >= 1000 else v}\nB={b}" for v, b in sizes],
            fontsize=8,
        )
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        if j == 0:
            axis.set_ylabel("% of a copy's bandwidth")
    highest = max(
        100 * timing["share_of_copy"] for result in results for timing in result["implementations"].values()
    )
    if highest < 40:  # else bars far below the copy's line would be too small to read
        axes[0, 0].set_ylim(0, 1.15 * highest)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def kernel(
    rows: Annotated[list[int] | None, typer.Option(min=1, help="B, rows of a batch; repeatable.")] = None,
    vocabulary: Annotated[list[int] | None, typer.Option(min=1, help="V, tokens; repeatable.")] = None,
    experts: Annotated[list[int] | None, typer.Option(min=1, max=MAX_EXPERTS, help="K; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; repeatable.")] = None,
    rule: Annotated[Rule | None, typer.Option(help="Default: both.")] = None,
    operation: Annotated[Operation | None, typer.Option(help="Default: both.")] = None,
    compile: Annotated[
        bool | None, typer.Option(help="Time compiled torch as well. Default: only on a GPU.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few small cases.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the plot.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Time mixing K experts' rows, against eager and compiled torch and a copy of the bytes that must move.

    mix writes the mixed rows [B, V]; decide writes greedy tokens and the posterior only. Every implementation
    is first held to the definition in float64, and nothing is timed if one is wrong. Runs on a GPU if there is
    one; else decar's plain torch is what is timed.
    """
    unknown = set(dtype or []) - set(DTYPES)
    if unknown:
        raise typer.BadParameter(f"dtype must be one of {', '.join(DTYPES)}, not {', '.join(unknown)}")
    console = Console(highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {
        "rows": rows,
        "vocabularies": vocabulary,
        "experts": experts,
        "dtypes": dtype,
        "rules": rule and [rule],
        "operations": operation and [operation],
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value}
    cases = replace(default_grid(device, quick), **chosen).cases
    compiled = device == "cuda" if compile is None else compile
    busy = psutil.cpu_percent(interval=0.5)
    copy = measure_copy(device, 2 * COPY_BYTES[device])
    results: list[dict[str, Any]] = []
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*bar, console=console, transient=True) as progress, torch.inference_mode():
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.label)
                results.append(measure(case, device, copy["bytes_per_s"], compiled))
                progress.advance(task)
    except WrongResult as error:
        print(f"decar: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    text = caption(device, copy)
    console.print(table_of(results, text))
    doubt = doubts(results, busy)
    if doubt:
        console.print(doubt, style="bold yellow")
    where = environment()
    report = {
        "benchmark": "kernel",
        "environment": where,
        "device": device,
        "implementation": "triton" if device == "cuda" else "torch",
        "torch_threads": torch.get_num_threads(),
        "notes": text,
        "doubts": doubt,
        "busy_percent": busy,
        "bytes_formula": BYTES,
        "copy": copy,
        "results": results,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{slug()}-kernel.json"
    path.write_text(lines_of(report))
    console.print(f"Wrote {path}", soft_wrap=True)
    hardware = where["gpus"][0] if device == "cuda" else f"{where['cpu']}, {where['cores']} cores, no Triton"
    try:
        plot(results, f"Bandwidth of mixing on {hardware}", path.with_suffix(".png"))
    except ModuleNotFoundError as error:
        console.print(f"No plot: {error}; install decar[bench]")
    else:
        console.print(f"Wrote {path.with_suffix('.png')}", soft_wrap=True)
