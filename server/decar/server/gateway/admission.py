"""What a request may ask of an ensemble, checked before any engine sees it. Knows prompts and sampling parameters.

vLLM's engines check too, but each for itself, by its own vocabulary, and not every version everything: a token id
that one expert has no row for would end that expert's engine, and with it everybody's requests.

V token ids that all experts share.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterator
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from decar.router.errors import StartError
from decar.server.gateway.images import is_text
from decar.server.protocol.member import REQUEST_KEY, ROWS_KEY, SPOKEN_KEY

TOKEN_FIELDS = (
    "logit_bias",
    "allowed_token_ids",
    "stop_token_ids",
    "logprob_token_ids",
    "trace_decode_token_ids",
)
"""Sampling parameters that name token ids, in some version of vLLM. Bad words and grammars are text: the tokenizer
makes ids of them, and it knows none beyond V (`check_tokenizer`)."""


class Admission:
    """Refuses what the engines of an ensemble could not answer alike.

    Args:
        vocab_size: V.
        max_logprobs: log-probabilities a token that may be asked for; -1: all.
    """

    def __init__(self, vocab_size: int, max_logprobs: int):
        self._vocab_size = vocab_size
        self._max_logprobs = vocab_size if max_logprobs == -1 else max_logprobs

    def check(self, prompt: Any, params: SamplingParams, priority: int = 0) -> None:
        """
        Raises:
            VLLMValidationError: something is asked that an ensemble has no answer to; names the field.
        """
        if priority:
            raise VLLMValidationError(
                "priority is not offered: requests are served as they come", parameter="priority"
            )
        if isinstance(prompt, AsyncGenerator):
            raise VLLMValidationError("an ensemble does not take a prompt as a stream", parameter="prompt")
        for key in (REQUEST_KEY, ROWS_KEY, SPOKEN_KEY):
            if key in (params.extra_args or {}):
                raise VLLMValidationError(f"vllm_xargs.{key} is decar's own", parameter="vllm_xargs")
        if getattr(params, "prompt_logprob_token_ids", None) is not None:
            raise VLLMValidationError(
                "an ensemble does not score a prompt by given token ids: ask for prompt_logprobs",
                parameter="prompt_logprob_token_ids",
            )
        self._check_prompt(prompt)
        for field in TOKEN_FIELDS:
            self._check_ids(field, getattr(params, field, None))
        self._check_counts(params)

    def _check_prompt(self, prompt: Any) -> None:
        """What holds an image's place may have an id of its own, which the model never looks up."""
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
        if ids and prompt.get("mm_placeholders"):
            ids = np.asarray(ids)[is_text(prompt)].tolist()
        self._check_ids("prompt", ids)

    def _check_ids(self, field: str, ids: Collection[int] | None) -> None:
        if not ids:
            return
        for token in (min(ids), max(ids)):
            if not 0 <= token < self._vocab_size:
                raise VLLMValidationError(
                    f"{field} names token id {token}; the ids that all experts share are 0 to {self._vocab_size - 1}",
                    parameter=field,
                )

    def _check_counts(self, params: SamplingParams) -> None:
        """As vLLM's engines do: for an ensemble's prompt they are not asked, and for its answer after the prompt."""
        for field in ("logprobs", "prompt_logprobs"):
            count = getattr(params, field)
            if count is not None and (self._vocab_size if count == -1 else count) > self._max_logprobs:
                raise VLLMValidationError(
                    f"{field} asks for {'all' if count == -1 else count} log-probabilities a token, and "
                    f"--max-logprobs allows {self._max_logprobs}",
                    parameter=field,
                )


def refuse_failed(params: SamplingParams, output: RequestOutput) -> None:
    """
    Raises:
        VLLMValidationError: an engine has ended a request because its grammar does not compile, or allows no token.
        RuntimeError: or for another reason.
    """
    if all(part.finish_reason != "error" for part in output.outputs):
        return
    if params.structured_outputs is None:
        raise RuntimeError("an engine has ended a request with an error")
    raise VLLMValidationError(
        "the grammar that structured_outputs, response_format or tools ask for cannot be compiled, or allows nothing",
        parameter="structured_outputs",
    )


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """
    Raises:
        StartError: the tokenizer of --tokenizer makes ids that not every expert has a row for.
    """
    if tokenizer is not None and tokenizer.max_token_id >= vocab_size:
        raise StartError(
            f"--tokenizer has ids up to {tokenizer.max_token_id}, but all experts share only {vocab_size}: leave it "
            "out, and the experts' own is used"
        )


_DRAWABLE = frozenset(
    {
        *("n", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "include_stop_str_in_output"),
        *("prompt_logprobs", "flat_logprobs", "detokenize", "skip_special_tokens", "output_kind"),
        *("spaces_between_special_tokens", "stream_interval", "skip_clone", "output_text_buffer_length"),
        *("skip_reading_prefix_cache", "watermarking", "routed_experts_prompt_start"),
    }
)
"""Sampling parameters under which drawing an expert is drawing from the mixture, whatever their values."""


def check_drawable(params: SamplingParams) -> None:
    """Refuse what does not commute with mixing: there, one expert's sample is not the mixture's.

    Raises:
        VLLMValidationError: names the parameter.
    """
    for name, value, wanted in _not_plain(params, _DRAWABLE):
        raise VLLMValidationError(
            f'decar.sampling "draw" is exact only for plain sampling, and {name} is {value!r}: set it to {wanted!r} '
            '(or leave it out, where that is the default), or decar.sampling to "mixture"',
            parameter=name,
        )


_REVEALABLE = _DRAWABLE - {"prompt_logprobs"} | {"temperature", "top_k", "top_p", "min_p", "logprobs"}
"""Sampling parameters that make sense where tokens are revealed in any order."""
_FROM_THE_LEFT = {
    **dict.fromkeys(
        ("presence_penalty", "frequency_penalty", "repetition_penalty"),
        "it counts the tokens before the next one",
    ),
    "structured_outputs": "a grammar is read from left to right",
    "prompt_logprobs": "it is of each token given those before it",
    "bad_words": "a word is forbidden by the tokens before its last one",
    "min_tokens": "it forbids ends by how many tokens there are",
}


def check_revealable(params: SamplingParams) -> None:
    """Refuse what only a text has that grows from left to right.

    Raises:
        VLLMValidationError: names the parameter, and why.
    """
    for name, _, wanted in _not_plain(params, _REVEALABLE):
        why = _FROM_THE_LEFT.get(name, "tokens are sampled from the experts' mixture as it is")
        raise VLLMValidationError(
            f"{name} is not offered by a flow ensemble, which reveals tokens in any order: {why}. Leave it out, or "
            f"set it to {wanted!r}",
            parameter=name,
        )


def _not_plain(params: SamplingParams, allowed: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Parameters that are not as they are by default, but for those ``allowed``: name, value, and the default."""
    plain = SamplingParams()
    for name in params.__struct_fields__:
        value, wanted = getattr(params, name), getattr(plain, name)
        if name in allowed or name.startswith("_") or value == wanted or (name == "top_k" and value == -1):
            continue
        yield name, value, wanted
