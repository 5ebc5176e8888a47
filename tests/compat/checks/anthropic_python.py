"""The anthropic package: messages whole and streamed, tools, token counts, errors by type."""

from __future__ import annotations

from typing import Any

import anthropic
from common import ADD, CHAT, EXPERT, KEY, MODEL, SERVER, TRACE, raises, remark, seen

client = anthropic.Anthropic(base_url=SERVER, api_key=KEY, max_retries=0)
for model in (MODEL, EXPERT):
    whole = client.messages.create(model=model, messages=CHAT, max_tokens=8, extra_body=TRACE)
    assert (whole.model, whole.stop_reason) == (model, "max_tokens")
    assert whole.model_extra is not None
    assert len(whole.model_extra["decar"]["weights"]) == 8
    with client.messages.stream(model=model, messages=CHAT, max_tokens=8, extra_body=TRACE) as stream:
        events = list(stream)
        final = stream.get_final_message()
    assert final.model == model
    assert [block.text for block in final.content] == [block.text for block in whole.content]  # type: ignore[union-attr]
    [last] = [event for event in events if event.type == "message_delta"]
    assert len((last.model_extra or {})["decar"]["weights"]) == 8
seen("messages, whole and streamed, with traces")

tools: list[Any] = [{"name": "add", "description": "Adds.", "input_schema": ADD}]
kinds: list[Any] = [{"type": "any"}, {"type": "tool", "name": "add"}]
for choice in kinds:
    called = client.messages.create(
        model=MODEL, messages=CHAT, max_tokens=128, tools=tools, tool_choice=choice
    )
    assert called.stop_reason == "tool_use"
    [block] = [block for block in called.content if block.type == "tool_use"]
    assert (block.name, block.input) == ("add", {"a": 3, "b": 3})
seen("tools")

assert client.messages.count_tokens(model=MODEL, messages=CHAT).input_tokens > 5
assert MODEL in {model.id for model in client.models.list()}
seen("token counts, models")


def kind_of(error: Any) -> str:
    return str(error.body["error"]["type"])


def create(**more: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "messages": CHAT, "max_tokens": 8, **more})


assert kind_of(raises(anthropic.NotFoundError, lambda: create(model="stranger"))) == "not_found_error"
for wrong in (
    {"extra_body": {"decar": {"rule": "x"}}},
    {"extra_body": {"temperature": -1}},
    {"max_tokens": 20_000},
):
    error = raises(anthropic.BadRequestError, lambda wrong=wrong: create(**wrong))
    assert kind_of(error) == "invalid_request_error"
stranger = anthropic.Anthropic(base_url=SERVER, api_key="wrong", max_retries=0)
refused = raises(
    anthropic.AuthenticationError,
    lambda: stranger.messages.create(model=MODEL, messages=CHAT, max_tokens=8),
)
assert kind_of(refused) == "authentication_error"
seen("errors")
remark()
