"""Every kind of request, run once, so that no user waits for a compilation. Knows what requests there are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from vllm.sampling_params import RequestOutputKind, SamplingParams

from decar.router import log_prior
from decar.router.manifest import Rule
from decar.server.gateway.ensemble import EnsembleClient
from decar.server.gateway.flow import FlowEnsemble
from decar.server.gateway.request import Call, current_call


async def warm_up(client: EnsembleClient, image: Any | None, expert: int | None = None) -> None:
    """Have ``client`` answer one request of each kind.

    Args:
        image: a prompt with an image; None where the experts take none.
        expert: the one whose engine is new; None: all are.
    """
    experts = len(client.experts)
    everyone = log_prior([float(each.up or k == expert) for k, each in enumerate(client.experts)])
    calls = [Call(everyone, "velocity"), Call(everyone, "logit")]
    calls += [
        Call(everyone, posterior=True, scored=True, prune=prune) for prune in (0.0, 1e-9) if experts > 1
    ]
    new = client.seats.of if expert is None else [expert]
    calls += [Call(log_prior([float(j == k) for j in range(experts)])) for k in new]
    calls = [replace(call, warms=expert) for call in calls]

    async def run(call: Call, params: SamplingParams, prompt: Any) -> None:
        current_call.set(call)
        async for _ in client.generate(prompt, params, f"warm-up-{id(call)}"):
            pass

    text: Any = {"prompt_token_ids": [0, 1, 2, 3]}
    for kind in (RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA):
        for extra in (
            {"temperature": 0.0},
            {"temperature": 0.8, "seed": 0},
            {"temperature": 0.8, "top_p": 0.9, "seed": 0, "logprobs": 2},
        ):
            params = SamplingParams(max_tokens=4, ignore_eos=True, output_kind=kind, **extra)
            await asyncio.gather(*(asyncio.create_task(run(call, params, text)) for call in calls))
    asked_for_prompt = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
    await asyncio.create_task(run(calls[0], asked_for_prompt, text))
    if image is not None:
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        await asyncio.gather(*(asyncio.create_task(run(call, params, image)) for call in calls))
    await (client if expert is None else client.experts[expert].engine.client).reset_prefix_cache()


async def warm_up_flow(client: FlowEnsemble, expert: int | None = None) -> None:
    """The same of a flow ensemble."""
    experts = len(client.experts)
    everyone = log_prior([float(each.up or k == expert) for k, each in enumerate(client.experts)])
    plain = replace(client.call_of(None, None), log_weights=everyone, router=None, model=None, warms=expert)
    rules: tuple[Rule, ...] = ("velocity", "logit")
    calls = [replace(plain, rule=rule, scored=True, posterior=experts > 1) for rule in rules]
    new = client.seats.of if expert is None else [expert]
    alone = [log_prior([float(j == k) for j in range(experts)]) for k in new]
    calls += [replace(plain, log_weights=weights, scored=False, posterior=False) for weights in alone]

    async def run(call: Call) -> None:
        current_call.set(call)
        params = SamplingParams(max_tokens=4, ignore_eos=True, top_p=0.9, seed=0, logprobs=2)
        async for _ in client.generate(
            {"type": "token", "prompt_token_ids": [0, 1]}, params, f"warm-up-{id(call)}"
        ):
            pass

    await asyncio.gather(*(asyncio.create_task(run(call)) for call in calls))
