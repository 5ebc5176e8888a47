"""The mixing rules against float64, and the rows that break naive code."""

import math

import pytest
import torch

from decar.kernels import mix

RULES = ("velocity", "logit")


def exact(logits: torch.Tensor, log_weights: torch.Tensor, rule: str) -> torch.Tensor:
    """The definition, in float64: [K, B, V], [B, K] -> [B, V]."""
    log_probs = logits.double().log_softmax(-1)
    weights = log_weights.double().T[:, :, None]
    if rule == "velocity":
        return (log_probs + weights).logsumexp(0)
    return (weights.exp() * log_probs).sum(0).log_softmax(-1)


def random_case(experts: int, rows: int, vocabulary: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(experts, rows, vocabulary, generator=generator)
    log_weights = torch.randn(rows, experts, generator=generator).log_softmax(-1)
    return logits, log_weights


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("experts", "rows", "vocabulary"),
    [
        (1, 1, 1),  # nothing to mix
        (2, 3, 7),  # V smaller than a vector register
        (3, 5, 257),  # V odd, one past a power of two
        (16, 2, 1000),  # the most experts
    ],
)
def test_equals_the_definition(rule: str, experts: int, rows: int, vocabulary: int) -> None:
    logits, log_weights = random_case(experts, rows, vocabulary)
    # float32 rounds each of ~K terms of size up to ~20: 20 * 2^-24 * (K + 4) < 3e-5.
    torch.testing.assert_close(
        mix(logits, log_weights, rule).double(), exact(logits, log_weights, rule), atol=3e-5, rtol=0
    )


@pytest.mark.parametrize("rule", RULES)
def test_sums_to_one_and_ignores_the_order_of_experts(rule: str) -> None:
    logits, log_weights = random_case(4, 6, 123)
    mixed = mix(logits, log_weights, rule)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(6), atol=1e-5, rtol=0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(mix(logits[order], log_weights[:, order], rule), mixed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_identical_experts_are_that_expert_under_any_weights(rule: str) -> None:
    logits, log_weights = random_case(3, 4, 50)
    logits[:] = logits[0].clone()
    torch.testing.assert_close(mix(logits, log_weights, rule), logits[0].log_softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_the_row_of_an_inactive_expert_is_never_used(rule: str, poison: float) -> None:
    logits, _ = random_case(3, 2, 40)
    log_weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]).log()
    expected = torch.stack(
        [
            exact(logits[:2, :1], log_weights[:1, :2], rule)[0],
            exact(logits[1:, 1:], log_weights[1:, 1:], rule)[0],
        ]
    )
    logits[2, 0] = poison
    logits[0, 1] = poison
    torch.testing.assert_close(mix(logits, log_weights, rule).double(), expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_forbidden_tokens_tiny_weights_and_huge_logits_give_no_nan(rule: str) -> None:
    logits, _ = random_case(2, 4, 64)
    log_weights = torch.tensor([[0.5, 0.5]] * 4).log()
    logits[0, 0, 10:] = -torch.inf  # one expert allows few tokens
    logits[1, 1] = -torch.inf
    logits[1, 1, 5] = 0.0  # one expert allows one token
    log_weights[2] = torch.tensor([1e-30, 1.0]).log()
    logits[:, 3] *= 1e4
    mixed = mix(logits, log_weights, rule)
    assert not mixed.isnan().any()
    # A float32 normaliser near 4e4 is off by up to 4e4 * 2^-24 = 0.0024, and so is the sum of a row with it.
    off = (mixed.exp().sum(-1) - 1).abs()
    assert off[:3].max() < 1e-5
    assert off[3] < 0.005
    assert mixed[1].argmax() == 5 if rule == "logit" else mixed[1].isfinite().all()


def test_under_velocity_a_token_that_one_expert_allows_is_possible_and_under_logit_it_is_not() -> None:
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 3] = -torch.inf
    log_weights = torch.tensor([[0.5, 0.5]]).log()
    assert mix(logits, log_weights, "velocity")[0, 3].item() == pytest.approx(math.log(0.125), abs=1e-6)
    assert mix(logits, log_weights, "logit")[0, 3].item() == -math.inf


def test_an_expert_that_allows_nothing_takes_no_part() -> None:
    logits, log_weights = random_case(2, 1, 9)
    logits[1] = -torch.inf
    mixed = mix(logits, log_weights, "logit")
    assert not mixed.isnan().any()


def test_wrong_shapes_and_rules_are_named() -> None:
    logits, log_weights = random_case(2, 3, 5)
    with pytest.raises(ValueError, match=r"\[B=3, K=2\]"):
        mix(logits, log_weights.T)
    with pytest.raises(ValueError, match="velocity"):
        mix(logits, log_weights, "mean")  # type: ignore[arg-type]
