"""Tokens of masked positions: as `decide` chooses them or from a truncated mixture, with their log-probabilities."""

import importlib
import math
from types import ModuleType
from typing import Any

import pytest
import torch

from decar.kernels import Revealed, Rows, decide, flow, mix, reveal, velocity
from decar.router.flow import rate, revealed_shares
from tests.flow import Asked, choice, gumbel, mixture
from tests.kernels.implementations import DEVICE
from tests.kernels.test_mix import exact, off_by, random_case

RULES = ("velocity", "logit")
MASK = 3


@pytest.fixture
def implementation(implementation: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What `reveal` runs."""
    public = importlib.import_module("decar.kernels.mix")
    monkeypatch.setattr(public, "_implementation", lambda rows: implementation)
    return implementation


def case(experts: int, rows: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`random_case` in which no expert spends anything on the mask token."""
    logits, log_weights = random_case(experts, rows, vocabulary, seed)
    logits[..., MASK] = -math.inf
    return logits, log_weights


def _reveal(logits: torch.Tensor, log_weights: torch.Tensor, rule: str, **settings: Any) -> Revealed:
    count = logits.shape[1]
    given: dict[str, Any] = {
        "temperatures": torch.ones(count),
        "seeds": torch.arange(count) + 7,
        "positions": torch.arange(count),
    }
    return Revealed(
        *(
            tensor.cpu()
            for tensor in reveal(
                Rows.stacked(logits.to(DEVICE)),
                torch.arange(count, device=DEVICE),
                log_weights.to(DEVICE),
                rule,  # type: ignore[arg-type]
                **{name: value.to(DEVICE) for name, value in (given | settings).items()},
            )
        )
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocabulary", [7, 2049, 9001])
def test_tokens_are_those_of_decide_and_know_their_log_probabilities(
    implementation: Any, rule: str, vocabulary: int
) -> None:
    logits, log_weights = case(3, 6, vocabulary)
    settings = {
        "temperatures": torch.tensor([0.0, 0.0, 1.0, 1.0, 0.5, 5.0]),
        "seeds": torch.tensor([0, 1, 2, 3, 4, 2**63 - 1]),
        "positions": torch.tensor([0, 1, 2**16, 3, 2**32 - 1, 5]),
    }
    tokens, log_probs, by_expert = _reveal(logits, log_weights, rule, **settings)
    expected, moved = decide(
        Rows.stacked(logits),
        torch.arange(6),
        log_weights,
        rule,  # type: ignore[arg-type]
        *settings.values(),
    )
    assert tokens.tolist() == expected.tolist()
    each, bound = torch.arange(6), off_by(logits.nan_to_num(neginf=0.0), log_weights)
    assert log_probs.tolist() == pytest.approx(
        exact(logits, log_weights, rule)[each, tokens].tolist(), abs=bound
    )
    of_experts = logits.double().log_softmax(-1)[:, each, tokens].T
    torch.testing.assert_close(by_expert, of_experts, atol=bound, rtol=0)
    after = (log_weights.double() + by_expert).log_softmax(-1)
    torch.testing.assert_close(after, moved.cpu(), atol=bound, rtol=0)


LIMITS = [
    {"top_k": 1},
    {"top_k": 4},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 8, "top_p": 0.7},
    {"top_k": 6, "top_p": 0.9, "min_p": 0.02},
    {"top_k": 10**6},
    {"top_p": 1e-9},
    {"min_p": 1.0},
    {},
]


@pytest.mark.parametrize("rule", RULES)
def test_truncation_is_the_mixtures_at_its_temperature(implementation: Any, rule: str) -> None:
    """Rows of every limit and temperature in one call, against a mixture, truncation and noise of their own."""
    asked = [
        Asked((), temperature=temperature, seed=9, **limits)
        for limits in LIMITS
        for temperature in (0.0, 2.0, 8.0)
    ]
    logits, log_weights = case(3, len(asked), 40)
    probabilities = logits.double().softmax(-1).numpy()
    weights = log_weights.double().softmax(-1).numpy()
    mixed = [mixture(probabilities[:, row], weights[row], rule) for row in range(len(asked))]
    noise = [gumbel(9, row, 40) for row in range(len(asked))]
    expected = [choice(mixed[row], noise[row], one) for row, one in enumerate(asked)]
    names = ("temperature", "seed", "top_k", "top_p", "min_p")
    temperatures, seeds, top_k, top_p, min_p = (
        torch.tensor([getattr(one, name) for one in asked]) for name in names
    )
    tokens, log_probs, _ = _reveal(
        logits,
        log_weights,
        rule,
        temperatures=temperatures,
        seeds=seeds,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    assert tokens.tolist() == expected
    of_all = [math.log(mixed[row][token]) for row, token in enumerate(expected)]
    assert log_probs.tolist() == pytest.approx(of_all, abs=1e-5)
    unlimited = [
        choice(mixed[row], noise[row], Asked((), temperature=one.temperature))
        for row, one in enumerate(asked)
    ]
    assert sum(a != b for a, b in zip(unlimited, expected, strict=True)) > 8  # what limits change


def test_many_rows_are_truncated_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, log_weights = case(2, 9, 40)
    together = _reveal(logits, log_weights, "velocity", top_k=torch.full((9,), 5))
    monkeypatch.setattr(flow, "_TRUNCATED_AT_ONCE", 2 * 40)
    some = _reveal(logits, log_weights, "velocity", top_k=torch.full((9,), 5))
    assert some.tokens.tolist() == together.tokens.tolist()


@pytest.mark.parametrize(
    "limits", [{"top_k": torch.tensor([2, 0])}, {"top_p": torch.tensor([0.1, 1.0])}, {"min_p": torch.ones(2)}]
)
def test_a_limit_may_come_alone(implementation: Any, limits: dict[str, torch.Tensor]) -> None:
    logits, log_weights = case(2, 2, 12)
    likeliest = exact(logits, log_weights, "velocity").argsort(dim=-1, descending=True)
    tokens, _, _ = _reveal(logits, log_weights, "velocity", **limits)
    assert tokens[0] in likeliest[0, :2]


@pytest.mark.parametrize("rule", RULES)
def test_the_mask_token_is_never_revealed(implementation: Any, rule: str) -> None:
    """At a temperature at which all tokens are nearly alike; half of the rows truncate."""
    logits, log_weights = case(2, 40, 5)
    hot, top_k = torch.full((40,), 1e4), torch.tensor([0, 30] * 20)
    tokens = _reveal(logits, log_weights, rule, temperatures=hot, top_k=top_k).tokens
    for some in (tokens[::2], tokens[1::2]):
        assert set(some.tolist()) == {0, 1, 2, 4}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_the_row_of_an_expert_that_takes_no_part_is_never_used(
    implementation: Any, rule: str, poison: float
) -> None:
    logits, log_weights = case(3, 4, 40)
    log_weights[:2, 1] = -math.inf  # no weight
    logits[1] = poison  # and for the others, no distribution
    limits = {"top_k": torch.tensor([0, 5, 0, 5])}
    tokens, log_probs, by_expert = _reveal(logits, log_weights, rule, **limits)
    others = [0, 2]
    expected = _reveal(logits[others], log_weights[:, others], rule, **limits)
    assert tokens.tolist() == expected.tokens.tolist()
    definition = exact(logits[others], log_weights[:, others], rule)[torch.arange(4), tokens]
    torch.testing.assert_close(log_probs, definition, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_expert[:, others], expected.expert_log_probs, atol=1e-6, rtol=0)
    assert by_expert[:, 1].isneginf().all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_where_no_expert_takes_part_the_first_token_has_no_probability(
    implementation: Any, rule: str, top_p: float
) -> None:
    logits, log_weights = case(2, 1, 9)
    log_weights[:] = -math.inf
    tokens, log_probs, by_expert = _reveal(logits, log_weights, rule, top_p=torch.tensor([top_p]))
    assert tokens.tolist() == [0]
    assert log_probs.tolist() == [-math.inf]
    assert by_expert.tolist() == [[-math.inf] * 2]


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_reveal_nothing(implementation: Any, rule: str) -> None:
    logits, log_weights = case(2, 3, 9)
    nothing = torch.zeros(0)
    for limits in ({}, {"min_p": nothing}):
        tokens, log_probs, by_expert = _reveal(logits[:, :0], log_weights[:0], rule, **limits)
        assert (tokens.shape, log_probs.shape, by_expert.shape) == ((0,), (0,), (0, 2))


def test_wrong_shapes_are_named() -> None:
    logits, log_weights = case(2, 3, 5)
    with pytest.raises(ValueError, match=r"top_k must be \[B=3\]"):
        _reveal(logits, log_weights, "velocity", top_k=torch.zeros(2))
    with pytest.raises(ValueError, match=r"seeds must be \[B=3\]"):
        _reveal(logits, log_weights, "velocity", seeds=torch.zeros(2, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------- velocities


def test_the_velocity_of_the_mixture_is_the_mean_of_the_experts_velocities() -> None:
    logits, log_weights = case(3, 5, 30)
    mixed = velocity(mix(logits, log_weights), MASK, 1.7)
    of_experts = torch.stack([velocity(row.log_softmax(-1), MASK, 1.7) for row in logits])
    mean = (log_weights.exp().T[..., None] * of_experts).sum(dim=0)
    torch.testing.assert_close(mixed, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.sum(dim=-1), torch.zeros(5), atol=1e-5, rtol=0)
    assert (mixed[:, MASK] == -torch.tensor(1.7)).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_an_euler_step_along_the_velocity_is_what_is_revealed(schedule: Any) -> None:
    """δ_mask + h u, step by step from all masked, leaves as much masked as the plan of an Euler sampler."""
    logits, _ = case(1, 1, 20)
    log_probs = logits[0].double().log_softmax(-1)
    steps, masked = 6, 1.0
    for step, share in enumerate(revealed_shares(schedule, steps, "euler")[:-1]):
        after = velocity(log_probs, MASK, float(rate(schedule, step / steps)))[0] / steps
        after[MASK] += 1
        assert after.sum().item() == pytest.approx(1)
        assert (after >= 0).all()
        masked *= after[MASK].item()
        assert 1 - masked == pytest.approx(share)
