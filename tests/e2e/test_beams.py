"""Beam search over the mixture: a beam's weights are those that a greedy answer of its tokens has."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from tests.e2e.test_exact import LEAD, LOGPROB_TOLERANCE, complete_all
from tests.helpers import Answer, Server, answer_of, assert_error, wait_until
from tests.reference import Reference, logits_of, mix, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

TOKENS = 16


def clear(answer: Answer) -> bool:
    """Whether each of its tokens is decided clearly."""
    best = [sorted(top.values(), reverse=True) for top in answer.top]
    return all(first - second > LEAD for first, second, *_ in best)


@pytest.mark.parametrize(
    "decar",
    [
        {},
        {"scope": "output"},
        {"prune": 0.1},
        {"prune": 0.3},
        {"top_k": 2},
        {"top_k": 2, "prune": 0.1},
        {"scope": "output", "prune": 0.1},
        {"scope": "output", "top_k": 2, "rule": "logit"},
        {"route": "prior", "prune": 0.25},
    ],
    ids=str,
)
async def test_one_beam_is_the_greedy_answer(
    trio_server: Server, trio: Reference, decar: dict[str, Any]
) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(8)]
    greedy = await complete_all(trio_server, trio.name, prompts, decar, max_tokens=TOKENS)
    beams = await complete_all(
        trio_server, trio.name, prompts, decar, {"use_beam_search": True}, max_tokens=TOKENS
    )
    decided = 0
    for (answer, _), (beam, _) in zip(greedy, beams, strict=True):
        if clear(answer):
            decided += 1
            assert beam.tokens == answer.tokens
            assert beam.logprobs == pytest.approx(answer.logprobs, abs=LOGPROB_TOLERANCE)
    assert decided >= 4
    wait_until(trio_server.is_idle, 10, "beams leave nothing behind")


async def test_several_prompts_have_beams_of_their_own(trio_server: Server, trio: Reference) -> None:
    """Also where one goes on as another one's beam might."""
    long = trio.encode(prompt_texts(9)[8])
    prompts = [long[:-1], long, long[:-2]]
    decar = {"scope": "output", "prune": 0.1}
    greedy = await complete_all(trio_server, trio.name, prompts, decar, max_tokens=TOKENS)
    extra = {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True, "decar": decar}
    async with trio_server.async_openai() as client:
        asked: dict[str, Any] = {"model": trio.name, "prompt": prompts, "max_tokens": TOKENS}
        beams = await client.completions.create(**asked, temperature=0, extra_body=extra)
    pairs = [(a, answer_of(b)) for (a, _), b in zip(greedy, beams.choices, strict=True) if clear(a)]
    assert pairs
    for answer, beam in pairs:
        assert beam.tokens == answer.tokens


def searched(
    reference: Reference, prompt: list[int], width: int, length: int
) -> list[tuple[list[int], float]]:
    """The best beams and their log-probabilities, where the answer alone moves the weights from the prior on."""
    prior = torch.tensor(reference.prior, dtype=torch.float64).log()
    beams = [([], 0.0, prior)]
    for _ in range(length):
        candidates = []
        for tokens, total, log_weights in beams:
            rows = torch.stack(
                [logits_of(m, [prompt + tokens], reference.vocab_size)[0, -1] for m in reference.models]
            ).log_softmax(dim=-1)
            best = mix(log_weights, rows, "velocity").topk(2 * width)
            for token, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                moved = (log_weights + rows[:, token]).log_softmax(dim=0)
                candidates.append(([*tokens, token], total + logprob, moved))
        beams = sorted(candidates, key=lambda beam: -beam[1])[:width]
    return [(tokens, total) for tokens, total, _ in beams]


async def test_two_beams_are_the_references(trio_server: Server, trio: Reference) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(4)]
    extra = {"use_beam_search": True, "ignore_eos": True, "return_token_ids": True}
    extra["decar"] = {"scope": "output"}
    async with trio_server.async_openai() as client:
        answers = await asyncio.gather(
            *(
                client.completions.create(
                    model=trio.name, prompt=prompt, n=2, max_tokens=6, temperature=0, extra_body=extra
                )
                for prompt in prompts
            )
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = searched(trio, prompt, 2, 6)
        assert abs(expected[0][1] - expected[1][1]) > LEAD, "choose other prompts"
        assert [answer_of(choice).tokens for choice in answer.choices] == [tokens for tokens, _ in expected]


@pytest.mark.parametrize("decar", [{"trace": True}, {"sampling": "draw"}], ids=str)
def test_what_no_beam_search_can_have_is_refused(
    trio_server: Server, trio: Reference, decar: dict[str, Any]
) -> None:
    body = {"model": trio.name, "prompt": [5], "max_tokens": 2, "use_beam_search": True, "decar": decar}
    [field] = decar
    error = assert_error(trio_server.http.post("/v1/completions", json=body), 400, f"decar.{field}", "beam")
    assert error["param"] == f"decar.{field}"
