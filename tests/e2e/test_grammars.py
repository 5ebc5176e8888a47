"""Grammars that need different backends: answered alike by every leader, whatever has been asked before."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers import Server, assert_error, wait_until
from tests.mutations import MESSAGES

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

MULTIPLE = {"json": {"type": "integer", "multipleOf": 7}}
"""xgrammar lacks it, so that guidance compiles it."""
TAGGED = {
    "structural_tag": json.dumps(
        {
            "type": "structural_tag",
            "format": {
                "type": "tag",
                "begin": "<a>",
                "content": {"type": "regex", "pattern": "[0-9]"},
                "end": "</a>",
            },
        }
    )
}
"""Only xgrammar knows tags of this form."""
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}
ROUTES: list[dict[str, Any]] = [
    {"route": "prior"},
    {"route": "posterior"},
    {"route": "posterior", "prune": 0.2},
    *({"weights": {"maths": 1, "code": 1, "prose": 1, name: 2}} for name in ("maths", "code", "prose")),
]
"""Every expert leads, and leaders hand over."""


def answer(server: Server, grammar: dict[str, Any], decar: dict[str, Any] | None, model: str = "trio") -> str:
    body = {"prompt": "x", "max_tokens": 24, "temperature": 0, "structured_outputs": grammar}
    body |= {"model": model} | ({"decar": decar} if decar else {})
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    text: str = choice["text"]
    return text


def test_what_was_asked_before_does_not_matter(trio_server: Server) -> None:
    """The first grammar of each expert is another backend's."""
    assert answer(trio_server, MULTIPLE, None, "trio/maths").isdigit()
    assert answer(trio_server, {"regex": "[ab]+c"}, None, "trio/code").strip("ab") in ("c", "")
    for decar in ROUTES:
        assert answer(trio_server, MULTIPLE, decar).isdigit()
        tagged = answer(trio_server, TAGGED, decar)
        assert (tagged[:3], tagged[4:]) == ("<a>", "</a>")
        assert answer(trio_server, {"choice": ["foo", "bar"]}, decar) in ("foo", "bar")
        assert answer(trio_server, {"grammar": 'root ::= "yes" | "no"'}, decar) in ("yes", "no")


@pytest.mark.parametrize("decar", ROUTES, ids=str)
def test_a_tool_is_required(trio_server: Server, decar: dict[str, Any]) -> None:
    answer(trio_server, MULTIPLE, None, "trio/prose")
    body = {"model": "trio", "messages": MESSAGES, "max_tokens": 8, "decar": decar}
    body |= {"tools": [TOOL], "tool_choice": "required"}
    response = trio_server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("model", ["trio", "trio/maths", "trio/prose"])
@pytest.mark.parametrize(
    "grammar",
    [{"json": {"$ref": "#"}}, {"grammar": '{"$ref": "#"}'}, {"regex": "(a"}, {"grammar": "root ::= x"}],
    ids=str,
)
def test_what_nothing_compiles_is_refused(trio_server: Server, grammar: dict[str, Any], model: str) -> None:
    for decar in ROUTES if model == "trio" else (None,):
        body = {"model": model, "prompt": "x", "structured_outputs": grammar, "n": 2}
        response = trio_server.http.post("/v1/completions", json=body | ({"decar": decar} if decar else {}))
        assert_error(response, 400)
    wait_until(trio_server.is_idle, 10, "nothing is left of them")
