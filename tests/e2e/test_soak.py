"""Mixed traffic for half an hour, with clients that leave and engines that are killed: nothing grows or gets stuck.

DECAR_SOAK_S=120 DECAR_SOAK_KILL_S=50 python -m pytest -m soak tests/e2e/test_soak.py -s
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import openai
import psutil
import pytest

from tests.e2e.test_loss import BACK_WITHIN_S, is_up, pid_of
from tests.helpers import EXACT, Server, wait_until
from tests.reference import Reference

LENGTH_S = float(os.environ.get("DECAR_SOAK_S", "1800"))
KILL_EVERY_S = float(os.environ.get("DECAR_SOAK_KILL_S", "180"))
pytestmark = [pytest.mark.engines, pytest.mark.soak, pytest.mark.timeout(LENGTH_S + 600)]

CLIENTS = 24
WINDOW_S = 2
LOWEST = 0.4  # of the median throughput, in any window but around a kill
GROWTH = 0.03  # of the gateway's memory, in the second half
MEANS_SOMETHING_S = 1200  # before, caches fill
AFTER_BACK_S = 4
T = TypeVar("T")
OF_THE_FIRST = 10  # descriptors of the first expert's first engine, whose renderer is kept


@dataclass
class Soak:
    """What was seen of the traffic, and when."""

    tokens: Counter[int] = field(
        default_factory=Counter
    )  # by window; of whole answers, when they may have been said
    asked: defaultdict[int, list[str]] = field(default_factory=lambda: defaultdict(list))  # by window
    requests: int = 0
    cancelled: int = 0
    failed: list[str] = field(default_factory=list)
    disturbed: list[tuple[float, float]] = field(default_factory=list)  # from a kill until its engine is back
    cores: list[tuple[float, str]] = field(default_factory=list)  # by second, what they did
    started: float = field(default_factory=time.monotonic)

    @property
    def now(self) -> float:
        return time.monotonic() - self.started

    def heard(self, tokens: int) -> None:
        self.tokens[int(self.now // WINDOW_S)] += tokens

    def answered(self, tokens: int, asked: float) -> None:
        """Tokens of a whole answer, which were said one by one since it was ``asked``."""
        for token in range(tokens):
            at = asked + (self.now - asked) * (token + 1) / tokens
            self.tokens[int(at // WINDOW_S)] += 1

    def undisturbed(self) -> dict[int, int]:
        """Tokens of each whole window in which no engine was missing; in the first clients connect, in the last they
        leave."""
        windows = range(2, int(LENGTH_S // WINDOW_S) - 1)
        return {
            i: self.tokens[i]
            for i in windows
            if not any(a < (i + 1) * WINDOW_S and i * WINDOW_S < b for a, b in self.disturbed)
        }

    def said_of(self, window: int) -> str:
        """What was asked and what the machine's cores did around a window, a second each: who was slow, if not the
        ensemble."""
        begin = window * WINDOW_S
        shares = [share for at, share in self.cores if begin - 1 <= at <= begin + WINDOW_S + 1]
        asked = [
            f"{len(self.asked[i])} ({', '.join(self.asked[i])})" for i in (window - 1, window, window + 1)
        ]
        return (
            f"at {begin} s, {[self.tokens[window + i] for i in range(-2, 3)]} tokens in it and its neighbours; "
            f"cores: {'; '.join(shares)}; asked: {'; '.join(asked)}"
        )


class Deck(Generic[T]):
    """Deals all of its cards, shuffled, before any comes again: mixed, and as much of each at any time."""

    def __init__(self, rng: random.Random, cards: Sequence[T]):
        self._rng, self._cards = rng, cards
        self._left: list[T] = []

    def deal(self) -> T:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


class Traffic:
    """What all clients ask for."""

    def __init__(self, seed: int = 0):
        self.rng = random.Random(seed)
        self._prompts = Deck(self.rng, (3, 20, 120))
        self._lengths = Deck(self.rng, (10, 20, 30, 40, 50, 60))
        self._options = Deck[dict[str, Any]](
            self.rng,
            [
                {"temperature": 0},
                {"temperature": 1.0},
                {"temperature": 1.0, "n": 3},
                {"temperature": 0, "logprobs": 3},
                {"temperature": 0, "stop": ["never said"]},
                {"temperature": 0, "presence_penalty": 0.5},
            ],
        )
        self._decar = Deck[dict[str, Any]](
            self.rng,
            [
                *(
                    {"route": "posterior"},
                    {"route": "prior"},
                    {"rule": "logit"},
                    {"prune": 0.02},
                    {"top_k": 2},
                ),
                *({"scope": "output"}, {"trace": True}, {"weights": {"code": 2, "prose": 1}}),
            ],
        )
        kinds = {"alone": 2, "scored": 2, "whole": 4, "stream": 9, "leaves": 3}
        self._kinds = Deck(self.rng, [kind for kind, count in kinds.items() for _ in range(count)])

    def request(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Of which kind it is, a completion's arguments, and its `decar` object."""
        prompt = [self.rng.randrange(5, 95) for _ in range(self._prompts.deal())]
        options = {"prompt": prompt, "max_tokens": self._lengths.deal(), **self._options.deal()}
        if options["temperature"] and "n" not in options:
            options["seed"] = self.rng.randrange(99)
        return self._kinds.deal(), options, self._decar.deal()


