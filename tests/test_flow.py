"""Flow ensembles, sampled by decar's own steps and rows: against enumerated laws, and token for token.

Five tokens and the mask, texts of four, three experts: 625 probabilities (`tests/flow.py`), 20,000 samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from decar.kernels import Rows, flow, mix, reveal
from decar.router import drawn, log_prior
from decar.router.flow import Revealing
from tests.flow import (
    Asked,
    Denoisers,
    Subsets,
    ancestral_chances,
    autoregressive,
    euler_chances,
    every_subset,
    law_of_own_processes,
    law_of_steps,
    leftmost,
    slowly_revealed,
)

VOCABULARY, LENGTH, SAMPLES = 5, 4, 20_000
LEFT_TO_RIGHT = [tuple(range(LENGTH))]
ANY_ORDER = list(itertools.permutations(range(LENGTH)))


@pytest.fixture(scope="module")
def denoisers() -> Denoisers:
    return Denoisers(VOCABULARY, LENGTH)


def answer_to(denoisers: Denoisers, asked: Asked, log_weights: np.ndarray | None = None) -> Revealing:
    return Revealing(
        np.flatnonzero(np.array(asked.text) == denoisers.mask),
        asked.order,  # type: ignore[arg-type]
        asked.schedule,  # type: ignore[arg-type]
        asked.steps,
        asked.block_length,
        asked.seed,
        np.log(denoisers.prior) if log_weights is None else log_weights,
        sampler=asked.sampler,  # type: ignore[arg-type]
        posterior=asked.posterior,
    )


def rows_of(denoisers: Denoisers, texts: np.ndarray) -> Rows:
    """Entry text · L + position of every expert's buffer is the row at that position."""
    return Rows.stacked(torch.from_numpy(denoisers.logits(texts)).flatten(1, 2))


def revealed(
    denoisers: Denoisers, requests: Sequence[Asked], answers: Sequence[Revealing]
) -> tuple[np.ndarray, list[dict[int, float]]]:
    """All requests together, a step of each at a time: texts [B, L], and log-probabilities by position."""
    texts = np.array([asked.text for asked in requests])
    log_probs: list[dict[int, float]] = [{} for _ in requests]
    settings = {
        name: torch.tensor([getattr(asked, field) for asked in requests])
        for name, field in (
            ("temperatures", "temperature"),
            ("seeds", "seed"),
            ("top_k", "top_k"),
            ("top_p", "top_p"),
            ("min_p", "min_p"),
        )
    }
    while live := [b for b, answer in enumerate(answers) if not answer.done]:
        asks = [answers[b].asks() for b in live]
        of_row = np.repeat(live, [len(positions) for positions in asks])
        given = reveal(
            rows_of(denoisers, texts),
            torch.from_numpy(of_row * denoisers.length + np.concatenate(asks)),
            torch.from_numpy(np.stack([answer.log_weights for answer in answers])[of_row]),
            requests[0].rule,  # type: ignore[arg-type]
            positions=torch.from_numpy(np.concatenate([answers[b].noise() for b in live])),
            **{name: values[of_row] for name, values in settings.items()},
        )
        ends = np.cumsum([len(positions) for positions in asks])[:-1]
        parts = [np.split(tensor.numpy(), ends) for tensor in given]
        for b, positions, tokens, said, by_expert in zip(live, asks, *parts, strict=True):
            now, chosen = answers[b].takes(positions, tokens, said, by_expert)
            texts[b, now] = chosen
            at = dict(zip(positions.tolist(), said.tolist(), strict=True))
            log_probs[b] |= {position: at[position] for position in now.tolist()}
    return texts, log_probs


def samples(
    denoisers: Denoisers, count: int = SAMPLES, weights: np.ndarray | None = None, **fields: Any
) -> np.ndarray:
    """Texts [count, L] from all masked, one seed each; ``weights`` [count, K] to begin with if not the prior's."""
    requests = [Asked(denoisers.masked_text(), seed=seed, **fields) for seed in range(count)]
    answers = [
        answer_to(denoisers, asked, None if weights is None else weights[b])
        for b, asked in enumerate(requests)
    ]
    return revealed(denoisers, requests, answers)[0]


def assert_follow(texts: np.ndarray, law: np.ndarray) -> None:
    """Chi-square over every text; those of which five are not expected count as one."""
    assert law.sum() == pytest.approx(1, abs=1e-12)
    counts = np.zeros(law.shape)
    np.add.at(counts, tuple(texts.T), 1)
    expected = len(texts) * law
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    assert stats.chisquare(observed, np.append(expected[~rare], expected[rare].sum())).pvalue > 0.01


