"""The mixing rules, in plain torch and in Triton, against float64 and the rows that break naive code.

Tolerance. With u = 2^-24: posted normalisers are given in float32, so a log-probability x - Z carries u(|x| + 2|Z|),
adding a log weight u|log w|, and a sum of K exponentials and its logarithm (K + 4)u. Inputs in bfloat16 and
float16 are exact in float32, so only that arithmetic counts. `off_by` is four times the sum.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decar.kernels import MAX_EXPERTS, Rows, mix, mix_rows, reference
from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS, name_of

RULES = ("velocity", "logit")
SHAPES = [
    (1, 1, 1),  # nothing to mix
    (2, 3, 7),  # V smaller than any block
    (3, 5, 257),  # K no power of two, V odd
    (5, 1, 2048),  # V exactly one block
    (2, 2, 2049),  # one token alone in the last block
    (4, 3, 8193),  # one token alone in the last chunk
    (MAX_EXPERTS, 2, 1000),  # the most experts
    (2, 2, 50257),  # GPT-2's vocabulary: rows that no vector load can align
]

Mix = Callable[..., torch.Tensor]


@pytest.fixture
def mixed(implementation: Any, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """`mix` by one implementation, every output poisoned with NaN until it is written."""
    _poison(monkeypatch)
    return lambda *args: _mix(implementation, *args)


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def _mix(
    implementation: Any, logits: torch.Tensor, log_weights: torch.Tensor, rule: str, anchored: bool = False
) -> torch.Tensor:
    rows = Rows.stacked(logits.to(DEVICE))
    entries = torch.arange(logits.shape[1], device=DEVICE)
    return implementation.mix_rows(rows, entries, log_weights.to(DEVICE), rule, anchored=anchored).cpu()


def exact(logits: torch.Tensor, log_weights: torch.Tensor, rule: str) -> torch.Tensor:
    """The definition, in float64: [K, B, V], [B, K] -> [B, V]."""
    log_probs = logits.double().log_softmax(-1)
    weights = log_weights.double().log_softmax(-1).T[:, :, None]
    if rule == "velocity":
        return (log_probs + weights).logsumexp(0)
    return (weights.exp() * log_probs).sum(0).log_softmax(-1)


def off_by(logits: torch.Tensor, log_weights: torch.Tensor) -> float:
    """The module's tolerance for these inputs."""
    sizes = [
        values[values.isfinite()].abs().max().item()
        for values in (logits.float(), log_weights.log_softmax(-1))
    ]
    normaliser = sizes[0] + math.log(logits.shape[-1])
    return 4 * 2**-24 * (sizes[0] + 2 * normaliser + sizes[1] + len(logits) + 4)


def assert_exact(result: torch.Tensor, logits: torch.Tensor, log_weights: torch.Tensor, rule: str) -> None:
    torch.testing.assert_close(
        result.double(), exact(logits, log_weights, rule), atol=off_by(logits, log_weights), rtol=0
    )


