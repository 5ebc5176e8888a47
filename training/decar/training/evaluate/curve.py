"""The curve: how far experts are behind one model, by how much of all training went into their common base.

Knows how a run is derived for each point, and what of its scores the curve is made of.

Shapes: K experts, N texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.router.posterior import Float64s, log_prior
from decar.training.config import CurveConfig, ExpertConfig, Recipe, TrainConfig
from decar.training.data.tokenizer import load_tokenizer
from decar.training.evaluate.environment import environment
from decar.training.evaluate.held_out import Text, read_texts, scored, scores_of
from decar.training.evaluate.measures import Pool, Totals, summed
from decar.training.evaluate.plot import plot_curve
from decar.training.evaluate.scores import Progress
from decar.training.evaluate.systems import DENSE, Outcome, System
from decar.training.evaluate.verdict import (
    RULE,
    RULE_RANGE,
    Estimate,
    Verdict,
    estimate,
    rule_of_thumb,
    verdict,
)
from decar.training.expert.model import build_model, load_model
from decar.training.expert.report import ExpertReport, priors_of, read_expert_report
from decar.training.expert.stage import expert_stage, train_model
from decar.training.fingerprints import expert_fingerprint
from decar.training.run import plot_file, read_report, report_file
from decar.training.stages import Stage, fingerprint, read_marker

TOGETHER, BASE, ONE_GO = "together", "base", "one go"
NOT_IN_POINTS = {"seeds", "margin", "prune", "prune_grid", "noise_levels"}
_AS_GOOD: tuple[Verdict, ...] = ("equivalent within noise", "better")


class Point(BaseModel):
    """One seed's K experts that branched from a base with a ``share`` of all training, on held-out texts.

    ``nll``: nats per token of what follows the prompts, pooled by the experts' priors, of the ensemble (*posterior*),
    of the model that went on from the same base on all data (*together*), of that which did so from the start (*one
    go*, where share 0 is among the points), of the base, and of each expert. ``behind_*``: what the ensemble needs more
    than those, with its standard error over texts.

    ``divergence`` and ``gain`` are those of arXiv 2603.22755, in percent: how much less an expert's loss on its own
    texts is than the base's, the mean over experts; and how much less the ensemble's loss is than the best expert's,
    where all experts' texts count alike.
    """

    seed: int
    share: float
    num_experts: int
    steps: dict[str, int]
    texts: int
    tokens: int
    nll: dict[str, float]
    nll_by_domain: dict[str, dict[str, float]]
    behind_together: float
    behind_together_error: float
    behind_one_go: float | None
    behind_one_go_error: float | None
    divergence: float
    gain: float


class Place(BaseModel):
    """All seeds' points of one ``share`` and number of experts. ``expected_gain`` is `rule_of_thumb`'s.

    ``verdict``: the ensemble against the model that was trained together, as the evaluation says it.
    """

    share: float
    num_experts: int
    behind_together: Estimate
    verdict: Verdict
    behind_one_go: Estimate | None
    divergence: Estimate
    gain: Estimate
    expected_gain: float


class CurveReport(BaseModel):
    """``report.json`` of a curve. ``as_good_from``: by number of experts, the least share from which on the ensemble is
    as good as the model trained together, within noise; None where there is none."""

    name: str
    seeds: list[int]
    margin: float
    places: list[Place]
    as_good_from: dict[int, float | None]
    verdict: list[str]
    points: list[Point]
    config: dict[str, Any]
    environment: dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One model to train for the curve, by ``recipe`` on ``shards`` of the run ``split``; its place is ``directory``.

    ``start`` is the base that it branches from, if any.
    """

    name: str
    split: TrainConfig
    recipe: Recipe
    shards: Sequence[str]
    directory: Path
    start: Path | None = None

    @property
    def stage(self) -> Stage:
        """The stage as its shards, and its base, are now.

        Raises:
            TrainingError: something of them is missing, or was made with another configuration.
        """
        inputs = [expert_stage(self.split, name).inputs for name in self.shards]
        start = None if self.start is None else read_marker(self.start)
        return Stage(self.directory, expert_fingerprint(self.recipe), fingerprint(inputs, start))

    def train(self, stage: Stage, callbacks: Iterable[Any] = ()) -> ExpertReport:
        """Train it and put it in place; as `train_model`."""
        return train_model(self.recipe, self.shards, stage, callbacks)


