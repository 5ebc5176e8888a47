"""litellm as a package: as OpenAI's, as a hosted vLLM and as Anthropic's; streams, tools, costs by model, errors."""

from __future__ import annotations

import litellm
from common import ADD, CHAT, EXPERT, KEY, MODEL, SERVER, TRACE, URL, raises, remark, seen

for provider, base in (("openai", URL), ("hosted_vllm", URL), ("anthropic", SERVER)):
    for name in (MODEL, EXPERT):
        options = {"model": f"{provider}/{name}", "messages": CHAT, "api_base": base, "api_key": KEY}
        whole = litellm.completion(**options, max_tokens=8)
        assert whole.choices[0].message.content
        assert whole.model.endswith(name), whole.model
        assert whole.usage.completion_tokens == 8
        text = ""
        for chunk in litellm.completion(**options, max_tokens=8, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
    tool = {"type": "function", "function": {"name": "add", "parameters": ADD}}
    called = litellm.completion(**options, max_tokens=128, tools=[tool], tool_choice="required")
    assert called.choices[0].message.tool_calls[0].function.name == "add"
    raises(litellm.NotFoundError, lambda: litellm.completion(**{**options, "model": f"{provider}/stranger"}))  # noqa: B023
    raises(litellm.AuthenticationError, lambda: litellm.completion(**{**options, "api_key": "wrong"}))  # noqa: B023
    raises(litellm.BadRequestError, lambda: litellm.completion(**options, max_tokens=100_000))  # noqa: B023
    seen(provider)

traced = litellm.completion(
    model=f"openai/{MODEL}", messages=CHAT, api_base=URL, api_key=KEY, max_tokens=4, extra_body=TRACE
)
assert traced.model_dump()["decar"]["experts"] == ["code", "prose"]
seen("the decar object")
text = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", prompt="Hi", api_base=URL, api_key=KEY, max_tokens=4
)
assert text.choices[0].text
seen("completions")
remark("whole, streams, tools, errors")
