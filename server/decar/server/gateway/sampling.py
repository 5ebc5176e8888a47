"""Sampling parameters of leaders, followers and choices, and choices' outputs as one request's. Knows no engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from copy import copy
from typing import Any

import numpy as np
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.server.gateway.aborts import Aborted
from decar.server.gateway.engine import Speech
from decar.server.protocol.member import REQUEST_KEY, SPOKEN_KEY, Member, Spoken


def params_of(
    expert: int, member: Member, params: SamplingParams, speech: Speech | None = None
) -> SamplingParams:
    """The leader's sampling parameters are the user's; a follower's only keep it running as long."""
    wire = {REQUEST_KEY: member.to_wire(), **_after(speech)}
    if expert == member.leader or member.may_release:  # where leaders hand over, everybody is ready to lead
        return _saying(params, wire)
    return SamplingParams(
        max_tokens=params.max_tokens,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_reading_prefix_cache=params.skip_reading_prefix_cache,
        extra_args=wire,
    )


def params_alone(params: SamplingParams, speech: Speech | None) -> SamplingParams:
    """The user's sampling parameters for an engine that answers alone, after ``speech``."""
    return params if speech is None else _saying(params, _after(speech))


def _after(speech: Speech | None) -> dict[str, Any]:
    return {} if speech is None else {SPOKEN_KEY: Spoken(speech.tokens, speech.ticket).to_wire()}


def _saying(params: SamplingParams, wire: dict[str, Any]) -> SamplingParams:
    """``params`` with more in what an engine alone reads."""
    mine = copy(params)
    mine.extra_args = {**(params.extra_args or {}), **wire}
    return mine


def without_prompt_logprobs(params: SamplingParams) -> SamplingParams:
    """``params`` for engines that need not say anything of the prompt any more."""
    rest = copy(params)
    rest.prompt_logprobs = None
    rest.skip_reading_prefix_cache = False
    return rest


def uniforms(params: SamplingParams) -> list[float]:
    """A number from 0 to 1 for each choice, which draws its expert."""
    rng = np.random.default_rng(params.seed if params.seed is None else abs(params.seed))
    numbers: list[float] = rng.random(params.n).tolist()
    return numbers


def params_of_choices(params: SamplingParams) -> Iterator[SamplingParams]:
    """One set of sampling parameters per choice; as in vLLM, a seed differs by the choice's index."""
    for i in range(params.n):
        choice = copy(params)
        choice.n = 1
        if params.seed is not None:
            choice.seed = params.seed + i
        yield choice


def produced_by(completion: CompletionOutput, params: SamplingParams, before: int) -> int:
    """Tokens of an answer with ``completion``, of which there were so many ``before``; in a stream it has new ones."""
    count = len(completion.token_ids)
    return before + count if params.output_kind == RequestOutputKind.DELTA else count


async def merged(
    choices: Iterator[AsyncGenerator[RequestOutput, None]], params: SamplingParams, at_once: int
) -> AsyncGenerator[RequestOutput, None]:
    """Run the choices of one request side by side, so many at once; give their outputs as one request's."""
    final_only = params.output_kind == RequestOutputKind.FINAL_ONLY
    outputs: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    rest = enumerate(choices)

    async def run() -> None:
        for index, choice in rest:
            try:
                async for output in choice:
                    outputs.put_nowait((index, output))
            except Aborted as aborted:
                outputs.put_nowait((index, aborted.output()))
            except Exception as error:
                outputs.put_nowait((index, error))
            finally:
                await choice.aclose()

    tasks = [asyncio.create_task(run()) for _ in range(min(params.n, at_once))]
    finals: dict[int, CompletionOutput] = {}
    unfinished = params.n
    try:
        while unfinished:
            index, output = await outputs.get()
            if isinstance(output, Exception):
                raise output
            for completion in output.outputs:
                completion.index = index
            if output.finished:
                unfinished -= 1
                output.finished = not unfinished
                finals[index] = output.outputs[0]
            if not final_only:
                yield output
            elif not unfinished:
                output.outputs = [finals[i] for i in sorted(finals)]
                yield output
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
