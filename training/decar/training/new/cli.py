"""The `decar new` command: its options, its progress, what it says. What it does is the other modules'."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from decar.router.errors import DecarError, EnsembleError, did_you_mean
from decar.training.data.files import KINDS as FILE_KINDS

if TYPE_CHECKING:
    from decar.router.files import TrainedRouter
    from decar.training.new.checkpoints import Checkpoint

KINDS = ("posterior", "prior", "classifier", "centroid")
_NEEDS_DATA = ("classifier", "centroid")


def new(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The model id, and the directory that is made; a path puts it elsewhere."
        ),
    ],
    experts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="EXPERT=CHECKPOINT",
            help="An expert's name and its folder, or a model of the Hugging Face Hub: ORG/MODEL, ORG/MODEL@REVISION.",
            show_default=False,
        ),
    ] = None,
    prior: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERT=SHARE,...", help="Each expert's share before anything is read; they add up to 1."
        ),
    ] = None,
    sample: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Estimate the shares from texts: {FILE_KINDS}."),
    ] = None,
    router: Annotated[
        str,
        typer.Option(metavar="|".join(KINDS), help="Where weights come from when a request does not say."),
    ] = "posterior",
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERT=FILE,...", help="Fit the classifier and centroid routers to texts of each expert."
        ),
    ] = None,
    hard_links: Annotated[
        bool,
        typer.Option(
            "--hard-links", help="Share the checkpoints' files instead of copying them; on the same disk."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an ensemble that is there.")] = False,
) -> None:
    """Make an ensemble directory from checkpoints that exist.

    Says what of them does not fit, or differs, and what to do about it.
    """
    try:
        _new(name, experts or [], prior or [], sample, router, data or [], hard_links, force)
    except (OSError, UnicodeDecodeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise EnsembleError(f"{reason}; nothing is written") from None
    except ModuleNotFoundError as error:
        raise EnsembleError(f"{error.name} is not installed; install decar with its [train] extra") from None


def _new(
    name: str,
    experts: Sequence[str],
    prior: Sequence[str],
    sample: Path | None,
    kind: str,
    data: Sequence[str],
    hard_links: bool,
    force: bool,
) -> None:
    from decar.router.manifest import RouterEntry
    from decar.training.new.checkpoints import fetch_weights
    from decar.training.new.named import checkpoints_of, data_of, priors_of, target_of
    from decar.training.new.write import check_space, check_target, size_bytes, write_ensemble

    # What takes a moment comes first: nobody waits for a download to read of a wrong option.
    target = target_of(name)
    given = checkpoints_of(experts, {"--prior": prior, "--data": data})
    names = list(given)
    if prior and sample is not None:
        raise EnsembleError("--prior and --sample both say the priors; leave one out")
    if kind not in KINDS:
        raise EnsembleError(f"--router {kind}: choose {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    if kind in _NEEDS_DATA and not data:
        example = ",".join(f"{expert}={expert}.jsonl" for expert in names)
        raise EnsembleError(f"--router {kind} learns from texts of each expert; add --data {example}")
    priors = list(priors_of(prior, names).values()) if prior else None
    files = data_of(data, names) if data else {}
    check_target(target, force)
    texts = _sample(sample) if sample is not None else None

    checkpoints = _found(given)
    _check_fit(checkpoints)
    for checkpoint in checkpoints:
        fetch_weights(checkpoint)
    _check_files(checkpoints)
    needed = size_bytes(checkpoints)
    if not hard_links:
        check_space(target, needed)
    fitted = _fit_router(files) if files else None
    note = ""
    if texts is not None:
        priors, note = _estimate(checkpoints, texts, sample)
    elif priors is None:
        priors = [1 / len(names)] * len(names)
        note = "" if len(names) == 1 else "equal, as neither --prior nor --sample says otherwise"
    with _progress("copying", as_bytes=True) as progress:
        ensemble = write_ensemble(
            target,
            checkpoints,
            priors,
            RouterEntry.model_validate({"kind": kind}),
            fitted,
            hard_links,
            progress,
        )
    shares = ", ".join(f"{expert.name} {expert.prior:.3f}" for expert in ensemble.experts)
    _say(f"priors: {shares}" + (f" ({note})" if note else ""))
    verb = "share the checkpoints' files" if hard_links else "are copies"
    _say(f"{target} is written; its experts {verb}, {needed / 2**20:,.1f} MiB. Next:")
    _say(f"  decar inspect {shlex.quote(str(target))}")
    _say(f"  decar serve {shlex.quote(str(target))} --port 8000")


def _found(given: Mapping[str, str]) -> list[Checkpoint]:
    from decar.training.new.checkpoints import find

    found, problems = [], []
    for name, checkpoint in given.items():
        try:
            found.append(find(name, checkpoint))
        except DecarError as error:
            problems.append(str(error))
    _raise_all(problems)
    return found


def _check_fit(checkpoints: Sequence[Checkpoint]) -> None:
    from decar.training.new.fits import compare

    fit = compare(checkpoints)
    _raise_all(fit.errors)
    for line in fit.warnings:
        print(f"decar: warning: {line}", file=sys.stderr)


def _check_files(checkpoints: Sequence[Checkpoint]) -> None:
    """What `decar inspect` would find wrong with each alone, before anything is copied."""
    from decar.router.manifest import ExpertEntry, read_experts

    problems = []
    for checkpoint in checkpoints:
        try:
            _ = checkpoint.files
        except DecarError as error:
            problems.append(str(error))
            continue
        problems += read_experts(checkpoint.folder, [ExpertEntry(name=checkpoint.name, path=".", prior=1.0)])[
            1
        ]
    _raise_all(problems)


def _raise_all(problems: Sequence[str]) -> None:
    if len(problems) > 1:
        for problem in problems:
            print(f"problem: {problem}", file=sys.stderr)
        raise EnsembleError(f"{len(problems)} problems, above; nothing is written")
    for problem in problems:
        raise EnsembleError(problem)


def _sample(file: Path) -> list[str]:
    from decar.training.new.priors import MAX_TEXTS, PIECE_CHARS
    from decar.training.new.texts import sample_texts

    return sample_texts("--sample", file.expanduser(), MAX_TEXTS, PIECE_CHARS, cut_rows=False)


def _estimate(
    checkpoints: Sequence[Checkpoint], texts: Sequence[str], file: Path | None
) -> tuple[list[float], str]:
    """(the priors, where they come from)."""
    from transformers.utils.logging import disable_progress_bar

    from decar.router.manifest import ExpertCheckpoint
    from decar.training.new.priors import estimate_priors

    disable_progress_bar()  # one is enough

    experts = [ExpertCheckpoint(c.name, c.folder, 1.0, c.config) for c in checkpoints]
    with _progress("scoring the sample") as progress:
        estimate = estimate_priors(
            [expert.path for expert in experts],
            texts,
            min(expert.vocab_size for expert in experts),
            min((expert.max_positions for expert in experts if expert.max_positions), default=None),
            progress,
        )
    error = max(estimate.standard_errors)
    return estimate.priors, f"estimated from {estimate.texts:,} texts of {file}, ± {error:.3f} or less"


def _fit_router(files: Mapping[str, Path]) -> TrainedRouter[str]:
    from decar.training.new.routers import fit_routers

    with _console().status("fitting routers"):
        fitted, report = fit_routers(files)
    best = max(len(files), 1)
    for kind in ("classifier", "centroid"):
        quality = report.routers[kind].all_lengths
        _say(
            f"{kind}: right for {quality.accuracy:.1%} of {quality.prefixes:,} held-out beginnings of texts "
            f"(by chance {1 / best:.1%}), {quality.nll:.3f} nats (by chance {math.log(best):.3f})"
        )
    return fitted.router


@contextmanager
def _progress(what: str, as_bytes: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, gone when it is done; elsewhere nothing."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    done = DownloadColumn(binary_units=True) if as_bytes else MofNCompleteColumn()
    columns = (TextColumn(what), BarColumn(), done, TimeRemainingColumn())
    console = _console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    return Console(stderr=True, highlight=False)


def _say(line: str) -> None:
    print(line, flush=True)
