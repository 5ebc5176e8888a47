"""Engines that die or stand still while they answer: the others go on, and the lost one comes back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.test_exact import LEAD, LOGPROB_TOLERANCE, RULES, assert_equal, complete_all, weighted
from tests.e2e.test_exact import check as check_exact
from tests.helpers import COMPLETION_EXTRAS, EXACT, Server, answer_of, assert_error, wait_until
from tests.reference import Reference, mixture_decode, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

TOKENS = 160
MIDST = 8
"""Tokens of an answer, on the average, after which answers are broken off. They are counted at the server: a client
that reads many streams is behind it."""
STUCK_AFTER_S = 8
BACK_WITHIN_S = 120  # an engine starts within 60 s on an idle machine
FLAGS = (
    *EXACT,
    *("--engine-timeout", str(STUCK_AFTER_S)),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)
PENALTIES = {"presence_penalty": 0.4, "frequency_penalty": -0.3}
SCHEMA = {"type": "array", "items": {"enum": ["code", "prose", "maths"]}, "minItems": 40, "maxItems": 40}


@pytest.fixture(scope="module")
def server(trio: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """K=3, to be broken again and again."""
    log = tmp_path_factory.mktemp("logs") / "loss.log"
    started = Server.start(trio.directory, log, FLAGS)
    try:
        yield started
        assert started.stop() == 0, started.log_tail()
    finally:
        started.kill()


def pid_of(server: Server, expert: str) -> int:
    [pid] = [found["pid"] for found in server.ensemble()["experts"] if found["name"] == expert]
    return int(pid)


def is_up(server: Server, expert: str) -> bool:
    return bool(next(found["up"] for found in server.ensemble()["experts"] if found["name"] == expert))


def wait_until_back(server: Server, expert: str) -> None:
    wait_until(
        lambda: is_up(server, expert), BACK_WITHIN_S, lambda: f"{expert} is back:\n{server.log_tail()}"
    )


def wait_until_another(server: Server, expert: str, before: int) -> None:
    """Until an expert is back, by another process than ``before``."""
    wait_until(
        lambda: is_up(server, expert) and pid_of(server, expert) != before,
        BACK_WITHIN_S,
        lambda: f"{expert} is back:\n{server.log_tail()}",
    )


@dataclass
class Kind:
    """A kind of request, and what the reference decodes in its place; None where its answer is not compared."""

    name: str
    decar: dict[str, Any]
    decode: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    stream: bool = True


KINDS = [
    *(
        Kind(f"{route}-{rule}", {"route": route, "rule": rule}, {"route": route, "rule": rule})
        for route in ("posterior", "prior")
        for rule in RULES
    ),
    Kind(
        "weights", weighted(maths=2, code=3, prose=5).decar, {"weights": {"maths": 2, "code": 3, "prose": 5}}
    ),
    Kind("output-scope", {"scope": "output"}),
    Kind("pruned", {"prune": 0.02}),
    Kind("top-k", {"route": "prior", "top_k": 2}),
    Kind("penalties", {"route": "posterior"}, {"route": "posterior", **PENALTIES}, PENALTIES),
    Kind("whole", {"route": "posterior"}, {"route": "posterior"}, stream=False),
    Kind("seed", {"route": "posterior"}, options={"temperature": 1.0, "seed": 5}),
    Kind("draw", {"sampling": "draw"}, options={"temperature": 1.0, "logprobs": None}),
    Kind("choices", {"route": "posterior"}, options={"temperature": 1.0, "n": 2, "seed": 3}),
    Kind("stop", {"route": "posterior"}, options={"stop": ["never said in this answer"]}),
    Kind(
        "grammar",
        {"route": "posterior"},
        options={"temperature": 1.0, "max_tokens": 400},
        extra={"structured_outputs": {"json": SCHEMA}, "ignore_eos": False},
    ),
]


@dataclass
class Heard:
    """A whole answer, put together from its chunks; of several choices, each."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    weights: dict[int, list[list[float]]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    degraded: list[tuple[int, list[str]]] = field(default_factory=list)  # (tokens so far, what was said then)

    def add(self, response: Any) -> None:
        before = sum(map(len, self.tokens.values()))
        for choice in response.choices:
            answer = answer_of(choice)
            for parts, part in (
                (self.tokens, answer.tokens),
                (self.weights, answer.weights),
                (self.logprobs, answer.logprobs),
            ):
                parts.setdefault(choice.index, []).extend(part)  # type: ignore[attr-defined]
            self.text[choice.index] = self.text.get(choice.index, "") + answer.text
            if answer.finish_reason:
                self.reasons[choice.index] = answer.finish_reason
        said = (response.model_extra or {}).get("decar")
        if said is not None:
            self.degraded.append((before, said["degraded"]))


