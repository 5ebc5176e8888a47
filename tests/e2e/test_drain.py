"""A server that is told to stop while it answers: what runs is finished, or told so, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.test_loss import pid_of
from tests.helpers import EXACT, Server, assert_error, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

STREAMS, WHOLE = 16, 4
ENDS_WITHIN_S = 10  # beyond its --shutdown-timeout
CACHE = "torchinductor"  # which every start finds again
LONG = {"max_tokens": 480, "temperature": 0, "prompt": [5, 6, 7], "ignore_eos": True}


@dataclass
class Ended:
    """How a request has ended: its status, and of a stream what its events were."""

    status: int
    events: list[dict[str, Any]]
    done: bool = True

    @property
    def reason(self) -> str | None:
        """Why a stream ended, if it did so by itself."""
        return self.events[-1]["choices"][0]["finish_reason"] if "choices" in self.events[-1] else None


@contextlib.contextmanager
def started(duo: Reference, tmp_path: Path, *flags: str) -> Iterator[Server]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    server = Server.start(duo.directory, tmp_path / "server.log", (*EXACT, *flags), {"TMPDIR": str(scratch)})
    try:
        yield server
    finally:
        server.kill()


def models(duo: Reference) -> list[str]:
    return [duo.name, f"{duo.name}/code", duo.name, f"{duo.name}/prose"]


async def stream(client: httpx.AsyncClient, model: str, underway: asyncio.Semaphore) -> Ended:
    events: list[dict[str, Any]] = []
    async with client.stream("POST", "/v1/completions", json={**LONG, "model": model, "stream": True}) as got:
        async for line in got.aiter_lines():
            if line == "data: [DONE]":
                return Ended(got.status_code, events)
            if line:
                events.append(json.loads(line.removeprefix("data: ")))
            if len(events) == 1:
                underway.release()
    return Ended(got.status_code, events, done=False)


async def whole(client: httpx.AsyncClient, model: str) -> Ended:
    got = await client.post("/v1/completions", json={**LONG, "model": model})
    return Ended(got.status_code, [got.json()])


@contextlib.asynccontextmanager
async def client_of(server: Server) -> Any:
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=httpx.Limits()) as client:
        yield client


@contextlib.asynccontextmanager
async def in_their_midst(
    server: Server, client: httpx.AsyncClient, duo: Reference
) -> AsyncIterator[list[asyncio.Task[Ended]]]:
    """Streams, first, and whole answers that all are under way, and get on once the context is left: while clients are
    slow, answers may else be whole when the last has begun."""
    underway = asyncio.Semaphore(0)
    names = models(duo)
    with server.standing_still() as move:
        tasks = [asyncio.create_task(whole(client, names[i % len(names)])) for i in range(WHOLE)]
        tasks = [
            *(asyncio.create_task(stream(client, names[i % len(names)], underway)) for i in range(STREAMS)),
            *tasks,
        ]
        for _ in range(STREAMS):
            while underway.locked():
                await asyncio.to_thread(move, 0.02)
            await underway.acquire()
        yield tasks


async def test_what_runs_is_finished_and_nothing_new_begins(duo: Reference, tmp_path: Path) -> None:
    """SIGTERM to all processes at once, as a service manager sends it."""
    with started(duo, tmp_path) as server:
        async with client_of(server) as client:
            async with in_their_midst(server, client, duo) as tasks:
                os.killpg(server.process.pid, signal.SIGTERM)
                wait_until(lambda: server.health() == 503, 5, "/health says that the server stops")
                refused = await client.post("/v1/completions", json={**LONG, "model": duo.name})
                assert_error(refused, 503, "shutting down")
                assert int(refused.headers["retry-after"]) > 0
                assert refused.headers["connection"] == "close"
                assert not all(task.done() for task in tasks), "what was asked meanwhile was asked too late"
            ended = await asyncio.gather(*tasks)
        assert [one.status for one in ended] == [200] * (STREAMS + WHOLE)
        assert {one.reason for one in ended} == {"length"}
        assert all(one.done for one in ended)
        assert server.ended("after its last answer") == 0, server.log_tail()
        assert "Traceback" not in server.log.read_text()


async def test_what_runs_for_too_long_is_told(duo: Reference, tmp_path: Path) -> None:
    """Its engines stand still, so that it does; an answer that was whole by then is one."""
    with started(duo, tmp_path, "--shutdown-timeout", "1") as server:
        async with client_of(server) as client, in_their_midst(server, client, duo) as tasks:
            server.process.send_signal(signal.SIGTERM)
            told = time.monotonic()
            ended = await asyncio.gather(*tasks)
        cut = [one for one in ended if one.reason is None]
        assert len(cut) >= STREAMS // 2
        for one in ended[:STREAMS]:
            assert one.status == 200
            assert one.done
            assert one not in cut or one.events[-1]["error"]["code"] == 503
        for one in ended[STREAMS:]:
            if one in cut:
                assert one.status == 503
                assert "shutting down" in one.events[0]["error"]["message"]
        assert server.ended("after --shutdown-timeout") == 0, server.log_tail()
        assert time.monotonic() - told < 1 + ENDS_WITHIN_S
        assert "Traceback" not in server.log.read_text()


async def test_a_second_signal_ends_at_once(duo: Reference, tmp_path: Path) -> None:
    with started(duo, tmp_path) as server:
        async with client_of(server) as client, in_their_midst(server, client, duo) as tasks:
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.health() == 503, 5, "the first one is heard")
            server.process.send_signal(signal.SIGINT)
            told = time.monotonic()
            assert server.ended("after the second signal") == 1
            assert time.monotonic() - told < ENDS_WITHIN_S
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, httpx.HTTPError) for result in results)


def test_an_engine_that_is_being_started_holds_nothing_up(duo: Reference, tmp_path: Path) -> None:
    with started(duo, tmp_path) as server:
        before = {process.pid for process in server.processes()}
        os.kill(pid_of(server, "code"), signal.SIGKILL)
        wait_until(
            lambda: {process.pid for process in server.processes()} - before, 30, "an engine is started", 0.01
        )
        told = time.monotonic()
        assert server.stop() == 0, server.log_tail()
        assert time.monotonic() - told < ENDS_WITHIN_S


async def test_the_gateway_is_killed_while_it_scores(duo: Reference, tmp_path: Path) -> None:
    """Rows of prompts lie in files of their own, and engines are spoken to through sockets."""
    scratch = tmp_path / "scratch"
    with started(duo, tmp_path) as server:
        before = server.shared_memory
        stopped = asyncio.Event()

        async def score(client: httpx.AsyncClient, i: int) -> None:
            while not stopped.is_set():
                prompt = [(7 * i + j) % 100 for j in range(500)]
                body = {"model": duo.name, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 1}
                with contextlib.suppress(httpx.HTTPError):
                    await client.post("/v1/completions", json=body)

        async with client_of(server) as client:
            tasks = [asyncio.create_task(score(client, i)) for i in range(4)]
            await asyncio.to_thread(
                wait_until, lambda: server.shared_memory > before, 60, "rows are there", 0.001
            )
            server.process.kill()
            stopped.set()
            await asyncio.gather(*tasks)
        wait_until(lambda: not server.leftovers(), 15, lambda: f"none is left of {server.leftovers()}")
        assert [path.name for path in scratch.iterdir() if not path.name.startswith(CACHE)] == []
