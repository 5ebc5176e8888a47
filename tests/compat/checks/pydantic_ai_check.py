"""pydantic-ai: text and objects, whole and streamed, over OpenAI's APIs and Anthropic's."""

from __future__ import annotations

import asyncio
from typing import Any

from anthropic import AsyncAnthropic
from common import EXPERT, KEY, MODEL, SERVER, URL, remark, seen
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel):
    name: str
    people: int


openais = OpenAIProvider(base_url=URL, api_key=KEY)
anthropics = AnthropicProvider(anthropic_client=AsyncAnthropic(base_url=SERVER, api_key=KEY))
makers: dict[str, Any] = {
    "chats": lambda name: OpenAIChatModel(name, provider=openais),
    "responses": lambda name: OpenAIResponsesModel(name, provider=openais),
    "messages": lambda name: AnthropicModel(name, provider=anthropics),
}


async def main() -> None:
    for api, make in makers.items():
        for name in (MODEL, EXPERT):
            answer = await Agent(make(name)).run("Hi", model_settings={"max_tokens": 8})
            assert answer.output
            assert answer.response.model_name == name
        async with Agent(make(MODEL)).run_stream("Hi", model_settings={"max_tokens": 8}) as stream:
            assert await stream.get_output() == answer.output
        by_tool = Agent(make(MODEL), output_type=City)  # which has to be called
        city = await by_tool.run("Which city?", model_settings={"max_tokens": 128})
        assert city.output == City(name="", people=3)
        [refused] = await asyncio.gather(Agent(make("stranger")).run("Hi"), return_exceptions=True)
        assert isinstance(refused, ModelHTTPError)
        assert refused.status_code == 404
        seen(api)


asyncio.run(main())
remark("text and objects, streams, errors")
