"""Rounds without engines: rows are real, in a real plane, and made by a hash of the text instead of a model."""

from __future__ import annotations

import asyncio
import copy
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from decar.router.flow import Revealing
from decar.router.manifest import Order
from decar.server.gateway.engine import ExpertEngine
from decar.server.gateway.rounds import Answer, Rounds, Sampled
from decar.server.metrics import FlowMetrics
from decar.server.protocol.flow import Denoising
from decar.server.protocol.plane import Plane

V = 7
MASK = V - 1
EOS = 0
T = 8


class Hashing:
    """An engine whose expert's row at a position is made from the whole text.

    Attributes:
        texts: that it was asked about.
        busy: while it is clear, nothing is answered.
        fails: raised instead, if not None.
    """

    def __init__(self, plane: Plane, expert: int, seed: int):
        self.rows = plane.fields["rows"][expert], plane.fields["log_normaliser"][expert]
        self.seed = seed
        self.client: Any = SimpleNamespace(errored=False)
        self.texts: list[list[int]] = []
        self.busy = asyncio.Event()
        self.busy.set()
        self.fails: Exception | None = None

    async def denoise(self, request_id: str, tokens: Sequence[int], part: Denoising) -> np.ndarray:
        self.texts.append(list(tokens))
        await self.busy.wait()
        if self.fails is not None:
            raise self.fails
        assert part.entries is not None
        for position, entry in zip(part.positions, part.entries, strict=True):
            assert tokens[position] == MASK
            rng = np.random.default_rng([self.seed, position, zlib.crc32(bytes(tokens))])
            row = rng.normal(size=V)
            row[part.mask_token_id] = -np.inf
            self.rows[0][entry], self.rows[1][entry] = row, np.logaddexp.reduce(row)
        return np.zeros(0)


class Told:
    """What a user is told."""

    def __init__(self, ends: Sequence[int] = ()) -> None:
        self.ends = frozenset(ends)
        self.tokens: list[int] = []
        self.parts: list[int] = []
        self.finish: str | None = None
        self.error: Exception | None = None
        self.ended = asyncio.Event()

    def say(self, tokens: Sequence[int], logprobs: Any, finish: str | None) -> bool:
        self.tokens += tokens
        self.parts.append(len(tokens))
        self.finish = finish
        if finish is not None:
            self.ended.set()
        return finish is None

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended.set()

    async def next(self) -> Any:
        raise NotImplementedError

    async def abort(self) -> None:
        raise NotImplementedError


class World:
    """K engines and their rounds, in a plane with room for so many rows."""

    def __init__(self, plane: Plane, seeds: Sequence[int]):
        self.engines = [Hashing(plane, k, seed) for k, seed in enumerate(seeds)]
        self.experts = [ExpertEngine(f"e{k}", engine) for k, engine in enumerate(self.engines)]  # type: ignore[arg-type]
        self.metrics = FlowMetrics(plane, CollectorRegistry())
        self.rounds = Rounds(self.experts, plane, self.metrics, MASK)

    def answer(
        self,
        prompt: Sequence[int] = (1, 2),
        seed: int = 0,
        weights: Sequence[float] = (0.5, 0.5),
        order: Order = "random",
        told: Told | None = None,
        **how: Any,
    ) -> Answer:
        text = np.array([*prompt, *[MASK] * (T - len(prompt))])
        with np.errstate(divide="ignore"):
            log_weights = np.log(weights)
        masked = np.flatnonzero(text == MASK)
        revealing = Revealing(masked, order, "linear", how.pop("steps", None), None, seed, log_weights)
        sampled = Sampled(how.pop("rule", "velocity"), 1.0, seed, **how)

        def lost(expert: int) -> np.ndarray:
            rest = revealing.log_weights.copy()
            rest[expert] = -np.inf
            return rest - np.logaddexp.reduce(rest)

        return Answer(text, int(masked[0]), len(prompt), revealing, sampled, told or Told(), lost)

    async def told(self, *answers: Answer) -> list[Told]:
        """What comes of answers that join together."""
        for answer in answers:
            self.rounds.join(answer)
        return await ended(*answers)


async def ended(*answers: Answer) -> list[Told]:
    """What has come of them, when they have ended."""
    found = []
    for answer in answers:
        assert isinstance(answer.speaker, Told)
        await asyncio.wait_for(answer.speaker.ended.wait(), 10)
        found.append(answer.speaker)
    return found


@pytest.fixture
def plane() -> Iterator[Plane]:
    made = Plane.create(2, 8, V, T)  # room for the rows of two whole answers, and not of three
    yield made
    made.unlink()


@pytest.fixture
async def world(plane: Plane) -> AsyncIterator[World]:
    made = World(plane, (1, 2))
    yield made
    made.rounds.stop()


def counted(world: World) -> dict[str, float]:
    return {
        family.name: family.samples[0].value
        for family in world.metrics.collect()
        if family.name.startswith("decar:flow")
    }


async def test_identical_experts_are_that_expert(plane: Plane) -> None:
    same = World(plane, (3, 3))
    for order in ("random", "confident", "left-to-right"):
        pair = same.answer(seed=5, order=order)
        [both] = await same.told(pair)
        [alone] = await same.told(same.answer(seed=5, order=order, weights=(1, 0)))
        assert both.tokens == alone.tokens
        assert pair.weights == pytest.approx(0.5)
    same.rounds.stop()


