"""Load beyond what can be answered soon, requests that ask for much, and clients that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MAX_NUM_SEQS
from tests.helpers import Server, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

AT_ONCE = 2000
REFUSED_WITHIN_S = 1.0  # the acceptance's bound, for 99 of 100
UNREAD, PROMPTS_EACH = 16, 10
SLOWER = 2  # the acceptance's bound
timed = pytest.mark.parametrize(
    "timed", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["untimed", "timed"]
)
"""Bounds on times hold on a machine that does nothing else: `make soak`."""
SHORT = {"max_tokens": 16, "temperature": 1.0, "extra_body": {"ignore_eos": True}}


@dataclass
class Answered:
    status: int
    headers: dict[str, str]
    took_s: float
    body: bytes = field(repr=False)


def post(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\nconnection: close\r\n"
    return f"{head}content-type: application/json\r\n\r\n".encode() + content


async def ask(port: int, request: bytes) -> Answered:
    """Over a connection of its own, without what a client library costs 2,000 times."""
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with closing(writer):
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        took_s = time.monotonic() - started
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        return Answered(int(head[0].split()[1]), headers, took_s, await reader.read())


@timed
async def test_2000_at_once_are_answered_or_refused_at_once(
    duo_server: Server, duo: Reference, timed: bool
) -> None:
    wait_until(duo_server.is_idle, 10, "nothing runs")
    before = sum(duo_server.metric("decar:rejected_total"))
    models = [duo.name, f"{duo.name}/code", duo.name, f"{duo.name}/prose"]
    bodies = [
        {"model": models[i % 4], "prompt": [5, 6, i % 99], "max_tokens": 16, "stream": i % 3 == 0}
        for i in range(AT_ONCE)
    ]
    requests = [post("/v1/completions", body) for body in bodies]
    answers = await asyncio.gather(*(ask(duo_server.port, request) for request in requests))

    assert {answer.status for answer in answers} == {200, 503}
    refused = [answer for answer in answers if answer.status == 503]
    assert len(answers) - len(refused) >= 5 * MAX_NUM_SEQS  # those that run, and four times as many wait
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    assert json.loads(refused[0].body)["error"]["code"] == 503
    if timed:
        assert statistics.quantiles([answer.took_s for answer in refused], n=100)[98] < REFUSED_WITHIN_S
    assert sum(duo_server.metric("decar:rejected_total")) - before == len(refused)
    assert sum(duo_server.metric("decar:queued")) == 0
    wait_until(duo_server.is_idle, 10, "nothing runs after the last answer")


@pytest.mark.parametrize("model", ["duo", "duo/code"])
@pytest.mark.parametrize(
    ("much", "choices"),
    [
        pytest.param({"prompt": [5, 6], "n": 3000}, 3000, id="choices"),
        pytest.param({"prompt": [[5, i % 99] for i in range(900)]}, 900, id="prompts"),
    ],
)
async def test_who_asks_for_much_holds_nobody_up(
    duo_server: Server, model: str, much: dict[str, Any], choices: int
) -> None:
    async with duo_server.async_openai() as client:
        large = asyncio.create_task(client.completions.create(model=model, **SHORT, **much))
        await asyncio.to_thread(
            wait_until, lambda: duo_server.metric("vllm:num_requests_running")[0] > 8, 60, "it runs"
        )
        for _ in range(3):
            await client.completions.create(model=model, prompt=[7, 8], **SHORT)
        assert not large.done()
        answer = await large
    assert {choice.index for choice in answer.choices} == set(range(choices))
    wait_until(duo_server.is_idle, 10, "nothing runs after the last answer")


async def idle_time_s(client: openai.AsyncOpenAI, model: str) -> float:
    """Of an answer, the median of several."""
    times = []
    for _ in range(15):
        started = time.monotonic()
        await client.completions.create(model=model, prompt=[7, 8], **{**SHORT, "max_tokens": 64})
        times.append(time.monotonic() - started)
    return statistics.median(times)


@timed
async def test_who_does_not_read_holds_nothing(trio_server: Server, trio: Reference, timed: bool) -> None:
    """Their answers are larger than what the system keeps for them."""
    body = {
        **{"model": trio.name, "prompt": [[5, i] for i in range(PROMPTS_EACH)], "stream": True},
        **{"max_tokens": 400, "logprobs": 20, "ignore_eos": True},
    }
    async with trio_server.async_openai() as client:
        alone_s = await idle_time_s(client, trio.name)
        sockets = []
        for _ in range(UNREAD):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", trio_server.port))
            sock.sendall(post("/v1/completions", body))
            sockets.append(sock)
        await asyncio.to_thread(
            wait_until, lambda: trio_server.ensemble()["slots"]["in_use"] > 64, 60, "they run"
        )
        await client.completions.create(model=trio.name, prompt=[7, 8], **SHORT)
        assert trio_server.ensemble()["slots"]["in_use"], "answered beside them"
        await asyncio.to_thread(wait_until, trio_server.is_idle, 300, "they hold no slot")
        beside_s = await idle_time_s(client, trio.name)
        for sock in sockets:
            sock.close()
    assert not timed or beside_s < SLOWER * alone_s
