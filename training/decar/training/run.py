"""The layout of a run's work directory, and the refusal where a part of it is missing. Knows names, no contents.

A directory has the name of the command that writes it, or of the module where that is a part of a command; a command's
module is `COMMAND/stage.py`, but `evaluate/centralized.py` and `evaluate/curve.py`:

    partition/                  report.json, map.png, nearest.png (where there are images)
    partition/EXPERT/           train.parquet, held_out.parquet
    tokenizer/
    experts/EXPERT/             the model, report.json, curve.png, adapter/ (where LoRA trained it)
    router/                     the router, report.json, calibration.png
    export/                     nothing but the marker; the ensemble is where `ensemble_dir` says, or in ensemble/
    ensemble-average/           one model of the experts' mean weights, always beside the ensemble
    ensemble-moe/               one mixture-of-experts model, always beside the ensemble
    moe/                        the same model before its export, report.json, curve.png (where it was trained)
    centralized/                as an expert
    random/                     a work directory of its own: the random split's
    scores/                     report.json: what `evaluate` measures of one seed
    evaluate/                   report.json, report.html and plots: what it says of all seeds
    curve/                      report.json, curve.png: what `curve` says of all seeds
    split-K/                    a work directory of its own: the curve's with K experts, without those
    split-K/share-PERCENT/      base/, together/, EXPERT/ (models as an expert's), scores/: of one share of the base
    seed-SEED/                  a work directory of its own: another seed's
    checkpoints/, logs/         of models in training, at the model's place: checkpoints/experts/EXPERT/...

A finished stage's directory holds its marker, DONE; a complete checkpoint's holds COMPLETE. The other files
of models, tokenizers and routers have the names that transformers and decar.router give them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel

from decar.router.errors import TrainingError

if TYPE_CHECKING:
    from decar.training.stages import Stage

Plot = Literal["map", "nearest", "calibration", "systems", "comparisons", "gaps", "pruning", "curve"]
Report = TypeVar("Report", bound=BaseModel)

SPLITS = ("train", "held_out")
_EXPERTS, _RANDOM, _SPLIT = "experts", "random", "split-"
_MARKER, _REPORT, _ADAPTER = "DONE", "report.json", "adapter"
# Of a stage's directory, patterns of what no ensemble holds.
NOT_EXPORTED = (_MARKER, _REPORT, "*.png", _ADAPTER)
# Directories whose name is not that of the command which writes them.
_PARTS_OF_COMMANDS = {"tokenizer": "partition", "scores": "evaluate", "moe": "export --merge moe"}


@dataclass(frozen=True)
class Run:
    """Where a run keeps what; nothing of it has to exist.

    Args:
        ensemble_dir: where the ensemble is to be, if not in the work directory.
        experts: their names, which their directories have too.
    """

    work_dir: Path
    ensemble_dir: Path | None = None
    experts: tuple[str, ...] = ()

    @property
    def partition(self) -> Path:
        return self.work_dir / "partition"

    def shard(self, expert: str, split: str) -> Path:
        """The parquet file of a shard; ``split`` is one of `SPLITS`.

        Its columns are ``text``, ``source``; where there are chats, ``messages`` and, if any has them, ``tools`` (JSON,
        or null); where texts are cut, ``origin``, the number of the input text, ``piece``, from 0, and ``is_last``;
        where there are images, ``images`` (encoded as they came, a list in each row).
        """
        return shard_file(self.partition, expert, split)

    def shards(self, split: str) -> list[Path]:
        """Those of all experts."""
        return [self.shard(expert, split) for expert in self.experts]

    @property
    def tokenizer(self) -> Path:
        return self.work_dir / "tokenizer"

    @property
    def tokenizer_files(self) -> list[Path]:
        """What every tokenizer has; there may be a processor's files beside them."""
        return [self.tokenizer / "tokenizer.json", self.tokenizer / "tokenizer_config.json"]

    def expert(self, name: str) -> Path:
        return self.work_dir / expert_path(name)

    @property
    def router(self) -> Path:
        return self.work_dir / "router"

    @property
    def export(self) -> Path:
        """What says that `ensemble` is finished."""
        return self.work_dir / "export"

    @property
    def ensemble(self) -> Path:
        return self.ensemble_dir or self.work_dir / "ensemble"

    @property
    def ensemble_average(self) -> Path:
        return self.ensemble.with_name(f"{self.ensemble.name}-average")

    @property
    def ensemble_moe(self) -> Path:
        return self.ensemble.with_name(f"{self.ensemble.name}-moe")

    @property
    def moe(self) -> Path:
        """The merged mixture of experts, trained; `ensemble_moe` is its export."""
        return self.work_dir / "moe"

    @property
    def centralized(self) -> Path:
        return self.work_dir / "centralized"

    @property
    def scores(self) -> Path:
        return self.work_dir / "scores"

    @property
    def evaluate(self) -> Path:
        return self.work_dir / "evaluate"

    @property
    def curve(self) -> Path:
        return self.work_dir / "curve"

    def split(self, num_experts: int) -> Path:
        """The work directory of the curve's runs with ``num_experts`` experts."""
        return self.work_dir / f"{_SPLIT}{num_experts}"

    def branched(self, share: float, name: str) -> Path:
        """Of the curve, model ``name`` where a base has ``share`` of all training, or that base, or their scores."""
        return self.work_dir / f"share-{100 * share:g}" / name

    @property
    def random(self) -> Path:
        """The work directory of the random split."""
        return self.work_dir / _RANDOM

    def seed(self, seed: int) -> Path:
        """The work directory of another ``seed``."""
        return self.work_dir / f"seed-{seed}"

    def checkpoints(self, stage: Stage) -> Path:
        """Where the model of ``stage`` keeps checkpoints; those of another configuration or shard lie elsewhere."""
        place = stage.directory.relative_to(self.work_dir)
        return self.work_dir / "checkpoints" / place / f"{stage.config}-{stage.inputs}"

    def lock(self, expert: str | None = None) -> Path:
        """The file that is locked by who works on the run, or on one ``expert`` of it."""
        return self.work_dir / ".lock" if expert is None else self.expert(expert).with_name(f".{expert}.lock")

    @property
    def centralized_lock(self) -> Path:
        """The file that is locked by who trains the centralized model, beside whatever else goes on in the run."""
        return self.work_dir / ".centralized.lock"

    def logs(self, stage: Stage) -> Path:
        """Where TensorBoard finds the curves of the model of ``stage``."""
        return self.work_dir / "logs" / stage.directory.relative_to(self.work_dir)


