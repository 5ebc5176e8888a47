"""What is seen and chosen while an expert trains: held-out losses, the best weights, samples, curves, options."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, Trainer, TrainerCallback
from transformers.integrations import integration_utils

from decar.router import Ensemble
from decar.router.errors import TrainingError
from decar.training import cli
from decar.training.config import TrainConfig, load_config
from decar.training.data.blocks import IGNORED, mean_loss
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.evaluate.centralized import with_all_compute
from decar.training.expert.model import build_model, round_weights, saved_dtype
from decar.training.expert.report import read_expert_report
from decar.training.expert.stage import (
    complete_checkpoints,
    expert_stage,
    make_trainer,
    read_blocks,
    step_of,
    train_expert,
)
from decar.training.expert.watch import CurvePoint, curve
from decar.training.fingerprints import expert_fingerprint
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig, tiny_config
from tests.training.test_apart import in_two_processes
from tests.training.test_expert import StopAt, weights
from tests.training.test_run import command

# Ever larger steps: the held-out loss falls, rises and falls, and the last one is not the lowest.
WANDERS = {"learning_rate": 0.3, "max_steps": 20, "warmup": 0.98, "eval_steps": 2, "save_steps": 5}
Weights = dict[str, torch.Tensor]


def made(path: Path, *overrides: str) -> TrainConfig:
    config = load_config(path, list(overrides))
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


def trained(config: TrainConfig, *callbacks: TrainerCallback) -> Weights:
    stage = expert_stage(config, "code")
    shutil.rmtree(stage.directory, ignore_errors=True)
    train_expert(config, "code", stage, callbacks)
    return weights(config, "code")


def assert_equal(left: Weights, right: Weights) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


class Watch(TrainerCallback):
    """Notes the weights and the metrics at every evaluation."""

    def __init__(self, measure: Callable[[Any], float] | None = None):
        self.measure = measure
        self.losses: dict[int, float] = {}
        self.measured: dict[int, float] = {}
        self.weights: dict[int, Weights] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        self.losses[state.global_step] = given["metrics"]["eval_loss"]
        self.weights[state.global_step] = {n: v.clone() for n, v in model.state_dict().items()}
        if self.measure is not None:
            self.measured[state.global_step] = self.measure(model)


# ------------------------------------------------------------------------------------------ held-out losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_per_token_over_the_whole_held_out_set(write_config: WriteConfig, precision: str) -> None:
    config = made(write_config(training={"eval_steps": 2, "precision": precision, "sequence_length": 30}))
    tokenizer = load_tokenizer(config.run.tokenizer)
    held_out = read_blocks(config.recipe("code"), ["code"], "held_out", tokenizer)
    watch = Watch(lambda model: mean_loss(model, held_out, 3))
    trained(config, watch)
    assert list(watch.losses) == [2, 4, 6]
    assert watch.losses == pytest.approx(watch.measured, abs=1e-6)
    report = read_expert_report(config.run.expert("code"))
    assert watch.losses[6] == pytest.approx(report.held_out_loss, abs=1e-6)
    # The last row has padding, so that a mean of rows or batches would be another number.
    counts = [int((held_out[i]["labels"] != IGNORED).sum()) for i in range(len(held_out))]
    assert len(set(counts)) > 1
    assert len(held_out) % config.training.batch_size == 1


def test_two_processes_measure_what_one_measures(write_config: WriteConfig) -> None:
    settings = {"keep": "best", "max_steps": 8, "sequence_length": 30, "sample_prompts": ["def"]}
    path = write_config(training=WANDERS | settings | {"sample_tokens": 5})
    config = made(path)
    printed = in_two_processes(path)
    report = read_expert_report(config.run.expert("code"))
    losses = {point.step: point.held_out_loss for point in report.curve if point.held_out_loss is not None}
    assert list(losses) == [2, 4, 6, 8]
    assert report.kept_step == min(losses, key=losses.__getitem__)
    # The held-out rows are odd in number, so that one is in both processes' last batch.
    held_out = read_blocks(config.recipe("code"), ["code"], "held_out", load_tokenizer(config.run.tokenizer))
    assert len(held_out) % 2
    model = AutoModelForCausalLM.from_pretrained(config.run.expert("code"))
    assert losses[report.kept_step] == pytest.approx(mean_loss(model, held_out, 1), abs=1e-6)
    assert printed.count("step 2/8, held-out loss ") == 1
    assert printed.count("'def' goes on ") == 5


def test_measuring_and_sampling_leave_the_weights_as_they_are(write_config: WriteConfig) -> None:
    path = write_config(model={"attention_dropout": 0.1})
    plain = trained(made(path))
    watched = ["training.eval_steps=1", "training.sample_prompts=[def]", "training.sample_tokens=3"]
    assert_equal(plain, trained(load_config(path, watched)))


def test_a_held_out_loss_that_is_not_finite_stops_at_once(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made(write_config(training={"eval_steps": 2}))

    nan = torch.tensor([float("nan")]), torch.ones(1)
    monkeypatch.setattr("decar.training.data.blocks.row_losses", lambda *_: nan)
    with pytest.raises(
        TrainingError, match=r"the held-out loss is nan after step 2 of 6; nothing of it is kept"
    ):
        train_expert(config, "code", expert_stage(config, "code"))
    assert not config.run.expert("code").exists()


# ------------------------------------------------------------------------------------------ the best weights


class Killed(TrainerCallback):
    """Stops as a kill would: at an event, once the others have seen it."""

    def __init__(self, event: str, step: int):
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_best_weights_are_kept(write_config: WriteConfig) -> None:
    config = made(write_config(training=WANDERS | {"keep": "best", "save_total_limit": 1}))
    watch = Watch()
    kept = trained(config, watch)
    report = read_expert_report(config.run.expert("code"))
    best = min(watch.losses, key=watch.losses.__getitem__)
    assert 2 < best < 20
    assert (report.kept_step, report.steps) == (best, 20)
    assert report.held_out_loss == pytest.approx(watch.losses[best], abs=1e-6)
    assert_equal(kept, watch.weights[best])
    last = trained(
        config.model_copy(update={"training": config.training.model_copy(update={"keep": "last"})})
    )
    assert_equal(last, watch.weights[20])


@pytest.mark.parametrize("patience", [None, 2])
def test_a_kill_at_any_point_gives_the_same_best_weights(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, patience: int | None
) -> None:
    """At a step's end, after an evaluation, within and after a save, and when training has ended."""
    settings = {"keep": "best", "save_total_limit": 1, "patience": patience}
    config = made(write_config(training=WANDERS | settings, model={"attention_dropout": 0.1}))
    stage = expert_stage(config, "code")
    whole = trained(config)
    report = read_expert_report(stage.directory)
    best, end = report.kept_step, report.steps
    points = [(point.step, point.held_out_loss) for point in report.curve if point.held_out_loss]
    assert best is not None
    assert best < end
    if patience is not None:
        assert end == best + 2 * patience < 20
    kills = [
        Killed(event, step)
        for event, step in {
            "on_step_end": end,
            "on_evaluate": best,
            "on_save": best,
            "on_train_end": end,
        }.items()
    ]
    for kill in kills:
        shutil.rmtree(stage.directory)
        with pytest.raises(KeyboardInterrupt):
            train_expert(config, "code", stage, [kill])
        assert not stage.is_done
        train_expert(config, "code", stage)
        assert_equal(weights(config, "code"), whole)
        again = read_expert_report(stage.directory)
        assert (again.kept_step, again.steps) == (best, end)
        assert [(point.step, point.held_out_loss) for point in again.curve if point.held_out_loss] == points
    # In the middle of a save: files are there, and nothing that says they are whole.
    save = Trainer._save_rng_state

    def half(self: Any, directory: str) -> None:
        if self.state.global_step == best:
            raise KeyboardInterrupt
        save(self, directory)

    shutil.rmtree(stage.directory)
    monkeypatch.setattr(Trainer, "_save_rng_state", half)
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage)
    monkeypatch.setattr(Trainer, "_save_rng_state", save)
    train_expert(config, "code", stage)
    assert_equal(weights(config, "code"), whole)


