"""The report of an evaluation: what all seeds together say, as json, plots and a page. Knows measures, never models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, seed_overrides
from decar.training.environment import command, environment
from decar.training.evaluate_html import render
from decar.training.evaluate_plot import plot_comparisons, plot_gaps, plot_pruning, plot_systems
from decar.training.measures import Row, perplexity
from decar.training.sampled import SampledRow
from decar.training.scores import CENTRALIZED, SeedReport, read_scores, scores_stage
from decar.training.stages import Stage, fingerprint, read_marker
from decar.training.verdict import Comparison, Gap, comparisons, gaps, in_words

REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
# Of a row, the fields whose spread over seeds is shown.
_SPREAD = ("perplexity", "nll", "above_dense", "accuracy", "exact")


class EvaluationReport(BaseModel):
    """``report.json``. ``rows`` and ``sampled`` are means over ``seeds``, which hold what each of them says.

    ``texts`` and ``tokens`` count those of all seeds. ``commands``: what gives the numbers of each seed alone, in the
    order of ``seeds``; ``environment`` has the command of all. ``config`` is the configuration's own seed's.
    """

    ensemble: str
    seed: int
    experts: list[str]
    model: str
    served: str
    centralized: str
    verdict: list[str]
    margin: float
    comparisons: list[Comparison]
    gaps: list[Gap]
    prompt_tokens: int
    max_tokens: int
    texts: dict[str, int]
    tokens: dict[str, int]
    rows: list[Row]
    sampled_tokens: int
    sampled: list[SampledRow]
    undefined: dict[str, str]
    seeds: list[SeedReport]
    commands: list[str]
    config: dict[str, Any]
    environment: dict[str, Any]


def evaluate_stage(config: TrainConfig, runs: Sequence[TrainConfig]) -> Stage:
    """The stage as ``config`` and the evaluations of ``runs``, one for each seed, are now.

    Raises:
        TrainingError: something of them is missing, or was made with another configuration.
    """
    stages = [scores_stage(run) for run in runs]
    for run, stage in zip(runs, stages, strict=True):
        if not stage.is_done:
            raise TrainingError(f"seed {run.seed} is not evaluated; run `decar-train evaluate CONFIG.yaml`")
    return Stage(
        config.work_dir / "evaluate",
        fingerprint(config.evaluate, config.seed),
        fingerprint([read_marker(stage.directory) for stage in stages]),
    )


def read_evaluation(stage: Stage) -> EvaluationReport:
    """A finished report.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    file = stage.directory / REPORT_FILE
    try:
        return EvaluationReport.model_validate_json(file.read_text())
    except (OSError, pydantic.ValidationError):
        raise TrainingError(f"{file} cannot be read; delete {stage.directory} and run again") from None


def make_evaluation(config: TrainConfig, runs: Sequence[TrainConfig], stage: Stage) -> EvaluationReport:
    """Sum up the finished evaluations of ``runs``, and write json, plots and page.

    Raises:
        TrainingError: an evaluation is missing or damaged.
    """
    settings = config.evaluate
    seeds = [read_scores(scores_stage(run)) for run in runs]
    first = seeds[0]
    compared, parts = comparisons(seeds, settings.margin), gaps(seeds)
    undefined = {name: why for seed in reversed(seeds) for name, why in seed.undefined.items()}
    report = EvaluationReport(
        ensemble=config.name,
        seed=config.seed,
        experts=config.expert_names,
        model=first.model,
        served=first.served,
        centralized=_how_compute_is_matched(config, seeds),
        verdict=in_words(compared, parts[0] if parts else None, undefined, len(seeds), settings.margin),
        margin=settings.margin,
        comparisons=compared,
        gaps=parts,
        prompt_tokens=settings.prompt_tokens,
        max_tokens=first.max_tokens,
        texts={name: sum(seed.texts[name] for seed in seeds) for name in config.expert_names},
        tokens={name: sum(seed.tokens[name] for seed in seeds) for name in config.expert_names},
        rows=mean_rows([seed.rows for seed in seeds]),
        sampled_tokens=first.sampled_tokens,
        sampled=_mean_sampled([seed.sampled for seed in seeds]),
        undefined=undefined,
        seeds=seeds,
        commands=[_command(config, run) for run in runs],
        config=config.model_dump(mode="json"),
        environment=environment(),
    )
    with stage.writing() as directory:
        (directory / REPORT_FILE).write_text(report.model_dump_json(indent=1) + "\n")
        title = f"{report.ensemble}: {len(report.experts)} experts, {report.model}"
        shown = [row for row in report.rows if row.prune in (0.0, *settings.prune)]
        points = [(row.system, row.active_experts, row.perplexity, row.prompt_passes) for row in shown]
        plot_systems(points, title, directory / "systems.png")
        plot_comparisons(report.comparisons, report.margin, title, directory / "comparisons.png")
        if report.gaps:
            plot_gaps(report.gaps, title, directory / "gaps.png")
        if report.sampled:
            curves: dict[str, list[tuple[float, float, float]]] = {}
            for row in report.rows:
                if row.prune:
                    curves.setdefault(row.family, []).append((row.prune, row.active_experts, row.dropped_max))
            measured = [(row.prune, row.total_variation, row.standard_error) for row in report.sampled]
            plot_pruning(curves, measured, title, directory / "pruning.png")
        (directory / PAGE_FILE).write_text(render(report, directory), encoding="utf-8")
    return report