def expert_path(name: str) -> str:
    """Where an expert is, alike in a work directory and in an ensemble."""
    return f"{_EXPERTS}/{name}"


# The files of a stage, by its directory: while it is written, that has another name than `Run`'s.


def marker_file(directory: Path) -> Path:
    return directory / _MARKER


def report_file(directory: Path) -> Path:
    return directory / _REPORT


def plot_file(directory: Path, plot: Plot) -> Path:
    return directory / f"{plot}.png"


def plot_files(directory: Path) -> list[Path]:
    """The plots that there are, by name."""
    return sorted(directory.glob("*.png"))


def page_file(evaluate: Path) -> Path:
    return evaluate / "report.html"


def shard_file(partition: Path, expert: str, split: str) -> Path:
    return partition / expert / f"{split}.parquet"


def spool_file(partition: Path) -> Path:
    """All documents, until they are dealt out."""
    return partition / "documents.parquet"


def adapter_folder(model: Path) -> Path:
    return model / _ADAPTER


def average_folder(scores: Path) -> Path:
    """The parameter average, until it is scored."""
    return scores / "average"


def complete_file(checkpoint: Path) -> Path:
    """What says that a checkpoint was written to its end."""
    return checkpoint / "COMPLETE"


def command_of(directory: Path) -> str:
    """The `decar-train` command that writes a stage's ``directory``, with the expert's name where it takes one."""
    work_dir, command = directory.parent, _PARTS_OF_COMMANDS.get(directory.name, directory.name)
    if any(part.startswith(_SPLIT) for part in work_dir.parts[-2:]):
        return "curve"
    if work_dir.name == _EXPERTS:
        work_dir, command = work_dir.parent, f"expert {directory.name}"
    # The random split has no configuration file, and hence no command of its own.
    return "evaluate" if work_dir.name == _RANDOM else command


def require(directory: Path, *files: Path) -> None:
    """Refuse to go on without ``files``, which the stage of ``directory`` writes.

    Raises:
        TrainingError: one of them is missing.
    """
    for file in files:
        if not file.is_file():
            raise TrainingError(f"{file} is missing; run `decar-train {command_of(directory)}` first")


def read_report(directory: Path, kind: type[Report]) -> Report:
    """The report, of this ``kind``, of the stage that wrote ``directory``.

    Raises:
        TrainingError: it is missing or damaged.
    """
    file, command = report_file(directory), command_of(directory)
    if not directory.is_dir():
        raise TrainingError(f"{file} is missing; run `decar-train {command}` first")
    try:
        return kind.model_validate_json(file.read_text())
    except (OSError, ValueError):  # ValueError: bytes that are no text, or a text that is no such report
        raise TrainingError(
            f"{file} cannot be read; delete {directory} and run `decar-train {command}` again"
        ) from None
