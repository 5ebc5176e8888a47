"""Bounds of masked-diffusion experts: on models so small that all they could say is counted, and by the command."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from decar.router import log_weights_after
from decar.router.errors import TrainingError
from decar.router.flow import plan
from decar.router.manifest import Flow, Schedule
from decar.training.config import load_config
from decar.training.evaluate.held_out import Text
from decar.training.evaluate.revealed import Reveals
from decar.training.evaluate.stage import EvaluationReport
from decar.training.evaluate.systems import DENSE, Outcome, System, posterior_path, systems
from decar.training.run import page_file, read_report
from tests.training.conftest import WriteConfig
from tests.training.test_masked import LENGTH, MASK, VOCABULARY, Table, flow_config
from tests.training.test_run import command

EXPERTS = [Table(seed) for seed in range(3)]
PRIOR = np.log([0.5, 0.3, 0.2])
PROMPT = 1
"""How many of the `LENGTH` tokens are given."""
Assignment = Sequence[int]
"""The step that reveals each hidden position."""
BY_PRIOR, POSTERIOR, DRAWN = (
    System("prior"),
    System(DENSE, bayes="output"),
    System("drawn", bayes="output", draw=True),
)


def reveals(steps: int, schedule: Schedule = "linear", **flow: Any) -> Reveals:
    how = Flow(mask_token_id=MASK, schedule=schedule, **flow)
    return Reveals(how, steps, seed=11, vocab_size=VOCABULARY + 1, rows=2)


def row(expert: Table, z: Sequence[int], place: int) -> list[float]:
    """p(token | z) of every token but the mask."""
    weights = [math.exp(value) for value in expert.rows[(*z, place)][:VOCABULARY].tolist()]
    return [weight / sum(weights) for weight in weights]


def by_hand(tokens: Sequence[int], assignment: Assignment, system: System) -> float:
    """log p of the hidden tokens, revealed as ``assignment`` says, in plain Python."""
    z = [*tokens[:PROMPT], *[MASK] * (LENGTH - PROMPT)]
    weights = np.exp(PRIOR)
    drawn, total = weights.copy(), 0.0
    for step in sorted(set(assignment)):
        now = [PROMPT + i for i, at in enumerate(assignment) if at == step]
        said = np.array([[row(expert, z, place)[tokens[place]] for expert in EXPERTS] for place in now])
        total += float(np.log(said @ weights).sum())
        drawn = drawn * said.prod(axis=0)
        if system.bayes != "none":
            weights = weights * said.prod(axis=0)
            weights = weights / weights.sum()
        for place in now:
            z[place] = tokens[place]
    return math.log(drawn.sum()) if system.draw else total


def scored(how: Reveals, tokens: list[int], system: System, numbers: Iterable[int]) -> list[float]:
    text = Text(0, tokens, PROMPT)
    outcomes = [system.outcome(how.scores(EXPERTS, text, n, {"prior": PRIOR})) for n in numbers]
    return [float(outcome.log_probs.sum()) for outcome in outcomes]


@pytest.mark.parametrize("system", [BY_PRIOR, POSTERIOR, DRAWN], ids=lambda system: system.family)
@pytest.mark.parametrize(("steps", "block_length"), [(1, None), (2, None), (3, None), (4, 2)])
def test_a_text_is_scored_as_its_tokens_are_revealed(
    steps: int, block_length: int | None, system: System
) -> None:
    how = reveals(steps, block_length=block_length)
    tokens = [2, 0, 4, 1]
    found = scored(how, tokens, system, range(20))
    wanted = []
    for number in range(20):
        hidden = range(PROMPT, LENGTH)
        planned = plan(hidden, "random", "linear", steps, block_length, how.seed * 2**32 + number)
        at = {place: step.index for step in planned for place in step.positions.tolist()}
        wanted.append(by_hand(tokens, [at[place] for place in hidden], system))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert len(set(np.round(wanted, 6))) > (1 if steps > 1 else 0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("system", [BY_PRIOR, POSTERIOR, DRAWN], ids=lambda system: system.family)
def test_the_mean_is_a_bound_of_the_process_that_is_served(system: System, schedule: Schedule) -> None:
    """In two steps: every position is in the first one with probability κ(1/2), whatever the others."""
    steps, tokens = 2, [2, 0, 4, 1]
    share = 0.5 if schedule == "linear" else 1 - math.cos(math.pi / 4)
    assignments = list(itertools.product(range(steps), repeat=LENGTH - PROMPT))
    chances = [math.prod(share if at == 0 else 1 - share for at in each) for each in assignments]

    def exact(hidden: Sequence[int]) -> float:
        texts = (by_hand([tokens[0], *hidden], each, system) for each in assignments)
        return sum(chance * math.exp(text) for chance, text in zip(chances, texts, strict=True))

    every = itertools.product(range(VOCABULARY), repeat=LENGTH - PROMPT)
    assert sum(map(exact, every)) == pytest.approx(1, abs=1e-9)

    bound = -sum(
        chance * by_hand(tokens, each, system) for chance, each in zip(chances, assignments, strict=True)
    )
    assert bound > -math.log(exact(tokens[PROMPT:])) + 1e-3
    found = -np.array(scored(reveals(steps, schedule), tokens, system, range(600)))
    assert found.mean() == pytest.approx(bound, abs=4 * found.std() / math.sqrt(len(found)))


def test_one_token_a_step_the_posterior_is_the_drawn_expert() -> None:
    """Then nothing is factorised: the weights' own product is the mixture of the experts' processes."""
    how, tokens = reveals(10_000), [2, 0, 4, 1]
    numbers = range(10)
    assert scored(how, tokens, POSTERIOR, numbers) == pytest.approx(
        scored(how, tokens, DRAWN, numbers), abs=1e-5
    )
    at_once = reveals(1)
    assert scored(at_once, tokens, POSTERIOR, numbers) != pytest.approx(
        scored(at_once, tokens, DRAWN, numbers), abs=1e-3
    )


def test_alike_experts_are_that_expert() -> None:
    how, text = reveals(2), Text(0, [2, 0, 4, 1], PROMPT)
    starts = {"prior": PRIOR, "centroid": PRIOR, "classifier": PRIOR}
    for number in range(5):
        scores = how.scores([EXPERTS[0]] * 3, text, number, starts)
        alone = Outcome.alone(how.scores(EXPERTS[:1], text, number, {}), 0)
        for system in systems(3, []):
            outcome = system.outcome(scores)
            np.testing.assert_allclose(outcome.log_probs.sum(), alone.log_probs.sum(), atol=1e-5)
            np.testing.assert_array_equal(outcome.right, alone.right)


@pytest.mark.parametrize("chunks", [1, 2, 3, 9])
def test_prompts_are_revealed_in_chunks_from_the_left(chunks: int) -> None:
    tokens, given = [2, 0, 4, 1], 3
    scores = reveals(1, prompt_chunks=chunks).scores(EXPERTS, Text(0, tokens, given), 0, {"prior": PRIOR})
    count = min(chunks, given)
    for k, expert in enumerate(EXPERTS):
        wanted = 0.0
        for i in range(count):
            begin, end = given * i // count, given * (i + 1) // count
            z = [*tokens[:begin], *[MASK] * (LENGTH - begin)]
            wanted += sum(math.log(row(expert, z, place)[tokens[place]]) for place in range(begin, end))
        assert scores.prompt[k] == pytest.approx(wanted, abs=1e-5)


def test_masks_in_a_text_stay_masked_and_are_not_scored() -> None:
    scores = reveals(1).scores(EXPERTS, Text(0, [2, 0, MASK, 1], 2), 0, {"prior": PRIOR})
    assert sorted(scores.ids.tolist()) == [1]
    z = [2, 0, MASK, MASK]
    assert scores.tokens[0] == pytest.approx([math.log(row(expert, z, 3)[1]) for expert in EXPERTS], abs=1e-5)


def test_weights_of_tokens_that_are_revealed_at_once_are_those_of_before() -> None:
    tokens = np.log(np.random.default_rng(0).uniform(size=(5, 3)))
    steps = np.array([0, 0, 1, 3, 3])
    path, _ = posterior_path(PRIOR, tokens, 0.0, steps)
    for t, before in enumerate([0, 0, 2, 3, 3]):
        np.testing.assert_allclose(path[t], log_weights_after(PRIOR, tokens[:before].sum(axis=0)))


def test_a_model_that_says_nan_is_named() -> None:
    broken = Table()
    broken.name_or_path = "somewhere"
    broken.rows = torch.full_like(broken.rows, torch.nan)
    with pytest.raises(TrainingError, match="the model in somewhere gives NaN on held-out text"):
        reveals(2).scores([broken], Text(0, [2, 0, 4, 1], PROMPT), 0, {})


# ------------------------------------------------------------------------------------------------------ the command

EVALUATE = {"prompt_tokens": 8, "max_tokens": 64, "max_texts": 3, "noise_levels": 4}


def test_evaluate_says_bounds(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = flow_config(write_config, evaluate=EVALUATE, training={"max_steps": 2})
    assert command(monkeypatch, "evaluate", path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    config = load_config(path)
    report = read_report(config.run.evaluate, EvaluationReport)
    (seed,) = report.seeds
    assert seed.noise_levels == 4
    said = (
        "Nats per token are bounds: continuations are revealed in 4 steps (evaluate.noise_levels), in random"
    )
    assert said in report.verdict[-1]
    assert said in printed
    assert said in page_file(config.run.evaluate).read_text()
    assert "mixture of experts: none: expert 'code' is a bert model" in printed
    rows = {row.system for row in report.rows}
    assert {"centralized model", "code alone", "prose alone", "parameter average", "random split"} <= rows
    assert {"prior", "centroid", "classifier", "posterior", "posterior, drawn"} <= rows
    assert not report.sampled
    assert {comparison.second for comparison in report.comparisons} == {
        "centralized model",
        "random split",
        "centroid, top-1",
        "posterior, top-1",
        "parameter average",
        "best expert alone",
    }
    assert command(monkeypatch, "evaluate", path) == 0
    assert "evaluate: done before" in capsys.readouterr().out
    assert command(monkeypatch, "export", path, "--merge", "moe") == 1
    assert "expert 'code' is a bert model; only llama and mistral" in capsys.readouterr().err
    assert command(monkeypatch, "curve", path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_dry_run_shows_the_first_batch(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    path = flow_config(write_config)
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "objective: masked-diffusion" in printed
    assert "dry run: nothing was trained, nothing was written" in printed
    assert not (tmp_path / "work").exists()
