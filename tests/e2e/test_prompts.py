"""What the ensemble says of a prompt: exact log-probabilities of the mixture, scored once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import openai
import pytest
import torch

from tests.e2e.conftest import CHUNK_TOKENS
from tests.e2e.test_exact import LEAD, LOGPROB_TOLERANCE, RULES, WEIGHT_TOLERANCE, complete_all
from tests.helpers import Server, answer_of, assert_error, by_token_id, wait_until
from tests.reference import (
    Reference,
    Rule,
    mixture_decode,
    prompt_scores,
    prompt_texts,
    sequence_log_probs,
    stdlib_text,
)

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

TOP = 5
TEXTS = 50
LONG = 200


def texts(reference: Reference, count: int, length: int) -> list[list[int]]:
    """Token sequences of the standard library's text, one after another."""
    tokens = reference.encode(stdlib_text("argparse", "fractions").encode("ascii", "ignore").decode())
    assert len(tokens) >= count * length
    return [tokens[i * length : (i + 1) * length] for i in range(count)]


async def echo(
    client: openai.AsyncOpenAI, model: str, prompt: list[int], decar: dict[str, Any] | None, **options: Any
) -> Any:
    """A completion of one token that scores its prompt, as evaluation harnesses ask for it."""
    extra = {"return_token_ids": True, "return_tokens_as_token_ids": True, "decar": decar}
    arguments: dict[str, Any] = {"echo": True, "logprobs": TOP, "max_tokens": 1, "temperature": 0, **options}
    completion = await client.completions.create(model=model, prompt=prompt, extra_body=extra, **arguments)
    return completion.choices[0]


