"""Processes that die, are killed, or are told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.helpers import COMPLETION_EXTRAS, EXACT, Server, answer_of, wait_until
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

LONG = {"max_tokens": 480, "temperature": 0, "prompt": [5, 6, 7]}
GONE_WITHIN_S = 15


@pytest.fixture
def server(duo: Reference, tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, to be broken."""
    started = Server.start(duo.directory, tmp_path / "server.log", EXACT)
    try:
        yield started
    finally:
        started.kill()


def connected(server: Server) -> openai.OpenAI:
    """A client that can send at once: making one takes longer than some answers."""
    client = server.openai()
    client.models.list()
    return client


def read_stream(
    client: openai.OpenAI, model: str, underway: threading.Barrier, decar: dict[str, Any] | None
) -> int:
    """Tokens of a long stream, read to its end; meets ``underway`` after the first ones."""
    extra = {**COMPLETION_EXTRAS, "decar": decar}
    stream = client.completions.create(model=model, stream=True, extra_body=extra, **LONG)
    tokens = 0
    for index, chunk in enumerate(stream):
        tokens += len(answer_of(chunk.choices[0]).tokens)
        if index == 2:
            underway.wait(timeout=60)
    return tokens


def read_whole(client: openai.OpenAI, model: str) -> Any:
    return client.completions.create(model=model, extra_body={"ignore_eos": True}, **LONG)


def test_the_gateway_is_killed(server: Server, duo: Reference) -> None:
    assert len(server.processes()) > len(duo.experts)
    assert server.shared_memory
    underway = threading.Barrier(2)
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(read_stream, connected(server), duo.name, underway, None)
        underway.wait(timeout=60)
        server.process.kill()
        with pytest.raises(openai.APIError):
            stream.result(timeout=60)
    wait_until(lambda: not server.leftovers(), GONE_WITHIN_S, "engines and their shared memory are gone")


def test_the_next_start_cleans_up_and_sigint_ends_it(duo: Reference, tmp_path: Path) -> None:
    """Where the engines were killed together with their gateway, nobody was left to remove the shared memory."""
    first = Server.start(duo.directory, tmp_path / "first.log", EXACT)
    try:
        remains = set(first.shared_memory)
        assert remains
        for process in first.processes():
            process.suspend()  # so that no survivor cleans up for the others
        for process in first.processes():
            process.kill()
        first.process.wait(GONE_WITHIN_S)
        assert all(path.exists() for path in remains)
        second = Server.start(duo.directory, tmp_path / "second.log", EXACT)
        try:
            assert not any(path.exists() for path in remains)
            assert second.stop(signal.SIGINT) == 0
        finally:
            second.kill()
    finally:
        first.kill()


def test_sigterm_while_starting(duo: Reference, tmp_path: Path) -> None:
    server = Server.launch(duo.directory, tmp_path / "server.log", EXACT)
    try:
        wait_until(
            lambda: any("EngineCore" in process.name() for process in server.processes()),
            120,
            "engines are starting",
        )
        assert server.health() is None
        assert server.stop() not in (0, None)
    finally:
        server.kill()
