"""Paths that exist are taken as they are, and two runs never work in one place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, load_config
from decar.training.data.sources import input_files
from decar.training.run import Run
from decar.training.stages import lock
from tests.training.conftest import WriteConfig
from tests.training.test_run import command

NAMES = ["my data [v1] (final).jsonl", "a*b?.jsonl", "[!x].jsonl", "{a,b} $HOME ~.jsonl", "[/red] 語.jsonl"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["", "runs [2026] (new)"])
def test_what_exists_is_taken_literally(tmp_path: Path, name: str, folder: str) -> None:
    name = name.replace("/", "-")
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    # These are what the names would find if they were globs.
    for other in ("my data v (final).jsonl", "aXbY.jsonl", "y.jsonl"):
        (root / other).touch()
    (root / name).touch()

    def found(pattern: str) -> list[str]:
        return [file.name for file in input_files(DataConfig(files=[str(root / pattern)]))]

    assert found(name) == [name]
    assert set(found("*.jsonl")) == {path.name for path in root.iterdir()}
    assert found("**/y.js*") == ["y.jsonl"]
    assert found("[xyz].jsonl") == ["y.jsonl"]


def test_relative_paths_and_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my [data]").mkdir()
    Path("my [data]/a.txt").touch()
    for pattern in ("my [data]/a.txt", "my [data]/*", "./my [data]/?.txt", "[m]y [[]data]/a.txt"):
        (file,) = input_files(DataConfig(files=[pattern]))
        assert file.samefile("my [data]/a.txt")
    with pytest.raises(TrainingError, match=r"data.files: 'my \[data\]/b.txt' matches no file"):
        input_files(DataConfig(files=["my [data]/b.txt"]))


def test_a_run_in_a_folder_with_brackets_prints_its_paths_whole(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "code [v1] (final).jsonl"
    (tmp_path / "code.jsonl").rename(source)
    work = tmp_path / "work [b] (c)"
    files = [str(source), str(tmp_path / "prose.jsonl")]
    path = write_config(work_dir=str(work), data={"files": files}, partition={"name_by": {}})
    assert command(monkeypatch, "run", path) == 0
    out = capsys.readouterr().out
    assert f"map {work}/partition/map.png" in out
    assert f"plot {work}/router/calibration.png" in out
    assert f"export: done, {work}/ensemble " in out
    assert "code [v1]" in out
    assert not list(work.rglob("*.lock"))


# ---------------------------------------------------------------------------------------------- one at a time


@contextmanager
def at_work(path: Path, *words: str) -> Iterator[None]:
    """Beside a decar-train that has the lock and waits; it is killed at the end."""
    script = (
        "import sys, time\n"
        "from decar.training import cli\n"
        "def wait(*_): print('locked', flush=True); time.sleep(600)\n"
        "cli._run = cli._expert = wait\n"
        f"sys.argv = ['decar-train', *{list(words)!r}, {str(path)!r}]\n"
        "cli.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_a_second_run_is_refused_and_a_killed_one_leaves_nothing_behind(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    config = load_config(path)
    with at_work(path, "run"):
        for words in (("run",), ("partition",), ("expert", "code"), ("export",), ("router",), ("evaluate",)):
            before = time.monotonic()
            assert command(monkeypatch, *words, path) == 1
            assert time.monotonic() - before < 10
            (line,) = capsys.readouterr().err.splitlines()
            assert line == (
                f"error: another decar-train is at work on {config.work_dir}; wait until it has ended, "
                "or set another work_dir"
            )
        assert command(monkeypatch, "partition", path, "--set", f"work_dir={config.work_dir}-2") == 0
    assert command(monkeypatch, "partition", path) == 0
    assert not list(config.work_dir.rglob("*.lock"))


def test_experts_are_trained_side_by_side_and_no_expert_twice(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    config = load_config(path)
    assert command(monkeypatch, "partition", path) == 0
    with at_work(path, "expert", "code"):
        assert command(monkeypatch, "expert", "prose", path) == 0
        capsys.readouterr()
        assert command(monkeypatch, "expert", "code", path) == 1
        assert f"at work on expert code in {config.work_dir};" in capsys.readouterr().err
        assert command(monkeypatch, "run", path) == 1
        assert f"at work on {config.work_dir};" in capsys.readouterr().err
        # The other processes of one expert belong to the first.
        monkeypatch.setenv("RANK", "1")
        assert command(monkeypatch, "expert", "prose", path) == 0
        monkeypatch.delenv("RANK")
    assert command(monkeypatch, "expert", "code", path) == 0
    assert not list(config.work_dir.rglob("*.lock"))


def test_the_centralized_model_is_trained_beside_the_run_and_not_twice(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo trains it so."""
    path = write_config()
    config = load_config(path)
    assert command(monkeypatch, "run", path) == 0
    with lock(config.run.lock(), "the run"):
        assert command(monkeypatch, "centralized", path) == 0
    capsys.readouterr()
    with lock(config.run.centralized_lock, "it"):
        assert command(monkeypatch, "centralized", path) == 1
        assert f"at work on the centralized model in {config.work_dir};" in capsys.readouterr().err
        assert command(monkeypatch, "run", path) == 0
    assert not list(config.work_dir.rglob("*.lock"))


def test_the_lock_leaves_no_directory_that_it_made(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "new")
    with lock(run.lock(), "it", shared=True), lock(run.lock(), "it", shared=True):
        assert json.dumps(os.listdir(run.work_dir)) == '[".lock"]'
        with (
            pytest.raises(TrainingError, match="another decar-train is at work on it"),
            lock(run.lock(), "it"),
        ):
            pass
    assert not run.work_dir.exists()
    with lock(run.lock(), "it"):
        (run.work_dir / "file").touch()
    assert os.listdir(run.work_dir) == ["file"]
