"""What pruning changes in text that the ensemble itself writes, which is what its bound speaks of.

Knows models and weights, never where they come from.

Shapes: N prompts of P tokens, K experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel

from decar.router.posterior import Float64s
from decar.training.evaluate.systems import Outcome


class SampledRow(BaseModel):
    """``total_variation`` of what follows a prompt, between the pruned ensemble and the whole one; a mean over prompts
    with its standard error."""

    prune: float
    total_variation: float
    standard_error: float
    active_experts: float
    dropped_max: float


@torch.inference_mode()
def sample_continuations(
    models: Sequence[Any],
    prompts: Sequence[list[int]],
    log_weights: Float64s,
    num_tokens: int,
    vocab_size: int,
    seed: int,
) -> list[list[int]]:
    """Each prompt with ``num_tokens`` tokens that the mixture with ``log_weights`` [N, K] goes on with.

    One expert is drawn for each prompt and goes on alone, which samples the mixture exactly. An end of text is a token
    like any other, so that all are of one length.
    """
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = np.array([rng.choice(len(models), p=np.exp(row)) for row in log_weights])
    written: dict[int, list[int]] = {}
    for k, model in enumerate(models):
        mine = np.flatnonzero(drawn == k)
        if not len(mine):
            continue
        tokens = torch.tensor([prompts[i] for i in mine])
        cache, last = None, tokens
        for _ in range(num_tokens):
            out = model(input_ids=last.to(model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            probabilities = out.logits[:, -1, :vocab_size].float().softmax(dim=-1).cpu()
            last = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, last], dim=1)
        written.update(zip(mine.tolist(), tokens.tolist(), strict=True))
    return [written[i] for i in range(len(prompts))]


def compare_pruned(budget: float, whole: Sequence[Outcome], pruned: Sequence[Outcome]) -> SampledRow:
    """``whole`` and ``pruned`` ensemble on the same texts, drawn from the whole one."""
    ratios = np.exp([p.log_probs.sum() - w.log_probs.sum() for w, p in zip(whole, pruned, strict=True)])
    # Total variation is E[max(0, q(x) / p(x) - 1)] over x drawn from p, and this half of it is never far from 0: where
    # pruning keeps within its budget, q(x) is at most p(x) / (1 - budget).
    distances: NDArray[np.float64] = np.maximum(0.0, ratios - 1.0)
    return SampledRow(
        prune=budget,
        total_variation=float(distances.mean()),
        standard_error=float(distances.std() / np.sqrt(len(distances))),
        active_experts=float(np.mean([outcome.active.mean() for outcome in pruned])),
        dropped_max=max(outcome.dropped for outcome in pruned),
    )
