"""Every request has an id: the client's or a new one, in what the app sees, in the answer, and in what is logged."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace

import pytest

from decar.server.gateway.request_id import add_request_ids, logged_for

from .test_middleware import app_of, client_of

NEW = re.compile(r"[0-9a-f]{32}")


@pytest.mark.parametrize("given", ["a", "trace-1:span/2@host_3+x=~.", "x" * 128])
async def test_the_clients_id_comes_back(given: str) -> None:
    async with client_of(app_of()) as client:
        response = await client.get("/health", headers={"x-request-id": given})
    assert response.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "é", "a\tb", 'quote"', "[forged]"])
async def test_what_would_not_do_in_a_log_is_replaced(given: str) -> None:
    async with client_of(app_of()) as client:
        response = await client.get("/health", headers={"x-request-id": given.encode()})
    assert NEW.fullmatch(response.headers["x-request-id"])


async def test_every_answer_has_one_of_its_own() -> None:
    """Refused keys and unknown routes too; two that a client sends are none."""
    async with client_of(app_of("key")) as client:
        answers = [
            await client.get("/health"),
            await client.get("/v1/models"),
            await client.get("/health", headers=[("x-request-id", "a"), ("x-request-id", "b")]),
            await client.get("/no-such-route", headers={"authorization": "Bearer key"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 401, 200, 404]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(NEW.fullmatch(found) for found in ids)
    assert len(set(ids)) == len(ids)


async def test_the_log_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(app_of()) as client:
        body = {"raise": "100 % of it"}
        response = await client.post("/v1/completions", json=body, headers={"x-request-id": "mine"})
    assert response.status_code == 500
    assert "POST /v1/completions has failed [request mine]" in caplog.messages


def test_what_is_logged_of_a_connection_is_of_the_request_that_it_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger("decar")
    add_request_ids(logger)
    add_request_ids(logger)  # once is enough
    with logged_for(SimpleNamespace(scope={"headers": [(b"x-request-id", b"slow")]})):
        logger.warning("%s does not read", "somebody")
    with logged_for(None):
        logger.warning("%s does not read", "nobody")
    logger.warning("of %s", "no request")
    assert caplog.messages == [
        "somebody does not read [request slow]",
        "nobody does not read",
        "of no request",
    ]
