"""The evaluation: what the scores of all seeds say together, as json, plots and a page. Knows measures, no models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.router.manifest import FlowDefaults
from decar.training.config import MoeConfig, Recipe, TrainConfig, TrainingConfig, seed_overrides
from decar.training.evaluate.environment import command, environment
from decar.training.evaluate.html import render
from decar.training.evaluate.measures import Row, perplexity
from decar.training.evaluate.plot import plot_comparisons, plot_gaps, plot_pruning, plot_systems
from decar.training.evaluate.revealed import measured_order
from decar.training.evaluate.sampled import SampledRow
from decar.training.evaluate.scores import CENTRALIZED, MOE, SeedReport, read_scores, scores_stage
from decar.training.evaluate.verdict import Comparison, Gap, comparisons, gaps, in_words
from decar.training.export.moe import experts_per_token
from decar.training.fingerprints import evaluate_fingerprint
from decar.training.run import Run, page_file, plot_file, read_report, report_file
from decar.training.stages import Stage, fingerprint, read_marker

# Of a row, the fields whose spread over seeds is shown.
_SPREAD = ("perplexity", "nll", "above_dense", "accuracy", "exact")


class EvaluationReport(BaseModel):
    """``report.json`` of an evaluation.

    ``rows`` and ``sampled`` are means over ``seeds``, which hold what each of them says. ``texts`` and ``tokens`` count
    those of all seeds. ``commands``: what gives the numbers of each seed alone, in the order of ``seeds``;
    ``environment`` has the command of all. ``config`` is the configuration's own seed's.
    """

    ensemble: str
    seed: int
    experts: list[str]
    model: str
    served: str
    centralized: str
    moe: str
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

    def shows(self, prune: float) -> bool:
        """Whether what is pruned with that budget stands in the tables; `evaluate.prune_grid` is for the plot alone."""
        return prune in (0.0, *self.config["evaluate"]["prune"])


def evaluate_stage(config: TrainConfig, configs: Sequence[TrainConfig]) -> Stage:
    """The stage as ``config`` and the scores of ``configs``, one for each seed, are now.

    Raises:
        TrainingError: something of them is missing, or was made with another configuration.
    """
    stages = [scores_stage(one) for one in configs]
    for one, stage in zip(configs, stages, strict=True):
        if not stage.is_done:
            raise TrainingError(f"seed {one.seed} is not evaluated; run `decar-train evaluate CONFIG.yaml`")
    return Stage(
        config.run.evaluate,
        evaluate_fingerprint(config),
        fingerprint([read_marker(stage.directory) for stage in stages]),
    )


def read_evaluation(stage: Stage) -> EvaluationReport:
    """The report of a finished evaluation.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    return read_report(stage.directory, EvaluationReport)


def make_evaluation(config: TrainConfig, runs: Sequence[Run], stage: Stage) -> EvaluationReport:
    """Sum up the finished scores of ``runs``, one for each seed, and write json, plots and page.

    Raises:
        TrainingError: scores are missing or damaged.
    """
    margin, seeds = config.evaluate.margin, [read_scores(run) for run in runs]
    first = seeds[0]
    compared, parts = comparisons(seeds, margin), gaps(seeds)
    undefined = {name: why for seed in reversed(seeds) for name, why in seed.undefined.items()}
    report = EvaluationReport(
        ensemble=config.name,
        seed=config.seed,
        experts=config.expert_names,
        model=first.model,
        served=first.served,
        centralized=_how_compute_is_matched(config.recipes[0], seeds),
        moe=_how_it_is_merged(config.moe, config.recipes[0], seeds),
        verdict=in_words(compared, parts[0] if parts else None, undefined, len(seeds), margin)
        + _what_is_bounded(config.flow, first.noise_levels),
        margin=margin,
        comparisons=compared,
        gaps=parts,
        prompt_tokens=config.evaluate.prompt_tokens,
        max_tokens=first.max_tokens,
        texts={name: sum(seed.texts[name] for seed in seeds) for name in config.expert_names},
        tokens={name: sum(seed.tokens[name] for seed in seeds) for name in config.expert_names},
        rows=mean_rows([seed.rows for seed in seeds]),
        sampled_tokens=first.sampled_tokens,
        sampled=_mean_sampled([seed.sampled for seed in seeds]),
        undefined=undefined,
        seeds=seeds,
        commands=[_command(config.run, config.seed, seed.seed) for seed in seeds],
        config=config.model_dump(mode="json"),
        environment=environment(),
    )
    with stage.writing() as directory:
        report_file(directory).write_text(report.model_dump_json(indent=1) + "\n")
        title = f"{report.ensemble}: {len(report.experts)} experts, {report.model}"
        points = [
            (row.system, row.active_experts, row.perplexity, row.prompt_passes)
            for row in report.rows
            if report.shows(row.prune)
        ]
        plot_systems(points, title, plot_file(directory, "systems"))
        plot_comparisons(report.comparisons, report.margin, title, plot_file(directory, "comparisons"))
        if report.gaps:
            plot_gaps(report.gaps, title, plot_file(directory, "gaps"))
        if report.sampled:
            curves: dict[str, list[tuple[float, float, float]]] = {}
            for row in report.rows:
                if row.prune:
                    curves.setdefault(row.family, []).append((row.prune, row.active_experts, row.dropped_max))
            measured = [(row.prune, row.total_variation, row.standard_error) for row in report.sampled]
            plot_pruning(curves, measured, title, plot_file(directory, "pruning"))
        page_file(directory).write_text(render(report, directory), encoding="utf-8")
    return report


def _command(run: Run, own_seed: int, seed: int) -> str:
    others = seed_overrides(run, seed) if seed != own_seed else []
    return command([*others, f"evaluate.seeds=[{seed}]"])


def _what_is_bounded(flow: FlowDefaults, noise_levels: int | None) -> list[str]:
    if noise_levels is None:
        return []
    return [
        f"Nats per token are bounds: continuations are revealed in {noise_levels} steps (evaluate.noise_levels), in "
        f"{measured_order(flow)} order by the {flow.schedule} schedule, and each token is scored in the step that "
        "reveals it; which step that is, is drawn alike for all systems."
    ]


def _how_compute_is_matched(recipe: Recipe, seeds: Sequence[SeedReport]) -> str:
    if CENTRALIZED in seeds[0].undefined:
        return f"none: {seeds[0].undefined[CENTRALIZED]}"
    steps = {trained.steps for seed in seeds for trained in seed.trained if trained.model == CENTRALIZED}
    took = f"{min(steps):,}" if len(steps) == 1 else f"{min(steps):,} to {max(steps):,}"
    start = recipe.model.get("checkpoint")
    return (
        f"the same architecture on all shards, {took} steps of {_step(recipe.training)}, "
        f"as many as all experts took together, from {'fresh weights' if start is None else f'the checkpoint {start}'} "
        "as they do"
    )


def _how_it_is_merged(settings: MoeConfig, recipe: Recipe, seeds: Sequence[SeedReport]) -> str:
    if MOE in seeds[0].undefined:
        return f"none: {seeds[0].undefined[MOE]}"
    count = experts_per_token(len(seeds[0].experts))
    weights = "of all weights" if settings.train == "all" else "of the gates alone"
    return (
        f"the experts' feed-forward blocks, {count} of them for each token, all else averaged; then "
        f"{settings.steps:,} steps {weights}, of {_step(recipe.training)} of all shards, which no other system had"
    )


def _step(training: TrainingConfig) -> str:
    return f"{training.rows_per_step} × {training.sequence_length} tokens"


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