# ---------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize(("order", "orders"), [("random", ANY_ORDER), ("left-to-right", LEFT_TO_RIGHT)])
def test_one_token_a_step_is_the_mixture_of_the_experts_processes(
    denoisers: Denoisers, order: str, orders: Sequence[Sequence[int]]
) -> None:
    assert_follow(samples(denoisers, order=order), law_of_own_processes(denoisers, orders))


@pytest.mark.parametrize("steps", [None, 2])
def test_drawing_an_expert_is_the_mixture_of_the_experts_processes_for_any_number_of_steps(
    denoisers: Denoisers, steps: int | None
) -> None:
    uniforms = np.random.default_rng(0).random(SAMPLES)
    weights = np.stack([drawn(np.log(denoisers.prior), uniform) for uniform in uniforms])
    if steps is None:
        law = law_of_own_processes(denoisers, ANY_ORDER)
    else:
        subsets = every_subset(ancestral_chances("linear", steps))
        alone = np.eye(len(denoisers.prior))
        laws = [law_of_steps(denoisers, weights, subsets) for weights in alone]
        law = np.tensordot(denoisers.prior, laws, axes=1)
    assert_follow(samples(denoisers, weights=weights, steps=steps), law)


@pytest.mark.parametrize(
    ("fields", "subsets"),
    [
        ({"steps": 1}, leftmost([LENGTH])),
        ({"steps": 2}, every_subset(ancestral_chances("linear", 2))),
        ({"steps": 3, "schedule": "cosine"}, every_subset(ancestral_chances("cosine", 3))),
        (
            {"steps": 3, "schedule": "cosine", "sampler": "euler"},
            every_subset(euler_chances("cosine", 3)),
        ),
        ({"steps": 3, "order": "left-to-right", "schedule": "cosine"}, leftmost([1, 1, 2])),
        ({"steps": 2, "block_length": 2}, leftmost([2, 2])),
    ],
    ids=["one step", "ancestral", "cosine", "euler", "left to right", "blocks"],
)
def test_several_tokens_a_step_are_the_factorised_process(
    denoisers: Denoisers, fields: dict[str, Any], subsets: Subsets
) -> None:
    law = law_of_steps(denoisers, denoisers.prior, subsets)
    assert_follow(samples(denoisers, count=SAMPLES // 4, **fields), law)


def test_the_factorised_process_approaches_the_mixture_with_more_steps(denoisers: Denoisers) -> None:
    """In total variation: several tokens a step is an approximation, and the tests above tell it from the exact law."""
    exact = law_of_own_processes(denoisers, ANY_ORDER)
    away = [
        np.abs(law_of_steps(denoisers, denoisers.prior, every_subset(chances)) - exact).sum() / 2
        for chances in (ancestral_chances("linear", steps) for steps in (1, 2, 3))
    ]
    assert away[0] > away[1] > away[2] > 0.05


# ---------------------------------------------------------------------------------------------- autoregression


@pytest.mark.parametrize("block_length", [None, 3])
def test_from_left_to_right_left_looking_experts_are_the_autoregressive_ensemble(
    block_length: int | None,
) -> None:
    """Each row, and the weights that mix it, after every prefix."""
    experts = Denoisers(VOCABULARY, LENGTH, left_looking=True)
    for text in itertools.product(experts.ids, experts.ids, experts.ids, experts.ids[:1]):
        z = np.array(experts.masked_text())
        answer = answer_to(experts, Asked(z.tolist(), order="left-to-right", block_length=block_length))
        for length, token in enumerate(text):
            distribution, weights = autoregressive(experts, text[:length])
            logits = torch.from_numpy(experts.logits(z[None]))[:, 0]
            (position,) = answer.asks()
            assert position == length
            row = mix(logits[:, [position]], torch.from_numpy(answer.log_weights)[None])[0].exp().numpy()
            np.testing.assert_allclose(row, distribution, atol=1e-6, rtol=0)
            np.testing.assert_allclose(np.exp(answer.log_weights), weights, atol=1e-6, rtol=0)
            said = logits[:, position].double().log_softmax(-1)[:, token].numpy()
            answer.takes([position], [token], [0.0], said[None])
            z[position] = token
        assert answer.done


# ---------------------------------------------------------------------------------------------- token for token


@pytest.fixture(scope="module")
def longer() -> Denoisers:
    return Denoisers(vocabulary=11, length=10, seed=1)


def some_requests(denoisers: Denoisers, count: int, rule: str) -> list[Asked]:
    """Of every kind: orders, schedules, one step and more than there are tokens, blocks, temperatures, truncation."""
    rng = np.random.default_rng(5)

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    return [
        Asked(
            text=[pick(denoisers.mask, denoisers.mask, *denoisers.ids[:2]) for _ in range(denoisers.length)],
            order=pick("random", "confident", "left-to-right"),
            schedule=pick("linear", "cosine"),
            steps=pick(None, 1, 2, 3, 4, 50),
            block_length=pick(None, 1, 2, 3, 50),
            seed=int(rng.integers(2**63 - 1)),
            sampler=pick("ancestral", "ancestral", "euler"),
            posterior=pick(True, True, False),
            rule=rule,
            temperature=pick(0.0, 0.5, 1.0, 1.0, 2.0),
            top_k=pick(0, 0, 3),
            top_p=pick(1.0, 1.0, 0.6),
            min_p=pick(0.0, 0.0, 0.2),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("rule", ["velocity", "logit"])
def test_every_kind_of_request_is_revealed_as_the_definition_says(longer: Denoisers, rule: str) -> None:
    requests = some_requests(longer, 300, rule)
    answers = [answer_to(longer, asked) for asked in requests]
    texts, log_probs = revealed(longer, requests, answers)
    for asked, answer, text, said in zip(requests, answers, texts, log_probs, strict=True):
        expected, expected_log_probs, weights = slowly_revealed(longer, asked)
        assert text.tolist() == expected, asked
        assert said == pytest.approx(expected_log_probs, abs=1e-5)
        assert np.exp(answer.log_weights) == pytest.approx(weights, abs=1e-5)


@pytest.mark.parametrize("rule", ["velocity", "logit"])
def test_an_answer_is_the_same_alone_and_among_others(longer: Denoisers, rule: str) -> None:
    requests = some_requests(longer, 33, rule)
    together = [answer_to(longer, asked) for asked in requests]
    texts, log_probs = revealed(longer, requests, together)
    for asked, answer, text, said in zip(requests, together, texts, log_probs, strict=True):
        alone = answer_to(longer, asked)
        alone_text, alone_log_probs = revealed(longer, [asked], [alone])
        assert alone_text[0].tolist() == text.tolist()
        assert said == pytest.approx(alone_log_probs[0], abs=1e-6)
        assert np.exp(answer.log_weights) == pytest.approx(np.exp(alone.log_weights), abs=1e-6)


def test_a_step_of_all_requests_is_one_call_of_decide(
    longer: Denoisers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(len(args[1]))
        return decide(*args)

    decide = flow.decide
    monkeypatch.setattr(flow, "decide", counted)
    requests = [Asked(longer.masked_text(), steps=4, order="left-to-right", seed=seed) for seed in range(32)]
    revealed(longer, requests, [answer_to(longer, asked) for asked in requests])
    assert calls == [32 * positions for positions in (2, 3, 3, 2)]


def test_identical_experts_are_that_expert(longer: Denoisers) -> None:
    requests = [asked for asked in some_requests(longer, 60, "velocity") if asked.posterior]
    one = Denoisers(vocabulary=11, length=10, experts=1, seed=1)
    texts, log_probs = revealed(one, requests, [answer_to(one, asked) for asked in requests])

    class Twins(Denoisers):
        def logits(self, texts: np.ndarray) -> np.ndarray:
            return np.repeat(one.logits(texts), len(self.prior), axis=0)

    three = Twins(vocabulary=11, length=10, seed=1)
    answers = [answer_to(three, asked) for asked in requests]
    texts_of_three, log_probs_of_three = revealed(three, requests, answers)
    assert texts_of_three.tolist() == texts.tolist()
    for said, expected, answer in zip(log_probs_of_three, log_probs, answers, strict=True):
        assert said == pytest.approx(expected, abs=1e-6)
        assert np.exp(answer.log_weights) == pytest.approx(three.prior, abs=1e-9)


def test_an_expert_without_weight_is_never_read(longer: Denoisers) -> None:
    requests = some_requests(longer, 60, "velocity")
    prior = log_prior([0.4, 0.0, 0.6])
    answers = [answer_to(longer, asked, prior) for asked in requests]
    texts, _ = revealed(longer, requests, answers)

    class Broken(Denoisers):
        def logits(self, texts: np.ndarray) -> np.ndarray:
            logits = super().logits(texts)
            logits[1] = np.nan
            return logits

    broken = Broken(vocabulary=11, length=10, seed=1)
    again = [answer_to(broken, asked, prior) for asked in requests]
    assert revealed(broken, requests, again)[0].tolist() == texts.tolist()
    for answer, expected in zip(again, answers, strict=True):
        assert answer.log_weights.tolist() == expected.log_weights.tolist()
        assert answer.log_weights[1] == -np.inf


def test_a_text_without_masks_asks_nothing(longer: Denoisers) -> None:
    answer = answer_to(longer, Asked(longer.ids[:10]))
    assert answer.done
    assert not len(answer.asks())
    assert revealed(longer, [Asked(longer.ids[:10])], [answer])[0].tolist() == [longer.ids[:10]]