def test_no_step_is_added_to_an_expert_that_was_killed_after_its_last(write_config: WriteConfig) -> None:
    # Six steps end within an epoch.
    config = made(write_config(training={"max_steps": 6, "save_steps": 3}))
    whole = trained(config)
    stage = expert_stage(config, "code")
    report = read_expert_report(stage.directory)
    shutil.rmtree(stage.directory)
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [Killed("on_train_end", 6)])
    assert [step_of(each) for each in complete_checkpoints(config.run.checkpoints(stage))] == [3, 6]
    train_expert(config, "code", stage)
    assert_equal(weights(config, "code"), whole)
    again = read_expert_report(stage.directory)
    assert (again.steps, again.held_out_loss, again.curve) == (6, report.held_out_loss, report.curve)
    assert again.train_loss is not None
    assert again.train_loss > 1


def test_a_rotation_spares_the_best(write_config: WriteConfig) -> None:
    settings = {"keep": "best", "save_total_limit": 2, "save_steps": 3}
    config = made(write_config(training=WANDERS | settings))
    stage = expert_stage(config, "code")
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [Killed("on_train_end", 20)])
    left = [step_of(each) for each in complete_checkpoints(config.run.checkpoints(stage))]
    best = min(left)
    assert left == [best, 18, 20]
    train_expert(config, "code", stage)
    assert read_expert_report(stage.directory).kept_step == best