def settings(config: TrainConfig) -> CurveConfig:
    """The section ``curve``.

    Raises:
        TrainingError: there is none, or its experts would not be alike, or read images, or the data cannot be dealt
            out to different numbers of experts.
    """
    if config.curve is None:
        raise TrainingError("the configuration has no section curve, e.g. `curve: {steps: 1200}`")
    if config.partition.method == "by-field":
        raise TrainingError(
            "curve: partition.method by-field deals out by domains that are named, so not to other numbers of experts; "
            "set partition.method to kmeans or two-stage"
        )
    if any(expert.model for expert in config.experts):
        raise TrainingError(
            "curve: all its experts have one model; describe it under model, and none under experts"
        )
    if "vision_config" in config.model:
        raise TrainingError(
            "curve: models that read images are not measured by it; describe one of text alone"
        )
    return config.curve


def split_config(config: TrainConfig, num_experts: int) -> TrainConfig:
    """The run with ``num_experts`` experts. All share the tokenizer and the held-out documents of the first."""
    first, *_ = settings(config).experts
    partition: dict[str, Any] = {"name_by": {}}
    tokenizer: dict[str, Any] = {}
    if num_experts != first:
        run = split_config(config, first).run
        partition["held_out_as"], tokenizer["path"] = run.partition, run.tokenizer
    return config.model_copy(
        update={
            "work_dir": config.run.split(num_experts),
            "ensemble_dir": None,
            "experts": [ExpertConfig(name=f"expert-{k}") for k in range(1, num_experts + 1)],
            "partition": config.partition.model_copy(update=partition),
            "tokenizer": config.tokenizer.model_copy(update=tokenizer),
        }
    )


