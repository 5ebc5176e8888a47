"""Rows of which a bidirectional model learns masked tokens, and the loss on them. Knows tokens, nothing about experts.

Source: MDLM (Sahoo et al. 2024, arXiv 2406.07524), whose time runs the other way: κ here is 1 - t there, or its cosine.

Shapes: N rows, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decar.router.manifest import Schedule
from decar.training.data.blocks import IGNORED, UNTAUGHT, Blocks

HELD_OUT_LEVELS = 8
"""At how many times, one from each equal part of [0, 1), every held-out row is measured."""
# The last times mask a token in a thousand, and would weight it by a thousand and more: MDLM leaves them out too.
_SHORTEST_TIME = 1e-3


def masked_share(schedule: Schedule, times: Tensor) -> Tensor:
    """1 - κ(t) of ``times``, any shape: with which probability a token is masked."""
    return 1 - times if schedule == "linear" else torch.cos(math.pi / 2 * times)


def rate(schedule: Schedule, times: Tensor) -> Tensor:
    """κ'(t) / (1 - κ(t)) of ``times``, any shape: what the loss of a masked token is weighted by."""
    return 1 / (1 - times) if schedule == "linear" else math.pi / 2 * torch.tan(math.pi / 2 * times)


@dataclass
class MaskedBlocks(Blocks):
    """`Blocks` whose tokens with a label are masked at random and learned from what is left.

    The first token of a row has no label, as nothing predicts it in a causal model: both learn the same tokens. Nor has
    a token that stands for a mask in the documents themselves.
    """

    mask_token_id: int
    schedule: Schedule
    seed: int

    @classmethod
    def of(cls, blocks: Blocks, mask_token_id: int, schedule: Schedule, seed: int) -> MaskedBlocks:
        """``blocks``, for a model whose mask token is that."""
        assert blocks.position_ids is not None
        labels = blocks.labels.clone()
        labels[:, 0] = IGNORED
        labels[blocks.input_ids == mask_token_id] = IGNORED
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

    def noise(self, key: Sequence[int], rows: int) -> dict[str, Tensor]:
        """``times`` [rows] and ``draws`` [rows, T], uniform in [0, 1): a function of the seed and ``key`` alone.

        Row i has its time in the i-th of equal parts of [0, 1).
        """
        rng = np.random.default_rng([self.seed, *key])
        times = (rng.random() + np.arange(rows)) / rows * (1 - _SHORTEST_TIME)
        draws = rng.random((rows, self.length), dtype=np.float32)
        return {"times": torch.from_numpy(times).float(), "draws": torch.from_numpy(draws)}

    def row_losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(nats [B] float64, tokens to learn [B] int64) of the rows of a ``batch`` with its `noise`.

        The nats are an unbiased estimate of a bound on those of a row's tokens, given those without a label.
        """
        labels, times = batch["labels"], batch["times"]
        learned = labels != IGNORED
        masked = learned & (batch["draws"] < masked_share(self.schedule, times)[:, None])
        ids = batch["input_ids"].masked_fill(masked, self.mask_token_id)
        logits = denoised(model, ids, batch["position_ids"], self.mask_token_id)
        losses = torch.nn.functional.cross_entropy(logits[masked], labels[masked], reduction="none")
        nats = torch.zeros(masked.shape, device=losses.device, dtype=torch.float64)
        nats[masked] = losses.double()
        return rate(self.schedule, times) * nats.sum(dim=1), learned.sum(dim=1)


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