def assert_scores(logprobs: Any, prompt: Sequence[int], expected: torch.Tensor) -> None:
    """Each prompt token's log-probability and the best ones at its place are those of ``expected`` [T - 1, V]."""
    assert logprobs.token_logprobs[0] is None
    tokens = torch.tensor(prompt[1:])
    of_tokens = expected.gather(1, tokens[:, None])[:, 0].tolist()
    assert logprobs.token_logprobs[1 : len(prompt)] == pytest.approx(of_tokens, abs=LOGPROB_TOLERANCE)
    best = expected.topk(TOP + 1)
    for t in range(len(prompt) - 1):
        ours = by_token_id(logprobs.top_logprobs[t + 1])
        values, ids = best.values[t].tolist(), best.indices[t].tolist()
        assert prompt[t + 1] in ours
        highest = sorted(ours.values(), reverse=True)[:TOP]
        assert highest == pytest.approx(values[:TOP], abs=LOGPROB_TOLERANCE)
        if values[TOP - 1] - values[TOP] > LEAD:
            assert set(ours) == {*ids[:TOP], prompt[t + 1]}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("decar", "posterior", "start"),
    [
        ({"route": "posterior"}, True, None),
        ({"route": "prior"}, False, None),
        ({"route": "posterior", "scope": "output"}, False, None),
        (
            {"route": "posterior", "prune": 0.2},
            True,
            None,
        ),  # what is dropped for the answer has seen the prompt
        ({"weights": {"maths": 0.3, "code": 0.0, "prose": 0.7}}, False, (0.3, 0.0, 0.7)),
    ],
    ids=["posterior", "prior", "output", "pruned", "weights"],
)
async def test_prompt_log_probabilities_are_the_mixtures(
    trio_server: Server,
    trio: Reference,
    decar: dict[str, Any],
    posterior: bool,
    start: Sequence[float] | None,
    rule: Rule,
) -> None:
    prompts = [*texts(trio, 2, 70), *[trio.encode(text) for text in prompt_texts(2)]]
    async with trio_server.async_openai() as client:
        answers = await asyncio.gather(
            *(echo(client, trio.name, prompt, {**decar, "rule": rule}) for prompt in prompts)
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, _ = prompt_scores(trio, prompt, rule=rule, posterior=posterior, start=start)
        assert len(answer.logprobs.token_logprobs) == len(prompt) + 1
        assert_scores(answer.logprobs, prompt, expected)


async def test_the_chain_rule_holds_over_many_long_texts(trio_server: Server, trio: Reference) -> None:
    """Σ of what is served = log Σ_k π_k p_k(x) by transformers: the first token is given."""
    prompts = texts(trio, TEXTS, LONG + 1)
    log_prior = torch.tensor(trio.prior, dtype=torch.float64).log()
    async with trio_server.async_openai() as client:
        answers = await asyncio.gather(
            *(echo(client, trio.name, prompt, {"route": "posterior"}, logprobs=1) for prompt in prompts)
        )
    for prompt, answer in zip(prompts, answers, strict=True):
        served = math.fsum(answer.logprobs.token_logprobs[1 : len(prompt)])
        expected = float((log_prior + sequence_log_probs(trio, prompt)).logsumexp(dim=0))
        assert served == pytest.approx(expected, rel=1e-4)


async def test_the_answer_after_a_scored_prompt_is_the_usual_one(duo_server: Server, duo: Reference) -> None:
    prompts = [duo.encode(text) for text in prompt_texts(8)]
    expected = [one for one in mixture_decode(duo, prompts, 16) if one.margin > LEAD]
    assert len(expected) >= 4
    async with duo_server.async_openai() as client:
        for one in expected:
            decar = {"route": "posterior", "trace": True}
            choice = await echo(client, duo.name, one.prompt, decar, max_tokens=16)
            answer = answer_of(choice)
            assert choice.logprobs.token_logprobs[len(one.prompt) :] == pytest.approx(
                one.logprobs, abs=LOGPROB_TOLERANCE
            )
            for ours, theirs in zip(answer.weights, one.weights, strict=True):
                assert ours == pytest.approx(theirs, abs=WEIGHT_TOLERANCE)


async def test_streams_and_several_choices_score_their_prompt_too(duo_server: Server, duo: Reference) -> None:
    [prompt] = texts(duo, 1, 40)
    expected, _ = prompt_scores(duo, prompt, rule="velocity", posterior=True)
    async with duo_server.async_openai() as client:
        extra = {"return_tokens_as_token_ids": True}
        chunks = await client.completions.create(
            model=duo.name,
            prompt=prompt,
            echo=True,
            logprobs=TOP,
            max_tokens=2,
            stream=True,
            temperature=0,
            extra_body=extra,
        )
        seen = [chunk.choices[0].logprobs async for chunk in chunks if chunk.choices]
        assert_scores(seen[0], prompt, expected)
        extra = {"prompt_logprobs": TOP, "n": 2, "seed": 1}
        both = await client.completions.create(model=duo.name, prompt=prompt, max_tokens=2, extra_body=extra)
    for choice in both.choices:
        scores = choice.model_extra["prompt_logprobs"]
        assert scores[0] is None
        for t, entry in enumerate(scores[1:]):
            found = entry[str(prompt[t + 1])]
            rank = int((expected[t] > expected[t, prompt[t + 1]]).sum()) + 1
            assert found["logprob"] == pytest.approx(float(expected[t, prompt[t + 1]]), abs=LOGPROB_TOLERANCE)
            # Whoever is as likely, but for rounding, may stand before or behind.
            assert abs(found["rank"] - rank) <= _as_likely(expected[t], prompt[t + 1])


def _as_likely(row: torch.Tensor, token: int) -> int:
    return int(((row - row[token]).abs() < LOGPROB_TOLERANCE).sum()) - 1


async def test_prompts_that_share_a_beginning_are_scored_once_and_rightly(
    duo_server: Server, duo: Reference
) -> None:
    """The cache of scores and the engines' prefix caches agree, whoever filled them."""
    long = duo.encode(stdlib_text("sched", "bisect").encode("ascii", "ignore").decode())[300:]
    shared = long[: CHUNK_TOKENS + 60]
    prompts = [shared[: 40 * i + 10] for i in range(1, 7)]
    prompts += [[*shared[:97], *long[700 + i : 730 + i]] for i in range(3)]
    expected = [one for one in mixture_decode(duo, prompts, 8) if one.margin > LEAD]
    assert len(expected) >= 5
    asked = [one.prompt for one in expected]
    for decar in ({"weights": {"code": 1}}, {"route": "posterior", "trace": True}):
        # An expert alone fills its cache with blocks whose score nobody knows.
        found = await complete_all(duo_server, duo.name, asked, decar, max_tokens=8)
    again = await complete_all(duo_server, duo.name, asked, decar, max_tokens=8)
    for one, (first, _), (second, _) in zip(expected, found, again, strict=True):
        for answer in (first, second):
            assert answer.tokens == one.tokens
            for ours, theirs in zip(answer.weights, one.weights, strict=True):
                assert ours == pytest.approx(theirs, abs=WEIGHT_TOLERANCE)


async def test_a_prompt_asked_for_again_is_not_scored_again(duo_server: Server, duo: Reference) -> None:
    """Nor is it while it is being scored; and the request that scores it is the one that answers."""
    prompts = [prompt[:64] for prompt in texts(duo, 6, 70)[3:6]]
    experts = len(duo.experts)

    async def spent(batch: list[list[int]]) -> tuple[float, float]:
        names = "decar:scored_tokens_total", "vllm:request_success_total"
        before = [sum(duo_server.metric(name)) for name in names]
        await complete_all(duo_server, duo.name, batch, {"route": "posterior"}, max_tokens=1)
        wait_until(duo_server.is_idle, 10, "all requests have ended")
        scored, requests = (
            sum(duo_server.metric(name)) - old for name, old in zip(names, before, strict=True)
        )
        return scored, requests

    scored, requests = await spent(prompts)
    assert scored == experts * 63 * len(prompts)
    assert requests <= experts * len(prompts)
    assert (await spent(prompts))[0] == 0
    assert (await spent([texts(duo, 9, 70)[8]] * 5))[0] == experts * 69


@pytest.mark.parametrize("count", [-1, 21, 10**9])
def test_more_log_probabilities_than_the_server_allows_are_refused_at_once(
    duo_server: Server, duo: Reference, count: int
) -> None:
    body = {"model": duo.name, "prompt": [5] * 400, "max_tokens": 1, "prompt_logprobs": count}
    assert_error(duo_server.http.post("/v1/completions", json=body), 400, "prompt_logprobs", "20")


@pytest.mark.parametrize("prompt", [[5], [5, 6]])
async def test_the_shortest_prompts(duo_server: Server, duo: Reference, prompt: list[int]) -> None:
    async with duo_server.async_openai() as client:
        answer = await echo(client, duo.name, prompt, None)
    if len(prompt) > 1:
        assert_scores(answer.logprobs, prompt, prompt_scores(duo, prompt, rule="velocity", posterior=True)[0])
    assert len(answer.logprobs.token_logprobs) == len(prompt) + 1


async def test_scoring_leaves_no_file_behind(duo_server: Server, duo: Reference) -> None:
    wait_until(duo_server.is_idle, 10, "nothing runs")
    before = duo_server.shared_memory
    async with duo_server.async_openai() as client:
        await asyncio.gather(*(echo(client, duo.name, p, None) for p in texts(duo, 8, 60)))
        task = asyncio.create_task(echo(client, duo.name, texts(duo, 1, 400)[0], None))
        await asyncio.sleep(0)
        task.cancel()
    wait_until(duo_server.is_idle, 10, "nothing runs")
    wait_until(lambda: duo_server.shared_memory <= before, 10, "prompt rows are gone")
