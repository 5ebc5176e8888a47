"""Active sets on real engines: pruning and handing over, drawing, top-k; held against the reference mixture."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import openai
import pytest
import torch

from tests.e2e.test_exact import LEAD, WEIGHT_TOLERANCE, assert_equal, complete_all
from tests.helpers import Answer, Server, answer_of, assert_error, wait_until
from tests.reference import Decoded, Reference, mixture_decode, prompt_texts, sequence_log_probs

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

TOKENS = 64  # long enough for posteriors to leave the expert that led at first
CANDIDATES = 32
PENALTIES: dict[str, Any] = {"frequency_penalty": 0.7, "presence_penalty": 0.3}
NEAR = 1e-4  # a weight this near to what may be pruned could go either way by rounding


def clear(reference: Reference, eps: float, **decode: Any) -> list[Decoded]:
    """Reference answers whose every token and every drop is decided clearly."""
    prompts = [reference.encode(text) for text in prompt_texts(CANDIDATES)]
    answers = mixture_decode(reference, prompts, TOKENS, prune=eps, **decode)
    chosen = [answer for answer in answers if answer.margin > LEAD and answer.prune_gap > NEAR]
    assert len(chosen) >= CANDIDATES // 2
    return chosen


def leaders_of(reference: Reference, expected: Decoded, first: str) -> list[str]:
    """The leader of each token: the first one until it is dropped, then whoever has most weight."""
    leaders, leader = [], reference.experts.index(first)
    for weights in expected.weights:
        if not weights[leader]:
            leader = max(range(len(weights)), key=weights.__getitem__)
        leaders.append(reference.experts[leader])
    return leaders


def counted(server: Server, name: str) -> int:
    return sum(expert["lockstep"][name] for expert in server.ensemble()["experts"])


@pytest.mark.parametrize("eps", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("which", ["duo", "trio"])
async def test_pruned_answers_are_the_references(
    which: str, eps: float, request: pytest.FixtureRequest
) -> None:
    reference, server = request.getfixturevalue(which), request.getfixturevalue(f"{which}_server")
    await check_pruned(server, reference, clear(reference, eps), eps)


async def check_pruned(server: Server, reference: Reference, expected: Sequence[Decoded], eps: float) -> None:
    """Some of ``expected`` change their leader on the way."""
    before = {name: counted(server, name) for name in ("pruned", "handed_over")}
    decar = {"route": "posterior", "prune": eps, "trace": True}
    prompts = [one.prompt for one in expected]
    found = await complete_all(server, reference.name, prompts, decar, max_tokens=TOKENS)
    handed_over = 0
    for one, (answer, summary) in zip(expected, found, strict=True):
        assert_equal(reference, one, answer)
        for ours, theirs in zip(answer.weights, one.weights, strict=True):
            assert ours == pytest.approx(theirs, abs=WEIGHT_TOLERANCE)
            assert [w > 0 for w in ours] == [w > 0 for w in theirs]
        assert answer.leaders == leaders_of(reference, one, summary["leader"])
        handed_over += sum(a != b for a, b in zip(answer.leaders, answer.leaders[1:], strict=False))
    assert handed_over > 0
    # A drop after the last token is one that nobody sees.
    assert counted(server, "handed_over") - before["handed_over"] >= handed_over
    assert counted(server, "pruned") > before["pruned"]
    wait_until(server.is_idle, 10, "released experts keep nothing")


async def test_streams_and_single_answers_are_the_same_across_a_hand_over(
    duo_server: Server, duo: Reference
) -> None:
    expected = [one for one in clear(duo, 0.1) if len({*leaders_of(duo, one, heaviest(duo, one))}) > 1]
    assert len(expected) >= 3
    async with duo_server.async_openai() as client:
        for one in expected:
            answer = await _stream(client, duo, one.prompt, {"prune": 0.1, "trace": True})
            assert answer.tokens == one.tokens
            assert answer.text == duo.decode(one.tokens)
            assert len(answer.weights) == len(answer.leaders) == TOKENS


async def test_penalties_grammar_and_stops_go_on_across_a_hand_over(
    duo_server: Server, duo: Reference
) -> None:
    """What depends on the answer so far: the next leader has to know all of it."""
    await check_what_depends_on_the_answer_so_far(duo_server, duo, clear(duo, 0.1, **PENALTIES))


async def check_what_depends_on_the_answer_so_far(
    duo_server: Server, duo: Reference, expected: Sequence[Decoded]
) -> None:
    """Some of ``expected``, which are decoded with PENALTIES, change their leader on the way."""
    decar = {"prune": 0.1, "trace": True}
    prompts = [one.prompt for one in expected]
    found = await complete_all(duo_server, duo.name, prompts, decar, max_tokens=TOKENS, **PENALTIES)
    changes = 0
    for one, (answer, _) in zip(expected, found, strict=True):
        assert answer.tokens == one.tokens
        changes += len(set(answer.leaders)) > 1
    assert changes > 0

    schema = {"type": "array", "items": {"enum": ["code", "prose", "maths"]}, "minItems": 12, "maxItems": 12}
    extra = {"structured_outputs": {"json": schema}, "ignore_eos": False}
    found = await complete_all(
        duo_server, duo.name, prompts, decar, extra, max_tokens=200, temperature=1.0, seed=5
    )
    assert any(len(set(answer.leaders)) > 1 for answer, _ in found)
    for answer, _ in found:
        assert answer.finish_reason == "stop"
        assert len(json.loads(answer.text)) == 12

    [stopped] = [one for one in expected if len(set(leaders_of(duo, one, heaviest(duo, one)))) > 1][:1]
    text = duo.decode(stopped.tokens)
    stop = text[-8:-4]
    [(answer, _)] = await complete_all(
        duo_server, duo.name, [stopped.prompt], decar, max_tokens=TOKENS, stop=[stop], **PENALTIES
    )
    assert answer.text == text[: text.index(stop)]
    assert answer.finish_reason == "stop"


async def test_a_seed_means_the_same_whether_a_lead_is_handed_over_or_not(
    duo_server: Server, duo: Reference
) -> None:
    """The next leader goes on in the same stream of random numbers."""
    await check_seeded(duo_server, duo, [one.prompt for one in clear(duo, 0.1)])


async def check_seeded(
    duo_server: Server, duo: Reference, prompts: Sequence[list[int]], **options: Any
) -> None:
    options = {"temperature": 1.0, "seed": 3, "max_tokens": TOKENS, **options}
    answers = [
        [answer for answer, _ in await complete_all(duo_server, duo.name, prompts, decar, **options)]
        for decar in ({"prune": 0.1, "trace": True}, {"prune": 0.1, "trace": True}, {"trace": True})
    ]
    once, again, dense = answers
    assert [answer.tokens for answer in once] == [answer.tokens for answer in again]
    same = 0
    for pruned, whole in zip(once, dense, strict=True):
        first = next((t for t, w in enumerate(pruned.weights) if 0 in w), TOKENS)
        assert pruned.tokens[:first] == whole.tokens[:first]
        handed = next((t for t, name in enumerate(pruned.leaders) if name != pruned.leaders[0]), None)
        # Mixtures that differ by a tenth of their mass mostly choose the same token of the same noise.
        same += handed is not None and pruned.tokens[: handed + 1] == whole.tokens[: handed + 1]
    assert same > 0


async def test_under_load_with_cancels_pruned_answers_stay_right(duo_server: Server, duo: Reference) -> None:
    """Greedy answers of the unpruned mixture, wherever no token is decided by less than was dropped."""
    eps = 0.02
    prompts = [duo.encode(text) for text in prompt_texts(48)]
    whole = mixture_decode(duo, prompts, TOKENS)
    pruned = mixture_decode(duo, prompts, TOKENS, prune=eps)
    sure = {
        i
        for i, (one, other) in enumerate(zip(whole, pruned, strict=True))
        if one.margin > LEAD and other.margin > LEAD and other.prune_gap > NEAR
    }
    # What the bound promises: a lead of more than eps in probability cannot be turned by a mass of eps.
    wide = {i for i in sure if _lead(whole[i]) > eps}
    for i in wide:
        assert whole[i].tokens == pruned[i].tokens
    rng = random.Random(2)
    decar = {"prune": eps, "trace": True}

    async def ask(client: openai.AsyncOpenAI, i: int) -> None:
        if rng.random() < 0.4:  # leaves early, somewhere
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(_stream(client, duo, prompts[i], decar), rng.uniform(0.01, 1.5))
            return
        answer = await _stream(client, duo, prompts[i], decar)
        assert len(answer.tokens) == TOKENS
        if i in sure:
            assert answer.tokens == pruned[i].tokens

    async with duo_server.async_openai() as client:
        await asyncio.gather(*(ask(client, i % len(prompts)) for i in range(160)))
    wait_until(duo_server.is_idle, 10, f"slots and KV are free again: {duo_server.ensemble()}")
    assert len(sure) > len(prompts) // 2


def _lead(answer: Decoded) -> float:
    """The smallest lead of a chosen token, as a probability."""
    leads = []
    for top in answer.top:
        first, second = (math.exp(value) for value in list(top.values())[:2])
        leads.append(first - second)
    return min(leads)


@pytest.mark.parametrize("k", [1, 2])
async def test_top_k_keeps_theheaviest(trio_server: Server, trio: Reference, k: int) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(8)]
    prior = dict(zip(trio.experts, trio.prior, strict=True))
    kept = dict(sorted(prior.items(), key=lambda item: -item[1])[:k])
    expected = [one for one in mixture_decode(trio, prompts, 16, weights=kept) if one.margin > LEAD]
    assert expected
    found = await complete_all(
        trio_server,
        trio.name,
        [one.prompt for one in expected],
        {"route": "prior", "top_k": k},
        max_tokens=16,
    )
    for one, (answer, summary) in zip(expected, found, strict=True):
        assert_equal(trio, one, answer)
        assert set(summary["experts"]) == set(kept)


def heaviest(reference: Reference, one: Decoded) -> str:
    return reference.experts[max(range(len(one.weights[0])), key=one.weights[0].__getitem__)]


async def _stream(
    client: openai.AsyncOpenAI, reference: Reference, prompt: list[int], decar: dict[str, Any]
) -> Answer:
    answer = Answer("", [], [], [], [], [], None)
    stream = await client.completions.create(
        model=reference.name,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "return_token_ids": True, "decar": decar},
    )
    async with stream:
        async for chunk in stream:
            part = answer_of(chunk.choices[0])
            answer.text += part.text
            answer.tokens += part.tokens
            answer.weights += part.weights
            answer.leaders += part.leaders
    return answer


# ---------------------------------------------------------------------------------------------- draw


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": 0}, "temperature"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias"),
        ({"logprobs": 1}, "logprobs"),
        ({"min_tokens": 1}, "min_tokens"),
        ({"bad_words": ["the"]}, "bad_words"),
        ({"allowed_token_ids": [5, 6]}, "allowed_token_ids"),
        ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        ({"decar": {"route": "prior"}}, "decar.route"),
        ({"decar": {"weights": {"code": 0.5, "prose": 0.5}}}, "decar.weights"),
        ({"decar": {"rule": "logit"}}, "decar.rule"),
    ],
    ids=str,
)
def test_a_draw_that_would_not_be_exact_is_refused(
    duo_server: Server, duo: Reference, options: dict[str, Any], word: str
) -> None:
    body = {"model": duo.name, "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 1, **options}
    body["decar"] = {"sampling": "draw", **options.get("decar", {})}
    assert_error(duo_server.http.post("/v1/completions", json=body), 400, "draw", word, "mixture")
    streamed = duo_server.http.post("/v1/completions", json={**body, "stream": True})
    assert_error(streamed, 400, "draw", word, "mixture")  # before the stream has begun


async def test_a_draw_is_one_experts_answer_and_as_many_as_choices(
    duo_server: Server, duo: Reference
) -> None:
    prompt = duo.encode(prompt_texts(1)[0])
    async with duo_server.async_openai() as client:

        async def sample(model: str, seed: int, decar: dict[str, Any] | None) -> Any:
            extra = {"ignore_eos": True, "return_token_ids": True, "decar": decar}
            return await client.completions.create(
                model=model, prompt=prompt, n=8, seed=seed, temperature=1, max_tokens=6, extra_body=extra
            )

        drawn = await sample(duo.name, 11, {"sampling": "draw", "trace": True})
        again = await sample(duo.name, 11, {"sampling": "draw", "trace": True})
        alone = {name: await sample(f"{duo.name}/{name}", 11, None) for name in duo.experts}
    answers = [answer_of(choice) for choice in drawn.choices]
    assert [a.tokens for a in answers] == [answer_of(choice).tokens for choice in again.choices]
    for index, answer in enumerate(answers):
        [name] = set(answer.leaders)
        assert answer.tokens == answer_of(alone[name].choices[index]).tokens
    assert {answer.leaders[0] for answer in answers} == set(duo.experts)  # at this seed
    assert set(drawn.model_extra["decar"]["experts"]) == set(duo.experts)


# ---------------------------------------------------------------------------------------------- scope


async def test_output_scope_starts_from_the_prior(trio_server: Server, trio: Reference) -> None:
    """The prompt does not count, the output does."""
    prompts = [trio.encode(text) for text in prompt_texts(6)]
    decar = {"route": "posterior", "scope": "output", "trace": True}
    found = await complete_all(trio_server, trio.name, prompts, decar, max_tokens=16)
    log_prior = torch.tensor(trio.prior, dtype=torch.float64).log()
    for prompt, (answer, _) in zip(prompts, found, strict=True):
        assert answer.weights[0] == pytest.approx(list(trio.prior), abs=WEIGHT_TOLERANCE)
        of_prompt = sequence_log_probs(trio, prompt)
        for t in (5, 15):
            gained = sequence_log_probs(trio, prompt + answer.tokens[:t]) - of_prompt
            expected = (log_prior + gained).softmax(dim=0).tolist()
            assert answer.weights[t] == pytest.approx(expected, abs=WEIGHT_TOLERANCE)


def test_options_that_do_not_go_together_are_refused(duo_server: Server, duo: Reference) -> None:
    for decar, word in (
        ({"scope": "output", "route": "prior"}, "decar.scope"),
        ({"start": "prior"}, "decar.start"),
        ({"route": "classifier"}, "not trained"),
        ({"prune": 1}, "decar.prune"),
        ({"top_k": 0}, "decar.top_k"),
        ({"sampling": "both"}, "decar.sampling"),
    ):
        body = {"model": duo.name, "prompt": [5], "max_tokens": 1, "decar": decar}
        assert_error(duo_server.http.post("/v1/completions", json=body), 400, word)


async def test_one_of_equal_experts_leads_all(duo_server: Server, duo: Reference) -> None:
    wait_until(duo_server.is_idle, 30, "nobody leads anything")
    prompts = [duo.encode(text) for text in prompt_texts(6)]
    equal = {"weights": dict.fromkeys(duo.experts, 0.5), "trace": True}
    found = await complete_all(duo_server, duo.name, prompts, equal, max_tokens=8)
    assert len({leader for answer, _ in found for leader in answer.leaders}) == 1


@pytest.mark.parametrize(("decar", "together"), [({"route": "prior"}, True), ({"prune": 0.1}, False)])
async def test_the_gateway_keeps_beside_an_engine_that_follows_and_gives_way_while_experts_decode_together(
    duo_server: Server, duo: Reference, decar: dict[str, Any], together: bool
) -> None:
    wait_until(duo_server.is_idle, 30, "no other request keeps it anywhere")
    gateway = duo_server.process.pid

    def place() -> tuple[set[int], int]:
        return os.sched_getaffinity(gateway), os.sched_getscheduler(gateway)

    usual = place()
    of_experts = {e["name"]: os.sched_getaffinity(e["pid"]) for e in duo_server.ensemble()["experts"]}
    if set.union(*of_experts.values()) != usual[0] or set.intersection(*of_experts.values()):
        pytest.skip("engines share cores, or leave some")
    seen: list[tuple[set[int], int]] = []

    def gives_way() -> bool:
        seen.append(place())
        return seen[-1][1] == os.SCHED_BATCH

    async with duo_server.async_openai() as client:
        answer = asyncio.create_task(
            client.completions.create(
                model=duo.name,
                prompt=duo.encode("def "),
                max_tokens=400,  # for about two seconds
                extra_body={"ignore_eos": True, "decar": decar},
            )
        )
        if together:
            await asyncio.to_thread(wait_until, gives_way, 30, "the gateway gives way")
        while not answer.done():
            gives_way()
            await asyncio.sleep(0.01)
        led = (await answer).decar["leader"]
    if together:
        (follower,) = of_experts.keys() - {led}
        beside = next(cores for cores, policy in seen if policy == os.SCHED_BATCH)
        assert beside == of_experts[follower]
    else:
        assert all(one == usual for one in seen)
    wait_until(duo_server.is_idle, 30, "the request is over")
    assert place() == usual
