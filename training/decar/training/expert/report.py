"""What is kept of how a model was trained: an expert's, or that of one they are compared with. Knows no training."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel

from decar.training.expert.watch import CurvePoint, Sample
from decar.training.run import read_report


class ExpertReport(BaseModel):
    """``report.json`` of an expert; losses in nats per token.

    ``train_loss`` is None where nothing was trained, as in a model that is merged and no more. ``shards`` holds the
    SHA-256 of each file that it was trained or measured on, ``versions`` the software that did. ``dropped`` counts what
    of its training documents it did not learn, by what it is. Half of these documents have at most
    ``document_tokens_p50`` tokens, 99 of 100 at most ``document_tokens_p99``. ``steps`` is how long it was trained,
    ``kept_step`` after which of them it had the weights that were kept, None in reports of older versions.
    ``held_out_loss`` is of these weights as they are saved; the losses in ``curve`` are those of training.
    """

    expert: str
    num_parameters: int
    train_tokens: int
    held_out_tokens: int
    steps: int
    train_loss: float | None
    held_out_loss: float
    train_time_s: float
    train_documents: int | None = None
    held_out_documents: int | None = None
    dropped: dict[str, int] = {}
    document_tokens_p50: int | None = None
    document_tokens_p99: int | None = None
    shards: dict[str, str] = {}
    versions: dict[str, str] = {}
    kept_step: int | None = None
    curve: list[CurvePoint] = []
    samples: list[Sample] = []


def read_expert_report(directory: Path) -> ExpertReport:
    """The report of a finished model in ``directory``.

    Raises:
        TrainingError: it is missing or damaged.
    """
    return read_report(directory, ExpertReport)


def priors_of(reports: Mapping[str, ExpertReport]) -> dict[str, float]:
    """Each expert's prior: its share of the training tokens."""
    num_tokens = sum(report.train_tokens for report in reports.values())
    return {name: report.train_tokens / num_tokens for name, report in reports.items()}


def versions() -> dict[str, str]:
    """Of what trains a model, by package, for its report."""
    return {package: _version(package) for package in ("decar", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
