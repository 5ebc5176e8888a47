"""The openai package: chats, completions, responses; whole and streamed; structured answers, tools, errors."""

from __future__ import annotations

import asyncio

import openai
from common import ADD, CHAT, EXPERT, KEY, MODEL, TRACE, URL, raises, remark, seen
from pydantic import BaseModel


class Sum(BaseModel):
    a: int
    text: str


client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
assert MODEL in {model.id for model in client.models.list()}
assert client.models.retrieve(EXPERT).id == EXPERT
seen("models")

for model in (MODEL, EXPERT):
    whole = client.chat.completions.create(model=model, messages=CHAT, max_tokens=8, extra_body=TRACE)
    assert whole.model == model
    assert whole.choices[0].model_extra is not None
    assert len(whole.choices[0].model_extra["decar"]["weights"]) == 8
    chunks = list(
        client.chat.completions.create(
            model=model, messages=CHAT, max_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    assert {chunk.model for chunk in chunks} == {model}
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
seen("chats")

completion = client.completions.create(
    model=EXPERT, prompt=["a", "b"], max_tokens=4, logprobs=2, n=2, temperature=1
)
assert (completion.model, len(completion.choices)) == (EXPERT, 4)
seen("completions")

for model in (MODEL, EXPERT):
    response = client.responses.create(model=model, input="Hi", max_output_tokens=8, extra_body=TRACE)
    assert (response.model, len(response.output_text) > 0) == (model, True)
    assert response.model_extra is not None
    assert len(response.model_extra["decar"]["weights"]) == 8
    with client.responses.stream(model=model, input="Hi", max_output_tokens=8) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == response.output_text == stream.get_final_response().output_text
seen("responses")

parsed = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Sum)
assert isinstance(parsed.choices[0].message.parsed, Sum)
from_response = client.responses.parse(model=MODEL, input="Hi", text_format=Sum)
assert isinstance(from_response.output_parsed, Sum)
seen("structured answers")

tool = {"type": "function", "function": {"name": "add", "parameters": ADD}}
for choice in ("required", {"type": "function", "function": {"name": "add"}}):
    called = client.chat.completions.create(model=MODEL, messages=CHAT, tools=[tool], tool_choice=choice)  # type: ignore[call-overload]
    [call] = called.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert call.function.arguments.replace(" ", "") == '{"a":3,"b":3}'
seen("tools")


async def at_once() -> None:
    several = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
    asked = [several.completions.create(model=MODEL, prompt=[5, 6], max_tokens=16) for _ in range(8)]
    answers = await asyncio.gather(*asked)
    assert len({answer.choices[0].text for answer in answers}) == 1


asyncio.run(at_once())
seen("8 at once")

raises(
    openai.NotFoundError,
    lambda: client.chat.completions.create(model="stranger", messages=CHAT),
    "stranger",
)
wrong = raises(
    openai.BadRequestError,
    lambda: client.chat.completions.create(
        model=MODEL, messages=CHAT, extra_body={"decar": {"weights": {"x": 1}}}
    ),
    "decar.weights",
)
assert wrong.param == "decar.weights"
stranger = openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0)
raises(openai.AuthenticationError, stranger.models.list, "API key")
seen("errors")
remark()
