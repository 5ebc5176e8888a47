"""Answers of vLLM's own layers: which model they name, and how streams of Anthropic's API fail."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.models.serving import OpenAIServingModels

from decar.router import Ensemble
from decar.server.gateway.errors import anthropic_error_event
from decar.server.gateway.request import current_call, model_asked_for, parse_call
from decar.server.vllm_adapter.answers import name_model_asked_for, tell_errors

from .test_routing import ensemble

__all__ = ["ensemble"]  # the fixture

CHUNK: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "demo"}


def serving_models(*names: str) -> Any:
    models = OpenAIServingModels.__new__(OpenAIServingModels)
    models.base_model_paths = [SimpleNamespace(name=name) for name in names]
    return models


def test_an_answer_names_the_model_that_was_asked_for(ensemble: Ensemble) -> None:
    models = serving_models("demo", "demo/code")
    name_model_asked_for(
        SimpleNamespace(state=SimpleNamespace(openai_serving_models=models)), model_asked_for
    )
    assert models.model_name() == "demo"
    for asked, named in (("demo/code", "demo/code"), ("demo", "demo"), (None, "demo"), ("", "demo")):
        before = current_call.set(parse_call(ensemble, asked, None))
        assert models.model_name(None) == named
        current_call.reset(before)


def chat_chunk(**delta: Any) -> str:
    choices = [{"index": 0, "delta": delta, "finish_reason": None}]
    return f"data: {json.dumps({**CHUNK, 'choices': choices})}\n\n"


async def converted(items: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    """Events of Anthropic's API that vLLM makes of a chat stream's ``items``, with decar's errors."""
    serving: Any = SimpleNamespace()
    serving.message_stream_converter = partial(AnthropicServingMessages.message_stream_converter, serving)
    tell_errors(
        SimpleNamespace(state=SimpleNamespace(anthropic_serving_messages=serving)), anthropic_error_event
    )

    async def chat() -> AsyncIterator[Any]:
        for item in items:
            yield item

    events = []
    async for event in serving.message_stream_converter(chat()):
        name, data = event.rstrip().split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


@pytest.mark.parametrize(
    ("code", "kind"), [(503, "overloaded_error"), (500, "api_error"), (400, "invalid_request_error")]
)
async def test_a_stream_that_fails_says_why_in_anthropics_form(code: int, kind: str) -> None:
    error = {"error": {"message": "expert 'code' is down", "type": "X", "param": None, "code": code}}
    begun = [chat_chunk(role="assistant", content=""), chat_chunk(content="hi")]
    *events, last = await converted([*begun, f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n"])
    told = {"type": "error", "error": {"type": kind, "message": "expert 'code' is down"}}
    assert last == ("error", told)
    assert [name for name, _ in events] == ["message_start", "content_block_start", "content_block_delta"]


async def test_a_stream_that_fails_before_its_first_token_says_why() -> None:
    error = {"error": {"message": "no", "type": "X", "param": None, "code": 503}}
    [(name, data)] = await converted([f"data: {json.dumps(error)}\n\n", "data: [DONE]\n\n"])
    assert (name, data["error"]["message"]) == ("error", "no")


async def test_a_stream_that_does_not_fail_is_vllms() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    end = f"data: {json.dumps({**CHUNK, 'choices': [], 'usage': usage})}\n\n"
    events = await converted(
        [chat_chunk(role="assistant"), chat_chunk(content="hi"), end, "data: [DONE]\n\n"]
    )
    assert [name for name, _ in events][-2:] == ["message_delta", "message_stop"]
    assert not any(name == "error" for name, _ in events)
