"""The curve on tiny experts: its numbers against plain transformers, what models are given, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from decar.router.errors import TrainingError
from decar.training.config import EvaluateConfig, TrainConfig, load_config, load_seeds
from decar.training.data.shards import read_texts
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.evaluate.curve import (
    BASE,
    NOT_IN_POINTS,
    ONE_GO,
    TOGETHER,
    CurveReport,
    divergence,
    gain,
    models,
    settings,
    split_config,
)
from decar.training.evaluate.systems import DENSE
from decar.training.evaluate.verdict import rule_of_thumb
from decar.training.expert.report import read_expert_report
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig, config_writer
from tests.training.test_run import command
from tests.training.test_scores import LONGEST, PROMPT, log_likelihoods

STEPS, SHARES, EXPERTS = 12, [0, 0.5], [2, 3]
CURVE = {"steps": STEPS, "shares": SHARES, "experts": EXPERTS}
SETTINGS = {"prompt_tokens": PROMPT, "max_tokens": LONGEST, "batch_size": 2, "seeds": [0, 1]}


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> int:
    return command(
        monkeypatch, "curve", path, *(word for override in overrides for word in ("--set", override))
    )


@pytest.fixture(scope="module")
def curve(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CurveReport]:
    write = config_writer(tmp_path_factory.mktemp("curve"))
    path = write(evaluate=SETTINGS, training={"learning_rate": 1e-2}, curve=CURVE)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, path) == 0
    return path, read(path)


def read(path: Path) -> CurveReport:
    report = load_config(path).run.curve / "report.json"
    return CurveReport.model_validate_json(report.read_text())


@pytest.mark.parametrize("count", EXPERTS)
@pytest.mark.parametrize("share", SHARES)
def test_numbers_are_those_of_the_chain_rule(
    curve: tuple[Path, CurveReport], share: float, count: int
) -> None:
    path, report = curve
    for config in load_seeds(path):
        (point,) = (
            p for p in report.points if (p.seed, p.share, p.num_experts) == (config.seed, share, count)
        )
        split = split_config(config, count)
        tokenizer = load_tokenizer(split.run.tokenizer)
        texts, domain = [], []
        for k, name in enumerate(split.expert_names):
            ids = tokenizer(list(read_texts(split.run.shard(name, "held_out"))))["input_ids"]
            mine = [text[:LONGEST] for text in ids if len(text) > PROMPT]
            texts += mine
            domain += [k] * len(mine)
        places = {model.name: model.directory for model in models(config, share, count)}
        found = {name: log_likelihoods(place, texts) for name, place in places.items()}
        tokens = np.array([read_expert_report(places[name]).train_tokens for name in split.expert_names])
        log_prior = np.log(tokens / tokens.sum())
        experts = np.array([found[name] for name in split.expert_names])
        mixed = np.logaddexp.reduce(log_prior[:, None, None] + experts, axis=0)

        def pooled(sums: np.ndarray, domain: np.ndarray, texts: list[list[int]], prior: np.ndarray) -> float:
            lengths = np.array([len(text) - PROMPT for text in texts])
            nats = sums[:, 0] - sums[:, 1]
            each = [nats[domain == k].sum() / lengths[domain == k].sum() for k in range(len(prior))]
            return float(prior @ each)

        where, prior = np.array(domain), np.exp(log_prior)
        ensemble = pooled(mixed, where, texts, prior)
        assert point.texts == len(texts)
        assert point.nll[DENSE] == pytest.approx(ensemble, abs=1e-5)
        for name, sums in found.items():
            assert point.nll[name] == pytest.approx(pooled(sums, where, texts, prior), abs=1e-5)
        assert point.behind_together == pytest.approx(ensemble - point.nll[TOGETHER], abs=1e-9 + 1e-5)
        straight = point.nll[ONE_GO] if share else point.nll[TOGETHER]
        assert point.behind_one_go == pytest.approx(point.nll[DENSE] - straight, abs=1e-9)
        assert (ONE_GO in point.nll) == bool(share)


def test_every_point_takes_the_same_compute(curve: tuple[Path, CurveReport]) -> None:
    _, report = curve
    assert len(report.points) == 2 * len(SHARES) * len(EXPERTS)
    for point in report.points:
        steps = dict(point.steps)
        base, together = steps.pop(BASE, 0), steps.pop(TOGETHER)
        assert base == point.share * STEPS
        assert len(steps) == point.num_experts
        assert len(set(steps.values())) == 1
        assert base + together == base + sum(steps.values()) == STEPS


def test_no_model_has_seen_what_any_is_measured_on(curve: tuple[Path, CurveReport]) -> None:
    path, _ = curve
    for config in load_seeds(path):
        held_out, train = [], []
        for count in EXPERTS:
            split = split_config(config, count)
            held_out.append(
                {t for name in split.expert_names for t in read_texts(split.run.shard(name, "held_out"))}
            )
            train.append(
                {t for name in split.expert_names for t in read_texts(split.run.shard(name, "train"))}
            )
        assert held_out[0] == held_out[1]
        assert train[0] == train[1]
        assert not held_out[0] & train[0]


def test_models_branch_from_the_base(write_config: WriteConfig) -> None:
    """At a rate at which nothing is learned, they are what they started from."""
    config = load_config(write_config(curve=CURVE, training={"learning_rate": 1e-30}))
    for count in EXPERTS:
        split = split_config(config, count)
        make_partition(split, partition_stage(split))
        make_tokenizer(split.run, split.tokenizer, tokenizer_stage(split.run, split.tokenizer))
    needed = list(models(config, 0.5, 3))
    assert [model.name for model in needed] == [BASE, TOGETHER, "expert-1", "expert-2", "expert-3"]
    base, *others = needed
    # Far from fresh weights, which all would have else.
    learning = base.recipe.training.model_copy(update={"learning_rate": 1e-2})
    assert not base.stage.is_done
    replace(base, recipe=replace(base.recipe, training=learning)).train(base.stage)
    start = weights(base.directory)
    for model in others[:2]:
        model.train(model.stage)
        for name, tensor in weights(model.directory).items():
            torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-6)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()


def test_what_is_finished_is_not_done_again(
    curve: tuple[Path, CurveReport], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = curve
    assert run(monkeypatch, path) == 0
    assert "done in" not in capsys.readouterr().out
    assert run(monkeypatch, path, "evaluate.margin=1000") == 0
    assert "done in" not in capsys.readouterr().out
    wide = read(path)
    assert wide.points == report.points
    assert wide.as_good_from == {2: 0, 3: 0}
    assert run(monkeypatch, path) == 0
    assert read(path).as_good_from == report.as_good_from


def test_what_no_point_is_measured_by_does_not_count() -> None:
    """Else a setting that comes later would have all points measured again."""
    counted = {"batch_size", "max_texts", "max_tokens", "prompt_tokens", "sampled_tokens"}
    assert EvaluateConfig.model_fields.keys() - NOT_IN_POINTS == counted


def test_the_table_and_the_plot(
    curve: tuple[Path, CurveReport], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = curve
    monkeypatch.setenv("COLUMNS", "160")
    assert run(monkeypatch, path) == 0
    printed = capsys.readouterr().out
    for place in report.places:
        assert f"{place.behind_together.mean:+.3f}" in printed
        assert f"{place.divergence.mean:.1f}%" in printed
    for sentence in report.verdict:
        assert sentence in printed
    assert (load_config(path).run.curve / "curve.png").stat().st_size > 10_000


def test_divergence_and_gain_are_the_papers() -> None:
    """By hand: experts that are 10 and 20 % better than the base on their own texts, and an ensemble of 2.4 where the
    best of them needs 2.7 of both alike."""
    nll: dict[str, dict[str, float]] = {
        BASE: {"a": 3.0, "b": 3.0},
        "a": {"a": 2.7, "b": 2.7},
        "b": {"a": 3.6, "b": 2.4},
        DENSE: {"a": 2.5, "b": 2.3},
    }
    assert divergence(nll, ["a", "b"]) == pytest.approx(15.0)
    assert gain(nll, ["a", "b"]) == pytest.approx(100 * (1 - 2.4 / 2.7))
    assert rule_of_thumb(15.65) == pytest.approx(10.113)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"curve": None}, "no section curve"),
        ({"curve": CURVE, "partition": {"method": "by-field", "name_by": {}}}, "by-field"),
        ({"curve": CURVE, "experts": [{"name": "code", "model": {"hidden_size": 64}}, "prose"]}, "one model"),
        ({"curve": CURVE, "model": {"model_type": "llava", "vision_config": {}}}, "images"),
        ({"curve": CURVE | {"steps": 13}}, "13 steps cannot be parted into a share of 0"),
        ({"curve": CURVE | {"shares": [0.3]}}, "cannot be parted into a share of 0.3"),
        ({"curve": CURVE | {"shares": [0.5, 0.5]}}, "shares lists a value twice"),
        ({"curve": CURVE | {"experts": [2, 2]}}, "experts lists a value twice"),
        ({"curve": CURVE | {"experts": [1]}}, "curve.experts.0"),
        ({"curve": CURVE | {"shares": [1]}}, "curve.shares.0"),
    ],
)
def test_what_makes_no_curve_is_refused(
    write_config: WriteConfig, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(TrainingError, match=said):
        settings(load_config(write_config(**changes)))


def test_other_settings_are_the_runs_own(write_config: WriteConfig) -> None:
    config: TrainConfig = load_config(write_config(curve=CURVE, seed=3))
    for count in EXPERTS:
        split = split_config(config, count)
        assert (split.seed, split.documents, split.data) == (3, config.documents, config.data)
        assert split.run.work_dir.parent == config.work_dir