def models(config: TrainConfig, share: float, num_experts: int) -> Iterator[Model]:
    """What the point needs, in the order of training: the base, the model trained together, the experts.

    The base and the model trained together are those of all numbers of experts.
    """
    curve = settings(config)
    first, split = split_config(config, curve.experts[0]), split_config(config, num_experts)
    every, one = first.expert_names, first.recipes[0]
    base_steps = curve.base_steps(share)
    left = curve.steps - base_steps
    base = None
    if base_steps:
        base = first.run.branched(share, BASE)
        yield Model(BASE, first, _taking(one, base_steps), every, base)
    together = first.run.branched(share, TOGETHER)
    yield Model(TOGETHER, first, _taking(one, left, base), every, together, base)
    for name in split.expert_names:
        recipe = _taking(split.recipe(name), left // num_experts, base)
        yield Model(name, split, recipe, [name], split.run.branched(share, name), base)


def _taking(recipe: Recipe, steps: int, start: Path | None = None) -> Recipe:
    """``recipe`` with so many steps, none fewer, from the checkpoint ``start`` if there is one."""
    model = recipe.model if start is None else {"checkpoint": str(start)}
    own = {"max_steps": steps, "patience": None}
    return replace(recipe, model=model, training=recipe.training.model_copy(update=own))


def point_stage(config: TrainConfig, share: float, num_experts: int) -> Stage:
    """The scores of a point as its models are now."""
    needed = {model.directory for model in models(config, share, num_experts)}
    if 0 in settings(config).shares:
        needed |= {model.directory for model in models(config, 0, num_experts) if model.name == TOGETHER}
    markers = [read_marker(directory) for directory in sorted(needed)]
    measured = config.evaluate.model_dump(mode="json", exclude=NOT_IN_POINTS)
    return Stage(
        split_config(config, num_experts).run.branched(share, "scores"),
        fingerprint(measured, config.seed),
        fingerprint(markers),
    )


def read_point(stage: Stage) -> Point:
    """A finished point.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    return read_report(stage.directory, Point)


def make_point(
    config: TrainConfig, share: float, num_experts: int, stage: Stage, progress: Progress = lambda *_: None
) -> Point:
    """Score the models of a point, which are trained.

    Args:
        progress: is told of (texts done, all).

    Raises:
        TrainingError: a shard, the tokenizer or a model is missing or damaged.
    """
    curve, split = settings(config), split_config(config, num_experts)
    mine = {model.name: model for model in models(config, share, num_experts)}
    places = {name: load_model(model.directory) for name, model in mine.items()}
    tokenizer = load_tokenizer(split.run.tokenizer)
    if BASE not in places:
        places[BASE] = build_model(split.recipes[0], tokenizer).eval()
    if share and 0 in curve.shares:
        one_go = next(model for model in models(config, 0, num_experts) if model.name == TOGETHER)
        places[ONE_GO] = load_model(one_go.directory)
    experts = split.expert_names
    reports = {name: read_expert_report(model.directory) for name, model in mine.items()}
    priors = priors_of({name: reports[name] for name in experts})
    texts = read_texts(split.run, split.evaluate, split.seed, tokenizer, split.evaluate.max_tokens).texts
    order = [*experts, *(name for name in places if name not in experts)]
    totals = _totals(
        [places[name] for name in order],
        order,
        texts,
        priors,
        len(tokenizer),
        split.evaluate.batch_size,
        progress,
    )
    pool = Pool(texts, priors)
    rows = {name: pool.row(name, total, totals[DENSE]) for name, total in totals.items()}
    by_domain = {name: row.nll_by_domain for name, row in rows.items()}
    behind, error = pool.excess(totals[DENSE], totals[TOGETHER])
    straight = (
        pool.excess(totals[DENSE], totals[ONE_GO if share else TOGETHER])
        if 0 in curve.shares
        else (None, None)
    )
    point = Point(
        seed=config.seed,
        share=share,
        num_experts=num_experts,
        steps={name: report.steps for name, report in reports.items()},
        texts=len(texts),
        tokens=int(totals[DENSE].tokens.sum()),
        nll={name: row.nll for name, row in rows.items()},
        nll_by_domain=by_domain,
        behind_together=behind,
        behind_together_error=error,
        behind_one_go=straight[0],
        behind_one_go_error=straight[1],
        divergence=divergence(by_domain, experts),
        gain=gain(by_domain, experts),
    )
    with stage.writing() as directory:
        report_file(directory).write_text(point.model_dump_json(indent=1) + "\n")
    return point


def divergence(nll_by_domain: Mapping[str, Mapping[str, float]], experts: Sequence[str]) -> float:
    """Percent, as arXiv 2603.22755 has it: by how much an expert's loss on its own texts is below the base's."""
    base = nll_by_domain[BASE]
    return 100 * float(np.mean([1 - nll_by_domain[name][name] / base[name] for name in experts]))


def gain(nll_by_domain: Mapping[str, Mapping[str, float]], experts: Sequence[str]) -> float:
    """Percent, as arXiv 2603.22755 has it: by how much the ensemble's loss is below the best expert's, where every
    expert's texts count alike."""

    def alike(system: str) -> float:
        return float(np.mean([nll_by_domain[system][name] for name in experts]))

    return 100 * (1 - alike(DENSE) / min(map(alike, experts)))


def _totals(
    loaded: Sequence[Any],
    order: Sequence[str],
    texts: Sequence[Text],
    priors: Mapping[str, float],
    vocab_size: int,
    batch_size: int,
    progress: Progress,
) -> dict[str, Totals]:
    """Of each model of ``order`` alone, and of the first K under the posterior."""
    num_experts = len(priors)
    start: Float64s = log_prior(list(priors.values()))
    dense = System(DENSE, bayes="full")
    alone = {name: partial(Outcome.alone, expert=i) for i, name in enumerate(order)}
    sums: dict[str, list[tuple[float, ...]]] = {name: [] for name in (DENSE, *order)}
    rows_of = scored(loaded, texts, batch_size, vocab_size)
    for done, (text, rows) in enumerate(rows_of, start=1):
        mixed = scores_of(text, rows[:, :num_experts], {"prior": start})
        sums[DENSE].append(summed(dense.outcome(mixed)))
        each = scores_of(text, rows, {})
        for name, outcome in alone.items():
            sums[name].append(summed(outcome(each)))
        progress(done, len(texts))
    return {name: Totals.of(found) for name, found in sums.items()}


def curve_stage(config: TrainConfig, configs: Sequence[TrainConfig]) -> Stage:
    """The stage as ``config`` and the points of ``configs``, one for each seed, are now.

    Raises:
        TrainingError: a point is missing, or was made with another configuration.
    """
    curve = settings(config)
    points = [stage for one in configs for stage in _point_stages(one)]
    if not all(stage.is_done for stage in points):
        raise TrainingError("not all points are scored; run `decar-train curve CONFIG.yaml`")
    return Stage(
        config.run.curve,
        fingerprint(curve, config.evaluate.margin),
        fingerprint([read_marker(stage.directory) for stage in points]),
    )


def _point_stages(config: TrainConfig) -> list[Stage]:
    curve = settings(config)
    return [point_stage(config, share, count) for count in curve.experts for share in curve.shares]


def read_curve(stage: Stage) -> CurveReport:
    """A finished curve.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    return read_report(stage.directory, CurveReport)


def make_curve(config: TrainConfig, configs: Sequence[TrainConfig], stage: Stage) -> CurveReport:
    """Sum up the finished points of ``configs``, one for each seed, and plot them.

    Raises:
        TrainingError: points are missing or damaged.
    """
    curve, margin = settings(config), config.evaluate.margin
    points = [read_point(stage) for one in configs for stage in _point_stages(one)]
    places = [
        _place([p for p in points if (p.share, p.num_experts) == (share, count)], margin)
        for count in curve.experts
        for share in curve.shares
    ]
    as_good_from = {count: _as_good_from(places, count) for count in curve.experts}
    report = CurveReport(
        name=config.name,
        seeds=[one.seed for one in configs],
        margin=margin,
        places=places,
        as_good_from=as_good_from,
        verdict=_in_words(places, as_good_from, curve, margin, len(configs)),
        points=points,
        config=config.model_dump(mode="json"),
        environment=environment(),
    )
    with stage.writing() as directory:
        report_file(directory).write_text(report.model_dump_json(indent=1) + "\n")
        plot_curve(report, plot_file(directory, "curve"))
    return report


def _place(points: Sequence[Point], margin: float) -> Place:
    behind = estimate([p.behind_together for p in points], [p.behind_together_error for p in points])
    straight = [
        (p.behind_one_go, p.behind_one_go_error or 0.0) for p in points if p.behind_one_go is not None
    ]
    divergences = estimate([p.divergence for p in points], [0.0] * len(points))
    return Place(
        share=points[0].share,
        num_experts=points[0].num_experts,
        behind_together=behind,
        verdict=verdict(behind, margin),
        behind_one_go=estimate(*map(list, zip(*straight, strict=True))) if straight else None,
        divergence=divergences,
        gain=estimate([p.gain for p in points], [0.0] * len(points)),
        expected_gain=rule_of_thumb(divergences.mean),
    )


def _as_good_from(places: Sequence[Place], num_experts: int) -> float | None:
    """The least share from which on every share has the ensemble as good."""
    found = None
    mine = [place for place in places if place.num_experts == num_experts]
    for place in sorted(mine, key=lambda place: -place.share):
        if place.verdict not in _AS_GOOD:
            break
        found = place.share
    return found


def _in_words(
    places: Sequence[Place],
    as_good_from: Mapping[int, float | None],
    curve: CurveConfig,
    margin: float,
    num_seeds: int,
) -> list[str]:
    sentences = []
    for count, share in as_good_from.items():
        if share is None:
            last = max((p for p in places if p.num_experts == count), key=lambda place: place.share)
            sentences.append(
                f"{count} experts: no share of these was found from which on they are as good as one model within "
                f"±{margin:g} nats; with {last.share:.0%} in the base they are {last.behind_together.mean:+.3f} behind "
                f"({last.behind_together.low:+.3f} to {last.behind_together.high:+.3f}): {last.verdict}."
            )
        else:
            sentences.append(
                f"{count} experts: as good as one model within ±{margin:g} nats from a share of {share:.0%} on."
            )
    least, most = RULE_RANGE
    within = [place for place in places if least <= place.divergence.mean <= most]
    if within:
        off = [place.gain.mean - place.expected_gain for place in within]
        sentences.append(
            f"The rule {RULE} (arXiv 2603.22755, for divergences of {least} to {most}%): of "
            f"{len(within)} places in its range the gain differs from it by {min(off):+.1f} to "
            f"{max(off):+.1f} percentage points."
        )
    else:
        sentences.append(
            f"The rule {RULE} (arXiv 2603.22755) is for divergences of {least} to {most}%; no place has one."
        )
    if num_seeds == 1:
        sentences.append(
            "One seed: intervals are over its held-out texts, and say nothing of another training."
        )
    return sentences
