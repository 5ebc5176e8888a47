"""The page of an evaluation: one file with everything in it, from a template. Knows reports, and no measuring."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from jinja2 import Environment, StrictUndefined

from decar.training.evaluate.measures import Row
from decar.training.evaluate.scores import AVERAGE, CENTRALIZED, MOE, RANDOM, TOP_1
from decar.training.evaluate.verdict import CONFIDENCE, Estimate
from decar.training.run import plot_files

if TYPE_CHECKING:
    from decar.training.evaluate.stage import EvaluationReport

_TEMPLATE = "report.html.jinja"


def render(report: EvaluationReport, directory: Path) -> str:
    """HTML that needs no other file and no script; pictures are those in ``directory``."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(signed=signed, spread=spread, cell=cell, percent=percent)
    source = resources.files("decar.training.evaluate").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        keys=[CENTRALIZED, report.served, TOP_1[0], RANDOM, AVERAGE, MOE],
        confidence=f"{CONFIDENCE:.0%}",
        shown=[row for row in report.rows if report.shows(row.prune)],
        pictures={
            file.stem: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
            for file in plot_files(directory)
        },
        config_yaml=yaml.safe_dump(report.config, sort_keys=False),
    )


def signed(value: float) -> str:
    """Nats, to a thousandth."""
    return f"{value:+.3f}"


def percent(value: float) -> str:
    return f"{value:.2%}"


def spread(estimate: Estimate) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    return signed(estimate.mean) + ("" if estimate.sd is None else f" ± {estimate.sd:.3f}")


def cell(row: Row, field: str) -> str:
    """``field`` of ``row``, and its standard deviation over seeds where there are several."""
    number = {"perplexity": ".1f", "nll": ".3f", "above_dense": "+.3f", "accuracy": ".2%", "exact": ".2%"}[
        field
    ]
    deviation = f" ± {format(row.spread[field], number.lstrip('+'))}" if field in row.spread else ""
    return format(getattr(row, field), number) + deviation
