"""What is sampled, counted: by mixing, by drawing and by pruning, against every answer that there can be.

Eight tokens, three experts, answers of three tokens: 512 probabilities, added up from plain transformers forwards.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from decar.router import prune
from tests.e2e.conftest import running
from tests.helpers import EXACT, Server
from tests.reference import ExpertSpec, Reference, logits_of, make_ensemble, make_tiny_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

VOCABULARY = 8
LENGTH = 3
PROMPT = [1, 5, 3, 6]
SAMPLES, CHOICES = 20_000, 200
SPECS = (
    ExpertSpec("code", "llama", 11, 0.5),
    ExpertSpec("prose", "qwen2", 12, 0.3),
    ExpertSpec("maths", "llama", 13, 0.2),
)
EPS = 0.3  # in the prompt's posterior and on the way, some experts fit into it, and others do not


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Experts that differ much: weights that did not move with the answer would show."""
    directory = tmp_path_factory.mktemp("ensembles") / "tiny"
    tokenizer = make_tiny_tokenizer(VOCABULARY)
    return Reference.load(make_ensemble(directory, SPECS, name="tiny", tokenizer=tokenizer, own_share=0.7))


@pytest.fixture(scope="module")
def tiny_server(tiny: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = (*EXACT, "--max-num-seqs", "256")
    with running(tiny, tmp_path_factory.mktemp("logs") / "tiny.log", flags) as server:
        yield server


@pytest.fixture(scope="module")
def experts_law(tiny: Reference) -> torch.Tensor:
    """log p_k(answer | prompt) [K, V, V, V] by token, summed up to it: entry t of a cumulative tensor per prefix."""
    prefixes = [PROMPT + list(tokens) for tokens in itertools.product(range(VOCABULARY), repeat=LENGTH - 1)]
    steps = []
    for model in tiny.models:
        scores = logits_of(model, prefixes, VOCABULARY).log_softmax(dim=-1)
        shape = [VOCABULARY] * (LENGTH - 1)
        first = scores[0, len(PROMPT) - 1].view(VOCABULARY, 1, 1)
        second = scores[:, len(PROMPT)].view(*shape, VOCABULARY)[:, 0].view(VOCABULARY, VOCABULARY, 1)
        third = scores[:, len(PROMPT) + 1].view(*shape, VOCABULARY)
        steps.append(torch.stack([step.expand(*shape, VOCABULARY) for step in (first, second, third)]))
    return torch.stack(steps, dim=1)  # [LENGTH, K, V, V, V]


@pytest.fixture(scope="module")
def log_start(tiny: Reference) -> torch.Tensor:
    """The posterior [K] after the prompt."""
    scores = torch.cat([_likelihood(model) for model in tiny.models])
    return (torch.tensor(tiny.prior, dtype=torch.float64).log() + scores).log_softmax(dim=0)


def _likelihood(model: Any) -> torch.Tensor:
    scores = logits_of(model, [PROMPT], VOCABULARY)[0].log_softmax(dim=-1)
    return scores[torch.arange(len(PROMPT) - 1), PROMPT[1:]].sum()[None]


@pytest.fixture(scope="module")
def mixture_law(experts_law: torch.Tensor, log_start: torch.Tensor) -> np.ndarray:
    """Σ_k w_k p_k(answer) [V, V, V]."""
    whole = experts_law.sum(dim=0)
    return torch.einsum("k,kabc->abc", log_start.exp(), whole.exp()).numpy()


def pruned_law(experts_law: torch.Tensor, log_start: torch.Tensor, eps: float) -> np.ndarray:
    """The same where experts are dropped on the way, within ``eps``."""
    law = np.zeros([VOCABULARY] * LENGTH)
    start = prune(log_start.numpy(), eps)
    for answer in itertools.product(range(VOCABULARY), repeat=LENGTH):
        (log_weights, left), log_p = start, 0.0
        for t in range(LENGTH):
            of_token = experts_law[(t, slice(None), *answer)].numpy()
            step = np.logaddexp.reduce(log_weights + of_token)
            log_p += step
            log_weights, left = prune(log_weights + of_token - step, left)
        law[answer] = math.exp(log_p)
    return law


async def sample(server: Server, decar: dict[str, Any]) -> np.ndarray:
    """How often each answer came [V, V, V], at fixed seeds."""
    counts = np.zeros([VOCABULARY] * LENGTH)
    places = asyncio.Semaphore(4)

    async def ask(seed: int) -> None:
        body = {
            "model": "tiny",
            "prompt": PROMPT,
            "n": CHOICES,
            "seed": seed,
            "temperature": 1,
            "max_tokens": LENGTH,
            "ignore_eos": True,
            "return_token_ids": True,
            "decar": decar,
        }
        async with places:
            completion = await client.completions.create(
                **{
                    key: body.pop(key)
                    for key in ("model", "prompt", "n", "seed", "temperature", "max_tokens")
                },
                extra_body=body,
            )
        for choice in completion.choices:
            counts[tuple(choice.token_ids)] += 1

    async with server.async_openai() as client:
        await asyncio.gather(*(ask(i * CHOICES) for i in range(SAMPLES // CHOICES)))
    assert counts.sum() == SAMPLES
    return counts


def p_value(counts: np.ndarray, law: np.ndarray) -> float:
    """Chi-square of ``counts`` against ``law``; answers that are expected less than five times count as one."""
    expected = law.ravel() * counts.sum()
    rare = expected < 5
    observed = np.append(counts.ravel()[~rare], counts.ravel()[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert len(expected) > 50
    return float(stats.chisquare(observed, expected).pvalue)


def test_the_laws_are_laws_and_differ(
    experts_law: torch.Tensor, log_start: torch.Tensor, mixture_law: np.ndarray
) -> None:
    assert mixture_law.sum() == pytest.approx(1, abs=1e-9)
    assert np.abs(pruned_law(experts_law, log_start, 0.0) - mixture_law).max() < 1e-12
    assert np.abs(_static(experts_law, log_start) - mixture_law).sum() / 2 > 0.02
    assert np.abs(pruned_law(experts_law, log_start, EPS) - mixture_law).sum() / 2 > 0.02


@pytest.mark.parametrize("eps", [0.3, 0.1, 0.01])
def test_pruning_moves_what_follows_by_no_more_than_eps(
    experts_law: torch.Tensor, log_start: torch.Tensor, mixture_law: np.ndarray, eps: float
) -> None:
    law = pruned_law(experts_law, log_start, eps)
    assert law.sum() == pytest.approx(1, abs=1e-9)
    assert np.abs(law - mixture_law).sum() / 2 <= eps


@pytest.mark.parametrize("decar", [{}, {"sampling": "draw"}], ids=["mixed", "drawn"])
async def test_mixing_and_drawing_sample_the_same_law(
    tiny_server: Server,
    experts_law: torch.Tensor,
    log_start: torch.Tensor,
    mixture_law: np.ndarray,
    decar: dict[str, Any],
) -> None:
    counts = await sample(tiny_server, {"route": "posterior", **decar})
    assert p_value(counts, mixture_law) > 0.01
    # Would a wrong law be noticed? Weights that stay where they were, and the leader alone.
    assert p_value(counts, _static(experts_law, log_start)) < 1e-6
    assert p_value(counts, experts_law.sum(dim=0)[int(log_start.argmax())].exp().numpy()) < 1e-6


async def test_pruned_samples_follow_the_pruned_law(
    tiny_server: Server, experts_law: torch.Tensor, log_start: torch.Tensor, mixture_law: np.ndarray
) -> None:
    counts = await sample(tiny_server, {"route": "posterior", "prune": EPS})
    assert p_value(counts, pruned_law(experts_law, log_start, EPS)) > 0.01
    assert p_value(counts, mixture_law) < 1e-6


def _static(experts_law: torch.Tensor, log_start: torch.Tensor) -> np.ndarray:
    """Each token mixed with the weights of the prompt: what previous-token or fixed weights would do."""
    step = torch.logsumexp(log_start[None, :, None, None, None] + experts_law, dim=1)
    return step.sum(dim=0).exp().numpy()
