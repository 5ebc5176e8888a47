"""The head to head on tiny experts: its numbers against plain transformers, its budgets, and what it is matched to."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from decar.router import Ensemble
from decar.router.errors import TrainingError
from decar.training.cli import main
from decar.training.config import TrainConfig, load_config
from decar.training.data.shards import read_texts
from decar.training.data.tokenizer import load_tokenizer
from decar.training.evaluate.centralized import centralized_stage, train_centralized
from decar.training.evaluate.held_out import Text, scored
from decar.training.evaluate.random_split import random_config
from decar.training.evaluate.sampled import compare_pruned, sample_continuations
from decar.training.evaluate.scores import (
    AVERAGE,
    BEST,
    CENTRALIZED,
    MOE,
    RANDOM,
    TOP_1,
    make_scores,
    scores_stage,
)
from decar.training.evaluate.stage import EvaluationReport
from decar.training.evaluate.systems import DENSE, Outcome
from decar.training.expert.model import load_model
from decar.training.expert.report import read_expert_report
from tests.training.conftest import WriteConfig, config_writer

PROMPT = 6
LONGEST = 40
SETTINGS = {"prompt_tokens": PROMPT, "max_tokens": LONGEST, "batch_size": 2}


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> int:
    arguments = [word for override in overrides for word in ("--set", override)]
    monkeypatch.setattr("sys.argv", ["decar-train", "evaluate", str(path), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, EvaluationReport]:
    write = config_writer(tmp_path_factory.mktemp("evaluated"))
    path = write(evaluate=SETTINGS, training={"learning_rate": 1e-2, "max_steps": 8})
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, path) == 0
    config = load_config(path)
    report = (config.work_dir / "evaluate" / "report.json").read_text()
    return config, EvaluationReport.model_validate_json(report)


@torch.inference_mode()
def log_likelihoods(directory: Path, texts: list[list[int]], **options: Any) -> np.ndarray:
    """[N, 2]: log p of each prompt and of each whole text, by a forward pass for each text alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **options)
    sums = []
    for ids in texts:
        rows = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        sums.append((float(own[: PROMPT - 1].sum()), float(own.sum())))
    return np.array(sums)


