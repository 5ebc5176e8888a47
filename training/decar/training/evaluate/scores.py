"""The scores of one run: every way to use its ensemble, and what it has to beat, on the same held-out texts.

Knows which systems are compared with which. What all seeds together say is `stage.py`'s.

Shapes: K experts, N texts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from decar.router import Ensemble, load_router, load_trained_images, log_weights_after
from decar.router.errors import TrainingError
from decar.router.manifest import Start
from decar.router.posterior import Float64s, log_prior
from decar.training.config import TrainConfig
from decar.training.data.tokenizer import load_tokenizer
from decar.training.evaluate.centralized import centralized_stage, why_no_twin
from decar.training.evaluate.environment import environment
from decar.training.evaluate.held_out import Text, read_texts, scored, scores_of
from decar.training.evaluate.measures import Difference, Pool, Row, Totals, summed
from decar.training.evaluate.random_split import random_config, why_no_random_split
from decar.training.evaluate.revealed import Reveals
from decar.training.evaluate.sampled import SampledRow, compare_pruned, sample_continuations
from decar.training.evaluate.systems import DENSE, ROUTERS, Outcome, Scores, System, served, systems
from decar.training.expert.model import load_model
from decar.training.expert.report import read_expert_report
from decar.training.expert.stage import expert_processor
from decar.training.export.average import average
from decar.training.export.moe import experts_per_token, moe_stage, why_no_moe
from decar.training.export.stage import export_stage
from decar.training.fingerprints import scores_fingerprint
from decar.training.run import Run, average_folder, read_report, report_file
from decar.training.stages import Stage, fingerprint, read_marker

CENTRALIZED = "centralized model"
AVERAGE = "parameter average"
MOE = "mixture of experts (merged)"
RANDOM = "random split"
BEST = "best expert alone"
# One expert for each input: the one whose cluster is nearest, as the paper serves, and the surest that there is.
TOP_1 = ("centroid, top-1", f"{DENSE}, top-1")
_FIX = "run `decar-train evaluate CONFIG.yaml`, which makes all that is missing"
_NOT_DONE = {
    CENTRALIZED: "the centralized model is not trained",
    MOE: "the experts are not merged into a mixture of experts",
    RANDOM: "the random split is not exported",
}
Progress = Callable[[int, int], None]


class Trained(BaseModel):
    """What a model's training took."""

    model: str
    num_parameters: int
    documents: int | None
    train_tokens: int
    steps: int
    tokens_per_step: int


class SeedReport(BaseModel):
    """``report.json`` of one run's scores.

    ``texts``, ``answers`` (those of the texts that are), ``tokens`` (continuations'): by whose they are. ``served``:
    the system that the ensemble's manifest makes the default. ``best``: the expert that needs the fewest nats per
    token. ``undefined``: why a system is not among the rows. ``sampled``: the pruned posterior on continuations of
    plain texts that the ensemble itself wrote. ``noise_levels``: in how many steps masked-diffusion experts reveal a
    continuation, of which all numbers are bounds then; None for causal ones.
    """

    seed: int
    experts: list[str]
    priors: list[float]
    model: str
    served: str
    best: str
    trained: list[Trained]
    texts: dict[str, int]
    answers: dict[str, int]
    tokens: dict[str, int]
    too_short: int
    too_long: int
    max_tokens: int
    rows: list[Row]
    differences: list[Difference]
    undefined: dict[str, str]
    sampled_tokens: int
    sampled: list[SampledRow]
    noise_levels: int | None = None
    environment: dict[str, Any]


@dataclass(frozen=True)
class Rivals:
    """What an ensemble is compared with beside its own experts, as far as it is defined.

    Args:
        models: where the models are, by what they are.
        split: the run whose documents were dealt out by chance.
        undefined: why one of them is not there.
    """

    models: dict[str, Path]
    split: Run | None
    undefined: dict[str, str]


def rivals_of(config: TrainConfig) -> Rivals:
    """Those of ``config``'s run.

    Raises:
        TrainingError: an expert is not trained.
    """
    why = {
        CENTRALIZED: why_no_twin(config.recipes),
        MOE: why_no_moe(config.recipes),
        RANDOM: why_no_random_split(config),
    }
    undefined = {name: reason for name, reason in why.items() if reason is not None}
    models = {CENTRALIZED: config.run.centralized, MOE: config.run.moe}
    return Rivals(
        {name: directory for name, directory in models.items() if name not in undefined},
        None if RANDOM in undefined else random_config(config).run,
        undefined,
    )


