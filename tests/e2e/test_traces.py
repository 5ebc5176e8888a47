"""A stream's chunks bring the weights of their own tokens, whatever else they bring and whoever reads them how fast."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest

from tests.helpers import ADMIN_KEY, Server, wait_until
from tests.reference import Reference, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]

TOLERANCE = 1e-4
MESSAGES: list[Any] = [{"role": "user", "content": "Sort a list."}]


def events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        return list(events(response.iter_lines()))


def assert_like(
    server: Server,
    path: str,
    body: dict[str, Any],
    chunks: list[dict[str, Any]],
    counts: dict[int, list[int]],
) -> None:
    """Each chunk's weights are those that the same answer, asked for as a whole, has for its tokens.

    Args:
        counts: how many tokens each chunk of a choice brings.
    """
    whole = server.http.post(path, json=body).json()
    for choice in whole["choices"]:
        index, expected = choice["index"], choice["decar"]
        mine = [part for chunk in chunks for part in chunk["choices"] if part["index"] == index]
        start = 0
        for part, count in zip(mine, counts[index], strict=True):
            trace = part.get("decar", {"weights": [], "leaders": []})
            assert len(trace["weights"]) == len(trace["leaders"]) == count
            for ours, theirs in zip(
                trace["weights"], expected["weights"][start : start + count], strict=True
            ):
                assert ours == pytest.approx(theirs, abs=TOLERANCE)
            start += count
        assert start == len(expected["weights"])
    assert not any(chunk.get("usage") for chunk in chunks), "nobody asked for it"


def of_token_ids(chunks: list[dict[str, Any]]) -> dict[int, list[int]]:
    counts: dict[int, list[int]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            counts.setdefault(part["index"], []).append(len(part.get("token_ids") or []))
    return counts


def of_logprobs(chunks: list[dict[str, Any]]) -> dict[int, list[int]]:
    counts: dict[int, list[int]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            logprobs = part.get("logprobs") or {}
            said = logprobs.get("tokens", logprobs.get("content")) or []
            counts.setdefault(part["index"], []).append(len(said))
    return counts


def test_a_slow_reader_of_several_choices(duo_server: Server, duo: Reference) -> None:
    """The engines are done long before the chunks are read."""
    body = {
        "model": duo.name,
        "prompt": duo.encode(prompt_texts(1)[0]),
        "max_tokens": 200,
        "n": 8,
        "seed": 7,
        "temperature": 1.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "decar": {"trace": True},
    }
    small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)]
    with (
        httpx.Client(
            transport=httpx.HTTPTransport(socket_options=small),
            base_url=duo_server.url,
            timeout=180,
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
        ) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response,
    ):
        lines = response.iter_lines()
        chunks = [next(events(lines))]
        wait_until(duo_server.is_idle, 60, "all has been said, and nothing been read")
        chunks += events(lines)
    assert len(chunks) > 800
    assert_like(duo_server, "/v1/completions", body, chunks, of_token_ids(chunks))


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ["no such text is ever said"]},  # text is held back
        {"return_token_ids": True, "stop": [" the", "e"]},
        {"stream_options": {"include_usage": False}},
        {"prompt": ["def", "class A:"], "n": 2},
    ],
    ids=str,
)
def test_completions(duo_server: Server, duo: Reference, more: dict[str, Any]) -> None:
    body = {
        "model": duo.name,
        "prompt": "import os",
        "max_tokens": 24,
        "seed": 7,
        "temperature": 1.0,
        "logprobs": 0,
        "ignore_eos": True,
        "decar": {"trace": True},
        **more,
    }
    chunks = streamed(duo_server, "/v1/completions", body)
    body.pop("stream_options", None)
    assert_like(duo_server, "/v1/completions", body, chunks, of_logprobs(chunks))


@pytest.mark.parametrize("n", [1, 3])
def test_an_echoed_prompt_has_none(duo_server: Server, duo: Reference, n: int) -> None:
    prompt = duo.encode("import os\n\ndef f(x):")
    body = {"model": duo.name, "prompt": prompt, "max_tokens": 8, "seed": 7, "temperature": 1.0, "n": n}
    body |= {"echo": True, "logprobs": 0, "ignore_eos": True, "decar": {"trace": True}}
    chunks = streamed(duo_server, "/v1/completions", body)
    counts = of_logprobs(chunks)
    for mine in counts.values():
        mine[0] -= len(prompt)
    assert_like(duo_server, "/v1/completions", body, chunks, counts)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("echo", [False, True])
def test_chats(duo_server: Server, duo: Reference, n: int, echo: bool) -> None:
    body: dict[str, Any] = {"model": duo.name, "messages": MESSAGES, "max_tokens": 16, "seed": 7, "n": n}
    body |= {"temperature": 1.0, "logprobs": True, "ignore_eos": True, "decar": {"trace": True}}
    if echo:
        body["messages"] = [*MESSAGES, {"role": "assistant", "content": "Here is how"}]
        body |= {"echo": True, "continue_final_message": True, "add_generation_prompt": False}
    chunks = streamed(duo_server, "/v1/chat/completions", body)
    assert echo == any(
        part["delta"].get("content") == "Here is how" for chunk in chunks for part in chunk["choices"]
    )
    assert_like(duo_server, "/v1/chat/completions", body, chunks, of_logprobs(chunks))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_who_asks_for_usage_in_each_chunk_gets_it(duo_server: Server, duo: Reference, path: str) -> None:
    body = {"model": duo.name, "prompt": "import", "messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = streamed(
        duo_server, path, {**body, "ignore_eos": True, "stream_options": options, "decar": {"trace": True}}
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks][-2:] == [4, 4]
    fingerprints = [
        [chunk.get("system_fingerprint") for chunk in streamed(duo_server, path, {**body, "decar": decar})]
        for decar in (None, {"trace": True})
    ]
    assert fingerprints[0][-1] == fingerprints[1][-1] is not None, "a trace changes nothing else"