async def client_of(soak: Soak, client: openai.AsyncOpenAI, trio: Reference, traffic: Traffic) -> None:
    while soak.now < LENGTH_S:
        kind, options, decar = traffic.request()
        asked = soak.now
        soak.asked[int(asked // WINDOW_S)].append(f"{kind} {options.get('n', 1)}x{options['max_tokens']}")
        try:
            if kind == "alone":  # one expert, which may be the one that was killed
                with suppress(openai.InternalServerError):
                    answer = await client.completions.create(model=f"{trio.name}/code", **options)
                    soak.answered(answer.usage.completion_tokens, asked)
            elif kind == "scored":
                answer = await client.completions.create(
                    model=trio.name,
                    **{**options, "n": 1, "extra_body": {"prompt_logprobs": 1, "ignore_eos": True}},
                )
                soak.answered(answer.usage.completion_tokens, asked)
            elif kind == "whole":
                extra = {"ignore_eos": True, "decar": decar}
                answer = await client.completions.create(model=trio.name, extra_body=extra, **options)
                soak.answered(answer.usage.completion_tokens, asked)
            else:
                leaves_after = traffic.rng.randint(1, 9) if kind == "leaves" else None
                await read(soak, client, trio, options, decar, leaves_after)
        except openai.APIError as error:
            soak.failed.append(f"{error!r}: {options} {decar}")
        soak.requests += 1


async def read(
    soak: Soak,
    client: openai.AsyncOpenAI,
    trio: Reference,
    options: dict[str, Any],
    decar: dict[str, Any],
    leaves_after: int | None,
) -> None:
    """A stream, to its end or until its client has had enough."""
    extra = {"ignore_eos": True, "return_token_ids": True, "decar": decar}
    stream = await client.completions.create(model=trio.name, stream=True, extra_body=extra, **options)
    async with stream:
        chunks = 0
        async for chunk in stream:
            chunks += 1
            soak.heard(sum(len(choice.model_extra["token_ids"] or ()) for choice in chunk.choices))
            if chunks == leaves_after:
                soak.cancelled += 1
                return


async def kill_now_and_then(soak: Soak, server: Server, trio: Reference) -> None:
    victims = [trio.experts[i % len(trio.experts)] for i in range(1000)]
    for i, victim in enumerate(victims, 1):
        await asyncio.sleep(max(i * KILL_EVERY_S - soak.now, 0))
        if soak.now > LENGTH_S - BACK_WITHIN_S / 2:
            return
        at = soak.now
        pid = await asyncio.to_thread(pid_of, server, victim)
        os.kill(pid, signal.SIGKILL)

        def back(victim: str = victim, pid: int = pid) -> bool:
            return is_up(server, victim) and pid_of(server, victim) != pid

        await asyncio.to_thread(wait_until, back, BACK_WITHIN_S, f"{victim} is back", 0.5)
        soak.disturbed.append((at, soak.now + AFTER_BACK_S))


def work_takes_s() -> float:
    """What the same small work takes of a core's time just now: a machine that is shared is not always as fast."""
    began = time.thread_time()
    sum(i * i for i in range(20_000))
    return time.thread_time() - began


async def sample_each_second(soak: Soak, process: psutil.Process, samples: list[tuple[float, int]]) -> None:
    while soak.now < LENGTH_S:
        samples.append((soak.now, process.memory_info().rss))
        did, work_ms = psutil.cpu_times_percent(None), work_takes_s() * 1e3
        soak.cores.append(
            (
                soak.now,
                f"idle {did.idle:.0f} %, stolen {did.steal:.0f} %, disk {did.iowait:.0f} %, work {work_ms:.2f} ms",
            )
        )
        await asyncio.sleep(1)


async def test_mixed_traffic_with_cancels_and_kills(trio: Reference, tmp_path: Path) -> None:
    server = Server.start(trio.directory, tmp_path / "server.log", EXACT)
    try:
        gateway = psutil.Process(server.process.pid)
        segments, descriptors = server.shared_memory, gateway.num_fds()
        samples: list[tuple[float, int]] = []
        async with server.async_openai() as client:
            soak, traffic = Soak(), Traffic()
            killing = asyncio.create_task(kill_now_and_then(soak, server, trio))
            memory = asyncio.create_task(sample_each_second(soak, gateway, samples))
            await asyncio.gather(*(client_of(soak, client, trio, traffic) for _ in range(CLIENTS)))
            await memory
            length_s = soak.now
            await killing
        wait_until(server.is_idle, 30, "slots and KV are free again")
        server.http.close()
        del server.http
        windows = soak.undisturbed()
        half = [rss for at, rss in samples if at * 2 >= LENGTH_S]
        tenth = max(len(half) // 10, 1)
        growth = statistics.mean(half[-tenth:]) / statistics.mean(half[:tenth]) - 1
        lowest, median = min(windows.values()), statistics.median(windows.values())
        slow = [soak.said_of(i) for i, tokens in windows.items() if tokens <= LOWEST * median]
        print(
            f"\n{length_s:.0f} s, {soak.requests} requests, {soak.cancelled} left, {len(soak.failed)} failed, "
            f"{len(soak.disturbed)} kills; {median / WINDOW_S:.0f} tokens/s, lowest window {lowest / median:.0%}; "
            f"memory {growth:+.1%} in the second half; descriptors {descriptors} -> {gateway.num_fds()}"
        )
        assert not soak.failed, soak.failed[:5]
        assert soak.cancelled
        assert len(soak.disturbed) >= int((LENGTH_S - BACK_WITHIN_S) / KILL_EVERY_S)
        assert not slow, "\n".join(slow)
        assert server.shared_memory <= segments
        descriptors += OF_THE_FIRST
        wait_until(lambda: gateway.num_fds() <= descriptors, 30, lambda: f"{gateway.num_fds()} descriptors")
        if LENGTH_S >= MEANS_SOMETHING_S:
            assert growth < GROWTH
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill()
