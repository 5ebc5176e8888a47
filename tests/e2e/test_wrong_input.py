"""Wrong input of every kind: answered with 4xx, at once, on a connection that stays."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import pytest

from tests.helpers import ADMIN_KEY, Server, assert_error, in_batches, wait_until
from tests.mutations import BY_TYPE, FIELDS, MESSAGES, Mutated, bases, mutated
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

ANSWERED_WITHIN_S = 60
SEED = 17
AT_ONCE = 8
OFFERED_TO_ALL = ("/v1/models", "/v1/ensemble", "/version", "/load", "/metrics", "/openapi.json", "/health")


class Kept:
    """One connection, for all requests: that it ends without announcement is an error."""

    def __init__(self, server: Server):
        self._connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=ANSWERED_WITHIN_S)
        self._connection.connect()
        self._connection.auto_open = 0

    def close(self) -> None:
        self._connection.close()

    def ask(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """Status and text of an answer."""
        given = {"content-type": "application/json", **(headers or {})}
        self._connection.request("POST", path, body, given)
        response = self._connection.getresponse()
        text = response.read().decode()
        if response.getheader("connection") == "close":
            self._connection.connect()
        return response.status, text


def problem_of(status: int, text: str) -> str | None:
    """What is wrong with an answer to a wrong request."""
    if not 200 <= status < 500:
        return f"{status}: {text[:500]}"
    codes = [int(code) for code in re.findall(r'^data: \{"error".*?"code": ?(\d+)', text, re.MULTILINE)]
    if any(code >= 500 for code in codes):  # within a stream
        return f"in a stream: {text[-500:]}"
    if status >= 400 and not set(json.loads(text)["error"]) >= {
        "message",
        "type",
    }:  # Anthropic's have no more
        return f"{status}, not in the usual form: {text[:500]}"
    return next(
        (f"it shows {leak}: {text[:500]}" for leak in ("Traceback", "/site-packages/") if leak in text), None
    )


def problems(server: Server, requests: Iterable[Mutated]) -> tuple[list[str], int]:
    """Ask everything, over a few connections that are kept: a line for each bad answer, and how many were of 200."""
    good = 0

    def ask_all(part: list[Mutated]) -> list[str]:
        nonlocal good
        found = []
        with closing(Kept(server)) as connection:
            for request in part:
                try:
                    status, text = connection.ask(request.path, request.body)
                    problem = problem_of(status, text)
                    good += status == 200
                except (OSError, http.client.HTTPException) as error:
                    problem = f"no answer: {error!r}"
                    connection.close()
                    connection = Kept(server)
                if problem is not None:
                    found.append(f"{request.number} {request.path} {request.body[:300]!r}: {problem}")
        return found

    requests = list(requests)
    parts = [requests[start::AT_ONCE] for start in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [problem for found in pool.map(ask_all, parts) for problem in found], good


def assert_all_answered(server: Server, requests: Iterable[Mutated]) -> None:
    requests = list(requests)
    found, good = problems(server, requests)
    assert not found, f"{len(found)} bad answers:\n" + "\n".join(found[:20])
    assert 0.1 < good / len(requests) < 0.9, "else all are refused for one reason, or hardly any is wrong"
    wait_until(server.is_idle, 30, "nothing is left of them")
    assert server.health() == 200


# ---------------------------------------------------------------------------------------------- bodies


def test_the_good_bodies_are_good(duo_server: Server) -> None:
    """Else what is mutated below would be refused for what was wrong before."""
    with closing(Kept(duo_server)) as connection:
        for path, body in bases("duo"):
            status, text = connection.ask(path, json.dumps(body).encode())
            assert status == 200, (path, body, text)


def every_type_everywhere() -> Iterator[Mutated]:
    """Every field of every route, with a value of every type that JSON has."""
    first = dict(reversed(bases("duo")))
    for path, fields in FIELDS.items():
        for field in fields.split():
            for values in BY_TYPE.values():
                for value in values[:2]:
                    body = json.dumps({**first[path], field: value}).encode()
                    yield Mutated(0, path, body)


def test_every_field_of_every_type(duo_server: Server) -> None:
    requests = list(every_type_everywhere())
    assert len(requests) > 2_000
    assert_all_answered(duo_server, requests)


def test_mutated_bodies(duo_server: Server) -> None:
    assert_all_answered(duo_server, mutated("duo", 3_000, SEED))


def with_grammars(requests: Iterable[Mutated]) -> Iterator[Mutated]:
    words = (b"structured_outputs", b"json_schema", b"tools")
    return (request for request in requests if any(word in request.body for word in words))


def test_mutated_grammars(trio_server: Server) -> None:
    """Where vLLM chooses what compiles them."""
    assert_all_answered(trio_server, with_grammars(mutated("trio", 3_000, SEED + 1)))


@pytest.mark.soak
def test_many_mutated_bodies(duo_server: Server) -> None:
    assert_all_answered(duo_server, mutated("duo", 30_000, SEED + 2))


@pytest.mark.soak
def test_many_mutated_grammars(trio_server: Server) -> None:
    assert_all_answered(trio_server, with_grammars(mutated("trio", 30_000, SEED + 3)))


USERS_OWN_FAULT: dict[str, tuple[str, Any]] = {
    "structured_outputs is text": ("/v1/completions", {"structured_outputs": "x"}),
    "structured_outputs is a list": ("/v1/chat/completions", {"structured_outputs": [1]}),
    "structured_outputs.json is a number": ("/v1/completions", {"structured_outputs": {"json": 3}}),
    "structured_outputs is empty": ("/v1/completions", {"structured_outputs": {}}),
    "schema refers to itself": ("/v1/completions", {"structured_outputs": {"json": {"$ref": "#"}}}),
    "schema in a chat refers to itself": (
        "/v1/chat/completions",
        {
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}},
        },
    ),
    "grammar is a schema": ("/v1/completions", {"structured_outputs": {"grammar": '{"$ref": "#"}'}}),
    "schema refers elsewhere": ("/v1/completions", {"structured_outputs": {"json": {"$ref": "#/x"}}}),
    "tool's schema refers to itself": (
        "/v1/chat/completions",
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
            "tool_choice": "required",
        },
    ),
}


@pytest.mark.parametrize("model", ["duo", "duo/code"])
@pytest.mark.parametrize(("path", "fields"), USERS_OWN_FAULT.values(), ids=USERS_OWN_FAULT)
def test_what_is_the_users_own_fault(
    duo_server: Server, path: str, fields: dict[str, Any], model: str
) -> None:
    body = {"model": model, "max_tokens": 2, "prompt": "x", "messages": MESSAGES, **fields}
    for stream in (False, True):
        response = duo_server.http.post(path, json={**body, "stream": stream})
        if not stream or response.status_code != 200:
            assert_error(response, 400)
    wait_until(duo_server.is_idle, 10, "nothing is left of it")


@pytest.mark.parametrize("model", ["", None, "duo"])
def test_no_model_is_the_ensemble(duo_server: Server, model: str | None) -> None:
    body = {"model": model, "prompt": "x", "max_tokens": 1, "messages": MESSAGES}
    for path in ("/v1/completions", "/v1/chat/completions", "/invocations"):
        response = duo_server.http.post(path, json=body)
        assert response.json()["decar"]["experts"] == ["code", "prose"]


@pytest.mark.parametrize(
    "body", [b"[" * 1_000 + b"]" * 1_000, b"[]", b"null", b"3", b'"x"', b"{", b"", b"\xff"]
)
def test_what_invocations_are_not(duo_server: Server, body: bytes) -> None:
    with closing(Kept(duo_server)) as connection:
        for headers in (
            {},
            {"x-amzn-sagemaker-session-id": "x"},
            {"x-amzn-sagemaker-adapter-identifier": "x"},
        ):
            status, text = connection.ask("/invocations", body, headers)
            assert 400 <= status < 500, text


@pytest.mark.parametrize("name", ["session-id", "adapter-identifier", "closed-session-id"])
def test_headers_of_sagemaker(duo_server: Server, name: str) -> None:
    with closing(Kept(duo_server)) as connection:
        body = json.dumps({"model": "duo", "prompt": "x", "max_tokens": 1}).encode()
        status, text = connection.ask("/invocations", body, {f"x-amzn-sagemaker-{name}": "x"})
        assert status < 500, text


def test_other_content_types(duo_server: Server) -> None:
    with closing(Kept(duo_server)) as connection:
        for kind in ("text/plain", "multipart/form-data", "application/x-www-form-urlencoded", "", "\xff"):
            for path in (*FIELDS, "/v1/messages/count_tokens"):
                status, text = connection.ask(path, b'{"model": "duo"}', {"content-type": kind})
                assert 400 <= status < 500, text


# ---------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/scale_elastic_ep",
            "/is_scaling_elastic_ep",
            "/inference/v1/generate",
        ),
        *(
            "/abort_requests",
            "/v1/load_lora_adapter",
            "/v1/embeddings",
            "/generative_scoring",
            "/collective_rpc",
        ),
        *("/v1/chat/completions/batch", "/v1/chat/completions/render", "/no/such/route"),
    ],
)
def test_routes_that_an_ensemble_does_not_offer(duo_server: Server, path: str) -> None:
    for body in ({}, {"new_data_parallel_size": 3}, {"request_ids": ["x"]}):
        assert_error(duo_server.http.post(path, json=body), 404, "an ensemble does not offer")


def test_what_is_offered_is_described(duo_server: Server) -> None:
    paths = duo_server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/ensemble", "/v1/responses/{response_id}"} <= set(paths)
    assert not any(word in path for path in paths for word in ("elastic", "lora", "inference", "batch"))


def test_only_the_admin_sees_paths_and_processes(duo_server: Server, duo: Reference) -> None:
    directory = str(duo.directory)
    for path in ("/v1/models", "/v1/models/duo", "/v1/ensemble"):
        assert directory in duo_server.http.get(path).text
    assert re.search(r'"pid": *\d', duo_server.http.get("/v1/ensemble").text)
    for path in (*OFFERED_TO_ALL, "/v1/models/duo"):
        hidden = duo_server.http.get(path, headers={"authorization": "Bearer none"})
        assert hidden.status_code == 200
        for secret in (directory, ADMIN_KEY, "/site-packages/"):
            assert secret not in hidden.text
        assert not re.search(r'"pid": *\d', hidden.text)  # /openapi.json says that there is one


# ---------------------------------------------------------------------------------------------- connections


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=ANSWERED_WITHIN_S) as sock:
        yield sock


def test_pipelined_requests_are_answered_in_order(duo_server: Server) -> None:
    """Wrong and good ones by turns: no answer is lost, none is another's."""
    sent = []
    for number in range(24):
        wrong: Any = [["x"], {"x": 1}, "stranger", 3][number % 4]
        model = wrong if number % 2 else "duo"
        body = json.dumps({"model": model, "prompt": [5, 6], "max_tokens": 1, "user": str(number)}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        sent.append(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    for at_once in (1, 6, 24):
        with connected(duo_server) as sock, sock.makefile("rb") as answers:
            statuses = []
            for batch in in_batches(sent, at_once):
                sock.sendall(b"".join(batch))
                for _ in batch:
                    statuses.append(int(answers.readline().split()[1]))
                    headers = http.client.parse_headers(answers)
                    answers.read(int(headers["content-length"]))
        assert [status == 200 for status in statuses] == [number % 2 == 0 for number in range(24)]
        assert all(status < 500 for status in statuses)


def test_a_header_without_end(duo_server: Server) -> None:
    """It is refused before it costs anything, and others are answered meanwhile."""
    with connected(duo_server) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nx: ")
        sent = 0
        try:
            while sent < 2**26:
                sent += sock.send(b"x" * 2**16)
                if sent % 2**20 == 0:
                    assert duo_server.health() == 200
        except OSError:
            pass
        assert sent < 2**25, "it was read on and on"
    assert duo_server.health() == 200


def test_health_is_not_slowed_by_half_sent_requests(duo_server: Server) -> None:
    parts = (b"G", b"GET / HTTP/1.1\r\nx: y", b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{")
    socks = [socket.create_connection(("127.0.0.1", duo_server.port)) for _ in range(300)]
    try:
        for number, sock in enumerate(socks):
            sock.sendall(parts[number % 3])
        start = time.monotonic()
        for _ in range(20):
            assert duo_server.health() == 200
        assert time.monotonic() - start < 10
        response = duo_server.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert response.status_code == 200
    finally:
        for sock in socks:
            sock.close()
    wait_until(duo_server.is_idle, 10, "nothing is left of them")


def test_a_connection_outlives_those_that_clients_keep(duo_server: Server) -> None:
    """httpx, and so OpenAI's client, asks again on one that has been idle for just below 5 s."""
    connection = http.client.HTTPConnection("127.0.0.1", duo_server.port, timeout=ANSWERED_WITHIN_S)
    with closing(connection):
        connection.connect()
        kept = connection.sock
        for idle_s in (0, 6):
            time.sleep(idle_s)  # that long is what is tested
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.read() == b""
            assert response.status == 200
            assert connection.sock is kept