async def test_answers_do_not_depend_on_who_else_is_revealed(world: World) -> None:
    """More rows than there is room for: some wait for the next round, and nobody is passed over for long."""

    def answers() -> list[Answer]:
        rules = ("velocity", "logit")
        orders: tuple[Order, ...] = ("confident", "random", "left-to-right")
        return [
            world.answer(seed=i, order=orders[i % 3], rule=rules[i % 2], steps=(None, 3)[i % 2], top_k=i % 4)
            for i in range(12)
        ]

    together = await world.told(*answers())
    alone = [(await world.told(answer))[0] for answer in answers()]
    assert [told.tokens for told in together] == [told.tokens for told in alone]
    assert {told.finish for told in together} == {"length"}


async def test_a_round_is_one_call_for_each_rule(world: World) -> None:
    await world.told(*(world.answer(seed=i, order="left-to-right") for i in range(4)))
    assert counted(world) == {
        "decar:flow_rounds": 6,
        "decar:flow_rows": 24,
        "decar:flow_steps": 24,
        "decar:flow_tokens": 24,
    }
    await world.told(*(world.answer(rule=rule, order="left-to-right") for rule in ("velocity", "logit")))
    assert counted(world)["decar:flow_rounds"] == 6 + 12


async def test_who_comes_in_a_round_joins_the_next_and_who_leaves_is_told_nothing_more(world: World) -> None:
    first, leaves, late = world.answer(seed=1), world.answer(seed=2), world.answer((3, 4), seed=3)
    [alone] = await world.told(world.answer(seed=1))
    for engine in world.engines:
        engine.busy.clear()
        engine.texts.clear()
    world.rounds.join(first)
    world.rounds.join(leaves)
    await until(lambda: len(world.engines[0].texts) == 2)
    world.rounds.join(late)
    world.rounds.leave(leaves)
    for engine in world.engines:
        engine.busy.set()
    [told, other] = await ended(first, late)
    assert [text[:2] for text in world.engines[0].texts[:4]] == [[1, 2], [1, 2], [1, 2], [3, 4]]
    assert told.tokens == alone.tokens
    assert other.finish == "length"
    assert isinstance(leaves.speaker, Told)
    assert (leaves.speaker.tokens, leaves.speaker.finish) == ([], None)
    assert world.rounds.under_way == 0


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


async def test_a_lost_expert_leaves_the_answer_to_the_others(world: World) -> None:
    world.engines[0].fails, world.engines[0].client.errored = RuntimeError("dead"), True
    answer = world.answer(seed=4)
    alone = world.answer(seed=4, weights=(0, 1))
    [told, other] = await world.told(answer, alone)
    assert told.tokens == other.tokens
    assert answer.active == [1]


async def test_an_expert_that_is_back_before_its_round_ends_was_lost_all_the_same(world: World) -> None:
    dead, slow = world.engines
    dead.fails, dead.client.errored = RuntimeError("dead"), True
    slow.busy.clear()
    answer = world.answer(seed=4)
    world.rounds.join(answer)
    await until(lambda: slow.texts and dead.texts)
    back = copy.copy(dead)
    back.fails, back.client = None, SimpleNamespace(errored=False)
    world.experts[0].engine = back  # type: ignore[assignment]
    slow.busy.set()
    [told] = await ended(answer)
    assert told.finish == "length"
    assert answer.active == [1]


async def test_what_else_goes_wrong_ends_the_answer_alone(world: World) -> None:
    world.engines[0].fails = ValueError("no")
    [told, other] = await world.told(world.answer(), world.answer(weights=(0, 1)))
    assert isinstance(told.error, ValueError)
    assert other.finish == "length"


async def test_an_answer_ends_where_all_before_its_end_is_revealed(world: World) -> None:
    """Not before, though the end may be revealed first; a token that ends answers is none in a prompt."""
    whole = [(await world.told(world.answer(seed=seed)))[0].tokens for seed in range(40)]
    seed = next(seed for seed, tokens in enumerate(whole) if EOS in tokens[1:-1])
    [told] = await world.told(world.answer(seed=seed, told=Told([EOS])))
    assert told.tokens == whole[seed][: whole[seed].index(EOS) + 1]
    assert told.finish == "stop"
    given = world.answer((1, MASK, EOS, MASK, 3, 1, 2, 2), seed=3, told=Told([EOS]))
    [filled] = await world.told(given)
    assert len(filled.tokens) == T - 1
    assert filled.tokens[1] == EOS
    assert filled.finish == "stop"
    assert given.revealed_at.tolist()[4:] == [0] * 4


async def test_alternatives_come_with_the_token_and_its_rank(world: World) -> None:
    said: list[Any] = []

    class Listening(Told):
        def say(self, tokens: Sequence[int], logprobs: Any, finish: str | None) -> bool:
            said.append(logprobs)
            return super().say(tokens, logprobs, finish)

    [told] = await world.told(world.answer(seed=6, alternatives=3, told=Listening()))
    ids, log_probs, ranks = (np.concatenate(parts) for parts in zip(*said, strict=True))
    assert ids[:, 0].tolist() == told.tokens
    assert (np.diff(log_probs[:, 1:], axis=1) <= 0).all()
    for row, values, rank in zip(ids, log_probs, ranks, strict=True):
        if rank <= 3:
            assert row[rank] == row[0]
            assert values[rank] == pytest.approx(values[0], abs=1e-5)
