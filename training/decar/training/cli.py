"""The `decar-train` command: stages in order, tables, one line per error. Knows no stage's inside."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

import decar
from decar.router.errors import DecarError, TrainingError
from decar.training.config import TrainConfig, load_config, load_seeds

if TYPE_CHECKING:
    from decar.training.expert.report import ExpertReport
    from decar.training.partition.report import PartitionReport
    from decar.training.stages import Stage

app = typer.Typer(
    name="decar-train",
    help="Train independent experts and export them as one ensemble.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(markup=False)  # what is printed may hold the user's paths and texts, brackets included
_SHOWN_ROWS = 8
# Of a parameter in training: itself, its gradient and Adam's two moments in fp32.
_STATE_BYTES = 16

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="the training configuration")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="override a field; may be repeated")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="say what training would take and show a batch; write nothing")
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"decar-train {decar.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Nothing to do: typer wants a function to hang the options on that come before a command."""


@app.command()
def run(config: ConfigPath, set_: Overrides = None, dry_run: DryRun = False) -> None:
    """All stages, in order; finished ones are not redone."""
    settings = _load(config, set_, check=not dry_run)
    if dry_run:
        _dry_run(settings)
        return
    with _alone(settings):
        _run(settings)


@app.command()
def partition(config: ConfigPath, set_: Overrides = None) -> None:
    """Split the data into one shard per expert, and make the tokenizer they share."""
    settings = _load(config, set_)
    with _alone(settings):
        _partition(settings)


@app.command()
def expert(
    name: Annotated[str, typer.Argument(metavar="NAME", help="which expert")],
    config: ConfigPath,
    set_: Overrides = None,
    dry_run: DryRun = False,
) -> None:
    """Train one expert on its shard; an interrupted one continues.

    Needs its shard, the tokenizer and the configuration. `accelerate launch -m decar.training expert …` trains it in
    several processes.
    """
    settings = _load(config, set_, name, check=not dry_run)
    if dry_run:
        _dry_run(settings, name)
        return
    with _alone(settings, name):
        _expert(settings, name)


@app.command()
def router(config: ConfigPath, set_: Overrides = None) -> None:
    """Train the classifier and the centroids on all shards, and measure them on held-out text."""
    settings = _load(config, set_)
    with _alone(settings):
        _router(settings)


@app.command()
def export(
    config: ConfigPath,
    set_: Overrides = None,
    merge: Annotated[
        Literal["average", "moe"] | None,
        typer.Option(
            help="one model beside the ensemble: of the experts' mean weights, or a mixture of experts (Mixtral)"
        ),
    ] = None,
) -> None:
    """Write the ensemble directory, or one merged model."""
    settings = _load(config, set_)
    with _alone(settings):
        if merge is None:
            _export(settings)
        elif merge == "average":
            _average(settings)
        else:
            _moe(settings)


@app.command()
def centralized(config: ConfigPath, set_: Overrides = None) -> None:
    """Train what the ensemble is held against: one model on all shards, with all the experts' compute."""
    _centralized(_load(config, set_))


@app.command()
def evaluate(config: ConfigPath, set_: Overrides = None) -> None:
    """Hold the ensemble against a centralized model, a random split and more, over seeds; makes what is missing."""

    def one_seed(one: TrainConfig) -> None:
        for step in (_run, _centralized, _mixture, _random_split, _scores):
            step(one)

    _over_seeds(config, set_, one_seed, _evaluate)


@app.command()
def curve(config: ConfigPath, set_: Overrides = None) -> None:
    """How far experts are behind one model, by how much of all training went into a common base; over seeds."""
    _over_seeds(config, set_, _points, _curve)


def main() -> None:
    """Entry point: errors that the user can mend end in one line and exit code 1."""
    try:
        app()
    except (DecarError, OSError) as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(
            f"error: {error}", style="red", highlight=False
        )
        sys.exit(1)


def _over_seeds(
    path: Path,
    overrides: list[str] | None,
    one_seed: Callable[[TrainConfig], None],
    all_seeds: Callable[[TrainConfig, list[TrainConfig]], None],
) -> None:
    """Do ``one_seed`` for the run of each of ``evaluate.seeds``, then sum up; nobody else works on any meanwhile."""
    settings = _load(path, overrides)
    configs = load_seeds(path, overrides)
    for one in configs:
        _check_models(one)
    with ExitStack() as stack:
        for one in {one.work_dir: one for one in (settings, *configs)}.values():
            stack.enter_context(_alone(one))
        for one in configs:
            if len(configs) > 1:
                console.rule(f"seed {one.seed}")
            one_seed(one)
        all_seeds(settings, configs)


