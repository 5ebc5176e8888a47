"""Engines with vLLM's V2 model runner: the answers that V1 gives too.

Without a GPU its kernels run in Triton's interpreter. A step of two requests takes about 45 ms there, so these are few
and short ones of the checks that V1 has.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch

from tests.e2e import test_exact as exact
from tests.e2e import test_openai_surface as surface
from tests.e2e import test_prompts as prompts
from tests.e2e import test_seeds as seeds
from tests.e2e.conftest import LOADED, NUM_BLOCKS, running
from tests.e2e.test_active import (
    PENALTIES,
    TOKENS,
    check_pruned,
    check_seeded,
    check_what_depends_on_the_answer_so_far,
    clear,
    heaviest,
    leaders_of,
)
from tests.e2e.test_decide import check_decided
from tests.e2e.test_exact import LEAD, RULES, Case, assert_equal, complete_all
from tests.helpers import Server, assert_error, wait_until
from tests.reference import Decoded, Reference, Rule, mixture_decode, prompt_scores, stdlib_text

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

V2_ON_CPU = Path(__file__).parents[1] / "v2_on_cpu"
FEW = 3  # requests at once
BLOCK_TOKENS = 32

client = surface.client


@pytest.fixture(scope="module")
def duo_server(duo: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of that name, with V2."""
    path = os.pathsep.join(filter(None, (str(V2_ON_CPU), os.environ.get("PYTHONPATH"))))
    on_cpu = not torch.cuda.is_available()
    log = tmp_path_factory.mktemp("logs") / "v2.log"
    environment = {"PYTHONPATH": path} if on_cpu else {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    environment["DECAR_SAMPLER"] = "decar"  # as on a GPU; what needs vLLM's sampler has that
    with running(duo, log, LOADED, environment) as server:
        yield server


def _handed_over(reference: Reference, **decode: Any) -> list[Decoded]:
    """Answers that the first expert begins and another one ends, pruned by a tenth: it is the heaviest one then, so it
    leads whether the prompt's weights are known before it is computed or not."""
    first = reference.experts[0]
    return [
        one
        for one in clear(reference, 0.1, **decode)
        if heaviest(reference, one) == first and len(set(leaders_of(reference, one, first))) > 1
    ]


@pytest.fixture(scope="module")
def handed_over(duo: Reference) -> list[Decoded]:
    return _handed_over(duo)


@pytest.fixture(scope="module")
def handed_over_with_penalties(duo: Reference) -> list[Decoded]:
    return _handed_over(duo, **PENALTIES)


def test_every_engine_runs_v2(duo_server: Server) -> None:
    lines = [line for line in duo_server.log.read_text().splitlines() if "Using V2 Model Runner" in line]
    for expert in duo_server.ensemble()["experts"]:
        assert any(f"pid={expert['pid']})" in line for line in lines), lines


# ---------------------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("rule", RULES)
@exact.ways_of_two
async def test_two_experts(duo_server: Server, duo: Reference, case: Case, rule: Rule) -> None:
    await exact.check(duo_server, duo, case, rule, FEW)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_tokens_that_the_kernel_chooses(duo_server: Server, duo: Reference, temperature: float) -> None:
    await check_decided(duo_server, duo, temperature, exact.routed("posterior"), "velocity", FEW)


async def test_prompts_longer_than_a_prefill_chunk(duo_server: Server, duo: Reference) -> None:
    await exact.test_prompts_longer_than_a_prefill_chunk(duo_server, duo, "velocity")


@pytest.mark.parametrize("rule", RULES)
async def test_prompt_log_probabilities_are_the_mixtures(
    duo_server: Server, duo: Reference, rule: Rule
) -> None:
    decar = {"route": "posterior", "rule": rule}
    async with duo_server.async_openai() as client:
        for prompt in prompts.texts(duo, 2, 70):
            answer = await prompts.echo(client, duo.name, prompt, decar)
            expected, _ = prompt_scores(duo, prompt, rule=rule, posterior=True)
            prompts.assert_scores(answer.logprobs, prompt, expected)


test_streams_and_several_choices_score_their_prompt_too = (
    prompts.test_streams_and_several_choices_score_their_prompt_too
)
test_the_shortest_prompts = prompts.test_the_shortest_prompts


# ------------------------------------------------------------------------------- what acts after mixing


def test_penalties(client: openai.OpenAI, duo: Reference) -> None:
    options = {"presence_penalty": 0.4, "frequency_penalty": -0.3, "repetition_penalty": 1.1}
    surface.test_penalties(client, duo, options, "posterior")


test_logit_bias = surface.test_logit_bias
test_json_schema = surface.test_json_schema
test_stop_strings = surface.test_stop_strings
test_the_end_of_sequence_token_ends_an_answer = surface.test_the_end_of_sequence_token_ends_an_answer
test_sampling_acts_on_the_mixture = surface.test_sampling_acts_on_the_mixture
test_four_choices_share_a_seed_and_differ = surface.test_four_choices_share_a_seed_and_differ


def test_a_seed_gives_the_same_samples_alone_and_in_company(duo_server: Server, duo: Reference) -> None:
    seeds.test_a_seed_gives_the_same_samples_alone_and_in_company(duo_server, duo.name, None)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"allowed_token_ids": [5 + i % 500 for i in range(1025)]}, "allowed_token_ids"),
        ({"stop_token_ids": list(range(5, 205)), "min_tokens": 1}, "stop_token_ids"),
        ({"bad_words": ["x y " * 100 + str(i) for i in range(20)]}, "bad_words"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_v2_has_no_room_for_is_refused(
    duo_server: Server, duo: Reference, options: dict[str, Any], word: str
) -> None:
    """An engine that meets it would end."""
    body = {"model": duo.name, "prompt": [5, 6], "max_tokens": 2, **options}
    assert_error(duo_server.http.post("/v1/completions", json=body), 400, word, "V2")
    assert duo_server.health() == 200


# ------------------------------------------------------------------------------------------- handing over


async def test_pruned_answers_are_the_references(
    duo_server: Server, duo: Reference, handed_over: list[Decoded]
) -> None:
    await check_pruned(duo_server, duo, handed_over, 0.1)


async def test_penalties_grammar_and_stops_go_on_across_a_hand_over(
    duo_server: Server, duo: Reference, handed_over_with_penalties: list[Decoded]
) -> None:
    await check_what_depends_on_the_answer_so_far(duo_server, duo, handed_over_with_penalties)


async def test_a_seed_means_the_same_whether_a_lead_is_handed_over_or_not(
    duo_server: Server, duo: Reference, handed_over: list[Decoded]
) -> None:
    await check_seeded(duo_server, duo, [one.prompt for one in handed_over])


# ------------------------------------------------------------------------------------ holds and preemption


@pytest.mark.parametrize("expert", ["code", "prose"])
async def test_an_engine_that_stands_still_is_not_waited_for(
    duo_server: Server, duo: Reference, handed_over_with_penalties: list[Decoded], expert: str
) -> None:
    """The other one holds: as leader it runs the position again, as follower it gets the token later.

    Either may lead in the end, when the penalties have to know that token too.
    """
    wait_until(duo_server.is_idle, 30, "no engine stands still in the middle of a step")
    experts = {one["name"]: one for one in duo_server.ensemble()["experts"]}
    [other] = experts.keys() - {expert}
    before = _holds(duo_server, other)
    one, decar = handed_over_with_penalties[0], {"prune": 0.1, "trace": True}
    engine = psutil.Process(experts[expert]["pid"])
    engine.suspend()
    try:
        asked = asyncio.create_task(
            complete_all(duo_server, duo.name, [one.prompt], decar, max_tokens=TOKENS, **PENALTIES)
        )
        await asyncio.to_thread(wait_until, lambda: _holds(duo_server, other) != before, 60, "it holds")
    finally:
        engine.resume()
    [(answer, summary)] = await asked
    assert_equal(duo, one, answer)
    assert answer.leaders == leaders_of(duo, one, summary["leader"])
    as_leader, as_follower = (
        after - held for after, held in zip(_holds(duo_server, other), before, strict=True)
    )
    assert as_leader if answer.leaders[0] == other else as_follower


def _holds(server: Server, expert: str) -> tuple[int, int]:
    """How often an engine has held as leader, and as follower."""
    [counted] = [one["lockstep"] for one in server.ensemble()["experts"] if one["name"] == expert]
    return counted["leader_holds"], counted["follower_holds"]


async def test_preempted_requests_go_on_where_they_were(duo_server: Server, duo: Reference) -> None:
    """V2 begins with them again, as with new ones."""
    tokens = duo.encode(stdlib_text("bisect", "sched").encode("ascii", "ignore").decode())
    length, new = 5 * BLOCK_TOKENS - 4, 12  # a sixth block each while they run
    texts = [tokens[i * length : (i + 1) * length] for i in range(8)]
    ways: list[dict[str, Any]] = [
        {"weights": {"code": 0.7, "prose": 0.3}},
        {"weights": {"code": 0.3, "prose": 0.7}},
        {"route": "posterior"},
    ]
    expected = [
        one for i, way in enumerate(ways) for one in mixture_decode(duo, texts[i::3], new, **way, **PENALTIES)
    ]
    decars = [way for i, way in enumerate(ways) for _ in texts[i::3]]
    before = sum(duo_server.metric("vllm:num_preemptions_total"))
    assert 6 * len(texts) > NUM_BLOCKS > 5 * 5
    found = await asyncio.gather(
        *(
            complete_all(duo_server, duo.name, [one.prompt], decar, max_tokens=new, **PENALTIES)
            for one, decar in zip(expected, decars, strict=True)
        )
    )
    clearly = 0
    for one, [(answer, _)] in zip(expected, found, strict=True):
        if one.margin > LEAD:
            clearly += 1
            assert_equal(duo, one, answer)
    assert clearly >= len(texts) // 2
    assert sum(duo_server.metric("vllm:num_preemptions_total")) > before, "memory was never short"
    wait_until(duo_server.is_idle, 10, "slots and KV are free again")
