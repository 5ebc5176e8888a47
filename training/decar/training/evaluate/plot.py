"""Plots of an evaluation. Knows numbers and names, not how they were measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from decar.training.evaluate.systems import DENSE
from decar.training.evaluate.verdict import CONFIDENCE, RULE, RULE_RANGE, Comparison, Gap, rule_of_thumb
from decar.training.plots import pyplot

if TYPE_CHECKING:
    from decar.training.evaluate.curve import CurveReport

_SAME_COST = 0.25  # experts per token; names of points this close share a column
_LINE = 0.034  # height of a name, of the axis
_DPI = 90  # the pictures travel inside the page
_COLOURS = {
    "equivalent within noise": "#55a868",
    "better": "#4c72b0",
    "worse": "#c44e52",
    "not told apart": "#8c8c8c",
}


def plot_systems(points: list[tuple[str, float, float, float]], title: str, path: Path) -> None:
    """Perplexity against cost. ``points``: (system, experts per token, perplexity, experts that read the prompt)."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(14, 9), layout="constrained")
    most = max(passes for *_, passes in points)
    for _, active, perplexity, passes in points:
        colour = "#4c72b0" if passes < most / 2 + 0.5 else "#c44e52"
        axis.scatter(active, perplexity, color=colour, zorder=3)
    for readers, colour in (("few", "#4c72b0"), ("all, or most", "#c44e52")):
        axis.scatter([], [], color=colour, label=f"{readers} experts read the prompt")
    axis.set(xlabel="active experts per token of the continuation", ylabel="perplexity", yscale="log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks("{x:g}")
    axis.set_title(title)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.45 * (high - low))
    for column in _columns(points):
        _name(axis, column)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def _columns(points: list[tuple[str, float, float, float]]) -> list[list[tuple[str, float, float]]]:
    """Points of about one cost, lowest perplexity first."""
    columns: list[list[tuple[str, float, float]]] = []
    for name, active, perplexity, _ in sorted(points, key=lambda point: point[1]):
        if not columns or active - columns[-1][0][1] > _SAME_COST:
            columns.append([])
        columns[-1].append((name, active, perplexity))
    return [sorted(column, key=lambda point: point[2]) for column in columns]


def _name(axis: Any, column: list[tuple[str, float, float]]) -> None:
    """Write names beside the points, moved up where they would cover each other."""
    to_axis = axis.transData + axis.transAxes.inverted()
    right = max(to_axis.transform((active, perplexity))[0] for _, active, perplexity in column)
    free = 0.0
    for name, active, perplexity in column:
        x, y = to_axis.transform((active, perplexity))
        free = max(free, y)
        axis.annotate(
            f"{name}  {perplexity:.1f}",
            (x, y),
            (right + 0.03, free),
            xycoords="axes fraction",
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5, "relpos": (0, 0.5)},
        )
        free += _LINE


