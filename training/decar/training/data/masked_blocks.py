"""Rows of which a bidirectional model learns masked tokens, and the loss on them. Knows tokens, nothing about experts.

Source: MDLM (Sahoo et al. 2024, arXiv 2406.07524), whose time runs the other way, and whose α is κ here.

Shapes: N rows, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decar.router.flow import kappa, rate
from decar.router.manifest import Schedule
from decar.training.data.blocks import IGNORED, UNTAUGHT, Blocks

HELD_OUT_LEVELS = 8
"""At how many times, one from each equal part of [0, 1), every held-out row is measured."""
# The last times mask less than a token in a thousand, and weight it by more than that: MDLM leaves them out too.
_LEFT_OUT = 1e-3


@dataclass
class MaskedBlocks(Blocks):
    """`Blocks` whose tokens with a label are masked at random and learned from what is left.

    A token that stands for a mask in the documents themselves has no label.
    """

    mask_token_id: int
    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, blocks: Blocks, mask_token_id: int, schedule: Schedule, seed: int) -> MaskedBlocks:
        """``blocks`` that were packed for a model which is not causal, and whose mask token is that."""
        assert blocks.position_ids is not None
        labels = blocks.labels.masked_fill(blocks.input_ids == mask_token_id, IGNORED)
        taught = (labels != IGNORED).any(dim=1)
        dropped = blocks.dropped.copy()
        dropped[UNTAUGHT] += int((~taught).sum())
        return cls(
            blocks.input_ids[taught],
            labels[taught],
            blocks.position_ids[taught],
            blocks.num_tokens,
            +dropped,
            blocks.documents,
            mask_token_id,
            schedule,
            seed,
        )

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORED).sum())

    def noise(self, key: Sequence[int], rows: int) -> dict[str, Tensor]:
        """What masks and weights the tokens of ``rows``: a function of the seed and ``key`` alone.

        Row i has its time t in the i-th of equal parts of [0, 1). Its tokens are masked where ``draws`` [rows, T],
        uniform in [0, 1), are below ``masked_share`` [rows], 1 - κ(t), and weighted by ``weight`` [rows],
        κ'(t) / (1 - κ(t)).
        """
        rng = np.random.default_rng([self.seed, *key])
        times = (rng.random() + np.arange(rows)) / rows * (1 - _LEFT_OUT)
        found = {
            "masked_share": 1 - kappa(self.schedule, times),
            "weight": rate(self.schedule, times),
            "draws": rng.random((rows, self.length)),
        }
        return {name: torch.from_numpy(values).float() for name, values in found.items()}

    def row_losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(nats [B] float64, tokens to learn [B] int64) of the rows of a ``batch`` with its `noise`.

        The nats are an unbiased estimate of a bound on those of a row's tokens, given those without a label.
        """
        labels = batch["labels"]
        learned = labels != IGNORED
        masked = learned & (batch["draws"] < batch["masked_share"][:, None])
        ids = batch["input_ids"].masked_fill(masked, self.mask_token_id)
        logits = denoised(model, ids, batch["position_ids"], self.mask_token_id)
        targets = labels.masked_fill(~masked, IGNORED)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        nats = losses.view(targets.shape).sum(dim=1, dtype=torch.float64)
        return batch["weight"] * nats, learned.sum(dim=1)


class HeldOutBlocks(MaskedBlocks):
    """`MaskedBlocks` each of whose rows is there `HELD_OUT_LEVELS` times, with noise that is always the same."""

    @classmethod
    def of_masked(cls, blocks: MaskedBlocks) -> HeldOutBlocks:
        return cls(**{field.name: getattr(blocks, field.name) for field in fields(blocks)})

    def __len__(self) -> int:
        return HELD_OUT_LEVELS * super().__len__()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row, level = divmod(index, HELD_OUT_LEVELS)
        noise = self.noise([row], HELD_OUT_LEVELS)
        return super().__getitem__(row) | {name: drawn[level] for name, drawn in noise.items()}


def denoised(model: Any, input_ids: Tensor, position_ids: Tensor, mask_token_id: int) -> Tensor:
    """Logits [B, T, V] float32 of each token of ``input_ids`` [B, T]; the mask token's are -inf, so that it has no part
    in their softmax.

    A document begins where ``position_ids`` [B, T] are 0, and sees no other one of its row.
    """
    config = getattr(model, "module", model).config
    mask = document_mask(position_ids)
    # Models that look at a window in some layers take a mask for each kind of layer.
    masks = dict.fromkeys(getattr(config, "layer_types", None) or (), mask)
    if "sliding_attention" in masks:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        masks["sliding_attention"] = mask & ((places - places[:, None]).abs() <= config.sliding_window)
    logits = model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=masks or mask
    ).logits.float()
    logits[..., mask_token_id] = -torch.inf
    return logits


def document_mask(position_ids: Tensor) -> Tensor:
    """[B, 1, T, T] bool: whether two tokens of a row are of one document."""
    documents = (position_ids == 0).cumsum(dim=1)
    return (documents[:, None, :] == documents[:, :, None])[:, None]