def random_case(
    experts: int, rows: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(experts, rows, vocabulary, generator=generator)
    log_weights = torch.randn(rows, experts, generator=generator).log_softmax(-1)
    return logits.to(dtype), log_weights


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("experts", "rows", "vocabulary"), SHAPES)
def test_equals_the_definition(mixed: Mix, rule: str, experts: int, rows: int, vocabulary: int) -> None:
    logits, log_weights = random_case(experts, rows, vocabulary)
    assert_exact(mixed(logits, log_weights, rule), logits, log_weights, rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_mixed_in_float32(mixed: Mix, rule: str, dtype: torch.dtype) -> None:
    logits, log_weights = random_case(3, 4, 333, dtype=dtype)
    assert_exact(mixed(logits, log_weights, rule), logits, log_weights, rule)


@pytest.mark.parametrize("rule", RULES)
def test_no_rows_and_rows_from_anywhere(mixed: Mix, implementation: Any, rule: str) -> None:
    logits, log_weights = random_case(3, 6, 300)
    assert mixed(logits[:, :0], log_weights[:0], rule).shape == (0, 300)
    rows = Rows.stacked(logits.to(DEVICE))
    entries = torch.tensor([5, 0, 5], device=DEVICE)  # any order, one of them twice
    result = implementation.mix_rows(rows, entries, log_weights[:3].to(DEVICE), rule, anchored=False).cpu()
    assert_exact(result, logits[:, [5, 0, 5]], log_weights[:3], rule)


@pytest.mark.parametrize("rule", RULES)
def test_anchored_logits_differ_by_the_mean_log_normaliser(mixed: Mix, rule: str) -> None:
    logits, log_weights = random_case(3, 4, 100)
    anchor = (log_weights.exp() * logits.logsumexp(-1).T).sum(-1, keepdim=True)
    anchored = mixed(logits, log_weights, rule, True)
    if rule == "logit":
        expected = (log_weights.exp().T[:, :, None] * logits).sum(0)
    else:
        expected = mixed(logits, log_weights, rule) + anchor
    torch.testing.assert_close(anchored, expected, atol=2 * off_by(logits, log_weights), rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_identical_experts_are_that_expert_under_any_weights(mixed: Mix, rule: str) -> None:
    logits, log_weights = random_case(3, 4, 50)
    logits[:] = logits[0].clone()
    bound = off_by(logits, log_weights)
    torch.testing.assert_close(
        mixed(logits, log_weights, rule), logits[0].log_softmax(-1), atol=bound, rtol=0
    )
    torch.testing.assert_close(mixed(logits, log_weights, rule, True), logits[0], atol=bound, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_the_row_of_an_inactive_expert_is_never_used(mixed: Mix, rule: str, poison: float) -> None:
    logits, _ = random_case(3, 2, 40)
    log_weights = torch.tensor([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]]).log()
    expected = torch.stack(
        [
            exact(logits[:2, :1], log_weights[:1, :2], rule)[0],
            exact(logits[1:, 1:], log_weights[1:, 1:], rule)[0],
        ]
    )
    bound = off_by(logits, log_weights)
    logits[2, 0] = poison
    logits[0, 1] = poison
    torch.testing.assert_close(mixed(logits, log_weights, rule).double(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_an_expert_without_a_distribution_takes_no_part(mixed: Mix, rule: str, broken: float) -> None:
    logits, log_weights = random_case(3, 2, 40)
    logits[1] = broken
    others = [0, 2]
    assert_exact(mixed(logits, log_weights, rule), logits[others], log_weights[:, others], rule)


@pytest.mark.parametrize("rule", RULES)
def test_where_no_expert_takes_part_no_token_is_possible(mixed: Mix, rule: str) -> None:
    logits, log_weights = random_case(2, 2, 40)
    log_weights[0] = -math.inf
    logits[:, 1] = math.nan
    assert mixed(logits, log_weights, rule).isneginf().all()


@pytest.mark.parametrize("rule", RULES)
def test_forbidden_tokens_tiny_weights_and_huge_logits_give_no_nan(mixed: Mix, rule: str) -> None:
    logits, _ = random_case(2, 4, 64)
    log_weights = torch.tensor([[0.5, 0.5]] * 4).log()
    logits[0, 0, 10:] = -math.inf  # one expert allows few tokens
    logits[1, 1] = -math.inf
    logits[1, 1, 5] = 0.0  # one expert allows one token
    log_weights[2] = torch.tensor([1e-30, 1.0]).log()
    logits[:, 3] = torch.where(logits[:, 3] > 0, 1e4, -1e4)
    result = mixed(logits, log_weights, rule)
    assert not result.isnan().any()
    for row in range(4):
        inputs = logits[:, [row]], log_weights[[row]]
        assert_exact(result[[row]], *inputs, rule)
        assert abs(result[row].double().exp().sum() - 1) < 64 * off_by(*inputs)


def test_under_velocity_a_token_that_one_expert_allows_is_possible_and_under_logit_it_is_not(
    mixed: Mix,
) -> None:
    logits = torch.zeros(2, 1, 4)
    logits[0, 0, 3] = -math.inf
    log_weights = torch.tensor([[0.5, 0.5]]).log()
    assert mixed(logits, log_weights, "velocity")[0, 3].item() == pytest.approx(math.log(0.125), abs=1e-6)
    assert mixed(logits, log_weights, "logit")[0, 3].item() == -math.inf


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of any scale with forbidden tokens, though never all of a row's, and weights of any size."""
    experts, rows, vocabulary = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    logits = scale * torch.randn(experts, rows, vocabulary, generator=generator)
    allowed = torch.rand(experts, rows, vocabulary, generator=generator) < draw(st.sampled_from([0.3, 1.0]))
    allowed[..., draw(st.integers(0, vocabulary - 1))] = True
    weights = draw(st.sampled_from([0.1, 3.0, 70.0])) * torch.randn(rows, experts, generator=generator)
    return logits.where(allowed, -math.inf), weights.log_softmax(-1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=name_of)
@pytest.mark.parametrize("rule", RULES)
@given(case=cases(), data=st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_properties(
    implementation: Any, rule: str, case: tuple[torch.Tensor, torch.Tensor], data: Any
) -> None:
    """Weights permute with experts, scaling all weights changes nothing, and the output sums to one."""
    logits, log_weights = case
    result = _mix(implementation, logits, log_weights, rule)
    bound = off_by(logits, log_weights)
    assert_exact(result, logits, log_weights, rule)
    assert (result.double().exp().sum(-1) - 1).abs().max() < 2 * bound
    order = data.draw(st.permutations(range(len(logits))))
    permuted = _mix(implementation, logits[order], log_weights[:, order], rule)
    torch.testing.assert_close(permuted, result, atol=2 * bound, rtol=0)
    shift = data.draw(st.floats(-20, 20))
    torch.testing.assert_close(
        _mix(implementation, logits, log_weights + shift, rule),
        result,
        atol=2 * bound + 8 * abs(shift) * 2**-24,
        rtol=0,
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_public_operations_run_the_implementation_of_the_device(rule: str) -> None:
    logits, log_weights = random_case(3, 4, 60)
    assert_exact(mix(logits, log_weights, rule), logits, log_weights, rule)  # type: ignore[arg-type]
    rows, entries = Rows.stacked(logits), torch.tensor([2, 1])
    torch.testing.assert_close(
        mix_rows(rows, entries, log_weights[:2], rule),  # type: ignore[arg-type]
        reference.mix_rows(rows, entries, log_weights[:2], rule, anchored=True),  # type: ignore[arg-type]
        atol=0,
        rtol=0,
    )


def test_wrong_shapes_and_rules_are_named() -> None:
    logits, log_weights = random_case(2, 3, 5)
    with pytest.raises(ValueError, match=r"\[B=3, K=2\]"):
        mix(logits, log_weights.T)
    with pytest.raises(ValueError, match="velocity"):
        mix(logits, log_weights, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float32, bfloat16 or float16"):
        mix(logits.double(), log_weights)
    with pytest.raises(ValueError, match="from 1 to 16"):
        mix(logits[:0], log_weights[:, :0])
    with pytest.raises(ValueError, match="one shape"):
        Rows([logits[0], logits[1, :2]], [torch.zeros(3), torch.zeros(3)])
    with pytest.raises(ValueError, match=r"\[E=3\]"):
        Rows([logits[0]], [torch.zeros(4)])