async def ask(client: openai.AsyncOpenAI, model: str, kind: Kind, prompt: list[int]) -> Heard:
    """One request of a kind."""
    extra = {**COMPLETION_EXTRAS, "decar": {**kind.decar, "trace": True}, **kind.extra}
    options = {"max_tokens": TOKENS, "temperature": 0, "logprobs": 1, **kind.options}
    heard = Heard()
    create = client.completions.create
    if not kind.stream:
        heard.add(await create(model=model, prompt=prompt, extra_body=extra, **options))
        return heard
    async for chunk in await create(model=model, prompt=prompt, stream=True, extra_body=extra, **options):
        heard.add(chunk)
    return heard


def mixed_tokens(server: Server) -> int:
    return sum(expert["lockstep"]["mixed_tokens"] for expert in server.ensemble()["experts"])


async def all_asked(
    server: Server,
    reference: Reference,
    asked: list[tuple[Kind, list[int]]],
    signals: list[tuple[int, signal.Signals]],
) -> list[Heard]:
    """The answers to all of ``asked`` at once; ``signals`` are sent in their midst."""
    enough = mixed_tokens(server) + MIDST * len(asked)
    async with server.async_openai() as client:
        tasks = [asyncio.create_task(ask(client, reference.name, kind, prompt)) for kind, prompt in asked]
        try:
            with server.standing_still() as move:

                def in_their_midst() -> bool:
                    # A busy gateway takes its time to say how far they are: they could be whole by then.
                    move(0.02)
                    return mixed_tokens(server) >= enough

                await asyncio.to_thread(wait_until, in_their_midst, 120, "answers are in their midst", 0.005)
            for pid, sent in signals:
                os.kill(pid, sent)
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()


async def all_kinds(
    server: Server, reference: Reference, prompts: list[list[int]], signals: list[tuple[int, signal.Signals]]
) -> list[tuple[Kind, list[int], Heard]]:
    """Every kind with every prompt, at once; ``signals`` are sent in their midst."""
    asked = [(kind, prompt) for kind in KINDS for prompt in prompts]
    heard = await all_asked(server, reference, asked, signals)
    return [(kind, prompt, one) for (kind, prompt), one in zip(asked, heard, strict=True)]


def assert_whole(kind: Kind, heard: Heard) -> None:
    """Nothing is missing, nothing is there twice, and it ends as it was asked to."""
    assert set(heard.reasons) == set(range(kind.options.get("n", 1))), kind.name
    for index, reason in heard.reasons.items():
        if kind.name == "grammar":
            assert reason == "stop"
            assert len(json.loads(heard.text[index])) == 40
            continue
        assert reason == "length", kind.name
        assert len(heard.tokens[index]) == len(heard.weights[index]) == TOKENS, kind.name
        if kind.options.get("logprobs", 1):
            assert len(heard.logprobs[index]) == TOKENS


def lost_from(reference: Reference, lost: str, heard: Heard, index: int = 0) -> int:
    """The position from which on ``lost`` takes no part."""
    k = reference.experts.index(lost)
    weights = [row[k] for row in heard.weights[index]]
    end = next((t for t, weight in enumerate(weights) if weight == 0), len(weights))
    assert not any(weights[end:])
    return end


def assert_mixtures(reference: Reference, lost: str, kind: Kind, prompt: list[int], heard: Heard) -> None:
    """Before the loss it is all experts' answer, after it that of those which are left."""
    end = lost_from(reference, lost, heard)
    tokens = heard.tokens[0]
    assert kind.decode is not None
    decode = dict(kind.decode)
    [before] = mixture_decode(reference, [prompt], end, **decode) if end else [None]
    if before is not None and before.margin > LEAD:
        assert tokens[:end] == before.tokens, kind.name
        assert heard.logprobs[0][:end] == pytest.approx(before.logprobs, abs=LOGPROB_TOLERANCE)
    rest = reference.without(lost)
    if "weights" in decode:
        decode["weights"] = {name: decode["weights"][name] for name in rest.experts}
    [after] = mixture_decode(rest, [prompt], TOKENS - end, spoken=[tokens[:end]], **decode)
    if after.margin > LEAD:
        assert tokens == after.tokens, kind.name
        assert heard.logprobs[0][end:] == pytest.approx(after.logprobs, abs=LOGPROB_TOLERANCE)
        for ours, theirs in zip(heard.weights[0][end:], after.weights, strict=True):
            mine = [ours[reference.experts.index(name)] for name in rest.experts]
            assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("lost", ["code", "maths"])
