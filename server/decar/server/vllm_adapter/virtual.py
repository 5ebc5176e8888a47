"""An engine that is none: tokens that somebody else has found become a request's outputs as an engine's would.

Knows vLLM's input and output processors, which turn tokens into text, stop strings and log-probabilities; knows nothing
of where tokens come from. What it offers is `decar.server.gateway.engine.Speaker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists

_FINISHED = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


class VirtualEngine:
    """What an `AsyncLLM` has in this process, without an engine behind it.

    Args:
        client: whose input processor reads requests.
    """

    def __init__(self, client: Any):
        self._inputs = client.input_processor
        self._outputs = OutputProcessor(client.renderer.tokenizer, log_stats=False)

    def begin(self, request_id: str, prompt: Any, params: SamplingParams, spoken_after: int) -> Speaker:
        """An answer of one choice.

        Args:
            spoken_after: how many tokens of the prompt come before it.

        Raises:
            VLLMValidationError: it cannot be answered, as an engine would say.
        """
        request = self._inputs.process_inputs(request_id, prompt, params, supported_tasks=("generate",))
        self._inputs.assign_request_id(request)
        request.prompt_token_ids = request.prompt_token_ids[:spoken_after]
        queue = RequestOutputCollector(params.output_kind, request.request_id)
        self._outputs.add_request(request, prompt.get("prompt"), None, 0, queue)
        known = request.sampling_params
        ends = set(known.stop_token_ids or ())
        if not known.ignore_eos:
            ends |= {*known.all_stop_token_ids, known.eos_token_id} - {None}
        return Speaker(self._outputs, queue, frozenset(ends), known.eos_token_id)


class Speaker:
    """Says one answer.

    Attributes:
        ends: tokens that end it.
    """

    def __init__(
        self, outputs: OutputProcessor, queue: RequestOutputCollector, ends: frozenset[int], eos: int | None
    ):
        self.ends = ends
        self._outputs, self._queue, self._eos = outputs, queue, eos

    def say(
        self,
        tokens: Sequence[int],
        logprobs: tuple[np.ndarray, np.ndarray, np.ndarray] | None,
        finish: str | None,
    ) -> bool:
        """Say the next tokens [n].

        Args:
            logprobs: token ids and log-probabilities [n, 1 + N], the token said first, and its rank [n].
            finish: why they are the last ones: "stop" or "length".

        Returns:
            whether the answer goes on: a stop string may have ended it.
        """
        output = EngineCoreOutput(self._queue.request_id, list(tokens))
        if logprobs is not None:
            output.new_logprobs = LogprobsLists(*logprobs)
        outputs = [output]
        if finish is not None:
            ended = finish == "stop" and tokens[-1] in self.ends
            if finish == "stop" and not ended:
                # vLLM leaves the token that stops an answer out of its text, and this one is no such token.
                outputs.append(EngineCoreOutput(self._queue.request_id, []))
            outputs[-1].finish_reason = _FINISHED[finish]
            if ended and tokens[-1] != self._eos:
                output.stop_reason = tokens[-1]
        stopped = self._outputs.process_outputs(outputs).reqs_to_abort
        return finish is None and not stopped

    async def next(self) -> RequestOutput:
        """What has been said since the last time.

        Raises:
            Exception: what `fail` was given.
        """
        output = await self._queue.get()
        assert isinstance(output, RequestOutput)
        return output

    def fail(self, error: Exception) -> None:
        """End the answer with an error for whoever listens."""
        self._queue.put(error)

    async def abort(self) -> None:
        """End it as it is, with the finish reason "abort"; quiet if it has ended."""
        self._outputs.abort_requests([self._queue.request_id], internal=True)