def scores_stage(config: TrainConfig) -> Stage:
    """The stage as ``config``, the exported ensemble and the models that it is compared with are now.

    Raises:
        TrainingError: something of it is missing, or was made with another configuration.
    """
    inputs: list[Any] = [export_stage(config).inputs]
    rivals = rivals_of(config)
    if CENTRALIZED in rivals.models:
        inputs.append(read_marker(_done(CENTRALIZED, centralized_stage(config)).directory))
    if MOE in rivals.models:
        inputs.append(read_marker(_done(MOE, moe_stage(config)).directory))
    if rivals.split is not None:
        inputs.append(_done(RANDOM, export_stage(random_config(config))).inputs)
    return Stage(config.run.scores, scores_fingerprint(config), fingerprint(inputs))


def _done(what: str, stage: Stage) -> Stage:
    if not stage.is_done:
        raise TrainingError(f"{_NOT_DONE[what]}; {_FIX}")
    return stage


def read_scores(run: Run) -> SeedReport:
    """What the finished scores of ``run`` say.

    Raises:
        TrainingError: its file is missing or damaged.
    """
    return read_report(run.scores, SeedReport)


def make_scores(
    config: TrainConfig, stage: Stage, progress: Progress = lambda done, total: None
) -> SeedReport:
    """Score the held-out texts of one run and derive what every system makes of them.

    Args:
        progress: is called with the number of texts done, and of all; a text counts once for every pass over it.

    Raises:
        TrainingError: an expert's held-out texts are all shorter than a prompt, or a model says NaN.
        EnsembleError: the exported ensemble has no router or cannot be read.
    """
    settings, run, seed, recipe = config.evaluate, config.run, config.seed, config.recipes[0]
    rivals = rivals_of(config)
    ensemble = Ensemble.load(run.ensemble)
    tokenizer = load_tokenizer(run.tokenizer)
    max_tokens = min(settings.max_tokens, ensemble.max_positions or settings.max_tokens)
    processor = expert_processor(recipe, tokenizer)
    held_out = read_texts(run, settings, seed, tokenizer, max_tokens, processor)
    texts = held_out.texts
    flow = ensemble.manifest.flow
    # What is pruned is compared on texts that causal experts write.
    plain = [i for i, text in enumerate(texts) if not text.is_answer] if flow is None else []
    prunes = sorted({*settings.prune, *settings.prune_grid}, reverse=True) if flow is None else []
    compared = systems(len(ensemble.experts), prunes)
    default = served(config.router.entry, config.mixing, compared)
    compared += [] if default in compared else [default]
    with stage.writing() as directory:
        singles, undefined = _with_average(rivals, ensemble, average_folder(directory))
        num_steps = len(texts) * (1 + len(singles) + (rivals.split is not None)) + len(plain)
        reveals = None
        if flow is not None:
            levels = settings.noise_levels
            reveals = Reveals(flow, levels, seed, ensemble.vocab_size, settings.batch_size)
        forward = _Forward(settings.batch_size, ensemble.vocab_size, processor, reveals, num_steps, progress)
        totals: dict[str, Totals] = {}
        for name, path in singles.items():
            active = experts_per_token(len(ensemble.experts)) if name == MOE else 1
            way = {name: partial(Outcome.alone, expert=0, active=active)}
            totals |= _totals(forward([load_model(path, config.is_flow)], texts, {}), way)
        shutil.rmtree(average_folder(directory), ignore_errors=True)
        if rivals.split is not None:
            # As the ensemble is served, but that no router can tell by a prompt which of such experts has learned it.
            alike = System(RANDOM, bayes=default.bayes, rule=default.rule)
            totals |= _random_split(rivals.split, alike, texts, forward)

        starts = _starts(ensemble, tokenizer, texts)
        experts = [load_model(expert.path, config.is_flow) for expert in ensemble.experts]
        alone = {f"{name} alone": partial(Outcome.alone, expert=k) for k, name in enumerate(run.experts)}
        after_prompt: list[Float64s] = []
        totals |= _totals(
            _noting(after_prompt, forward(experts, texts, starts)),
            alone | {system.name: system.outcome for system in compared},
        )
        sampled_tokens = min(settings.sampled_tokens, max_tokens - settings.prompt_tokens)
        sampled: list[SampledRow] = []
        if plain:
            ids = sample_continuations(
                experts,
                [texts[i].ids[: settings.prompt_tokens] for i in plain],
                np.array(after_prompt)[plain],
                sampled_tokens,
                ensemble.vocab_size,
                seed,
            )
            own = [
                Text(texts[i].domain, written, settings.prompt_tokens)
                for i, written in zip(plain, ids, strict=True)
            ]
            prior: dict[Start, Float64s] = {"prior": starts["prior"][plain]}
            sampled = _pruned(forward(experts, own, prior), [s for s in compared if s.family == DENSE])

        pool = Pool(texts, {expert.name: expert.prior for expert in ensemble.experts})
        best = min(alone, key=lambda name: pool.excess(totals[name], totals[DENSE])[0])
        order = [CENTRALIZED, *alone, AVERAGE, MOE, RANDOM, *(system.name for system in compared)]
        first = ensemble.experts[0]
        report = SeedReport(
            seed=seed,
            experts=ensemble.expert_names,
            priors=[expert.prior for expert in ensemble.experts],
            model=f"{first.architecture}, {first.num_parameters / 1e6:.1f}M parameters",
            served=default.name,
            best=best,
            trained=_trained(run, rivals, recipe.training.tokens_per_step),
            texts=pool.counts(np.ones(len(texts))),
            answers=pool.counts(pool.is_answer.astype(np.float64)),
            tokens=pool.counts(totals[DENSE].tokens),
            too_short=held_out.too_short,
            too_long=held_out.too_long,
            max_tokens=max_tokens,
            rows=_rows(pool, {name: totals[name] for name in order if name in totals}, compared),
            differences=_differences(pool, totals, default, best, compared),
            undefined=undefined,
            sampled_tokens=sampled_tokens,
            sampled=sampled,
            noise_levels=settings.noise_levels if config.is_flow else None,
            environment=environment(),
        )
        report_file(directory).write_text(report.model_dump_json(indent=1) + "\n")
    return report