def test_perplexities_are_those_of_the_chain_rule(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config, report = evaluated
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    ensemble = Ensemble.load(config.run.ensemble)
    priors = np.array([expert.prior for expert in ensemble.experts])
    nll = {row.system: row.nll for row in report.rows}
    per_system: dict[str, list[float]] = {}
    for name in config.expert_names:
        texts = [tokenizer.encode(text)[:LONGEST] for text in read_texts(config.run.shard(name, "held_out"))]
        tokens = sum(len(ids) - PROMPT for ids in texts)
        each = np.stack([log_likelihoods(expert.path, texts) for expert in ensemble.experts], axis=-1)
        prompt, whole = each[:, 0], each[:, 1]  # [N, K]
        mixture = np.log(np.exp(whole) @ priors) - np.log(np.exp(prompt) @ priors)
        per_system.setdefault(DENSE, []).append(-mixture.sum() / tokens)
        for k, other in enumerate(config.expert_names):
            per_system.setdefault(f"{other} alone", []).append(-(whole - prompt)[:, k].sum() / tokens)
        twin = log_likelihoods(config.work_dir / "centralized", texts)
        per_system.setdefault(CENTRALIZED, []).append(-(twin[:, 1] - twin[:, 0]).sum() / tokens)
    # float32 forwards here against float64 there: 1e-6 of some 5 nats, averaged over tokens
    for system, by_domain in per_system.items():
        assert nll[system] == pytest.approx(float(priors @ by_domain), rel=1e-5), system
    perplexity = {row.system: row.perplexity for row in report.rows}
    assert perplexity[DENSE] == pytest.approx(math.exp(nll[DENSE]))
    assert nll[f"{DENSE}, drawn"] == nll[DENSE]


def test_mass_dropped_stays_within_each_budget(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    _, report = evaluated
    pruned = [row for row in report.rows if row.prune]
    assert any(row.dropped_max > 0 for row in pruned)
    assert all(row.dropped_mean <= row.dropped_max <= row.prune for row in pruned)
    for family in {row.family for row in pruned}:
        mine = sorted((row for row in pruned if row.family == family), key=lambda row: row.prune)
        active = [row.active_experts for row in mine]
        assert active == sorted(active, reverse=True)
        assert all(1 <= experts <= 2 for experts in active)


def test_what_the_ensemble_writes_changes_less_than_the_budget(
    evaluated: tuple[TrainConfig, EvaluationReport],
) -> None:
    _, report = evaluated
    assert report.sampled_tokens == LONGEST - PROMPT
    assert [row.prune for row in report.sampled] == sorted(
        (row.prune for row in report.sampled), reverse=True
    )
    for row in report.sampled:
        # of six texts; each adds at most 1 / (1 - ε) - 1
        assert 0 <= row.total_variation <= row.prune / (1 - row.prune)
        assert row.dropped_max <= row.prune


def test_continuations_are_drawn_from_the_mixture(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    """First tokens after one prompt, against the mixture's probabilities: chi-square over bins of equal mass."""
    config, _ = evaluated
    models = [load_model(expert.path) for expert in Ensemble.load(config.run.ensemble).experts]
    prompt, weights = [5, 9, 7], np.array([0.3, 0.7])
    with torch.inference_mode():
        rows = [model(torch.tensor([prompt])).logits[0, -1].softmax(-1).double().numpy() for model in models]
    mixture = weights @ rows
    num_texts, num_bins = 4_000, 20
    written = sample_continuations(
        models, [prompt] * num_texts, np.log(np.tile(weights, (num_texts, 1))), 2, len(mixture), seed=0
    )
    assert all(text[:3] == prompt and len(text) == 5 for text in written)
    bins = np.minimum((np.cumsum(mixture) - mixture / 2) * num_bins, num_bins - 1).astype(int)
    counts = np.bincount(bins[[text[3] for text in written]], minlength=num_bins)
    expected = np.bincount(bins, weights=mixture, minlength=num_bins) * num_texts
    assert chisquare(counts[expected > 0], expected[expected > 0] * num_texts / expected.sum()).pvalue > 0.01


def test_total_variation_is_estimated_from_the_ratio() -> None:
    """p is even over two texts, q has 0.8 and 0.2: three tenths apart."""
    whole, pruned = (
        [Outcome(np.log([p]), np.ones(1), 1.0, np.ones(1), 1) for p in masses]
        for masses in ([0.5, 0.5], [0.8, 0.2])
    )
    assert compare_pruned(0.4, whole, pruned).total_variation == pytest.approx(0.3)


def test_costs_are_counted(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    rows = {row.system: row for row in evaluated[1].rows}
    costs = {name: (row.active_experts, row.prompt_passes) for name, row in rows.items()}
    assert costs["code alone"] == costs[CENTRALIZED] == costs["classifier, top-1"] == (1, 1)
    assert costs[DENSE] == costs["prior"] == (2, 2)
    assert costs[f"{DENSE}, top-1"] == costs[f"{DENSE}, drawn"] == (1, 2)
    assert rows[DENSE].above_dense == rows[DENSE].standard_error == 0


def test_the_twin_takes_as_many_steps_as_all_experts(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config, report = evaluated
    twin = read_expert_report(config.work_dir / "centralized")
    assert twin.steps == 16
    experts = [read_expert_report(config.work_dir / "experts" / name) for name in config.expert_names]
    assert twin.train_tokens == sum(expert.train_tokens for expert in experts)
    assert twin.num_parameters == experts[0].num_parameters
    assert "16 steps of 2 × 32 tokens" in report.centralized


def test_a_finished_evaluation_is_shown_again(
    evaluated: tuple[TrainConfig, EvaluationReport],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config, report = evaluated
    directory = config.work_dir / "evaluate"
    pictures = {"comparisons.png", "gaps.png", "pruning.png", "systems.png"}
    assert {file.name for file in directory.iterdir()} == {"DONE", "report.json", "report.html", *pictures}
    assert {"date", "cpu", "cores", "versions", "command"} <= report.environment.keys()
    before = (directory / "report.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run(monkeypatch, config.work_dir.parent / "config.yaml") == 0
    out = capsys.readouterr().out
    assert "evaluate: done before" in out
    assert out.count("done before") == 15
    for name in ("classifier→posterior ε 0.01", "posterior, logit rule", CENTRALIZED):
        assert name in out
    assert (directory / "report.json").stat().st_mtime_ns == before
    assert json.loads((directory / "report.json").read_text())["seed"] == 0
    changed = load_config(config.work_dir.parent / "config.yaml", ["evaluate.prompt_tokens=9"])
    assert not scores_stage(changed).is_done


@torch.inference_mode()
def rows_of(directory: Path, ids: list[int]) -> np.ndarray:
    """[T, V]: log-probabilities of every token after the prompt, by a forward pass for one text alone."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return model(torch.tensor([ids])).logits[0, PROMPT - 1 : -1].log_softmax(-1).numpy()


def held_out_ids(config: TrainConfig, name: str) -> list[list[int]]:
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    return [tokenizer.encode(text)[:LONGEST] for text in read_texts(config.run.shard(name, "held_out"))]


def test_accuracy_is_that_of_the_mixtures_most_probable_tokens(
    evaluated: tuple[TrainConfig, EvaluationReport],
) -> None:
    config, report = evaluated
    ensemble = Ensemble.load(config.run.ensemble)
    paths = [expert.path for expert in ensemble.experts]
    priors = np.array([expert.prior for expert in ensemble.experts])
    right: dict[str, list[float]] = {}
    for name in config.expert_names:
        hits: dict[str, list[bool]] = {}
        for ids in held_out_ids(config, name):
            rows = np.stack([rows_of(path, ids) for path in paths], axis=1)  # [T, K, V]
            own = rows[np.arange(len(rows)), :, ids[PROMPT:]]
            prompt = np.array([log_likelihoods(path, [ids])[0, 0] for path in paths])
            joint = np.log(priors) + prompt + np.cumsum(own, axis=0) - own  # before each token
            weights = np.exp(joint - np.logaddexp.reduce(joint, axis=1)[:, None])
            best = {
                DENSE: np.einsum("tk,tkv->tv", weights, np.exp(rows)).argmax(axis=1),
                "prior, logit rule": np.einsum("k,tkv->tv", priors, rows).argmax(axis=1),
                f"{config.expert_names[0]} alone": rows[:, 0].argmax(axis=1),
            }
            for system, tokens in best.items():
                hits.setdefault(system, []).extend(tokens == ids[PROMPT:])
        for system, found in hits.items():
            right.setdefault(system, []).append(float(np.mean(found)))
    accuracy = {row.system: row.accuracy for row in report.rows}
    for system, by_domain in right.items():
        assert accuracy[system] == pytest.approx(float(priors @ by_domain)), system
    assert 0 < accuracy[DENSE] < 1
    assert all(row.exact is None for row in report.rows)


def test_the_random_split_is_scored_on_the_same_texts(
    evaluated: tuple[TrainConfig, EvaluationReport],
) -> None:
    config, report = evaluated
    split = random_config(config)
    shards = {
        which: [set(read_texts(one.run.shard(name, "held_out"))) for name in config.expert_names]
        for which, one in (("clusters", config), ("chance", split))
    }
    assert set.union(*shards["clusters"]) == set.union(*shards["chance"])
    assert shards["clusters"] != shards["chance"]
    tokenizers = [(one.work_dir / "tokenizer" / "tokenizer.json").read_text() for one in (config, split)]
    assert tokenizers[0] == tokenizers[1]
    of_chance = Ensemble.load(split.run.ensemble)
    chances = np.array([expert.prior for expert in of_chance.experts])
    priors = np.array([expert.prior for expert in Ensemble.load(config.run.ensemble).experts])
    by_domain = []
    for name in config.expert_names:
        texts = held_out_ids(config, name)
        each = np.stack([log_likelihoods(expert.path, texts) for expert in of_chance.experts], axis=-1)
        mixture = np.log(np.exp(each[:, 1]) @ chances) - np.log(np.exp(each[:, 0]) @ chances)
        by_domain.append(-mixture.sum() / sum(len(ids) - PROMPT for ids in texts))
    row = next(row for row in report.rows if row.system == RANDOM)
    assert row.nll == pytest.approx(float(priors @ by_domain), rel=1e-5)
    steps = {trained.model: trained.steps for trained in report.seeds[0].trained}
    assert steps["random split: code"] == steps["code"] == 8


def test_the_average_is_that_of_the_weights(
    evaluated: tuple[TrainConfig, EvaluationReport], tmp_path: Path
) -> None:
    config, report = evaluated
    experts = Ensemble.load(config.run.ensemble).experts
    models = [AutoModelForCausalLM.from_pretrained(expert.path, dtype=torch.float64) for expert in experts]
    states = [model.state_dict() for model in models]
    models[0].load_state_dict({key: sum(state[key] for state in states) / 2 for key in states[0]})
    models[0].save_pretrained(tmp_path / "mean")
    by_domain = []
    for name in config.expert_names:
        texts = held_out_ids(config, name)
        sums = log_likelihoods(tmp_path / "mean", texts)
        by_domain.append(-(sums[:, 1] - sums[:, 0]).sum() / sum(len(ids) - PROMPT for ids in texts))
    row = next(row for row in report.rows if row.system == AVERAGE)
    assert row.nll == pytest.approx(float(np.dot([e.prior for e in experts], by_domain)), rel=1e-5)


def test_the_mixture_of_experts_is_the_merged_model(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config, report = evaluated
    experts = Ensemble.load(config.run.ensemble).experts
    by_domain = []
    for name in config.expert_names:
        texts = held_out_ids(config, name)
        # The usual implementation knows no float64.
        sums = log_likelihoods(config.run.moe, texts, experts_implementation="eager")
        by_domain.append(-(sums[:, 1] - sums[:, 0]).sum() / sum(len(ids) - PROMPT for ids in texts))
    row = next(row for row in report.rows if row.system == MOE)
    assert row.nll == pytest.approx(float(np.dot([e.prior for e in experts], by_domain)), rel=1e-5)
    assert (row.active_experts, row.prompt_passes) == (2, 2)
    took = next(trained for trained in report.seeds[0].trained if trained.model == MOE)
    assert (took.steps, took.tokens_per_step) == (50, 64)
    assert took.num_parameters > read_expert_report(config.run.expert("code")).num_parameters
    assert "50 steps of all weights, of 2 × 32 tokens" in report.moe
    page = (config.run.evaluate / "report.html").read_text()
    assert report.moe in html.unescape(page)
    (config.run.moe / "DONE").rename(config.run.moe / "AWAY")
    try:
        with pytest.raises(
            TrainingError, match="not merged into a mixture of experts; run `decar-train eval"
        ):
            scores_stage(config)
    finally:
        (config.run.moe / "AWAY").rename(config.run.moe / "DONE")


def test_a_model_that_says_nan_is_named(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config, _ = evaluated
    path = Ensemble.load(config.run.ensemble).experts[0].path
    models = [load_model(path), load_model(path)]
    models[1].lm_head.weight.data[7] = float("nan")
    with pytest.raises(
        TrainingError, match=rf"the model in {path} gives NaN .* lower training\.learning_rate"
    ):
        list(scored(models, [Text(0, [1, 2, 3], 2)], 1, 300))


def test_the_gap_adds_up(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    _, report = evaluated
    nll = {row.system: row.nll for row in report.rows}
    assert report.gaps[0].system == report.served == DENSE
    assert {"classifier, top-1", "prior", "classifier→posterior", "prior, logit rule"} <= {
        gap.system for gap in report.gaps
    }
    for gap in report.gaps:
        assert gap.total.mean == pytest.approx(gap.routing.mean + gap.estimation.mean, abs=1e-12)
        assert gap.total.mean == pytest.approx(nll[gap.system] - nll[CENTRALIZED], abs=1e-12)
        assert gap.estimation.mean == pytest.approx(nll[DENSE] - nll[CENTRALIZED], abs=1e-12)


def test_what_is_compared(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    _, report = evaluated
    nll = {row.system: row.nll for row in report.rows}
    nll[BEST] = min(nll["code alone"], nll["prose alone"])
    pairs = [(comparison.first, comparison.second) for comparison in report.comparisons]
    assert pairs == [(DENSE, other) for other in (CENTRALIZED, RANDOM, *TOP_1, AVERAGE, MOE, BEST)]
    for comparison in report.comparisons:
        expected = nll[comparison.first] - nll[comparison.second]
        assert comparison.difference.mean == pytest.approx(expected, abs=1e-12)
    assert len(report.verdict) == len(pairs) + 1
    assert report.verdict[-1].startswith("One seed")


def test_a_prompt_longer_than_every_text(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config = load_config(evaluated[0].work_dir.parent / "config.yaml", ["evaluate.prompt_tokens=40"])
    with pytest.raises(
        TrainingError, match=r"no held-out text of 'code' is longer than evaluate\.prompt_tokens, 40"
    ):
        make_scores(config, scores_stage(config))


def test_experts_of_different_models_have_no_twin(write_config: WriteConfig) -> None:
    config = load_config(write_config(experts=["code", {"name": "prose", "model": {"hidden_size": 64}}]))
    with pytest.raises(TrainingError, match="experts 'code' and 'prose' have different models"):
        centralized_stage(config)


def test_an_interrupted_twin_leaves_nothing_behind(evaluated: tuple[TrainConfig, EvaluationReport]) -> None:
    config, _ = evaluated
    stage = centralized_stage(config)
    assert stage.is_done
    (stage.directory / "DONE").unlink()
    with pytest.raises(TrainingError, match="centralized model is not trained; run `decar-train evaluate"):
        scores_stage(config)
    train_centralized(config.recipes, stage)
    assert stage.is_done
    assert not list((config.work_dir / "checkpoints").rglob("checkpoint-*"))
