"""Flow ensembles on real engines: what is served is what plain transformers forwards reveal."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import running
from tests.flow import Asked, slowly_revealed
from tests.flow_reference import FLOW_POSITIONS, MASK, FlowReference, make_flow_ensemble
from tests.helpers import Server, assert_error, wait_until
from tests.reference import prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32")
TOKENS = 12
SHAKEN_BY = 1e-4
LOGPROB_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def flows(tmp_path_factory: pytest.TempPathFactory) -> FlowReference:
    """K=2 denoisers."""
    directory = tmp_path_factory.mktemp("ensembles") / "flows"
    return FlowReference.load(
        make_flow_ensemble(directory, {"code": 1, "prose": 2}, (0.6, 0.4), name="flows")
    )


@pytest.fixture(scope="session")
def flow_server(flows: FlowReference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(flows, tmp_path_factory.mktemp("logs") / "flows.log", FLAGS) as server:  # type: ignore[arg-type]
        yield server


@dataclass(frozen=True)
class Case:
    """A request: its prompt, what else it says, and the same for the reference."""

    prompt: str
    asked: Asked
    max_tokens: int | None = TOKENS
    decar: dict[str, Any] = field(default_factory=dict)
    model: str = "flows"

    def body(self) -> dict[str, Any]:
        how = {
            "order": self.asked.order,
            "schedule": self.asked.schedule,
            "steps": self.asked.steps,
            "block_length": self.asked.block_length,
            "trace": True,
        }
        body = {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.asked.seed,
            "temperature": self.asked.temperature,
            "top_k": self.asked.top_k or -1,
            "top_p": self.asked.top_p,
            "logprobs": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "decar": {**how, **self.decar},
        }
        return body if self.max_tokens is None else {**body, "max_tokens": self.max_tokens}


ORDERS = ("random", "confident", "left-to-right")
TEXTS = prompt_texts(12, min_words=1, max_words=5)


def how(number: int, **more: Any) -> Asked:
    return Asked((), seed=number, **more)


CASES = [
    *(Case(TEXTS[i], how(i, order=order)) for i, order in enumerate(ORDERS)),
    *(Case(TEXTS[i], how(10 + i, order=order, schedule="cosine", steps=5)) for i, order in enumerate(ORDERS)),
    *(Case(TEXTS[i], how(20 + i, order=order, steps=7, block_length=5)) for i, order in enumerate(ORDERS)),
    *(
        Case(TEXTS[3 + i], how(30 + i, order=order, temperature=0.0, steps=6))
        for i, order in enumerate(ORDERS)
    ),
    Case(TEXTS[6], how(40, temperature=0.7, steps=1)),
    Case(TEXTS[7], how(41, steps=50)),  # more than there are tokens
    Case(TEXTS[8], how(42, posterior=False), decar={"route": "prior"}),
    Case(TEXTS[9], how(43, posterior=False, steps=4), decar={"weights": {"code": 1, "prose": 3}}),
    Case(TEXTS[10], how(44, rule="logit", steps=4), decar={"rule": "logit"}),
    Case(TEXTS[11], how(45, top_k=20, top_p=0.8, temperature=1.2)),
    Case(TEXTS[0], how(46, posterior=False), model="flows/prose"),
    Case(f"def {MASK}{MASK}(self):{MASK} return {MASK}", how(47, steps=3), max_tokens=None),
    Case(f"{MASK} and{MASK} then", how(48, block_length=2), max_tokens=3),
    Case(MASK * 6, how(49), max_tokens=None),
]
"""More than 20, since what is decided by a hair is left out."""


@dataclass(frozen=True)
class Expected:
    text: list[int]
    begins: int
    logprobs: list[float]
    reference: FlowReference


def expected(flows: FlowReference, case: Case) -> Expected | None:
    """What the reference reveals; None if it is decided by a hair."""
    prompt = flows.tokenizer(case.prompt)["input_ids"]
    added = case.max_tokens or 0
    alone = case.model.partition("/")[2]
    reference = flows.alone(alone) if alone else flows
    if "weights" in case.decar:
        weights = np.array([case.decar["weights"][name] for name in flows.experts])
        reference = replace(reference, prior=weights / weights.sum())
    elif case.asked.posterior:
        reference = reference.after(prompt, added)
    asked = replace(case.asked, text=[*prompt, *[flows.mask] * added])
    text, log_probs, _ = slowly_revealed(reference, asked)  # type: ignore[arg-type]
    for seed in range(2):
        if slowly_revealed(reference.shaken(seed, SHAKEN_BY), asked)[0] != text:  # type: ignore[arg-type]
            return None
    begins = min(log_probs)
    return Expected(text, begins, [log_probs.get(p, 0.0) for p in range(begins, len(text))], reference)


@pytest.fixture(scope="session")
def answers(flows: FlowReference) -> list[tuple[Case, Expected]]:
    found = [(case, expected(flows, case)) for case in CASES]
    clear = [(case, answer) for case, answer in found if answer is not None]
    assert len(clear) >= 20
    return clear


async def complete_all(
    server: Server, bodies: Sequence[dict[str, Any]], at_once: int
) -> list[dict[str, Any]]:
    """Answers to ``bodies``, in their order."""
    turns = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=False) as client:

        async def complete(body: dict[str, Any]) -> dict[str, Any]:
            async with turns:
                response = await client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            return answer

        return list(await asyncio.gather(*map(complete, bodies)))


def check(case: Case, answer: Expected, body: dict[str, Any]) -> None:
    [choice] = body["choices"]
    assert choice["token_ids"] == answer.text[answer.begins :], case
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(answer.logprobs, abs=LOGPROB_TOLERANCE), case
    assert choice["finish_reason"] == ("length" if case.max_tokens else "stop")
    trace = choice["decar"]
    at = {p: step for p, step in enumerate(trace["revealed_at"], answer.begins) if step}
    assert set(at) == {p for p, logprob in enumerate(answer.logprobs, answer.begins) if logprob}
    wanted = answer.reference.weights_of(answer.text, at)
    named = answer.reference.experts
    for position, weights in wanted.items():
        given = dict(zip(("code", "prose"), trace["weights"][position - answer.begins], strict=True))
        weights = weights if case.asked.posterior else answer.reference.prior
        assert [given[name] for name in named] == pytest.approx(weights, abs=WEIGHT_TOLERANCE), case


@pytest.mark.parametrize("at_once", [1, 32])
async def test_answers_are_the_references_alone_and_beside_others(
    flow_server: Server, answers: list[tuple[Case, Expected]], at_once: int
) -> None:
    bodies = [case.body() for case, _ in answers]
    bodies = bodies if at_once == 1 else [*bodies, *bodies[: 32 - len(bodies)]]
    given = await complete_all(flow_server, bodies, at_once)
    for (case, answer), body in zip([*answers, *answers], given, strict=False):
        check(case, answer, body)


async def test_one_call_of_the_kernel_serves_all_answers_of_a_round(flow_server: Server) -> None:
    """32 answers of 12 tokens, one a step, are 12 rounds and those in which some have not come yet."""
    names = ("flow_rounds", "flow_rows", "flow_steps", "flow_tokens")

    def counted() -> list[float]:
        return [flow_server.metric(f"decar:{name}_total")[0] for name in names]

    before = counted()
    body = {"model": "flows", "prompt": "x", "max_tokens": TOKENS, "ignore_eos": True}
    await complete_all(flow_server, [body] * 32, 32)
    rounds, rows, steps, tokens = (after - was for after, was in zip(counted(), before, strict=True))
    assert rows == steps == tokens == 32 * TOKENS
    assert rounds < 4 * TOKENS


# ---------------------------------------------------------------------------------------------- in vLLM's API


def test_a_stream_says_what_is_revealed_up_to_the_first_mask(flow_server: Server) -> None:
    body = {
        "max_tokens": 16,
        "seed": 5,
        "extra_body": {"ignore_eos": True, "decar": {"block_length": 4, "trace": True}},
    }
    client = flow_server.openai()
    whole = client.completions.create(model="flows", prompt="def main", **body)
    chunks = list(client.completions.create(model="flows", prompt="def main", stream=True, **body))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) >= 4  # one for each block, or more
    traces = [chunk.choices[0].decar for chunk in chunks]
    wanted = whole.choices[0].decar
    assert [step for trace in traces for step in trace["revealed_at"]] == wanted["revealed_at"]
    weights = [share for trace in traces for shares in trace["weights"] for share in shares]
    wanted_weights = [share for shares in wanted["weights"] for share in shares]
    assert weights == pytest.approx(wanted_weights, abs=WEIGHT_TOLERANCE)
    assert [sorted(wanted["revealed_at"][i : i + 4]) for i in (0, 4, 8, 12)] == [
        list(range(i + 1, i + 5)) for i in (0, 4, 8, 12)
    ]


def test_chat_with_choices_log_probabilities_and_usage(flow_server: Server) -> None:
    client = flow_server.openai()
    asked = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 4, "n": 3}
    answer = client.chat.completions.create(
        model="flows", logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True}, **asked
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    for choice in answer.choices:
        assert choice.logprobs is not None
        for token in choice.logprobs.content or []:
            own, *best = [other.logprob for other in token.top_logprobs]  # in vLLM's order
            assert own == token.logprob
            assert len(best) == 2
            assert best == sorted(best, reverse=True)
            assert own <= best[0]
    again = client.chat.completions.create(
        model="flows", extra_body={"ignore_eos": True}, **{**asked, "seed": 5, "n": 2}
    )
    assert again.choices[0].message.content == answer.choices[1].message.content  # a choice has the next seed


def test_an_answer_ends_at_a_stop_string_or_token(flow_server: Server, flows: FlowReference) -> None:
    body: dict[str, Any] = {
        "model": "flows",
        "prompt": "def main",
        "max_tokens": 16,
        "seed": 5,
        "return_token_ids": True,
    }
    whole = flow_server.http.post("/v1/completions", json={**body, "ignore_eos": True}).json()["choices"][0]
    tokens = whole["token_ids"]
    text = flows.tokenizer.decode(tokens[:6])
    by_text = flow_server.http.post(
        "/v1/completions", json={**body, "ignore_eos": True, "stop": [text[-3:]]}
    ).json()["choices"][0]
    assert by_text["finish_reason"] == "stop"
    assert by_text["stop_reason"] == text[-3:]
    assert whole["text"].startswith(by_text["text"] + text[-3:])
    by_token = flow_server.http.post(
        "/v1/completions", json={**body, "ignore_eos": True, "stop_token_ids": [tokens[4]]}
    ).json()["choices"][0]
    assert by_token["token_ids"] == tokens[: tokens.index(tokens[4]) + 1]
    assert (by_token["finish_reason"], by_token["stop_reason"]) == ("stop", tokens[4])


@pytest.mark.parametrize("given", [[], [40, 41]], ids=["ends in a mask", "ends in given tokens"])
def test_a_text_that_is_filled_in_is_told_to_its_end(
    flow_server: Server, flows: FlowReference, given: list[int]
) -> None:
    body = {"model": "flows", "prompt": [10, 11, flows.mask, *given], "seed": 1, "return_token_ids": True}
    answer = flow_server.http.post("/v1/completions", json={**body, "skip_special_tokens": False}).json()
    [choice] = answer["choices"]
    assert choice["token_ids"][1:] == given
    known = flow_server.http.post("/detokenize", json={"model": "flows", "tokens": choice["token_ids"]})
    assert choice["text"] == known.json()["prompt"]


def test_numbers_beyond_the_vocabulary_are_the_vocabularys(flow_server: Server) -> None:
    body = {"model": "flows", "prompt": "x", "max_tokens": 4, "seed": 1, "ignore_eos": True}
    texts = set()
    for top_k in (0, 10**30):
        response = flow_server.http.post("/v1/completions", json={**body, "top_k": top_k})
        assert response.status_code == 200, response.text
        texts.add(response.json()["choices"][0]["text"])
    assert len(texts) == 1


def test_a_drawn_expert_takes_all_steps_alone(flow_server: Server) -> None:
    body = {"model": "flows", "prompt": "x", "max_tokens": 8, "seed": 1, "ignore_eos": True}
    drawn = flow_server.http.post(
        "/v1/completions", json={**body, "decar": {"sampling": "draw", "trace": True}}
    ).json()
    [expert] = drawn["choices"][0]["decar"]["active"]
    alone = flow_server.http.post("/v1/completions", json={**body, "model": f"flows/{expert}"}).json()
    assert drawn["choices"][0]["text"] == alone["choices"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decar": {"prune": 0.1}}, ("decar.prune",)),
        ({"decar": {"top_k": 1}}, ("decar.top_k",)),
        ({"decar": {"stepps": 3}}, ("decar.stepps", "steps")),
        ({"decar": {"steps": 0}}, ("decar.steps",)),
        ({"decar": {"block_length": True}}, ("decar.block_length",)),
        ({"decar": {"order": "rightmost"}}, ("decar.order",)),
        ({"decar": {"schedule": "cubic"}}, ("decar.schedule",)),
        ({"decar": {"route": "classifier"}}, ("decar.route", "not trained")),
        ({"decar": {"sampling": "draw", "rule": "logit"}}, ("decar.sampling",)),
        ({"decar": {"sampling": "draw"}, "temperature": 0.5}, ("temperature", "draw")),
        ({"decar": {"weights": {"nobody": 1}}}, ("nobody",)),
        ({"echo": True}, ("echo",)),
        ({"prompt_logprobs": 1}, ("prompt_logprobs",)),
        ({"presence_penalty": 1}, ("presence_penalty",)),
        ({"repetition_penalty": 1.1}, ("repetition_penalty",)),
        ({"logit_bias": {"5": 1}}, ("logit_bias",)),
        ({"min_tokens": 2}, ("min_tokens",)),
        ({"bad_words": ["a"]}, ("bad_words",)),
        ({"structured_outputs": {"regex": "a+"}}, ("structured_outputs", "grammar")),
        ({"use_beam_search": True, "n": 2}, ("use_beam_search",)),
        ({"max_tokens": FLOW_POSITIONS + 1}, ("max_tokens",)),
        ({"prompt": [5] * FLOW_POSITIONS, "max_tokens": 1}, ("max_tokens",)),
        ({"prompt": [5] * (FLOW_POSITIONS + 1)}, ("160",)),
        ({"prompt": [600]}, ("600",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_apply_is_refused_by_its_name(
    flow_server: Server, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    body = {"model": "flows", "prompt": "x", "max_tokens": 4, **fields}
    assert_error(flow_server.http.post("/v1/completions", json=body), 400, *words)


def test_tools_are_refused(flow_server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    body = {"model": "flows", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    assert_error(flow_server.http.post("/v1/chat/completions", json=body), 400, "tools")


def test_the_ensemble_says_what_it_is(flow_server: Server, flows: FlowReference) -> None:
    said = flow_server.ensemble()
    assert (said["kind"], said["routes"]) == ("flow", ["posterior", "prior"])
    assert said["defaults"] == {
        **{
            "route": "posterior",
            "scope": "full",
            "start": "prior",
            "rule": "velocity",
            "mask_token_id": flows.mask,
        },
        **{"schedule": "linear", "steps": None, "block_length": None, "order": "random", "prompt_chunks": 4},
    }


def test_explain_draws_an_answer_as_it_is_revealed(flow_server: Server) -> None:
    command = [sys.executable, "-m", "decar.server", "explain", "--base-url", flow_server.url]
    command += ["--steps", "--max-tokens", "5", f"def {MASK}("]
    drawn = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    steps = [line for line in drawn if line.startswith("step")]
    assert steps[0] == "step 0 ░(░░░░░"
    assert [line.count("░") for line in steps] == [6, 5, 4, 3, 2, 1, 0]
    assert any(line.startswith("code ") for line in drawn)


# ---------------------------------------------------------------------------------------------- what goes wrong


async def test_answers_that_nobody_wants_any_more_leave(flow_server: Server) -> None:
    """300 are cancelled, and one beside them is as it is alone."""
    long = {"model": "flows", "prompt": "x", "max_tokens": 150, "ignore_eos": True}
    mine = {
        "model": "flows",
        "prompt": "def main",
        "max_tokens": 40,
        "ignore_eos": True,
        "seed": 9,
        "temperature": 0.5,
    }
    [alone] = await complete_all(flow_server, [mine], 1)
    async with httpx.AsyncClient(
        base_url=flow_server.url, timeout=120, verify=False, limits=httpx.Limits()
    ) as client:
        for _ in range(3):
            tasks = [asyncio.create_task(client.post("/v1/completions", json=long)) for _ in range(100)]
            beside = asyncio.create_task(client.post("/v1/completions", json=mine))
            await asyncio.to_thread(
                wait_until, lambda: flow_server.ensemble()["slots"]["in_use"] > 8, 60, "they are revealed"
            )
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await beside).json()["choices"][0]["text"] == alone["choices"][0]["text"]
    await asyncio.to_thread(
        wait_until,
        lambda: (
            (flow_server.ensemble()["slots"]["in_use"], flow_server.ensemble()["queue"]["waiting"]) == (0, 0)
        ),
        60,
        "nothing is left of them",
    )


async def test_an_engine_that_is_killed_costs_its_part_alone_and_comes_back(
    flow_server: Server, flows: FlowReference
) -> None:
    [victim] = [expert for expert in flow_server.ensemble()["experts"] if expert["name"] == "code"]
    decar = {"route": "prior", "trace": True}
    long = {"model": "flows", "max_tokens": 150, "ignore_eos": True, "prompt": "x", "decar": decar}
    bodies = [
        long,
        {**long, "decar": {"route": "prior", "on_expert_loss": "fail"}},
        {**long, "model": "flows/code", "decar": {}},
        {**long, "model": "flows/prose", "decar": {}},
    ]
    async with httpx.AsyncClient(base_url=flow_server.url, timeout=120, verify=False) as client:
        with flow_server.standing_still() as move:
            tasks = [asyncio.create_task(client.post("/v1/completions", json=body)) for body in bodies]
            await asyncio.to_thread(
                wait_until, lambda: flow_server.ensemble()["slots"]["in_use"] == 4, 60, "they are revealed"
            )
            [before] = flow_server.metric("decar:flow_tokens_total")
            while flow_server.metric("decar:flow_tokens_total")[0] < before + 8:
                await asyncio.to_thread(move, 0.02)
            os.kill(victim["pid"], signal.SIGKILL)
        degraded, fails, gone, other = await asyncio.gather(*tasks)
    assert degraded.json()["decar"]["degraded"] == ["code"]
    trace = degraded.json()["choices"][0]["decar"]
    shares = [
        round(code, 6) for _, (code, _) in sorted(zip(trace["revealed_at"], trace["weights"], strict=True))
    ]
    assert set(shares) == {0.6, 0.0}
    assert shares == sorted(shares, reverse=True)  # from a step on, it has no part
    assert degraded.json()["usage"]["completion_tokens"] == 150
    assert_error(fails, 503, "code")
    assert_error(gone, 503, "code")
    assert other.json()["decar"]["degraded"] == []
    wait_until(
        lambda: all(expert["up"] for expert in flow_server.ensemble()["experts"]),
        120,
        lambda: f"it is back:\n{flow_server.log_tail()}",
    )
    back = {**long, "model": "flows/code", "max_tokens": 4, "decar": {}}
    [answer] = await complete_all(flow_server, [back], 1)
    assert answer["decar"]["degraded"] == []
