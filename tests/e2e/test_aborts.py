"""vLLM's route that ends requests by their ids (--enable-scale-out), asked of an ensemble."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from decar.server.vllm_adapter.versions import installed_version, numbers_of
from tests.helpers import Server, wait_until
from tests.mutations import MESSAGES

pytestmark = [
    pytest.mark.engines,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        numbers_of(installed_version() or "") < (0, 32), reason="this vLLM has no route that aborts"
    ),
]

LONG = {"model": "trio", "max_tokens": 480, "ignore_eos": True}
MIXED: dict[str, Any] = {**LONG, "prompt": "x", "decar": {"route": "prior"}}
KINDS: dict[str, dict[str, Any]] = {
    "mixed": MIXED,
    "posterior": {**LONG, "prompt": "x", "decar": {"route": "posterior", "prune": 0.01}},
    "drawn": {**LONG, "prompt": "x", "decar": {"sampling": "draw"}},
    "alone": {**LONG, "prompt": "x", "model": "trio/code", "n": 2},
    "several choices": {**MIXED, "n": 3},
    "several prompts": {**MIXED, "prompt": ["x", "y"], "n": 2},
    "more than there are slots": {**MIXED, "prompt": ["x", "y"], "n": 90},
    "chat": {**LONG, "messages": MESSAGES},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_ends_by_its_id(trio_server: Server, kind: str) -> None:
    body, others = KINDS[kind], {**MIXED, "max_tokens": 40}
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    prefix = "chatcmpl-" if "messages" in body else "cmpl-"
    with ThreadPoolExecutor(2) as pool:
        headers = {"X-Request-Id": "mine"}

        def abort() -> bool:
            ids = {"request_ids": [f"{prefix}mine", "nobody's", 3, None]}
            assert trio_server.http.post("/inference/v1/abort_requests", json=ids).status_code == 200
            return mine.done()

        with trio_server.standing_still() as move:
            mine = pool.submit(trio_server.http.post, path, json=body, headers=headers)
            other = pool.submit(trio_server.http.post, "/v1/completions", json=others)
            wait_until(lambda: not trio_server.is_idle(), 30, "it runs")
            move(0.02)
            wait_until(abort, 30, "it ends")
        choices = mine.result().json()["choices"]
        assert len(choices) == body.get("n", 1) * (2 if isinstance(body.get("prompt"), list) else 1)
        assert {choice["finish_reason"] for choice in choices} == {"abort"}
        assert other.result().json()["choices"][0]["finish_reason"] == "length"
    wait_until(trio_server.is_idle, 10, "nothing is left of it")


@pytest.mark.parametrize("ids", [3, {"x": 1}, "nobody's", [[]], []], ids=str)
def test_what_is_no_id_ends_nothing(trio_server: Server, ids: Any) -> None:
    response = trio_server.http.post("/inference/v1/abort_requests", json={"request_ids": ids})
    assert response.status_code == 200
