"""Tokens chosen while mixing: greedy, Gumbel samples, and the posterior after them."""

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from decar.kernels import Rows, decide, reference
from tests.kernels.implementations import DEVICE, IMPLEMENTATIONS
from tests.kernels.test_mix import exact, random_case


def _decide(
    implementation: ModuleType,
    logits: torch.Tensor,
    log_weights: torch.Tensor,
    rule: str,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    entries: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    entries = torch.arange(logits.shape[1]) if entries is None else entries
    mixture = (entries, log_weights)
    settings = (temperatures, seeds, positions)
    tokens, after = implementation.decide(
        Rows.stacked(logits.to(DEVICE)),
        *(tensor.to(DEVICE) for tensor in mixture),
        rule,
        *(tensor.to(DEVICE) for tensor in settings),
    )
    return tokens.cpu(), after.cpu()


@pytest.mark.parametrize("rule", ["velocity", "logit"])
@pytest.mark.parametrize("vocabulary", [1, 7, 2049, 20011])
def test_greedy_is_the_argmax_of_the_definition(implementation: Any, rule: str, vocabulary: int) -> None:
    logits, log_weights = random_case(3, 4, vocabulary)
    nothing = torch.zeros(4, dtype=torch.int64)
    tokens, _ = _decide(implementation, logits, log_weights, rule, torch.zeros(4), nothing, nothing)
    assert tokens.tolist() == exact(logits, log_weights, rule).argmax(-1).tolist()


def test_ties_go_to_the_smaller_id(implementation: Any) -> None:
    logits = torch.zeros(2, 1, 20000)
    logits[..., 3000:] = 1.0
    nothing = torch.zeros(1, dtype=torch.int64)
    log_weights = torch.tensor([[0.5, 0.5]]).log()
    tokens, _ = _decide(implementation, logits, log_weights, "velocity", torch.zeros(1), nothing, nothing)
    assert tokens.tolist() == [3000]


def test_ties_go_to_the_smaller_id_of_any_block(implementation: Any) -> None:
    """A kernel keeps the best of each column of its blocks: here the smaller id is in the later column."""
    logits = torch.zeros(2, 1, 20000)
    logits[..., [3100, 4101, 12000]] = 1.0
    nothing = torch.zeros(1, dtype=torch.int64)
    log_weights = torch.tensor([[0.5, 0.5]]).log()
    tokens, _ = _decide(implementation, logits, log_weights, "velocity", torch.zeros(1), nothing, nothing)
    assert tokens.tolist() == [3100]


@pytest.mark.parametrize("rule", ["velocity", "logit"])
def test_where_nobody_takes_part_the_first_token_is_chosen(implementation: Any, rule: str) -> None:
    logits, _ = random_case(2, 2, 9000)
    nothing, log_weights = torch.zeros(2, dtype=torch.int64), torch.full((2, 2), -torch.inf)
    tokens, _ = _decide(implementation, logits, log_weights, rule, torch.tensor([0.0, 1.0]), nothing, nothing)
    assert tokens.tolist() == [0, 0]


def test_the_greedy_token_of_unlikely_ones_is_found(implementation: Any) -> None:
    """Experts that exclude each other's tokens, all of a probability that float32 rounds to 0 but for one a chunk."""
    logits = torch.full((2, 1, 20000), -200.0)
    logits[0, 0, 17000], logits[1, 0, 900] = 0.0, 0.0
    nothing = torch.zeros(1, dtype=torch.int64)
    for weights, token in (([0.4, 0.6], 900), ([0.6, 0.4], 17000), ([1.0, 1e-30], 17000)):
        log_weights = torch.tensor([weights]).log()
        tokens, _ = _decide(implementation, logits, log_weights, "velocity", torch.zeros(1), nothing, nothing)
        assert tokens.tolist() == [token]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_weights_and_temperatures_come_in_any_dtype(implementation: Any, dtype: torch.dtype) -> None:
    logits, log_weights = random_case(3, 4, 300)
    rounded, temperatures = log_weights.to(dtype), torch.tensor([0.0, 0.5, 1.0, 2.0])
    spread = torch.stack([rounded, rounded], dim=1)[:, 0]  # rows that do not follow one another
    seeds = torch.arange(4)
    expected = _decide(reference, logits, rounded.double(), "velocity", temperatures, seeds, seeds)
    tokens, after = _decide(implementation, logits, spread, "velocity", temperatures.to(dtype), seeds, seeds)
    assert tokens.tolist() == expected[0].tolist()
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, expected[1], atol=1e-12, rtol=0)


def test_one_call_leaves_nothing_for_the_next(implementation: Any) -> None:
    """The same rows again and again, few and many, as an engine reads them."""
    logits, log_weights = random_case(2, 6, 17000)
    rows = Rows.stacked(logits.to(DEVICE))
    best = exact(logits, log_weights, "logit").argmax(-1)
    for entries in ([0, 1], [5, 4, 3, 2, 1, 0], [2]):
        chosen = torch.tensor(entries)
        nothing = torch.zeros(len(entries), dtype=torch.int64)
        weights, zeros = log_weights[chosen].to(DEVICE), torch.zeros(len(entries))
        log_probs = implementation.mix_rows(rows, chosen.to(DEVICE), weights, "logit", anchored=False)
        tokens, _ = implementation.decide(
            rows,
            chosen.to(DEVICE),
            weights,
            "logit",
            *(tensor.to(DEVICE) for tensor in (zeros, nothing, nothing)),
        )
        assert tokens.tolist() == log_probs.argmax(-1).tolist() == best[chosen].tolist()


