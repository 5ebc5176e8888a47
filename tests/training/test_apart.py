"""Experts trained apart: in other directories, in several processes, and through kills."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from decar.router import Ensemble
from decar.training.config import TrainConfig, load_config
from decar.training.data.tokenizer import make_tokenizer, tokenizer_stage
from decar.training.expert.stage import complete_checkpoints, expert_stage, step_of, train_expert
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig
from tests.training.test_run import command

COMMAND = (sys.executable, "-m", "decar.training")
DEADLINE_S = 120


def made(path: Path, *overrides: str) -> TrainConfig:
    config = load_config(path, list(overrides))
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


def weights(work_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(work_dir / "experts" / name / "model.safetensors")


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_processes_that_see_only_their_own_shard_train_what_run_trains(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write_config()
    assert command(monkeypatch, "run", path) == 0
    together = tmp_path / "work"

    processes = []
    for name in ("code", "prose"):
        alone = tmp_path / f"only-{name}"
        shutil.copytree(together / "partition" / name, alone / "work" / "partition" / name)
        shutil.copytree(together / "tokenizer", alone / "work" / "tokenizer")
        shutil.copyfile(path, alone / "config.yaml")
        arguments = (
            "expert",
            name,
            "config.yaml",
            "--set",
            "work_dir=work",
            "--set",
            "data.files=[none.jsonl]",
        )
        processes.append(subprocess.Popen([*COMMAND, *arguments], cwd=alone))
    assert [process.wait(DEADLINE_S) for process in processes] == [0, 0]
    for name in ("code", "prose"):
        assert_equal(weights(together, name), weights(tmp_path / f"only-{name}" / "work", name))

    # Carried home, they are finished there.
    shutil.rmtree(together / "experts")
    for name in ("code", "prose"):
        shutil.copytree(tmp_path / f"only-{name}" / "work" / "experts" / name, together / "experts" / name)
    capfd.readouterr()
    assert command(monkeypatch, "run", path) == 0
    assert capfd.readouterr().out.count("done before") >= 4
    Ensemble.load(load_config(path).run.ensemble)


def test_a_machine_needs_no_other_experts_checkpoint(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(experts=["code", {"name": "prose", "model": {"checkpoint": "/elsewhere"}}])
    settings = ("--set", "tokenizer.path=/elsewhere")
    assert command(monkeypatch, "expert", "code", path, *settings) == 1
    assert "run `decar-train partition` first" in capsys.readouterr().err
    assert command(monkeypatch, "expert", "prose", path, *settings) == 1
    assert "the checkpoint of 'prose', /elsewhere, holds no config.json" in capsys.readouterr().err


def test_a_killed_expert_ends_with_the_same_weights(write_config: WriteConfig, tmp_path: Path) -> None:
    # Dropout, so that the state of the random numbers matters; several epochs, so that the order of the data does.
    settings = {"max_steps": 60, "save_steps": 3, "gradient_accumulation": 2, "save_total_limit": 1}
    model = {"attention_dropout": 0.1}
    path = write_config(training=settings, model=model)
    config = made(path)
    stage = expert_stage(config, "code")
    kill_after = random.Random(17).randrange(4, 40)

    with subprocess.Popen([*COMMAND, "expert", "code", path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            step = re.search(r"step (\d+)/60", line)
            if step and int(step[1]) >= kill_after:
                os.kill(child.pid, signal.SIGKILL)
                break
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
    assert not stage.is_done
    left = complete_checkpoints(config.run.checkpoints(stage))
    assert step_of(left[-1]) >= 3
    train_expert(config, "code", stage)
    resumed = weights(config.work_dir, "code")

    shutil.rmtree(stage.directory)
    train_expert(config, "code", stage)
    assert_equal(weights(config.work_dir, "code"), resumed)


def in_two_processes(path: Path) -> str:
    """What they print who train expert ``code`` of the configuration at ``path`` together."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = subprocess.run(
        [*torchrun, "-m", "decar.training", "expert", "code", path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_two_processes_train_what_one_trains(write_config: WriteConfig) -> None:
    # Eight steps are less than an epoch, whose last batch several processes fill up.
    path = write_config(training={"max_steps": 8, "batch_size": 4, "save_steps": 4, "tensorboard": True})
    config = made(path)
    stage = expert_stage(config, "code")
    train_expert(config, "code", stage)
    alone = weights(config.work_dir, "code")
    shutil.rmtree(stage.directory)

    assert in_two_processes(path).count("expert code: done in") == 1
    assert stage.is_done
    together = weights(config.work_dir, "code")
    moved = 8 * config.training.learning_rate
    for name, value in alone.items():
        # Gradients are summed in another order. Adam divides by their size, so that where they are all but zero the
        # rounding counts as much as a step does; nearly everywhere it does not.
        assert (value - together[name]).abs().max() < moved, name
        assert (value - together[name]).abs().mean() < 1e-3 * moved, name


def test_several_processes_do_one_thing_only(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert command(monkeypatch, "run", path) == 1
    assert "accelerate launch -m decar.training expert NAME CONFIG.yaml" in capsys.readouterr().err
    assert command(monkeypatch, "expert", "code", path, "--dry-run") == 1
    assert "--dry-run measures one process" in capsys.readouterr().err
    made(path)
    assert command(monkeypatch, "expert", "code", path) == 1
    assert "training.batch_size 2 cannot be dealt out to 3 processes" in capsys.readouterr().err
