"""The yardstick itself, held against what can be computed without it."""

import math

import pytest
import torch

from tests.reference import (
    PADDING_ROWS,
    VOCAB_SIZE,
    Reference,
    Rule,
    mix,
    mixture_decode,
    prompt_texts,
    sequence_log_probs,
)

RULES: tuple[Rule, ...] = ("velocity", "logit")


@pytest.fixture(scope="module")
def prompts(trio: Reference) -> list[list[int]]:
    return [trio.encode(text) for text in prompt_texts(6)]


def test_one_expert_decodes_as_transformers_generates(duo: Reference, prompts: list[list[int]]) -> None:
    alone = duo.alone("code")
    for answer in mixture_decode(alone, prompts, 24):
        generated = alone.models[0].generate(
            torch.tensor([answer.prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert generated[0, len(answer.prompt) :].tolist() == answer.tokens


def test_posterior_obeys_the_chain_rule(trio: Reference, prompts: list[list[int]]) -> None:
    """The sum over t of log p(x_t | x_<t) is log of the sum over k of prior_k p_k(x)."""
    log_prior = torch.tensor(trio.prior, dtype=torch.float64).log()
    for answer in mixture_decode(trio, prompts, 24):
        of_prompt = torch.logsumexp(log_prior + sequence_log_probs(trio, answer.prompt), dim=0)
        whole = torch.logsumexp(log_prior + sequence_log_probs(trio, answer.prompt + answer.tokens), dim=0)
        # The arithmetic is float64, but rounding in the fp32 forwards differs with the sequence's length.
        assert float(whole - of_prompt) == pytest.approx(sum(answer.logprobs), abs=1e-4)


def test_posterior_weights_are_bayes_rule_over_everything_before(
    trio: Reference, prompts: list[list[int]]
) -> None:
    log_prior = torch.tensor(trio.prior, dtype=torch.float64).log()
    answer = mixture_decode(trio, prompts[:1], 24)[0]
    for t in (0, 1, 23):
        expected = (log_prior + sequence_log_probs(trio, answer.prompt + answer.tokens[:t])).softmax(dim=0)
        assert answer.weights[t] == pytest.approx(expected.tolist(), abs=1e-5)  # fp32 forwards, as above


@pytest.mark.parametrize("rule", RULES)
def test_mixtures_are_distributions_and_identical_experts_are_one(rule: Rule) -> None:
    rows = torch.randn(2, 50, dtype=torch.float64).log_softmax(dim=1)
    log_weights = torch.tensor([0.3, 0.7], dtype=torch.float64).log()
    assert float(mix(log_weights, rows, rule).exp().sum()) == pytest.approx(1.0, abs=1e-12)
    same = rows[:1].repeat(2, 1)
    torch.testing.assert_close(mix(log_weights, same, rule), rows[0])


def test_the_two_rules_are_the_arithmetic_and_the_geometric_mean() -> None:
    rows = torch.randn(2, 5, dtype=torch.float64).log_softmax(dim=1)
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    arithmetic = 0.25 * rows[0].exp() + 0.75 * rows[1].exp()
    geometric = rows[0].exp() ** 0.25 * rows[1].exp() ** 0.75
    torch.testing.assert_close(mix(weights.log(), rows, "velocity").exp(), arithmetic)
    torch.testing.assert_close(mix(weights.log(), rows, "logit").exp(), geometric / geometric.sum())


def test_an_expert_without_weight_has_no_say(duo: Reference, prompts: list[list[int]]) -> None:
    expected = mixture_decode(duo.alone("prose"), prompts, 8)
    for rule in RULES:
        answers = mixture_decode(duo, prompts, 8, rule=rule, weights={"prose": 3.0})
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
        assert all(weights == [0.0, 1.0] for answer in answers for weights in answer.weights)


def test_padding_rows_would_matter_and_are_dropped(trio: Reference, prompts: list[list[int]]) -> None:
    padded = trio.models[trio.experts.index("maths")]
    assert padded.config.vocab_size == VOCAB_SIZE + PADDING_ROWS
    assert trio.vocab_size == VOCAB_SIZE
    with torch.inference_mode():
        probabilities = padded(input_ids=torch.tensor(prompts[:1])).logits[0, -1].softmax(dim=0)
    assert float(probabilities[VOCAB_SIZE:].sum()) > 1e-3
    for answer in mixture_decode(trio, prompts, 8, weights={"maths": 1.0}):
        assert max(answer.tokens) < VOCAB_SIZE


def test_experts_differ_but_not_hopelessly(trio: Reference, duo: Reference, prompts: list[list[int]]) -> None:
    """The ensembles have to be able to show a wrong mixture: no expert alone gives the mixture's answers, and
    posteriors move while more than one expert counts."""
    for reference in (trio, duo):
        mixed = mixture_decode(reference, prompts, 32, route="prior")
        for expert in reference.experts:
            alone = mixture_decode(reference.alone(expert), prompts, 32)
            assert sum(a.tokens != b.tokens for a, b in zip(mixed, alone, strict=True)) >= len(prompts) / 2
        answers = mixture_decode(reference, prompts, 32)
        undecided = [0.05 < max(w) < 0.95 for answer in answers for w in answer.weights]
        assert sum(undecided) > len(undecided) / 4


def test_bias_and_penalties_act_on_the_mixture(duo: Reference, prompts: list[list[int]]) -> None:
    plain = mixture_decode(duo, prompts[:1], 16, route="prior")[0]
    first = plain.tokens[0]
    banned = mixture_decode(duo, prompts[:1], 16, route="prior", logit_bias={first: -100.0})[0]
    assert first not in banned.tokens
    assert banned.top[0] == pytest.approx(plain.top[0])  # logprobs are those before the bias

    harsh = mixture_decode(duo, prompts[:1], 16, route="prior", presence_penalty=100.0)[0]
    assert len(set(harsh.tokens)) == 16
    harsh = mixture_decode(duo, prompts[:1], 16, route="prior", frequency_penalty=100.0)[0]
    assert len(set(harsh.tokens)) == 16
    prompt = [*prompts[0], first]
    again = mixture_decode(duo, [prompt], 16, route="prior", repetition_penalty=1e6)[0]
    assert not set(again.tokens) & set(prompt)
    assert len(set(again.tokens)) == 16


def test_a_mask_and_an_end_token_bind(duo: Reference, prompts: list[list[int]]) -> None:
    def allowed(tokens: list[int]) -> torch.Tensor:
        mask = torch.zeros(duo.vocab_size, dtype=torch.bool)
        mask[9 if tokens else 7] = True
        return mask

    answer = mixture_decode(duo, prompts[:1], 16, eos_token_id=9, allowed=allowed)[0]
    assert answer.tokens == [7, 9]
    assert answer.finished
    assert math.isinf(answer.margin)