@pytest.mark.parametrize("rule", ["velocity", "logit"])
def test_all_implementations_sample_the_same_token_whatever_the_batch(rule: str) -> None:
    logits, log_weights = random_case(2, 12, 9001)
    generator = torch.Generator().manual_seed(1)
    temperatures = torch.tensor([0.0, 0.3, 1.0, 5.0] * 3)
    seeds = torch.randint(0, 2**63 - 1, (12,), generator=generator)
    positions = torch.randint(0, 2**32, (12,), generator=generator)
    alone = [
        _decide(
            reference,
            logits,
            log_weights[[i]],
            rule,
            temperatures[[i]],
            seeds[[i]],
            positions[[i]],
            torch.tensor([i]),
        )[0].item()
        for i in range(12)
    ]
    assert len(set(alone)) > 6
    for implementation in IMPLEMENTATIONS:
        tokens, _ = _decide(implementation, logits, log_weights, rule, temperatures, seeds, positions)
        assert tokens.tolist() == alone


def test_philox_gives_its_published_words() -> None:
    """Known answers of Random123 (kat_vectors, philox4x32 with 7 rounds)."""
    zero = [torch.zeros(1, dtype=torch.int64)] * 4
    assert [hex(word.item()) for word in reference.philox(zero, zero[0])] == [
        "0x5f6fb709",
        "0xd893f64",
        "0x4f121f81",
        "0x4f730a48",
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_exact_distribution(temperature: float) -> None:
    """100,000 draws, chi-square over every token; on a GPU the kernel's, else the reference's, which equal them."""
    draws, vocabulary = 100_000, 60
    logits, log_weights = random_case(2, 1, vocabulary, seed=2)
    probabilities = (exact(logits, log_weights, "velocity")[0] / temperature).softmax(-1).numpy()
    implementation = IMPLEMENTATIONS[-1] if DEVICE == "cuda" else reference
    tokens, _ = _decide(
        implementation,
        logits,
        log_weights.expand(draws, -1),
        "velocity",
        torch.full((draws,), temperature),
        torch.full((draws,), 1234),
        torch.arange(draws),
        torch.zeros(draws, dtype=torch.int64),
    )
    counts = np.bincount(tokens.numpy(), minlength=vocabulary)
    rare = draws * probabilities < 5  # the chi-square approximation wants five expected draws in a cell
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = draws * np.append(probabilities[~rare], probabilities[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 0.01


def test_noise_is_gumbel_up_to_its_largest_values() -> None:
    """The maximum over a vocabulary of 128k decides a sample: its distribution is Gumbel shifted by log V."""
    vocabulary = 1 << 17
    noise = reference.gumbel(torch.full((200,), 9), torch.arange(200), vocabulary)
    assert stats.kstest(noise[:4].flatten().numpy(), stats.gumbel_r.cdf).pvalue > 0.01
    highest = noise.max(dim=1).values
    assert stats.kstest(highest.numpy(), stats.gumbel_r(loc=math.log(vocabulary)).cdf).pvalue > 0.01
    assert len(highest.unique()) == 200  # coarse uniforms would repeat their largest value


def test_the_posterior_moves_by_the_token_likelihoods(implementation: Any) -> None:
    logits, log_weights = random_case(3, 5, 50)
    log_weights[1] = torch.tensor([-torch.inf, -0.5, -1.0])  # inactive
    logits[0, 2] = math.nan  # no distribution
    logits[1, 3] = -math.inf
    logits[1, 3, 7] = 0.0  # one token only, and it is unlikely to be chosen
    nothing = torch.zeros(5, dtype=torch.int64)
    tokens, after = _decide(implementation, logits, log_weights, "velocity", torch.zeros(5), nothing, nothing)
    for row, token in enumerate(tokens.tolist()):
        log_probs = logits[:, row].double().log_softmax(-1)[:, token].nan_to_num(-math.inf)
        expected = (log_weights[row].double() + log_probs).log_softmax(-1)
        # The normalisers are float32: |Z| <= 18 rounds by 18 * 2^-24.
        torch.testing.assert_close(after[row], expected, atol=4e-6, rtol=0)


def test_weights_stay_where_nothing_can_be_learnt(implementation: Any) -> None:
    logits = torch.full((2, 1, 9), math.nan)
    log_weights = torch.tensor([[0.25, 0.75]]).log()
    nothing = torch.zeros(1, dtype=torch.int64)
    tokens, after = _decide(implementation, logits, log_weights, "velocity", torch.zeros(1), nothing, nothing)
    torch.testing.assert_close(after, log_weights.double())
    assert 0 <= tokens.item() < 9


def test_wrong_shapes_are_named() -> None:
    logits, log_weights = random_case(2, 3, 5)
    rows, entries, zero = Rows.stacked(logits), torch.arange(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"seeds must be \[B=3\]"):
        decide(rows, entries, log_weights, "velocity", torch.zeros(3), zero[:2], zero)