def _command(config: TrainConfig, run: TrainConfig) -> str:
    others = seed_overrides(config, run.seed) if run.seed != config.seed else []
    return command([*others, f"evaluate.seeds=[{run.seed}]"])


def _how_compute_is_matched(config: TrainConfig, seeds: Sequence[SeedReport]) -> str:
    if CENTRALIZED in seeds[0].undefined:
        return f"none: {seeds[0].undefined[CENTRALIZED]}"
    steps = {trained.steps for seed in seeds for trained in seed.trained if trained.model == CENTRALIZED}
    took = f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"
    training = config.training
    blocks = training.batch_size * training.gradient_accumulation
    start = config.model_of(config.expert_names[0]).get("checkpoint")
    return (
        f"the same architecture on all shards, {took} steps of {blocks} × {training.sequence_length} tokens, "
        f"as many as all experts took together, from {'fresh weights' if start is None else f'the checkpoint {start}'} "
        "as they do"
    )


def mean_rows(seeds: Sequence[Sequence[Row]]) -> list[Row]:
    """Rows that all ``seeds`` have, averaged over them; perplexities are those of the mean nats per token."""
    by_name = [{row.system: row for row in rows} for rows in seeds]
    if len(seeds) == 1:
        return list(seeds[0])
    return [
        _mean_row([rows[name] for rows in by_name])
        for name in by_name[0]
        if all(name in rows for rows in by_name)
    ]


def _mean_row(rows: Sequence[Row]) -> Row:
    def mean(field: str) -> float:
        return float(np.mean([getattr(row, field) for row in rows]))

    means = {
        field: mean(field)
        for field in ("nll", "above_dense", "accuracy", "active_experts", "prompt_passes", "dropped_mean")
    }
    has_exact = all(row.exact is not None for row in rows)
    errors = np.array([row.standard_error for row in rows])
    return rows[0].model_copy(
        update={
            **means,
            "perplexity": perplexity(means["nll"]),
            "exact": mean("exact") if has_exact else None,
            "nll_by_domain": {
                name: float(np.mean([row.nll_by_domain[name] for row in rows]))
                for name in rows[0].nll_by_domain
            },
            "standard_error": float(np.sqrt(np.square(errors).sum()) / len(rows)),
            "dropped_max": max(row.dropped_max for row in rows),
            "spread": {
                field: float(np.std([getattr(row, field) for row in rows], ddof=1))
                for field in _SPREAD
                if field != "exact" or has_exact
            },
        }
    )


def _mean_sampled(seeds: Sequence[Sequence[SampledRow]]) -> list[SampledRow]:
    if not all(seeds):  # a seed whose held-out documents are all chats
        return []
    return [
        SampledRow(
            prune=rows[0].prune,
            total_variation=float(np.mean([row.total_variation for row in rows])),
            standard_error=float(np.sqrt(np.sum([row.standard_error**2 for row in rows])) / len(rows)),
            active_experts=float(np.mean([row.active_experts for row in rows])),
            dropped_max=max(row.dropped_max for row in rows),
        )
        for rows in zip(*seeds, strict=True)
    ]