@dataclass
class _Forward:
    """Runs models over texts and counts the texts that are done."""

    batch_size: int
    vocab_size: int
    processor: Any
    reveals: Reveals | None
    num_steps: int
    progress: Progress
    done: int = field(default=0, init=False)

    def __call__(
        self, models: Sequence[Any], texts: Sequence[Text], starts: Mapping[Start, Float64s]
    ) -> Iterator[Scores]:
        """``starts``: log weights [N, K] of the routers."""
        for of_text in self._scores(
            models, texts, [{start: rows[i] for start, rows in starts.items()} for i in range(len(texts))]
        ):
            yield of_text
            self.done += 1
            self.progress(self.done, self.num_steps)

    def _scores(
        self, models: Sequence[Any], texts: Sequence[Text], starts: Sequence[Mapping[Start, Float64s]]
    ) -> Iterator[Scores]:
        if self.reveals is not None:
            for number, (text, start) in enumerate(zip(texts, starts, strict=True)):
                yield self.reveals.scores(models, text, number, start)
            return
        rows_of = scored(models, texts, self.batch_size, self.vocab_size, self.processor)
        for (text, rows), start in zip(rows_of, starts, strict=True):
            yield scores_of(text, rows, start)


def _starts(ensemble: Ensemble, tokenizer: Any, texts: Sequence[Text]) -> dict[Start, Float64s]:
    """Log weights [N, K] that each router gives for the prompts: for their images, if any, and else for their text."""
    prompts = [tokenizer.decode(text.ids[: text.prompt_tokens], skip_special_tokens=True) for text in texts]
    starts = {start: load_router(ensemble, start).log_weights(prompts) for start in ROUTERS}
    with_images = [i for i, text in enumerate(texts) if text.places]
    for start, router in load_trained_images(ensemble).items():
        if with_images:
            starts[start][with_images] = router.log_weights([texts[i].images() for i in with_images])
    return starts


