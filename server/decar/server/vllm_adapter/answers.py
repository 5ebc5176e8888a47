"""Model ids in answers, and errors in Anthropic's streams. Knows vLLM's OpenAI and Anthropic layers.

vLLM serves one model under several names, and calls it by the first in every answer. An ensemble's are several models.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any


def name_model_asked_for(app: Any, asked_for: Callable[[], str | None]) -> None:
    """Have answers name the model that was asked for.

    Args:
        asked_for: the id in the current request; None: it names none.
    """
    models = app.state.openai_serving_models
    first = models.model_name

    def model_name(lora_request: Any = None) -> str:
        return asked_for() or str(first(lora_request))

    models.model_name = model_name


def tell_errors(app: Any, event: Callable[[str, int], str]) -> None:
    """Have streams of Anthropic's API end with the error that generation ends with.

    They are made of chat streams, in which vLLM 0.26 to 0.32 takes an error for a chunk that it cannot read.

    Args:
        event: the last event of a stream, of an error's message and status.
    """
    serving = app.state.anthropic_serving_messages
    if serving is None:
        return
    convert = serving.message_stream_converter

    async def message_stream_converter(generator: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
        failed: tuple[str, int] | None = None

        async def until_error() -> AsyncGenerator[Any, None]:
            nonlocal failed
            async for item in generator:
                failed = _error_in(item)
                if failed is not None:
                    return
                yield item

        async with contextlib.aclosing(convert(until_error())) as stream:
            async for converted in stream:
                yield converted
        if failed is not None:
            yield event(*failed)

    serving.message_stream_converter = message_stream_converter


def _error_in(item: Any) -> tuple[str, int] | None:
    """Message and status of the error that a chat stream's item is: text, and from 0.33 on an `ErrorResponse`."""
    if isinstance(item, str):
        if not item.startswith('data: {"error"'):
            return None
        error = json.loads(item.removeprefix("data: "))["error"]
        return str(error["message"]), int(error["code"])
    error = getattr(item, "error", None)
    return None if error is None else (str(error.message), int(error.code))