def plot_pruning(
    curves: dict[str, list[tuple[float, float, float]]],
    measured: list[tuple[float, float, float]],
    title: str,
    path: Path,
) -> None:
    """Active experts per token, and what pruning changes, against its budget ε.

    Args:
        curves: of each system, (ε, active experts, most mass dropped from a text).
        measured: (ε, total variation on text that the ensemble wrote, its standard error).
    """
    plt = pyplot()
    figure, (active, changed) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for name, points in curves.items():
        budgets, experts, mass = zip(*sorted(points), strict=True)
        active.plot(budgets, experts, marker="o", label=name)
        changed.plot(budgets, mass, marker="o", label=f"{name}: most mass dropped from a text")
    budgets, distances, errors = zip(*sorted(measured), strict=True)
    changed.errorbar(
        budgets,
        distances,
        yerr=errors,
        marker="s",
        color="black",
        label=f"{DENSE}: total variation, own text",
    )
    changed.plot(budgets, budgets, color="grey", linestyle=":", label="ε, the bound")
    active.set(
        xscale="log", xlabel="ε", ylabel="experts", title="active experts per token", ylim=(0.95, None)
    )
    changed.set(xscale="log", yscale="log", xlabel="ε", title="what pruning changes")
    for axis in (active, changed):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_comparisons(comparisons: Sequence[Comparison], margin: float, title: str, path: Path) -> None:
    """Each comparison's difference: its interval, its mean, and every seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.5 * len(comparisons)), layout="constrained")
    axis.axvspan(-margin, margin, color="#55a868", alpha=0.15, label=f"the margin, ±{margin:g}")
    axis.axvline(0, color="grey", lw=0.8)
    for place, comparison in enumerate(comparisons):
        difference, colour = comparison.difference, _COLOURS[comparison.verdict]
        axis.plot([difference.low, difference.high], [place, place], color=colour, lw=2.5, alpha=0.6)
        axis.scatter(difference.per_seed, [place] * len(difference.per_seed), color=colour, s=14, alpha=0.7)
        axis.scatter(difference.mean, place, color=colour, marker="D", zorder=3)
        axis.annotate(
            comparison.verdict,
            (difference.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    axis.set_yticks(
        range(len(comparisons)), [f"{c.first}\nagainst {c.second}" for c in comparisons], fontsize=8
    )
    axis.invert_yaxis()
    # The average of experts from scratch is nats away, the margin hundredths.
    linear = 5 * margin
    axis.set_xscale("symlog", linthresh=linear, subs=[2, 5])
    ends = [end for c in comparisons for end in (c.difference.low, c.difference.high)]
    axis.set_xlim(min(*ends, -margin) * 1.3, max(*ends, margin) * 3)
    for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
        ticks("{x:g}")
    scale = f"{CONFIDENCE:.0%} intervals; logarithmic beyond ±{linear:g}"
    axis.set(title=title, xlabel=f"nats per token, less is better for the first ({scale})")
    axis.grid(alpha=0.3, axis="x", which="both")
    axis.legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_gaps(gaps: Sequence[Gap], title: str, path: Path) -> None:
    """Each system's gap to the centralized model: what estimation loses, and what routing adds or takes."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10, 1.8 + 0.3 * len(gaps)), layout="constrained")
    places = range(len(gaps))
    estimation, routing = ([gap.estimation.mean for gap in gaps], [gap.routing.mean for gap in gaps])
    axis.barh(
        places,
        estimation,
        color="#4c72b0",
        alpha=0.8,
        height=0.6,
        label="estimation: posterior − centralized",
    )
    axis.barh(
        places,
        routing,
        left=estimation,
        color="#c44e52",
        alpha=0.8,
        height=0.35,
        label="routing: system − posterior",
    )
    for place, gap in zip(places, gaps, strict=True):
        axis.plot([gap.total.low, gap.total.high], [place, place], color="black", lw=1)
        axis.scatter(gap.total.mean, place, color="black", s=16, zorder=3)
    axis.scatter([], [], color="black", s=16, label=f"their sum, with its {CONFIDENCE:.0%} interval")
    axis.axvline(0, color="grey", lw=0.8)
    axis.set_yticks(places, [gap.system for gap in gaps], fontsize=8)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="nats per token more than the centralized model")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)


def plot_curve(report: CurveReport, path: Path) -> None:
    """How far experts are behind one model, and what they gain over the best of them, by the base's share."""
    plt = pyplot()
    figure, (behind, rule) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    behind.axhspan(-report.margin, report.margin, color="#55a868", alpha=0.15)
    behind.axhline(0, color="grey", lw=0.8)
    counts = sorted(report.as_good_from)
    for place, (count, colour) in enumerate(
        zip(counts, ("#4c72b0", "#c44e52", "#8172b3", "#ccb974") * 4, strict=False)
    ):
        mine = sorted((p for p in report.places if p.num_experts == count), key=lambda p: p.share)
        # Side by side, so that intervals do not hide each other.
        shares = [100 * p.share + 0.8 * (place - (len(counts) - 1) / 2) for p in mine]
        gaps = [p.behind_together for p in mine]
        bars = [[g.mean - g.low for g in gaps], [g.high - g.mean for g in gaps]]
        behind.errorbar(
            shares,
            [g.mean for g in gaps],
            yerr=bars,
            marker="D",
            capsize=3,
            color=colour,
            label=f"{count} experts",
        )
        for x, gap in zip(shares, gaps, strict=True):
            behind.scatter([x] * len(gap.per_seed), gap.per_seed, color=colour, s=12, alpha=0.6, zorder=3)
        rule.scatter(
            [p.divergence.mean for p in mine],
            [p.gain.mean for p in mine],
            color=colour,
            label=f"{count} experts",
        )
        for p in mine:
            rule.annotate(
                f"{p.share:.0%}",
                (p.divergence.mean, p.gain.mean),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
            )
    behind.set_ylim(top=max(p.behind_together.high for p in report.places) * 1.1 + report.margin)
    behind.set(
        title=f"behind one model, shaded: ±{report.margin:g}",
        xlabel="share of all training in the common base, %",
        ylabel=f"nats per token ({CONFIDENCE:.0%} intervals)",
    )
    low, high = RULE_RANGE
    ends = [low, max(p.divergence.mean for p in report.places)]
    rule.plot(ends, [rule_of_thumb(end) for end in ends], color="grey", ls="--", label=RULE)
    rule.axvspan(low, high, color="grey", alpha=0.1, label="where that was fitted")
    rule.set(
        title="gain over the best expert, by the base's share",
        xlabel="divergence from the base, %",
        ylabel="gain, %",
    )
    for axis in (behind, rule):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(report.name)
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
