"""How many tokens each chunk of a stream brings. Knows vLLM's OpenAI layer, which counts where usage is asked for.

A chunk's text does not tell: prompts are echoed, text is held back for stop strings, parsers keep some to themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any


def count_tokens(asks: Callable[[bool], bool]) -> None:
    """Have the chunks of streams say in their ``usage`` how many tokens their choice has by now.

    Args:
        asks: is told, as a stream begins, whether its client gets that anyway; gives whether chunks have to have it.
    """
    from vllm.entrypoints.openai.chat_completion import serving as of_chats
    from vllm.entrypoints.openai.completion import serving as of_completions

    for serving in (of_chats, of_completions):
        serving.should_include_usage = partial(_should_include_usage, serving.should_include_usage, asks)


def _should_include_usage(
    decide: Callable[..., tuple[bool, bool]], asks: Callable[[bool], bool], *args: Any, **kwargs: Any
) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, which is left to vLLM, and whether each of its chunks has it."""
    at_the_end, in_chunks = decide(*args, **kwargs)
    return at_the_end, asks(in_chunks)