def test_how_often_it_is_measured_may_change_while_it_is_interrupted(write_config: WriteConfig) -> None:
    path = write_config()
    config = made(path)
    stage = expert_stage(config, "code")
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [StopAt(3)])
    measured = load_config(path, ["training.eval_steps=2"])
    assert expert_stage(measured, "code") == stage
    watch = Watch()
    train_expert(measured, "code", stage, [watch])
    assert list(watch.losses) == [4, 6]


def test_the_centralized_model_stops_no_earlier(write_config: WriteConfig) -> None:
    config = made(write_config(training=WANDERS | {"keep": "best", "patience": 1}))
    for name in config.expert_names:
        train_expert(config, name, expert_stage(config, name))
    steps = [read_expert_report(config.run.expert(name)).steps for name in config.expert_names]
    twin = with_all_compute(config.recipes).training
    assert max(steps) < 20
    assert (twin.max_steps, twin.patience, twin.keep) == (sum(steps), None, "best")


# ------------------------------------------------------------------------------------------ fingerprints


def test_fingerprints_of_older_configurations_stay(tmp_path: Path) -> None:
    """As they were computed before there was any of these settings."""
    older = tiny_config(Path("/x"))
    assert expert_fingerprint(TrainConfig.model_validate(older).recipe("code")) == "25e60c60d1103542"
    older["training"] |= {"gradient_accumulation": 2, "precision": "bf16", "freeze": ["embed_tokens"]}
    assert expert_fingerprint(TrainConfig.model_validate(older).recipe("code")) == "a1a8bf23086d19ff"


def test_what_weights_depend_on(write_config: WriteConfig) -> None:
    def fingerprint(*changes: str) -> str:
        return expert_fingerprint(
            load_config(path, [f"training.{change}" for change in changes]).recipe("code")
        )

    path = write_config()
    for change in ("eval_steps=2", "report_to=[wandb]", "sample_prompts=[a]", "sample_tokens=3", "keep=last"):
        assert fingerprint(change) == fingerprint(), change
    best = ("eval_steps=2", "keep=best")
    different = [(), best, ("eval_steps=3", "keep=best"), (*best, "patience=2"), ("save_dtype=bf16",)]
    different += [("trainer={optim: adafactor}",), ("trainer={optim: sgd}",)]
    assert len({fingerprint(*changes) for changes in different}) == len(different)


# ------------------------------------------------------------------------------------------ what is shown


