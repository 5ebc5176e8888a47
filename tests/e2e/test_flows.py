"""Flow ensembles on real engines: what is served is what plain transformers forwards reveal."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import running
from tests.flow import Asked, slowly_revealed
from tests.flow_reference import FLOW_POSITIONS, MASK, FlowReference, make_flow_ensemble
from tests.helpers import Server, assert_error
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
