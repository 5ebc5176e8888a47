"""Tokens that the mixing kernel chooses in place of vLLM's sampler: what a reference chooses with the same noise.

On a CPU that is vLLM's sampler's to do unless DECAR_SAMPLER says otherwise, as here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from decar.kernels.reference import gumbel
from tests.e2e import test_seeds as seeds
from tests.e2e.conftest import LOADED, running
from tests.e2e.test_active import NEAR, check_seeded, clear, counted
from tests.e2e.test_exact import (
    CANDIDATES,
    LEAD,
    RULES,
    WEIGHT_TOLERANCE,
    Case,
    assert_equal,
    complete_all,
    routed,
    weighted,
)
from tests.helpers import Server
from tests.reference import Decoded, Reference, Rule, mixture_decode, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

TOKENS = 24
SEED = -3  # any integer is one
FEWEST = 12  # answers that are decided clearly, of CANDIDATES
CASES = [routed("posterior"), weighted(code=1, prose=2)]


@pytest.fixture(scope="module")
def deciding_server(duo: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "deciding.log"
    with running(duo, log, LOADED, {"DECAR_SAMPLER": "decar"}) as server:
        yield server


def noise_of(seed: int, vocabulary: int) -> Callable[[int], torch.Tensor]:
    """By position, of a seed that somebody asks for."""
    key = torch.tensor([seed & (2**63 - 1)])
    return lambda position: gumbel(key, torch.tensor([position]), vocabulary)[0]


def chosen(reference: Reference, case: Case, rule: Rule, temperature: float) -> list[Decoded]:
    """Answers whose every token clearly leads."""
    noise = noise_of(SEED, reference.vocab_size) if temperature else None
    prompts = [reference.encode(text) for text in prompt_texts(CANDIDATES)]
    answers = mixture_decode(
        reference, prompts, TOKENS, **case.decode, rule=rule, temperature=temperature or 1.0, noise=noise
    )
    clearly = [answer for answer in answers if answer.margin > LEAD]
    assert len(clearly) >= FEWEST
    return clearly


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES, ids=["posterior", "weights"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_tokens_are_the_references_whatever_else_is_in_the_batch(
    deciding_server: Server, duo: Reference, temperature: float, case: Case, rule: Rule
) -> None:
    """More requests than there is memory for, so some are held."""
    await check_decided(deciding_server, duo, temperature, case, rule)


async def check_decided(
    server: Server, reference: Reference, temperature: float, case: Case, rule: Rule, count: int = CANDIDATES
) -> None:
    """At most ``count`` answers; beside them, the same prompts with what needs vLLM's sampler."""
    expected = chosen(reference, case, rule, temperature)[:count]
    prompts = [one.prompt for one in expected]
    decar = {**case.decar, "rule": rule, "trace": True}
    plain: dict[str, Any] = {"logprobs": None, "temperature": temperature, "seed": SEED}
    found, others = await asyncio.gather(
        complete_all(server, reference.name, prompts, decar, max_tokens=TOKENS, **plain),
        complete_all(server, reference.name, prompts, decar, max_tokens=TOKENS),
    )
    for one, (answer, _) in zip(expected, found, strict=True):
        assert answer.tokens == one.tokens
        assert answer.text == reference.decode(one.tokens)
        for ours, theirs in zip(answer.weights, one.weights, strict=True):
            assert ours == pytest.approx(theirs, abs=WEIGHT_TOLERANCE)
    greedy = mixture_decode(reference, prompts, TOKENS, **case.decode, rule=rule)
    for one, (answer, _) in zip(greedy, others, strict=True):
        if one.margin > LEAD:
            assert_equal(reference, one, answer)


async def test_a_request_whose_every_row_is_sampled_elsewhere_draws_the_same(
    deciding_server: Server, duo: Reference
) -> None:
    """What asks for log-probabilities is vLLM's sampler's: its noise is another one, and stays its own."""
    prompts = [duo.encode(text) for text in prompt_texts(6)]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": TOKENS}
    alone = await complete_all(deciding_server, duo.name, prompts, {}, **options)
    beside, _ = await asyncio.gather(
        complete_all(deciding_server, duo.name, prompts, {}, **options),
        complete_all(deciding_server, duo.name, prompts, {}, **{**options, "logprobs": None}),
    )
    assert [answer.tokens for answer, _ in beside] == [answer.tokens for answer, _ in alone]


@pytest.mark.parametrize("decar", [{"weights": {"code": 1, "prose": 2}}, None], ids=["weights", "posterior"])
def test_a_seed_gives_the_same_samples_alone_and_in_company(
    deciding_server: Server, duo: Reference, decar: dict[str, Any] | None
) -> None:
    seeds.test_a_seed_gives_the_same_samples_alone_and_in_company(deciding_server, duo.name, decar)


async def test_without_a_seed_samples_differ(deciding_server: Server, duo: Reference) -> None:
    prompt = duo.encode(next(iter(prompt_texts(1))))
    found = await complete_all(
        deciding_server, duo.name, [prompt] * 6, {}, temperature=1.0, logprobs=None, max_tokens=TOKENS
    )
    assert len({tuple(answer.tokens) for answer, _ in found}) == 6


async def test_a_seed_means_the_same_whether_a_lead_is_handed_over_or_not(
    deciding_server: Server, duo: Reference
) -> None:
    before = counted(deciding_server, "handed_over")
    await check_seeded(deciding_server, duo, [one.prompt for one in clear(duo, 0.1)], logprobs=None)
    assert counted(deciding_server, "handed_over") > before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_pruned_answers_are_the_references(
    deciding_server: Server, duo: Reference, temperature: float
) -> None:
    """Also from where one expert is left, whoever that is."""
    prompts = [one.prompt for one in clear(duo, 0.1)]
    noise = noise_of(SEED, duo.vocab_size) if temperature else None
    expected = mixture_decode(duo, prompts, TOKENS, prune=0.1, noise=noise)
    options: dict[str, Any] = {"temperature": temperature, "seed": SEED, "logprobs": None}
    decar = {"prune": 0.1, "trace": True}
    found = await complete_all(deciding_server, duo.name, prompts, decar, max_tokens=TOKENS, **options)
    left = 0
    for one, (answer, _) in zip(expected, found, strict=True):
        if one.margin > LEAD and one.prune_gap > NEAR:
            assert answer.tokens == one.tokens
            left += 0 in answer.weights[-1]
    assert left >= 3


async def test_so_are_those_of_an_expert_alone(deciding_server: Server, duo: Reference) -> None:
    alone = duo.alone("prose")
    expected = chosen(alone, weighted(prose=1), "velocity", 0.8)
    options: dict[str, Any] = {"temperature": 0.8, "seed": SEED, "logprobs": None, "max_tokens": TOKENS}
    found, greedy = await asyncio.gather(
        complete_all(deciding_server, alone.name, [one.prompt for one in expected], None, **options),
        complete_all(deciding_server, alone.name, [one.prompt for one in expected], None, max_tokens=TOKENS),
    )
    assert [answer.tokens for answer, _ in found] == [one.tokens for one in expected]
    assert [answer.tokens for answer, _ in greedy] != [answer.tokens for answer, _ in found]
