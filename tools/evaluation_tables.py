"""The tables of docs/evaluation.md and docs/routing.md, in Markdown, from reports of decar-train evaluate and curve.

python tools/evaluation_tables.py docs/evaluation/text/report.json docs/evaluation/four/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def systems(report: Report) -> str:
    """Every system without pruning, and with the budgets of the table."""
    shown = (0.0, *report["config"]["evaluate"]["prune"])
    columns = ["system", "perplexity", "nats more than the posterior", "tokens right", "active", "passes"]
    rows = [
        [
            row["system"],
            with_spread(row, "perplexity", ".1f"),
            with_spread(row, "above_dense", "+.3f"),
            with_spread(row, "accuracy", ".2%"),
            f"{row['active_experts']:.3g}",
            f"{row['prompt_passes']:.3g}",
        ]
        for row in report["rows"]
        if row["prune"] in shown
    ]
    return table(columns, rows)


def with_spread(row: dict[str, Any], field: str, number: str) -> str:
    spread = row["spread"].get(field)
    return f"{row[field]:{number}}" + ("" if spread is None else f" ± {spread:{number.lstrip('+')}}")


def comparisons(report: Report) -> str:
    columns = ["first", "against", "nats per token", "95% interval", "each seed", "the first is"]
    rows = [
        [
            c["first"],
            c["second"],
            f"{c['difference']['mean']:+.3f}",
            f"{c['difference']['low']:+.3f} to {c['difference']['high']:+.3f}",
            ", ".join(f"{value:+.3f}" for value in c["difference"]["per_seed"]),
            c["verdict"],
        ]
        for c in report["comparisons"]
    ]
    return table(columns, rows)


def pruning(report: Report) -> str:
    columns = ["ε", "total variation, measured", "active"]
    rows = [
        [
            f"{row['prune']:g}",
            f"{row['total_variation']:.2g} ± {row['standard_error']:.1g}",
            f"{row['active_experts']:.3f}",
        ]
        for row in report["sampled"]
    ]
    return table(columns, rows)


def places(report: Report) -> str:
    """Every point of a curve, over its seeds."""
    columns = [
        "experts",
        "in the base",
        "nats behind one model",
        "95% interval",
        "each seed",
        "the ensemble is",
        "behind one that went straight",
        "divergence",
        "gain",
        "by the rule",
    ]
    rows = [
        [
            str(place["num_experts"]),
            f"{place['share']:.0%}",
            f"{behind['mean']:+.3f}",
            f"{behind['low']:+.3f} to {behind['high']:+.3f}",
            ", ".join(f"{value:+.3f}" for value in behind["per_seed"]),
            place["verdict"],
            f"{place['behind_one_go']['mean']:+.3f}",
            f"{place['divergence']['mean']:.1f}%",
            f"{place['gain']['mean']:+.1f}%",
            f"{place['expected_gain']:+.1f}%",
        ]
        for place in report["places"]
        for behind in (place["behind_together"],)
    ]
    return table(columns, rows)


def main() -> None:
    for path in sys.argv[1:]:
        report = json.loads(Path(path).read_text())
        if "places" in report:
            print(f"## {report['name']}: `decar-train curve`", places(report), *report["verdict"], sep="\n\n")
            continue
        title = f"## {report['ensemble']}: `{report['environment']['command']}`"
        print(title, comparisons(report), systems(report), pruning(report), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