def _totals(scores: Iterable[Scores], ways: Mapping[str, Callable[[Scores], Outcome]]) -> dict[str, Totals]:
    sums: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for of_text in scores:
        for name, outcome in ways.items():
            sums[name].append(summed(outcome(of_text)))
    return {name: Totals.of(rows) for name, rows in sums.items()}


def _noting(after_prompt: list[Float64s], scores: Iterable[Scores]) -> Iterator[Scores]:
    """``scores``, and in ``after_prompt`` the posterior log weights [K] that each text's prompt leaves."""
    for of_text in scores:
        after_prompt.append(log_weights_after(of_text.starts["prior"], of_text.prompt))
        yield of_text


def _with_average(
    rivals: Rivals, ensemble: Ensemble, directory: Path
) -> tuple[dict[str, Path], dict[str, str]]:
    """Where the models beside the experts are, the average in ``directory``; and why one is not defined."""
    models, undefined = dict(rivals.models), dict(rivals.undefined)
    directory.mkdir()
    try:
        average(ensemble.experts, directory)
        models[AVERAGE] = directory
    except TrainingError as error:
        undefined[AVERAGE] = str(error)
    order = (CENTRALIZED, AVERAGE, MOE, RANDOM)
    return models, {name: undefined[name] for name in order if name in undefined}


def _random_split(split: Run, system: System, texts: Sequence[Text], forward: _Forward) -> dict[str, Totals]:
    """``system`` with experts whose documents were dealt out by chance."""
    ensemble = Ensemble.load(split.ensemble)
    prior = np.tile(log_prior([expert.prior for expert in ensemble.experts]), (len(texts), 1))
    is_flow = ensemble.manifest.kind == "flow"
    models = [load_model(expert.path, is_flow) for expert in ensemble.experts]
    return _totals(forward(models, texts, {"prior": prior}), {system.name: system.outcome})


def _pruned(scores: Iterable[Scores], compared: Sequence[System]) -> list[SampledRow]:
    """Each budget of ``compared`` against none, on texts that the ensemble wrote."""
    outcomes: dict[float, list[Outcome]] = {system.prune: [] for system in compared}
    for of_text in scores:
        for system in compared:
            outcomes[system.prune].append(system.outcome(of_text))
    return [compare_pruned(budget, outcomes[0.0], pruned) for budget, pruned in outcomes.items() if budget]


def _rows(pool: Pool, totals: Mapping[str, Totals], compared: Sequence[System]) -> list[Row]:
    rows = {name: pool.row(name, total, totals[DENSE]) for name, total in totals.items()}
    for system in compared:
        rows[system.name].family, rows[system.name].prune = system.family, system.prune
    return list(rows.values())


def _differences(
    pool: Pool, totals: Mapping[str, Totals], default: System, best: str, compared: Sequence[System]
) -> list[Difference]:
    """All that the report states: the default against what it has to beat, clusters against chance, and the gap of
    every way to weight experts, in two parts."""
    named = {**totals, BEST: totals[best]}
    pairs = [(default.name, other) for other in (CENTRALIZED, RANDOM, *TOP_1, AVERAGE, MOE, BEST)]
    pairs += [
        (s.name, other) for s in compared if not s.prune or s is default for other in (DENSE, CENTRALIZED)
    ]
    return [
        Difference(first=first, second=second, nats=nats, standard_error=error)
        for first, second in dict.fromkeys(pairs)
        if second in named and first != second
        for nats, error in [pool.excess(named[first], named[second])]
    ]


def _trained(run: Run, rivals: Rivals, tokens_per_step: int) -> list[Trained]:
    """The experts, the centralized model, the mixture of experts after its merge (without what its experts took), and
    the experts of the random split, as far as there are any."""
    found = {name: run.expert(name) for name in run.experts} | rivals.models
    if rivals.split is not None:
        found |= {f"{RANDOM}: {name}": rivals.split.expert(name) for name in rivals.split.experts}
    reports = {name: read_expert_report(directory) for name, directory in found.items()}
    return [
        Trained(
            model=name,
            num_parameters=report.num_parameters,
            documents=report.train_documents,
            train_tokens=report.train_tokens,
            steps=report.steps,
            tokens_per_step=tokens_per_step,
        )
        for name, report in reports.items()
    ]