async def test_an_engine_is_killed_and_every_answer_goes_on(
    server: Server, trio: Reference, lost: str
) -> None:
    """One expert leads most requests, the other one follows."""
    prompts = [trio.encode(text) for text in prompt_texts(2)]
    victim = pid_of(server, lost)
    before = server.metric("decar:restarts_total")
    found = await all_kinds(server, trio, prompts, [(victim, signal.SIGKILL)])
    compared = 0
    for kind, prompt, heard in found:
        assert_whole(kind, heard)
        if kind.decode is not None:
            assert_mixtures(trio, lost, kind, prompt, heard)
            end = lost_from(trio, lost, heard)
            compared += 0 < end < TOKENS
            if kind.stream and end < TOKENS:
                assert (end, [lost]) in heard.degraded, "it is said where it happened"
    assert compared >= 4, [lost_from(trio, lost, heard) for _, _, heard in found]
    assert server.health() == 200
    assert sum(server.metric("decar:failovers_total")) >= compared
    request = {"model": f"{trio.name}/{lost}", "prompt": "x", "max_tokens": 1}
    if not is_up(server, lost):
        response = server.http.post("/v1/completions", json=request)
        assert_error(response, 503, lost)
        assert int(response.headers["retry-after"]) > 0
    wait_until_back(server, lost)
    assert sum(server.metric("decar:restarts_total")) == sum(before) + 1
    assert pid_of(server, lost) != victim
    assert server.http.post("/v1/completions", json=request).status_code == 200
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)
    wait_until(server.is_idle, 30, "nothing is left of those requests")


async def test_an_engine_that_stands_still_for_a_while_is_waited_for(server: Server, trio: Reference) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(12)]
    expected = [one for one in mixture_decode(trio, prompts, TOKENS) if one.margin > LEAD]
    assert len(expected) >= 3
    victim = pid_of(server, "prose")
    answers = asyncio.create_task(
        complete_all(
            server, trio.name, [one.prompt for one in expected], {"route": "posterior"}, max_tokens=TOKENS
        )
    )
    await asyncio.to_thread(wait_until, lambda: server.ensemble()["slots"]["in_use"], 60, "they run", 0.01)
    os.kill(victim, signal.SIGSTOP)
    await asyncio.sleep(STUCK_AFTER_S / 2)  # that long is what is tested
    os.kill(victim, signal.SIGCONT)
    for one, (answer, summary) in zip(expected, await answers, strict=True):
        assert answer.tokens == one.tokens
        assert summary["degraded"] == []
    assert pid_of(server, "prose") == victim


async def test_an_engine_that_does_not_get_on_is_ended(server: Server, trio: Reference) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(2)]
    victim = pid_of(server, "prose")
    found = await all_kinds(server, trio, prompts, [(victim, signal.SIGSTOP)])
    for kind, prompt, heard in found:
        assert_whole(kind, heard)
        if kind.decode is not None:
            assert_mixtures(trio, "prose", kind, prompt, heard)
    wait_until_back(server, "prose")
    assert pid_of(server, "prose") != victim
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)


async def test_two_engines_die_at_once_and_one_answers(server: Server, trio: Reference) -> None:
    [prompt] = [trio.encode(text) for text in prompt_texts(1)]
    victims = [(pid_of(server, name), signal.SIGKILL) for name in ("code", "prose")]
    found = await all_kinds(server, trio, [prompt], victims)
    for kind, _, heard in found:
        assert_whole(kind, heard)
    for name in ("code", "prose"):
        wait_until_back(server, name)
    [alone] = mixture_decode(trio, [prompt], 8, weights={"maths": 1.0})
    [(answer, _)] = await complete_all(server, trio.name, [prompt], {"weights": {"maths": 1.0}}, max_tokens=8)
    assert_equal(trio, alone, answer)


async def test_what_engines_are_forked_from_is_killed_and_all_are_back(
    server: Server, trio: Reference
) -> None:
    """They end with it: nobody could tell any more when one of them does."""
    before = {name: pid_of(server, name) for name in trio.experts}
    forked_from = {psutil.Process(pid).ppid() for pid in before.values()}
    assert len(forked_from) == 1
    assert server.process.pid not in forked_from
    os.kill(forked_from.pop(), signal.SIGKILL)
    for name in trio.experts:
        wait_until_another(server, name, before[name])
    assert not any(psutil.pid_exists(pid) for pid in before.values())
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)


