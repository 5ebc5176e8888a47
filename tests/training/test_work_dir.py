"""Where a run keeps what: every path as a user finds it, refusals, and that no other module has names of its own."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training import run as layout
from decar.training.config import TrainConfig
from decar.training.evaluate.random_split import random_config
from decar.training.run import Run, command_of, read_report, report_file, require
from decar.training.stages import Stage

RUN = Run(Path("work"))
STAGE = Stage(RUN.expert("code"), "settings", "files")
PATHS = {
    "work/partition": RUN.partition,
    "work/partition/DONE": layout.marker_file(RUN.partition),
    "work/partition/report.json": report_file(RUN.partition),
    "work/partition/map.png": layout.plot_file(RUN.partition, "map"),
    "work/partition/nearest.png": layout.plot_file(RUN.partition, "nearest"),
    "work/partition/documents.parquet": layout.spool_file(RUN.partition),
    "work/partition/code/train.parquet": RUN.shard("code", "train"),
    "work/partition/code/held_out.parquet": RUN.shard("code", "held_out"),
    "work/tokenizer": RUN.tokenizer,
    "work/experts/code": RUN.expert("code"),
    "work/experts/code/adapter": layout.adapter_folder(RUN.expert("code")),
    "work/experts/code/curve.png": layout.plot_file(RUN.expert("code"), "curve"),
    "work/router": RUN.router,
    "work/router/calibration.png": layout.plot_file(RUN.router, "calibration"),
    "work/export": RUN.export,
    "work/ensemble": RUN.ensemble,
    "work/ensemble-average": RUN.ensemble_average,
    "work/ensemble-moe": RUN.ensemble_moe,
    "work/moe": RUN.moe,
    "work/centralized": RUN.centralized,
    "work/random": RUN.random,
    "work/scores": RUN.scores,
    "work/scores/average": layout.average_folder(RUN.scores),
    "work/evaluate": RUN.evaluate,
    "work/evaluate/report.html": layout.page_file(RUN.evaluate),
    "work/evaluate/systems.png": layout.plot_file(RUN.evaluate, "systems"),
    "work/evaluate/comparisons.png": layout.plot_file(RUN.evaluate, "comparisons"),
    "work/evaluate/gaps.png": layout.plot_file(RUN.evaluate, "gaps"),
    "work/evaluate/pruning.png": layout.plot_file(RUN.evaluate, "pruning"),
    "work/curve": RUN.curve,
    "work/curve/curve.png": layout.plot_file(RUN.curve, "curve"),
    "work/split-2": RUN.split(2),
    "work/split-2/share-25/base": Run(RUN.split(2)).branched(0.25, "base"),
    "work/seed-3": RUN.seed(3),
    "work/logs/experts/code": RUN.logs(STAGE),
    "work/checkpoints/experts/code/settings-files": RUN.checkpoints(STAGE),
    "work/checkpoints/experts/code/settings-files/checkpoint-2/COMPLETE": layout.complete_file(
        RUN.checkpoints(STAGE) / "checkpoint-2"
    ),
}


class Sizes(BaseModel):
    documents: int


@pytest.mark.parametrize("expected", PATHS)
def test_paths(expected: str) -> None:
    assert PATHS[expected] == Path(expected)


def test_every_place_is_among_these_paths() -> None:
    places = {name for name, value in vars(Run).items() if isinstance(value, property)} - {
        "tokenizer_files",
        "centralized_lock",
    }
    assert {getattr(RUN, name) for name in places} <= set(PATHS.values())
    assert {f"{plot}.png" for plot in get_args(layout.Plot)} <= {Path(path).name for path in PATHS}


def test_the_documentation_lists_the_same_directories() -> None:
    document = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = document[document.index("## The work directory") : document.index("## Partition")]
    rows = re.findall(r"^\| (`.*?) \| (`.*?`).*?\|", table, re.MULTILINE)
    listed = {name: command for names, command in rows for name in re.findall(r"`([\w-]+)/", names)}
    assert listed.keys() == {Path(path).parts[1] for path in PATHS} - {
        "export",
        "moe",
        "seed-3",
        "split-2",
    } | {
        "seed-SEED",
        "split-K",
    }
    for name in ("partition", "tokenizer", "router", "centralized", "scores", "evaluate"):
        assert listed[name] == f"`{command_of(RUN.work_dir / name)}`"


def test_shards_are_those_of_all_experts() -> None:
    run = Run(Path("work"), experts=("prose", "code"))
    assert run.shards("train") == [run.shard("prose", "train"), run.shard("code", "train")]


def test_the_ensemble_may_be_elsewhere() -> None:
    run = Run(Path("work"), Path("served/demo"))
    assert (run.ensemble, run.ensemble_average) == (Path("served/demo"), Path("served/demo-average"))


def test_the_random_split_is_a_run_of_its_own(config: TrainConfig) -> None:
    split = random_config(config)
    assert split.run == Run(config.work_dir / "random", experts=("code", "prose"))
    assert split.tokenizer.path == config.run.tokenizer


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("directory", "command"),
    [
        (RUN.partition, "partition"),
        (RUN.tokenizer, "partition"),
        (RUN.expert("code"), "expert code"),
        # An expert may have the name of a stage.
        (RUN.expert("scores"), "expert scores"),
        (RUN.router, "router"),
        (RUN.export, "export"),
        (RUN.centralized, "centralized"),
        (RUN.scores, "evaluate"),
        (RUN.evaluate, "evaluate"),
        (Run(RUN.random).partition, "evaluate"),
        (RUN.curve, "curve"),
        (Run(RUN.split(2)).partition, "curve"),
        (Run(RUN.split(2)).branched(0.25, "base"), "curve"),
        (Run(RUN.split(2)).branched(0.25, "scores"), "curve"),
        (Run(RUN.random).expert("code"), "evaluate"),
    ],
)
def test_which_command_writes_a_directory(directory: Path, command: str) -> None:
    assert command_of(directory) == command


def test_a_missing_file_is_refused_with_what_makes_it(tmp_path: Path) -> None:
    run = Run(tmp_path)
    train, held_out = (run.shard("code", split) for split in layout.SPLITS)
    train.parent.mkdir(parents=True)
    train.touch()
    require(run.partition, train)
    message = f"{held_out} is missing; run `decar-train partition` first"
    with pytest.raises(TrainingError, match=f"^{re.escape(message)}$"):
        require(run.partition, train, held_out)


def test_a_report_is_read_or_refused(tmp_path: Path) -> None:
    directory = Run(tmp_path).expert("code")
    file = report_file(directory)
    missing = f"{file} is missing; run `decar-train expert code` first"
    with pytest.raises(TrainingError, match=f"^{re.escape(missing)}$"):
        read_report(directory, Sizes)
    directory.mkdir(parents=True)
    damaged = f"{file} cannot be read; delete {directory} and run `decar-train expert code` again"
    for content in (None, b"", b'{"documents": "many"}', b"\xff\xfe"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(TrainingError, match=f"^{re.escape(damaged)}$"):
            read_report(directory, Sizes)
    file.write_text('{"documents": 3}')
    assert read_report(directory, Sizes) == Sizes(documents=3)


# ---------------------------------------------------------------------------------------------------------------- names

MODULES = sorted(path for path in Path(layout.__file__).parent.rglob("*.py") if path.name != "run.py")
# `code`, `settings-files` and `checkpoint-2` are not the layout's: an expert's name, fingerprints, the Trainer's.
NAMES = {part for path in PATHS for part in Path(path).parts[1:]} - {"code", "settings-files", "checkpoint-2"}
FILES = {name for name in NAMES if "." in name} | {"DONE", "COMPLETE"}


def joined_names(source: str) -> Iterator[str]:
    """What of the layout ``source`` spells itself: joined to a path, or a file's name anywhere but in a docstring."""
    tree = ast.parse(source)
    sentences = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            below = ast.unparse(node.left)
            if below.endswith("work_dir") or re.search(r"\brun\.\w+(\(.*\))?$", below):
                yield ast.unparse(node)
            yield from spelled(node.right)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("joinpath", "with_name", "Path"):
                for argument in node.args:
                    yield from spelled(argument)
        elif isinstance(node, ast.Constant) and node not in sentences and node.value in FILES:
            yield node.value