def _load(
    path: Path, overrides: list[str] | None, only: str | None = None, check: bool = True
) -> TrainConfig:
    """The configuration at ``path``; with ``only``, its other experts' models may be on other machines.

    Args:
        check: whether models are checked, or whoever calls does that.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = load_config(path, overrides)
    if check:
        _check_models(config, only)
    if only is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError(
            "several processes train one expert: `accelerate launch -m decar.training expert NAME CONFIG.yaml`; "
            "run every other stage in one"
        )
    # Of several processes, the first one speaks.
    console.quiet = os.environ.get("RANK", "0") != "0"
    return config


@contextmanager
def _alone(config: TrainConfig, expert: str | None = None) -> Iterator[None]:
    """Work on the run as nobody else does; or on one ``expert``, beside others who train others of it.

    Raises:
        TrainingError: another process is at work on it.
    """
    from decar.training.stages import lock

    if (
        os.environ.get("RANK", "0") != "0"
    ):  # of several processes that train one expert, the first one holds the lock
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(lock(config.run.lock(), str(config.work_dir), shared=expert is not None))
        if expert is not None:
            stack.enter_context(lock(config.run.lock(expert), f"expert {expert} in {config.work_dir}"))
        yield


def _check_models(config: TrainConfig, only: str | None = None) -> None:
    from decar.training.expert.model import check_model
    from decar.training.expert.options import check_options

    check_options(config.training)
    for name in config.expert_names if only is None else [only]:
        check_model(config.recipe(name))


def _run(config: TrainConfig) -> None:
    _partition(config)
    for name in config.expert_names:
        _expert(config, name)
    _router(config)
    _export(config)


def _partition(config: TrainConfig) -> None:
    from decar.training.data.tokenizer import make_tokenizer, tokenizer_stage
    from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
    from decar.training.run import plot_file

    stage = partition_stage(config)
    if stage.is_done:
        report = read_partition_report(stage)
        console.print("partition: done before")
    else:
        with Progress(*_columns("partition:"), TimeRemainingColumn(), console=console) as bar:
            tasks: dict[str, TaskID] = {}

            def show(step: str, done: int, total: int | None) -> None:
                if step not in tasks:
                    tasks[step] = bar.add_task("", total=total, note=step)
                bar.update(tasks[step], completed=done, total=total)

            report = make_partition(config, stage, show)
        console.print("partition: done")
    _show_partition(report, plot_file(stage.directory, "map"))

    stage = tokenizer_stage(config.run, config.tokenizer)
    if stage.is_done:
        console.print("tokenizer: done before")
    else:
        with console.status("tokenizer: training"):
            make_tokenizer(config.run, config.tokenizer, stage)
        console.print("tokenizer: done")


def _show_partition(report: PartitionReport, map_file: Path) -> None:
    table = Table("expert", "train", "held out", "sources", "top terms")
    for shard in report.shards:
        sources = [f"{source} {count:,}" for source, count in shard.sources.items()]
        if len(sources) > 3:
            sources[3:] = [f"{len(sources) - 3} more"]
        numbers = f"{shard.train_documents:,}", f"{shard.held_out_documents:,}"
        table.add_row(shard.expert, *numbers, ", ".join(sources), " ".join(shard.top_terms))
    console.print(table)
    for shard in report.shards:
        for example in shard.nearest[:1]:
            console.print(f"{shard.expert}, nearest example: {example}", no_wrap=True, overflow="ellipsis")
    _show_dropped(report)
    silhouette = "none" if report.silhouette is None else f"{report.silhouette:.3f}"
    console.print(
        f"{report.method}: {report.documents:,} documents, largest/smallest {report.balance:.3f}; of {report.sample:,} "
        f"of them mean cosine to the centroid {report.mean_cosine:.3f}, silhouette {silhouette}; map {map_file}",
        soft_wrap=True,
    )


def _show_dropped(report: PartitionReport) -> None:
    if report.formats:
        read = (
            f"{count:,} {'texts' if name == 'text' else f'{name} rows'}"
            for name, count in report.formats.items()
        )
        console.print(f"read {', '.join(read)}", soft_wrap=True)
    for what, count in report.left_out.items():
        _warn(f"left out {count:,} {what}")
    for reason, count in report.dropped.items():
        _warn(f"dropped {count:,} of {report.texts:,} texts {reason}")
    if report.held_out_duplicates:
        what = "removed" if report.duplicates_removed else "kept"
        _warn(
            f"{what} {report.held_out_duplicates:,} held-out documents that are among the training documents too"
        )
    if report.most_repeated is not None:
        _warn(
            f"kept {report.duplicates:,} training documents that repeat another in the same words; the most frequent "
            f"is there {report.most_repeated.times:,} times: {report.most_repeated.begins!r}"
        )
    if report.skipped_lines:
        files = ", ".join(f"{file} {count:,}" for file, count in report.skipped_lines.items())
        skipped = sum(report.skipped_lines.values())
        _warn(f"skipped {skipped:,} bad lines ({files}); the first: {report.first_skipped}")


def _warn(line: str) -> None:
    console.print(line, style="yellow", soft_wrap=True)


def _expert(config: TrainConfig, name: str) -> None:
    from decar.training.expert.stage import expert_stage, train_expert

    _model(config, expert_stage(config, name), f"expert {name}", partial(train_expert, config, name))


def _centralized(config: TrainConfig) -> None:
    from decar.training.evaluate.centralized import centralized_stage, train_centralized, why_no_twin
    from decar.training.stages import lock

    problem = why_no_twin(config.recipes)
    if problem:
        console.print(f"centralized model: none, {problem}", soft_wrap=True)
        return
    with lock(config.run.centralized_lock, f"the centralized model in {config.work_dir}"):
        _model(
            config, centralized_stage(config), "centralized model", partial(train_centralized, config.recipes)
        )


def _mixture(config: TrainConfig) -> None:
    from decar.training.export.moe import why_no_moe

    problem = why_no_moe(config.recipes)
    if problem:
        console.print(f"mixture of experts: none, {problem}", soft_wrap=True)
    else:
        _merge(config)


def _merge(config: TrainConfig) -> Stage:
    from decar.training.export.moe import moe_stage, train_moe

    stage = moe_stage(config)
    _model(
        config, stage, "mixture of experts", partial(train_moe, config.recipes, config.moe), "starts it again"
    )
    return stage


def _random_split(config: TrainConfig) -> None:
    from decar.training.evaluate.random_split import random_config, why_no_random_split

    problem = why_no_random_split(config)
    if problem:
        console.print(f"random split: none, {problem}", soft_wrap=True)
        return
    console.print("random split: the same run, with documents dealt out by chance")
    split = random_config(config)
    _partition(split)
    for name in split.expert_names:
        _expert(split, name)
    _export(split)


def _model(
    config: TrainConfig,
    stage: Stage,
    what: str,
    train: Callable[[Stage, list[Any]], ExpertReport],
    again: str = "continues from its last checkpoint",
) -> None:
    from decar.training.expert.report import read_expert_report

    if stage.is_done:
        report = read_expert_report(stage.directory)
        verb = "done before"
    else:
        try:
            report = train(stage, [_progress_callback(what, config.training.sample_prompts)])
        except KeyboardInterrupt:
            console.print(f"{what}: interrupted; the same command {again}")
            raise typer.Exit(130) from None
        verb = f"done in {report.train_time_s:.0f} s"
    steps = f"{report.steps:,} steps"
    if report.kept_step not in (None, report.steps):
        steps += f" of which {report.kept_step:,} are kept"
    console.print(
        f"{what}: {verb}, {report.num_parameters / 1e6:.1f}M parameters, {report.train_tokens:,} tokens, "
        f"{steps}, held-out loss {report.held_out_loss:.3f} nats/token "
        f"({'a bound: ' if config.is_flow else ''}perplexity {math.exp(min(report.held_out_loss, 100)):.1f})",
        soft_wrap=True,
    )
    for sample in report.samples:
        if sample.step == report.kept_step:
            _show_sample(what, sample.prompt, sample.text)
    for reason, count in report.dropped.items():
        _warn(f"{what}: dropped {count:,} {reason}")


def _show_sample(what: str, prompt: str, text: str) -> None:
    console.print(f"{what}: {prompt!r} goes on {text!r}", soft_wrap=True, highlight=False)


def _router(config: TrainConfig) -> None:
    from decar.training.router.stage import read_router_report, router_stage, train_router
    from decar.training.run import plot_file

    stage = router_stage(config)
    if stage.is_done:
        report, verb = read_router_report(stage), "done before"
    else:
        with console.status("router: training"):
            report, verb = train_router(config.run, config.router, config.seed, stage), "done"
    routers = report.routers.values()
    table = Table("held out", "texts", *report.routers, box=box.SIMPLE_HEAD, pad_edge=False)
    rows = {f"{length} chars": [r.by_length[length] for r in routers] for length in report.lengths}
    for name, row in {**rows, "all": [router.all_lengths for router in routers]}.items():
        cells = (f"{quality.accuracy:.1%} {quality.nll:.3f} {quality.ece:.3f}" for quality in row)
        table.add_row(name, f"{row[0].prefixes:,}", *cells)
    console.print(table)
    console.print(
        "each router's accuracy, negative log-likelihood in nats and calibration error, by length of text"
    )
    if report.images is not None:
        by_image = (
            f"{name} {quality.accuracy:.1%} {quality.nll:.3f} {quality.ece:.3f}"
            for name, quality in report.images.routers.items()
        )
        console.print(f"by images: {', '.join(by_image)}", soft_wrap=True)
    console.print(f"router: {verb}, plot {plot_file(stage.directory, 'calibration')}", soft_wrap=True)


def _export(config: TrainConfig) -> None:
    from decar.router import Ensemble
    from decar.training.export.stage import export as write_ensemble
    from decar.training.export.stage import export_stage, is_exported

    stage = export_stage(config)
    if is_exported(config.run, stage):
        ensemble, verb = Ensemble.load(config.run.ensemble), "done before"
    else:
        ensemble, verb = write_ensemble(config, stage), "done"
    priors = ", ".join(f"{expert.name} {expert.prior:.3f}" for expert in ensemble.experts)
    console.print(f"export: {verb}, {ensemble.directory} (priors: {priors})", soft_wrap=True)


def _scores(config: TrainConfig) -> None:
    from decar.training.evaluate.scores import make_scores, scores_stage

    _scored(scores_stage(config), "scores", partial(make_scores, config))


def _scored(stage: Stage, what: str, make: Callable[[Stage, Callable[[int, int], None]], object]) -> None:
    if stage.is_done:
        console.print(f"{what}: done before")
        return
    with Progress(*_columns(f"{what}:"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=None, note="")
        make(stage, lambda done, total: bar.update(task, completed=done, total=total, note="texts"))
    console.print(f"{what}: done")


def _evaluate(config: TrainConfig, configs: list[TrainConfig]) -> None:
    from decar.training.evaluate.stage import evaluate_stage, make_evaluation, read_evaluation
    from decar.training.run import page_file

    stage = evaluate_stage(config, configs)
    if stage.is_done:
        report, verb = read_evaluation(stage), "done before"
    else:
        report, verb = make_evaluation(config, [one.run for one in configs], stage), "done"
    columns = (
        "system",
        "perple-\nxity",
        "nats above\nposterior",
        "tokens\nright",
        *(["answers\nright"] if report.rows[0].exact is not None else []),
        "active",
        "prompt\npasses",
    )
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for row in report.rows:
        if report.shows(row.prune):
            spread = row.spread.get("above_dense", row.standard_error)
            table.add_row(
                row.system,
                f"{row.perplexity:.2f}",
                f"{row.above_dense:+.4f}±{spread:.4f}",
                f"{row.accuracy:.2%}",
                *([] if row.exact is None else [f"{row.exact:.2%}"]),
                f"{row.active_experts:.3f}",
                f"{row.prompt_passes:.2f}",
            )
    console.print(table)
    what = (
        "the error over texts" if len(configs) == 1 else f"the standard deviation over {len(configs)} seeds"
    )
    console.print(
        f"{sum(report.texts.values()):,} held-out texts, {sum(report.tokens.values()):,} tokens after prompts, pooled "
        f"by the experts' priors; ±: {what}; active: experts per token; passes: per prompt",
        soft_wrap=True,
    )
    distances = [
        f"ε {row.prune:g}: {row.total_variation:.2g} ± {row.standard_error:.1g}"
        for row in report.sampled
        if report.shows(row.prune)
    ]
    if distances:
        console.print(
            f"total variation from the whole posterior, over the {report.sampled_tokens} tokens that it writes itself "
            f"after a prompt: {', '.join(distances)}",
            soft_wrap=True,
        )
    console.print(f"centralized model: {report.centralized}", soft_wrap=True)
    console.print(f"mixture of experts: {report.moe}", markup=False, soft_wrap=True)
    for sentence in report.verdict:
        console.print(sentence, soft_wrap=True)
    console.print(f"evaluate: {verb}, {page_file(stage.directory)}, json and plots beside it", soft_wrap=True)


def _points(config: TrainConfig) -> None:
    from decar.training.evaluate.curve import make_point, models, point_stage, settings, split_config

    shares, counts = settings(config).shares, settings(config).experts
    for count in counts:
        console.print(f"split into {count}:")
        _partition(split_config(config, count))
    for share in shares:
        for count in counts:
            for model in models(config, share, count):
                _model(config, model.stage, f"{share:.0%} base, {count} experts: {model.name}", model.train)
            _scored(
                point_stage(config, share, count),
                f"{share:.0%} base, {count} experts: scores",
                partial(make_point, config, share, count),
            )


def _curve(config: TrainConfig, configs: list[TrainConfig]) -> None:
    from decar.training.evaluate.curve import curve_stage, make_curve, read_curve
    from decar.training.run import plot_file

    stage = curve_stage(config, configs)
    if stage.is_done:
        report, verb = read_curve(stage), "done before"
    else:
        report, verb = make_curve(config, configs, stage), "done"
    columns = (
        "base",
        "experts",
        "behind one\nmodel",
        "95% interval",
        "verdict",
        "behind one\nin one go",
        "diver-\ngence",
        "gain",
        "rule",
    )
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place in report.places:
        behind, straight = place.behind_together, place.behind_one_go
        table.add_row(
            f"{place.share:.0%}",
            str(place.num_experts),
            f"{behind.mean:+.3f}",
            f"{behind.low:+.3f} to {behind.high:+.3f}",
            place.verdict,
            "" if straight is None else f"{straight.mean:+.3f}",
            f"{place.divergence.mean:.1f}%",
            f"{place.gain.mean:.1f}%",
            f"{place.expected_gain:.1f}%",
        )
    console.print(table)
    for sentence in report.verdict:
        console.print(sentence, soft_wrap=True)
    console.print(
        f"curve: {verb}, plot {plot_file(stage.directory, 'curve')}, json beside it", soft_wrap=True
    )


def _average(config: TrainConfig) -> None:
    from decar.training.export.stage import export_average

    console.print(
        f"export: done, {export_average(config)} (the mean of {len(config.experts)} experts)", soft_wrap=True
    )


def _moe(config: TrainConfig) -> None:
    from decar.training.export.moe import export_moe

    target = export_moe(config, _merge(config))
    console.print(f"export: done, {target} (a mixture of {len(config.experts)} experts)", soft_wrap=True)


def _dry_run(config: TrainConfig, only: str | None = None) -> None:
    from decar.training.dry_run import (
        Cost,
        count_parameters,
        estimate,
        partition_report,
        problems,
        with_shards,
    )
    from decar.training.dry_run_tables import shortened, show_data

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainingError("--dry-run measures one process; run it without `accelerate launch`")
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), soft_wrap=True)
    found = problems(config, only)
    for line in found:
        _warn(f"problem: {line}")
    if found:
        for name in config.expert_names if only is None else [only]:
            number = count_parameters(config, name)
            if number is not None:
                console.print(
                    f"{name}: {number:,} parameters, {_size(_STATE_BYTES * number)} for weights, gradients and "
                    "optimiser, if all are trained",
                    soft_wrap=True,
                )
        raise TrainingError(f"this cannot be run ({len(found)} problems); the first: {found[0]}")
    known: dict[str, Cost] = {}
    if only is None:
        with with_shards(config) as shards:
            report = partition_report(shards)
            estimates = [estimate(config, name, shards, known) for name in config.expert_names]
    else:
        report = partition_report(config)
        estimates = [estimate(config, only, config, known)]
    show_data(console, config, report, estimates)
    columns = "expert", "state", "parameters", "tokens", "steps", "memory", "time"
    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False)
    for expert in estimates:
        state = "to train"
        if expert.is_done:
            state = "done before"
        elif expert.steps_done:
            state = f"continues at {expert.steps_done:,}"
        cost, about = expert.cost, "≈ " if expert.is_sampled else ""
        trained = "" if cost.num_trained == cost.num_parameters else f", {cost.num_trained:,} trained"
        learned = (
            "" if expert.num_targets > 0.9 * expert.train_tokens else f", {expert.num_targets:,} learned"
        )
        table.add_row(
            expert.expert,
            state,
            f"{cost.num_parameters:,}{trained}",
            f"{about}{expert.train_tokens:,}{learned}",
            f"{'' if config.training.max_steps else about}{expert.steps:,} × {expert.tokens_per_step:,}",
            _size(cost.memory_bytes),
            _duration(expert.time_s),
        )
    console.print(table)
    console.print(
        "tokens: of the training documents; steps × tokens of one; time: "
        f"{_duration(sum(e.time_s for e in estimates))} in all, at the measured "
        + ", ".join(f"{e.cost.step_time_s:.3g} s" for e in estimates)
        + " a step; memory: weights, gradients, optimiser and activations",
        soft_wrap=True,
    )
    for expert in estimates[:1]:
        sample = ", had it the sample alone" if expert.is_sampled else ""
        console.print(f"the first batch of {expert.expert}{sample}:")
        for row, text in enumerate(expert.batch[:_SHOWN_ROWS]):
            console.print(f"[{row}] {shortened(text)}", soft_wrap=True, highlight=False)
        if len(expert.batch) > _SHOWN_ROWS:
            console.print(f"and {len(expert.batch) - _SHOWN_ROWS:,} rows more")
    console.print("dry run: nothing was trained, nothing was written")


def _size(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.1f} GiB"


def _duration(time_s: float) -> str:
    if time_s < 90:
        return f"{time_s:.0f} s"
    return f"{time_s / 60:.0f} min" if time_s < 5400 else f"{time_s / 3600:.1f} h"


def _columns(what: str) -> tuple[ProgressColumn, ...]:
    return TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")


def _time_left(time_s: float) -> str:
    minutes, seconds = divmod(round(time_s), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _progress_callback(what: str, prompts: Sequence[str]) -> Any:
    """A bar on a terminal, a line per ``log_steps`` elsewhere; and how ``prompts`` go on, whenever that is tried."""
    from transformers import TrainerCallback

    from decar.training.expert.watch import sample_key

    is_terminal = console.is_terminal
    bar = Progress(*_columns(what), TimeRemainingColumn(), console=console, disable=not is_terminal)

    class ShowProgress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.task = bar.add_task(what, total=state.max_steps, completed=state.global_step, note="")
            self.notes: dict[str, str] = {}
            self.start_s: float | None = None
            bar.start()

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.start_s is None:
                self.start_s, self.first_step = time.monotonic(), state.global_step

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.update(self.task, completed=state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            logs = logs or {}
            step = f"{what}: step {state.global_step}/{state.max_steps}"
            if "loss" in logs and self.start_s is not None:
                pace_s = (time.monotonic() - self.start_s) / (state.global_step - self.first_step)
                self.notes |= {"loss": f"loss {float(logs['loss']):.3f}", "pace": f"{pace_s:.2g} s/step"}
                left = _time_left(pace_s * (state.max_steps - state.global_step))
                self._say(f"{step}, {self.notes['loss']}, {self.notes['pace']}, {left} left")
            if "eval_loss" in logs:
                self.notes["held out"] = f"held-out loss {float(logs['eval_loss']):.3f}"
                self._say(f"{step}, {self.notes['held out']}")
            for i, prompt in enumerate(prompts):
                if sample_key(i) in logs:
                    _show_sample(step, prompt, logs[sample_key(i)])
            bar.update(self.task, note=", ".join(self.notes.values()))

        def _say(self, line: str) -> None:
            if not is_terminal:
                console.print(line, soft_wrap=True)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            bar.stop()

    return ShowProgress()
