"""`Step` for vLLM's V1 model runner (`vllm/v1/worker/gpu_model_runner.py`), and its CPU child."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput

from decar.server.vllm_adapter.step import Settle, Step


class StepV1(Step):
    """A hold is a row of `discard_request_mask`: its sample is not kept, and the scheduler counts its tokens."""

    def __init__(self, runner: Any, vocab_size: int):
        super().__init__(runner, vocab_size)
        self._sample = runner._sample
        runner._sample = self._sample_and_settle
        self._settle: Settle | None = None
        self._sampler = True
        self._spoken: dict[str, Sequence[int]] = {}  # of requests that begin in this step, after so much
        self._joined: Any = None  # the batch that is asked to say who joins it

    def go_on(self, request_id: str, tokens: Sequence[int]) -> None:
        """The runner knows such requests only from its own past: so it is given one, before the batch has them."""
        self._spoken[request_id] = tokens
        batch = self._runner.input_batch
        if self._joined is not batch:
            self._joined = batch
            self._add_request = batch.add_request
            batch.add_request = self._add_request_after_tokens

    def _add_request_after_tokens(self, request: Any) -> Any:
        """In place of the batch's `add_request`."""
        tokens = self._spoken.pop(request.req_id, None)
        if tokens is not None:
            request.output_token_ids.extend(tokens)
            self.redraw(request.req_id, len(tokens))
        return self._add_request(request)

    def append(self, request_id: str, token: int) -> None:
        self._runner.requests[request_id].output_token_ids.append(token)
        batch = self._runner.input_batch
        row = batch.req_id_to_index.get(request_id)
        if row is not None:
            end = batch.num_tokens_no_spec[row]
            batch.token_ids_cpu[row, end] = token
            batch.is_token_ids[row, end] = True
            batch.num_tokens_no_spec[row] = end + 1

    def redraw(self, request_id: str, tokens: int) -> None:
        """What vLLM draws for a token differs by device, so its own sampler draws it."""
        request = self._runner.requests[request_id]
        if request.generator is None:
            return
        sample = self._runner.sampler.topk_topp_sampler
        # On a CPU it draws one number whatever the vocabulary, unless it is told to draw all of them.
        narrow = current_platform.is_cpu() and not getattr(sample, "use_fp64_gumbel", False)
        width = 1 if narrow else self._runner.input_batch.vocab_size
        nothing = torch.zeros(1, width, device=request.generator.device)
        request.generator.manual_seed(request.sampling_params.seed)
        for _ in range(tokens):
            sample(nothing, {0: request.generator}, None, None)

    @property
    def ran(self) -> bool:
        return self._runner.execute_model_state is not None

    @property
    def rows(self) -> Mapping[str, int]:
        return self._runner.input_batch.req_id_to_index

    def hidden_states(self, request_id: str) -> tuple[int, torch.Tensor]:
        row = self.rows[request_id]
        start, end = self._runner.query_start_loc.np[row : row + 2].tolist()
        first = int(self._runner.requests[request_id].num_computed_tokens)
        return first, self._runner.execute_model_state.hidden_states[start:end]

    def logits(self) -> torch.Tensor:
        state = self._runner.execute_model_state
        logits = state.logits.float()
        self._runner.execute_model_state = state._replace(logits=logits)
        return logits

    def sample(
        self,
        grammar_output: Any,
        undecided: Collection[int] = (),
        settle: Settle | None = None,
        sampler: bool = True,
    ) -> Any:
        """A dropped row, or one of an unfinished prompt, draws nothing from its seeded generator.

        vLLM would take the draw back, which a CPU generator cannot do: it raises.
        """
        batch = self._runner.input_batch
        unfinished = np.flatnonzero(self._runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        spared = {
            row: batch.generators.pop(row) for row in {*undecided, *unfinished} if row in batch.generators
        }
        self._settle, self._sampler = settle, sampler
        try:
            return self._runner.sample_tokens(grammar_output)
        finally:
            self._settle, self._sampler = None, True
            batch.generators.update(spared)

    def keep_told(self, grammar_output: Any, settle: Settle) -> Any:
        """No row draws anything: what has not been drawn need not be taken back."""
        return self.sample(grammar_output, range(self._runner.input_batch.num_reqs), settle, sampler=False)

    def drop(self, rows: Sequence[int]) -> None:
        self._runner.discard_request_mask.np[rows] = True

    def _sample_and_settle(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        """In place of the runner's `_sample`."""
        if self._sampler:
            output = self._sample(logits, spec_decode_metadata)
        else:
            nothing = torch.zeros(len(logits), 1, dtype=torch.int32, device=logits.device)
            output = SamplerOutput(nothing, logprobs_tensors=None)
        if self._settle is not None:
            self._settle(output.sampled_token_ids[:, 0])
        return output
