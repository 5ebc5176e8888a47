"""Which requests need nothing of vLLM's sampler, so that `decide` chooses their tokens, and with which noise.

Knows vLLM's sampling parameters. Whether a request does is known when it begins, and stays so: its tokens cannot depend
on which others are in its batch.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from decar.kernels import Rows, decide
from decar.server.protocol.member import REQUEST_KEY, ROWS_KEY, SPOKEN_KEY, Draw

VARIABLE = "DECAR_SAMPLER"
"""Of the environment: who chooses the tokens of plain requests. auto: `decide` where rows are mixed on a GPU, since
there it is a launch instead of a dozen. decar: `decide`. vllm: vLLM's sampler, whose noise costs less on a CPU."""

_OF_NO_MATTER = {
    *(
        "n",
        "max_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "repetition_detection",
    ),  # when an answer ends
    *("_eos_token_id", "_all_stop_token_ids"),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output"),
    *("output_kind", "stream_interval", "flat_logprobs", "output_text_buffer_length"),  # how it is told
    *("prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start"),
    *("skip_clone", "skip_reading_prefix_cache"),
    *("watermarking", "_watermarking_skipped"),  # --watermark-config is refused
}
"""Sampling parameters that do not say which token comes next, where it is no end. Every other one, those of later
versions included, has to be as it is by default, but for what `Draws.of` looks at."""


class Draws:
    """What `decide` is to draw for whom.

    Args:
        on_device: rows are mixed on a GPU.
        logits_processors: the user's own, which may change any request's logits.

    Raises:
        ValueError: the environment's `VARIABLE` is none of its values.
    """

    def __init__(self, on_device: bool, logits_processors: Sequence[Any] | None):
        who = os.environ.get(VARIABLE, "auto")
        if who not in ("auto", "decar", "vllm"):
            raise ValueError(f"{VARIABLE} must be auto, decar or vllm, not {who!r}")
        custom = logits_processors or entry_points(group=LOGITSPROCS_GROUP)
        self._decides = not custom and (who == "decar" or (who == "auto" and on_device))
        self._default = SamplingParams()
        self._matter = [
            name
            for name in self._default.__struct_fields__
            if name not in {*_OF_NO_MATTER, "temperature", "seed", "extra_args"}
        ]

    def of(self, params: Any) -> Draw | None:
        """How the tokens of a request with these sampling parameters are drawn; None: vLLM's sampler is needed."""
        if not self._decides or not {*(params.extra_args or ())} <= {REQUEST_KEY, ROWS_KEY, SPOKEN_KEY}:
            return None
        if any(getattr(params, name) != getattr(self._default, name) for name in self._matter):
            return None
        seed = secrets.randbits(63) if params.seed is None else params.seed & (2**63 - 1)
        return Draw(params.temperature, seed)


def draw_alone(
    logits: torch.Tensor,
    rows: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Tokens [n] of one expert's ``logits`` [B, V] float32 at ``rows`` [n], with the noise of `decide`.

    A mixture of one: its log-normalisers, which no token's lead depends on, are taken to be 0.
    """
    own = Rows([logits], [torch.zeros(len(logits), device=logits.device)])
    weights = torch.zeros(len(rows), 1, device=logits.device)
    tokens, _ = decide(own, rows, weights, "logit", temperatures, seeds, positions)
    return tokens
