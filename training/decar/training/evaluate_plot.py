"""Plots of an evaluation. Knows numbers and names, not how they were measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decar.training.systems import DENSE

_SAME_COST = 0.12  # experts per token; names of points this close share a column
_LINE = 0.034  # height of a name, of the axis


def plot_systems(points: list[tuple[str, float, float, float]], title: str, path: Path) -> None:
    """Perplexity against cost. ``points``: (system, experts per token, perplexity, experts that read the prompt)."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(14, 9), layout="constrained")
    most = max(passes for *_, passes in points)
    for _, active, perplexity, passes in points:
        colour = "#4c72b0" if passes < most / 2 + 0.5 else "#c44e52"
        axis.scatter(active, perplexity, color=colour, zorder=3)
    for readers, colour in (("few", "#4c72b0"), ("all, or most", "#c44e52")):
        axis.scatter([], [], color=colour, label=f"{readers} experts read the prompt")
    axis.set(xlabel="active experts per token of the continuation", ylabel="perplexity", yscale="log")
    axis.set_title(title)
    low, high = axis.get_xlim()
    axis.set_xlim(low, high + 0.45 * (high - low))
    for column in _columns(points):
        _name(axis, column)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=130)
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
    plt = _pyplot()
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
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
