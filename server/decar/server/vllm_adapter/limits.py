"""What vLLM's V2 model runner has no room for. Its engine finds out in the middle of a step, and ends."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from decar.server.vllm_adapter.versions import bad_words_limits


def keep_to_limits(llm: AsyncLLM) -> None:
    """Have an engine of the V2 runner refuse such requests as they come."""
    if not llm.vllm_config.use_v2_model_runner:
        return
    process_inputs = llm.input_processor.process_inputs

    def process_and_check(*args: Any, **kwargs: Any) -> Any:
        request = process_inputs(*args, **kwargs)
        if request.sampling_params is not None:
            refuse_beyond_limits(request.sampling_params)
        return request

    llm.input_processor.process_inputs = process_and_check


def refuse_beyond_limits(params: SamplingParams) -> None:
    """
    Args:
        params: as an engine gets them, with the stop tokens of its model and the tokens of bad words.

    Raises:
        VLLMValidationError: names the parameter that has too many tokens, and how many it may have.
    """
    from vllm.v1.worker.gpu.sample.logit_bias import (
        MAX_NUM_ALLOWED_TOKEN_IDS,
        MAX_NUM_LOGIT_BIAS_TOKENS,
        MAX_NUM_STOP_TOKEN_IDS,
    )

    words = params.bad_words_token_ids or ()
    most_words, most_tokens = bad_words_limits()
    stops = params.all_stop_token_ids if params.min_tokens else ()
    for name, count, limit in (
        ("allowed_token_ids", len(params.allowed_token_ids or ()), MAX_NUM_ALLOWED_TOKEN_IDS),
        ("logit_bias", len(params.logit_bias or ()), MAX_NUM_LOGIT_BIAS_TOKENS),
        ("stop_token_ids", len(stops), MAX_NUM_STOP_TOKEN_IDS),
        ("bad_words", len(words), most_words),
        ("bad_words", sum(map(len, words)), most_tokens),
    ):
        if count > limit:
            raise VLLMValidationError(
                f"{name} comes to {count} words or tokens, and vLLM's V2 model runner allows {limit}",
                parameter=name,
            )