async def test_who_wants_nobody_missing_is_told(server: Server, trio: Reference) -> None:
    victim = pid_of(server, "maths")
    kind = Kind("fail", {"route": "prior", "on_expert_loss": "fail"})
    with pytest.raises(openai.APIError, match="maths"):
        await all_asked(server, trio, [(kind, [5, 6, 7])], [(victim, signal.SIGKILL)])
    wait_until_back(server, "maths")
    wait_until(server.is_idle, 30, "nothing is left of that request")


# --- what takes long: `make soak` -------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(1800)
async def test_ten_kills_in_a_row(server: Server, trio: Reference) -> None:
    """Each of the three, again and again, while others answer."""
    [prompt] = [trio.encode(text) for text in prompt_texts(1)]
    for i in range(10):
        lost = trio.experts[i % len(trio.experts)]
        for kind, _, heard in await all_kinds(
            server, trio, [prompt], [(pid_of(server, lost), signal.SIGKILL)]
        ):
            assert_whole(kind, heard)
            if kind.decode is not None:
                assert_mixtures(trio, lost, kind, prompt, heard)
        wait_until_back(server, lost)
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)
    wait_until(server.is_idle, 30, "nothing is left of those requests")


def engines_of(server: Server) -> set[int]:
    """Processes that are engines, or become some: vLLM names them when it has been imported."""
    found = set()
    for process in server.processes():
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "EngineCore" in command or "multiprocessing.spawn" in command:
                found.add(process.pid)
    return found


@pytest.mark.soak
@pytest.mark.parametrize("when", ["starts", "warms up"])
async def test_an_engine_is_killed_again_before_it_is_back(
    server: Server, trio: Reference, when: str
) -> None:
    prompts = [trio.encode(text) for text in prompt_texts(2)]
    os.kill(pid_of(server, "code"), signal.SIGKILL)
    wait_until(lambda: not is_up(server, "code"), 30, "its death is noticed", 0.01)
    others = {pid_of(server, name) for name in ("maths", "prose")}
    if when == "starts":
        [victim] = wait_until(lambda: engines_of(server) - others, 60, "it is started again", 0.01)
    else:
        dead = pid_of(server, "code")
        victim = wait_until(
            lambda: pid_of(server, "code") not in (dead, 0) and pid_of(server, "code"),
            120,
            "it warms up",
            0.01,
        )
    assert not is_up(server, "code")
    os.kill(victim, signal.SIGKILL)
    rest = trio.without("code")
    for prompt in prompts:
        [expected] = mixture_decode(rest, [prompt], 16)
        [(answer, summary)] = await complete_all(
            server, trio.name, [prompt], {"route": "posterior"}, max_tokens=16
        )
        if not is_up(server, "code"):
            assert summary["degraded"] == ["code"]
            assert expected.margin <= LEAD or answer.tokens == expected.tokens
    wait_until_back(server, "code")
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)


@pytest.mark.soak
async def test_an_engine_is_killed_while_the_server_stops(
    trio: Reference, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its answers go on without it, and the server ends as ever."""
    prompts = [trio.encode(text) for text in prompt_texts(1)]
    log = tmp_path_factory.mktemp("logs") / "stops.log"
    server = Server.start(trio.directory, log, FLAGS)
    try:
        signals = [(server.process.pid, signal.SIGTERM), (pid_of(server, "code"), signal.SIGKILL)]
        for kind, _, heard in await all_kinds(server, trio, prompts, signals):
            assert_whole(kind, heard)
        assert server.ended("when its answers have ended") == 0
    finally:
        server.kill()


@pytest.mark.soak
async def test_an_engine_that_stands_still_for_two_minutes(server: Server, trio: Reference) -> None:
    """It is another one by then; that this one is let go on, afterwards, changes nothing."""
    victim = pid_of(server, "maths")
    [prompt] = [trio.encode(text) for text in prompt_texts(1)]
    found = await all_kinds(server, trio, [prompt], [(victim, signal.SIGSTOP)])
    for kind, _, heard in found:
        assert_whole(kind, heard)
    await asyncio.sleep(120)  # that long is what is tested
    assert is_up(server, "maths")
    assert pid_of(server, "maths") != victim
    with contextlib.suppress(ProcessLookupError):  # it has been ended
        os.kill(victim, signal.SIGCONT)
    await check_exact(server, trio, weighted(code=2, prose=5, maths=3), "velocity", 4)