def test_the_report_has_the_curve(write_config: WriteConfig) -> None:
    config = made(write_config(training={"eval_steps": 3, "log_steps": 2, "tensorboard": True}))
    trained(config)
    report = read_expert_report(config.run.expert("code"))
    assert [(p.step, p.train_loss is not None, p.held_out_loss is not None) for p in report.curve] == [
        (2, True, False),
        (3, False, True),
        (4, True, False),
        (6, True, True),
    ]
    # A step takes the rate of before it: the first none, of warm-up.
    assert [p.learning_rate for p in report.curve if p.train_loss] == pytest.approx(
        [1e-3, 7e-4, 2e-4], rel=0.3
    )
    png = (config.run.expert("code") / "curve.png").read_bytes()
    assert png.startswith(b"\x89PNG")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.work_dir / "logs" / "experts" / "code"))
    events.Reload()
    for tag, name in (
        ("train/loss", "train_loss"),
        ("eval/loss", "held_out_loss"),
        ("train/learning_rate", "learning_rate"),
    ):
        expected = [(p.step, getattr(p, name)) for p in report.curve if getattr(p, name) is not None]
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_a_curve_is_read_from_the_log() -> None:
    log = [
        {"step": 2, "loss": 3.0, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 2, "eval_loss": 3.5},
        {"step": 2, "sample_1": "x"},
        {"step": 3, "eval_loss": 3.25},
        {"step": 3, "train_loss": 3.0},
    ]
    assert curve(log) == [
        CurvePoint(step=2, train_loss=3.0, held_out_loss=3.5, learning_rate=0.1),
        CurvePoint(step=3, held_out_loss=3.25),
    ]
    assert curve([]) == []


def test_lines_say_how_far_it_is(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(training={"eval_steps": 3, "sample_prompts": ["def"], "sample_tokens": 3})
    made(path)
    assert command(monkeypatch, "expert", "code", path) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [
        re.fullmatch(r"expert code: step (\d)/6, loss (\d\.\d{3}), [\d.e+-]+ s/step, \d+ s left", line)
        for line in lines
    ]
    assert [int(step[1]) for step in steps if step] == [1, 2, 3, 4, 5, 6]
    assert any("step 6/6" in line and line.endswith(" 0 s left") for line in lines)
    losses = [re.fullmatch(r"expert code: step (\d)/6, held-out loss \d\.\d{3}", line) for line in lines]
    assert [int(loss[1]) for loss in losses if loss] == [3, 6]
    assert sum(line.startswith("expert code: step 3/6: 'def' goes on '") for line in lines) == 1
    assert sum(line.startswith("expert code: 'def' goes on '") for line in lines) == 1


def test_the_bar_says_the_same(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = made(write_config(training={"eval_steps": 3}))
    console = Console(force_terminal=True, width=100, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    monkeypatch.setattr(cli, "console", console)
    trained(config, cli._progress_callback("expert code", []))
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.export_text())
    assert re.search(
        r"expert code .* 6/6 loss \d\.\d{3}, [\d.e-]+ s/step, held-out loss \d\.\d{3} 0:00:00", shown
    )


def test_time_left_is_in_units_that_fit() -> None:
    assert [cli._time_left(time_s) for time_s in (0, 41.4, 101, 3600, 7500)] == [
        "0 s",
        "41 s",
        "1 min 41 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


# ------------------------------------------------------------------------------------------ services


class Service(TrainerCallback):
    """Stands for what a service's package does: it is given the run's name, and every log."""

    runs: dict[str | None, list[int]] = {}  # noqa: RUF012

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.runs.setdefault(args.run_name, []).append(state.global_step)


def test_services_get_the_run_by_its_name(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Service)
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: True)
    monkeypatch.setattr(Service, "runs", {})
    path = write_config(training={"report_to": ["trackio"]})
    config = made(path)
    assert command(monkeypatch, "expert", "code", path, "--dry-run") == 0
    assert Service.runs == {}
    trained(config)
    assert Service.runs == {"tiny code": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mlflow",
            r"training.report_to: 'mlflow' needs its package, which is not installed; try `pip install mlflow`",
        ),
        (
            "wandbb",
            r"training.report_to: transformers reports to no 'wandbb'; did you mean 'wandb'\?; it knows azure",
        ),
        ("tensorboard", r"training.report_to: for tensorboard, set training.tensorboard: true instead"),
    ],
)
def test_services_that_are_not_there_are_named_before_anything_starts(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    message: str,
) -> None:
    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: False)
    path = write_config(training={"report_to": [name]})
    assert command(monkeypatch, "run", path) == 1
    out, error = capsys.readouterr()
    assert re.match(f"error: {message}", error)
    assert error.count("\n") == 1
    assert not out
    assert not load_config(path).work_dir.exists()
    assert command(monkeypatch, "run", path, "--dry-run") == 1
    assert re.search(message, capsys.readouterr().err)


# ------------------------------------------------------------------------------------------ saved dtype