def spelled(expression: ast.expr) -> Iterator[str]:
    for node in ast.walk(expression):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from NAMES & {*node.value.split("/"), f"{node.value}3"}  # seed-3 of f"seed-{seed}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_other_module_joins_a_name_of_the_work_directory(module: Path) -> None:
    assert list(joined_names(module.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "config.work_dir / 'anything'",
        "config.run.scores / 'anything'",
        "run.expert(name) / 'anything'",
        "directory / 'tokenizer' / 'tokenizer.json'",
        "directory / f'experts/{name}'",
        "directory / f'seed-{seed}'",
        "directory.joinpath('router')",
        "Path('partition', name)",
        "path.with_name('evaluate')",
        "REPORT = 'report.json'",
        "print(f'{directory}', 'map.png')",
    ],
)
def test_such_a_join_would_be_found(source: str) -> None:
    assert list(joined_names(source))


def test_what_is_no_join_is_left_alone() -> None:
    source = '''
def read(root, name):
    """The report of ``root`` / "report.json"."""
    print("router: done", root / "config.json", root / name, {"tokenizer": 1} | {"export": 2})
'''
    assert list(joined_names(source)) == []


def test_modules_have_the_names_of_the_directories_that_they_write() -> None:
    stages = {path.name for path in (RUN.partition, RUN.tokenizer, RUN.router, RUN.export, RUN.centralized)}
    stages |= {RUN.scores.name, RUN.evaluate.name}
    for stage in stages:
        (source,) = (
            path.read_text()
            for path in MODULES
            if (path.parent.name, path.stem) == (stage, "stage") or path.stem == stage
        )
        assert f"def {stage}_stage(" in source
        assert re.search(rf"\brun\.{stage}\b", source)
