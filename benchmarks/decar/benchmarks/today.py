"""The ways an ensemble is decoded without decar: a transformers loop, and log-probabilities over HTTP.

Both mix by the velocity rule with fixed weights and decode greedily. `Mixture.scores` is what served answers are
checked against.

Shapes: K experts, V vocabulary, T tokens.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from transformers import AutoModelForCausalLM


class Decoded(NamedTuple):
    """Greedy tokens of each request, and how long all took, loading left out."""

    tokens: list[list[int]]
    duration_s: float


class Mixture:
    """The experts as transformers models, loaded once.

    Args:
        experts: their directories.
        weights: fixed, sum to 1.
        dtype: a torch dtype's name.
    """

    def __init__(self, experts: Sequence[Path], weights: Sequence[float], dtype: str):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._log_weights = torch.tensor(weights, device=self._device).log()
        self._models: list[Any] = [
            AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), trust_remote_code=False)
            .to(self._device)
            .eval()
            for path in experts
        ]

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], tokens: int) -> Decoded:
        """One static batch of equally long ``prompts``: every expert's forward pass, one after another, then mix."""
        ids = torch.tensor(prompts, device=self._device)
        caches = [None] * len(self._models)
        chosen = []
        started = time.perf_counter()
        for _ in range(tokens):
            rows = []
            for k, model in enumerate(self._models):
                output = model(ids, past_key_values=caches[k], use_cache=True)
                caches[k] = output.past_key_values
                rows.append(output.logits[:, -1])
            ids = (_log_probs(rows) + self._log_weights).logsumexp(-1).argmax(-1, keepdim=True)
            chosen.append(ids)
        decoded: list[list[int]] = torch.cat(chosen, dim=1).tolist()  # waits for a GPU
        return Decoded(decoded, time.perf_counter() - started)

    @torch.inference_mode()
    def scores(
        self, text: list[int], start: int, posterior: bool = False
    ) -> tuple[list[float], list[float], float]:
        """What the mixture says of ``text`` from position ``start`` on, each token given those before it.

        Args:
            posterior: the weights are those before the text, and every token after the first moves them on.

        Returns:
            log-probabilities of its tokens, the highest log-probability at each of them, and the largest logit.
        """
        ids = torch.tensor([text], device=self._device)
        rows = [model(ids).logits[0, :-1] for model in self._models]  # [T, V]
        log_probs = _log_probs(rows)
        log_weights = self._log_weights.expand(len(log_probs), 1, -1)
        if posterior:
            said = log_probs.take_along_dim(ids[0, 1:, None, None], dim=1)  # [T, 1, K]
            log_weights = (log_weights + said.cumsum(0) - said).log_softmax(-1)
        mixed = (log_probs + log_weights).logsumexp(-1)[start - 1 :]
        chosen = mixed.gather(1, ids[0, start:, None])[:, 0]
        return chosen.tolist(), mixed.max(-1).values.tolist(), max(float(row.abs().max()) for row in rows)


def _log_probs(rows: list[torch.Tensor]) -> torch.Tensor:
    """Log-probabilities [..., V, K] over the vocabulary that all ``rows`` [..., V'] share."""
    width = min(row.shape[-1] for row in rows)
    return torch.stack([row[..., :width].float().log_softmax(-1) for row in rows], dim=-1)


async def over_http(
    servers: Sequence[tuple[str, str]], weights: Sequence[float], prompts: list[list[int]], tokens: int
) -> Decoded:
    """All ``prompts`` at once, each token by one request to each of the K plain ``servers`` for every
    log-probability it has; mixed here.

    Args:
        servers: (base URL, model) of each expert's server, started with --max-logprobs -1.

    Raises:
        RuntimeError: a server refused.
    """

    async def row(client: httpx.AsyncClient, server: tuple[str, str], ids: list[int]) -> dict[str, float]:
        body = {
            "model": server[1],
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": -1,
            "return_tokens_as_token_ids": True,
        }
        response = await client.post(f"{server[0]}/v1/completions", json=body)
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {response.text[:300]}")
        answer: dict[str, float] = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        return answer

    async def decode(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            rows = await asyncio.gather(*(row(client, server, ids) for server in servers))
            shared = set.intersection(*map(set, rows))
            mixed = {
                token: sum(w * math.exp(log_probs[token]) for w, log_probs in zip(weights, rows, strict=True))
                for token in shared
            }
            ids.append(int(max(mixed, key=mixed.__getitem__).removeprefix("token_id:")))
        return ids[len(prompt) :]

    limits = httpx.Limits(max_connections=len(servers) * len(prompts))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        started = time.perf_counter()
        decoded = await asyncio.gather(*(decode(client, prompt) for prompt in prompts))
        return Decoded(decoded, time.perf_counter() - started)