@pytest.fixture
def base_of(write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration whose experts start from a checkpoint of a dtype."""

    def write(dtype: torch.dtype, **training: Any) -> Path:
        config = made(write_config())
        directory = tmp_path / "base"
        shutil.copytree(config.run.tokenizer, directory)
        build_model(config.recipe("code"), load_tokenizer(directory)).to(dtype).save_pretrained(directory)
        shutil.rmtree(config.work_dir)
        path = write_config(tokenizer={"path": str(directory)}, training=training)
        data = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(data | {"model": {"checkpoint": str(directory)}}))
        return path

    return write


@pytest.mark.parametrize(
    ("stored", "setting", "lora", "saved"),
    [
        (torch.bfloat16, "base", False, torch.bfloat16),
        (torch.float16, "base", False, torch.float16),
        (torch.float32, "base", False, torch.float32),
        (torch.bfloat16, "base", True, torch.bfloat16),
        (torch.bfloat16, "fp32", False, torch.float32),
        (torch.float32, "bf16", False, torch.bfloat16),
    ],
)
def test_weights_are_saved_in_the_dtype_of_their_base(
    base_of: Callable[..., Path], stored: torch.dtype, setting: str, lora: bool, saved: torch.dtype
) -> None:
    path = base_of(stored, save_dtype=setting, lora={"rank": 2} if lora else None, learning_rate=1e-2)
    config = made(path)
    kept = trained(config)
    assert {value.dtype for value in kept.values()} == {saved}
    described = json.loads((config.run.expert("code") / "config.json").read_text())
    assert described["dtype"] == str(saved).removeprefix("torch.")
    # The loss is that of the weights in the file.
    held_out = read_blocks(config.recipe("code"), ["code"], "held_out", load_tokenizer(config.run.tokenizer))
    model = AutoModelForCausalLM.from_pretrained(config.run.expert("code"), dtype=torch.float32)
    report = read_expert_report(config.run.expert("code"))
    assert report.held_out_loss == pytest.approx(mean_loss(model, held_out, 2), abs=1e-7)
    if saved != torch.float32 and not lora:
        whole = trained(load_config(path, ["training.save_dtype=fp32"]))
        assert_equal(kept, {name: value.to(saved) for name, value in whole.items()})
        unrounded = read_expert_report(config.run.expert("code")).held_out_loss
        assert unrounded != pytest.approx(report.held_out_loss, abs=1e-7)


def test_fresh_weights_stay_fp32_and_a_base_is_what_most_of_it_is(
    write_config: WriteConfig, base_of: Callable[..., Path]
) -> None:
    assert saved_dtype(load_config(write_config()).recipe("code")) == torch.float32
    config = load_config(base_of(torch.bfloat16))
    file = Path(config.model_of("code")["checkpoint"]) / "model.safetensors"
    tensors = load_file(file)
    norms = {name: value.float() for name, value in tensors.items() if "norm" in name}
    assert norms
    from safetensors.torch import save_file

    save_file(tensors | norms, file, metadata={"format": "pt"})
    assert saved_dtype(config.recipe("code")) == torch.bfloat16


def test_weights_that_do_not_fit_are_refused(config: TrainConfig) -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    round_weights(model, torch.bfloat16)
    with pytest.raises(
        TrainingError, match=r"training.save_dtype: the weights weight do not fit into float16"
    ):
        round_weights(model, torch.float16)


def test_experts_in_bf16_are_exported_and_merged(
    base_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = base_of(torch.bfloat16)
    assert command(monkeypatch, "run", path) == 0
    assert command(monkeypatch, "export", path, "--merge", "average") == 0
    assert command(monkeypatch, "export", path, "--merge", "moe", "--set", "moe.steps=2") == 0
    run = load_config(path).run
    experts = [load_file(expert.path / "model.safetensors") for expert in Ensemble.load(run.ensemble).experts]
    for name, value in load_file(run.ensemble_average / "model.safetensors").items():
        mean = (experts[0][name].float() + experts[1][name].float()) / 2
        assert torch.equal(value, mean.to(torch.bfloat16)), name
    merged = load_file(run.ensemble_moe / "model.safetensors")
    assert {value.dtype for value in merged.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(run.ensemble_moe).dtype == torch.bfloat16
    config = load_config(path)
    held_out = read_blocks(config.recipes[0], config.expert_names, "held_out", load_tokenizer(run.tokenizer))
    model = AutoModelForCausalLM.from_pretrained(run.ensemble_moe, dtype=torch.float32)
    report = read_expert_report(run.moe)
    assert report.held_out_loss == pytest.approx(mean_loss(model, held_out, 2), abs=1e-6)
    assert [(p.step, p.held_out_loss) for p in report.curve][-1] == (2, report.held_out_loss)
    assert {file.name for file in run.moe.glob("*.png")} == {"curve.png"}
    assert not list(run.ensemble_moe.glob("*.png"))
    assert not list(run.ensemble.rglob("curve.png"))


# ------------------------------------------------------------------------------------------ samples


def test_samples_are_what_the_model_generates(write_config: WriteConfig) -> None:
    prompts = ["def return", "self ("]
    settings = WANDERS | {
        "sample_prompts": prompts,
        "sample_tokens": 7,
        "tensorboard": True,
        "eval_steps": 8,
    }
    config = made(write_config(training=settings))
    trained(config)
    samples = read_expert_report(config.run.expert("code")).samples
    assert [(each.step, each.prompt) for each in samples] == [(s, p) for s in (8, 16, 20) for p in prompts]
    tokenizer = AutoTokenizer.from_pretrained(config.run.expert("code"))
    model = AutoModelForCausalLM.from_pretrained(config.run.expert("code"))
    for sample in samples[-2:]:
        given = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        for _ in range(7):
            following = model(given).logits[:, -1].argmax(dim=-1)
            if following == tokenizer.eos_token_id:
                break
            given = torch.cat([given, following[None]], dim=1)
        assert tokenizer.decode(given[0], skip_special_tokens=True) == sample.prompt + sample.text
    assert samples[0].text != samples[-2].text

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.work_dir / "logs" / "experts" / "code"), {"tensors": 0})
    events.Reload()
    shown = {
        (e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("train/sample_1/text_summary")
    }
    assert shown == {(0, prompts[0])} | {(each.step, each.text) for each in samples[::2]}


def test_samples_survive_an_interruption(write_config: WriteConfig) -> None:
    config = made(write_config(training={"eval_steps": 2, "sample_prompts": ["def"], "sample_tokens": 3}))
    trained(config)
    stage = expert_stage(config, "code")
    whole = read_expert_report(stage.directory)
    shutil.rmtree(stage.directory)
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [StopAt(5)])
    train_expert(config, "code", stage)
    resumed = read_expert_report(stage.directory)
    assert [each.step for each in resumed.samples] == [2, 4, 6]
    assert (resumed.samples, resumed.curve) == (whole.samples, whole.curve)


def test_chats_are_sampled_as_chats(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, word in (("code", "def"), ("prose", "whale")):
        rows = [
            {"messages": [{"role": "user", "content": f"{word} {i}"}, {"role": "assistant", "content": "Y"}]}
            for i in range(15)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<assistant>{% endif %}"
    sampled = {"sample_prompts": ["def 3"], "sample_tokens": 4}
    config = made(write_config(tokenizer={"chat_template": template}, training=sampled))
    given: list[str] = []
    generate = GenerationMixin.generate

    def noted(self: Any, ids: torch.Tensor, **options: Any) -> Any:
        given.append(load_tokenizer(config.run.tokenizer).decode(ids[0]))
        return generate(self, ids, **options)

    monkeypatch.setattr(GenerationMixin, "generate", noted)
    trained(config)
    assert given == ["<user>def 3<assistant>"]


def test_prompts_that_do_not_fit_are_named(write_config: WriteConfig) -> None:
    config = made(write_config(training={"sample_prompts": ["def", "return " * 40], "sample_tokens": 90}))
    with pytest.raises(
        TrainingError,
        match=r"training.sample_prompts: the \d+ tokens of 'return return.*max_position_embeddings 128",
    ) as caught:
        train_expert(config, "code", expert_stage(config, "code"))
    assert "\n" not in str(caught.value)
    assert not (config.work_dir / "checkpoints").exists()


# ------------------------------------------------------------------------------------------ options


def trainer_of(config: TrainConfig) -> Any:
    tokenizer = load_tokenizer(config.run.tokenizer)
    train = read_blocks(config.recipe("code"), ["code"], "train", tokenizer)
    return make_trainer(
        config.recipe("code"),
        build_model(config.recipe("code"), tokenizer),
        train,
        config.work_dir / "checkpoints",
    )


def test_options_reach_the_trainer(write_config: WriteConfig) -> None:
    path = write_config()
    config = made(path)
    plain = trained(config)
    options = {
        "optim": "adafactor",
        "neftune_noise_alpha": 5,
        "lr_scheduler_type": "linear",
        "dataloader_num_workers": 0,
    }
    changed = load_config(path, [f"training.trainer={json.dumps(options)}"])
    arguments = trainer_of(changed).args
    assert (arguments.optim, arguments.neftune_noise_alpha) == ("adafactor", 5)
    assert (arguments.lr_scheduler_type, arguments.seed, arguments.learning_rate) == ("linear", 0, 1e-3)
    kept = trained(changed)
    assert not torch.equal(kept["lm_head.weight"], plain["lm_head.weight"])
    rates = [p.learning_rate for p in read_expert_report(changed.run.expert("code")).curve]
    assert rates[-1] == pytest.approx(1e-3 / 5, rel=0.01)  # one step before a straight line's end


def test_options_for_fsdp_reach_the_trainer_and_are_refused_where_accelerate_would_ignore_them(
    write_config: WriteConfig,
) -> None:
    options = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    path = write_config()
    made(path)
    config = load_config(path, [f"training.trainer={json.dumps(options)}"])
    seen: list[Any] = []
    init = Trainer.__init__

    def noted(self: Any, *given: Any, **named: Any) -> None:
        seen.append(named["args"])
        init(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", noted)
        with pytest.raises(
            TrainingError, match=r"training.trainer: Using fsdp only works in distributed training"
        ):
            trainer_of(config)
    (arguments,) = seen
    assert arguments.fsdp
    assert arguments.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optm", "TrainingArguments has no such option; did you mean 'optim'?"),
        ("output_dir", "set work_dir instead"),
        ("seed", "set seed instead"),
        ("learning_rate", "set training.learning_rate instead"),
        ("save_steps", "set training.save_steps instead"),
        ("bf16", "set training.precision instead"),
        ("load_best_model_at_end", "set training.keep instead"),
        ("resume_from_checkpoint", "decar sees to that itself; leave it out"),
        ("use_cache", "decar sees to that itself; leave it out"),
        ("hub_token", "decar sees to that itself; leave it out"),
    ],
)
def test_options_that_are_not_for_the_trainer(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    message: str,
) -> None:
    path = write_config(training={"trainer": {option: 1}})
    assert command(monkeypatch, "run", path) == 1
    assert capsys.readouterr().err == f"error: training.trainer.{option}: {_full(message)}\n"
    assert not load_config(path).work_dir.exists()


def _full(message: str) -> str:
    return f"transformers' {message}" if message.startswith("TrainingArguments") else message


def test_every_option_that_decar_sets_is_refused_or_may_be_laid_over(write_config: WriteConfig) -> None:
    from dataclasses import fields

    from transformers import TrainingArguments

    from decar.training.expert.options import _LEFT_OUT, _SETTINGS

    names = {field.name for field in fields(TrainingArguments)}
    assert names >= _SETTINGS.keys() | _LEFT_OUT
    assert not _SETTINGS.keys() & _LEFT_OUT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["trainer={optim: nothing}"], r"training.trainer: .*nothing"),
        (["trainer={lr_scheduler_type: zigzag}"], r"training.trainer: .*zigzag"),
        (["keep=best"], r"keep: best compares held-out losses, of which there are none; set eval_steps too"),
        (["eval_steps=2", "patience=1"], r"patience waits for a lower held-out loss.*set keep: best too"),
        (["sample_prompts=['']"], r"training.sample_prompts"),
        (["save_dtype=fp8"], r"training.save_dtype"),
    ],
)
def test_mistakes_end_in_one_line(write_config: WriteConfig, changes: list[str], message: str) -> None:
    path = write_config()
    made(path)
    with pytest.raises(TrainingError, match=message) as caught:
        trainer_of(load_config(path, [f"training.{change}" for change in changes]))
    assert "\n" not in str(caught.value)
