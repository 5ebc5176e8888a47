"""What experts that reveal masked tokens say of held-out texts, revealed as an ensemble does. Knows models in memory.

An answer is revealed in steps, and each of its tokens is scored once: in the step that reveals it, given the prompt and
what earlier steps revealed. Which step that is, is drawn. Given all draws, the scores add up to log p of the process
that is served; without them its p is the mean over them, and by Jensen the mean of -log p is a bound on its -log.

Shapes: K models, T tokens of the continuation, L of a text, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decar.router.errors import TrainingError
from decar.router.flow import plan, prompt_chunks
from decar.router.manifest import Flow, FlowDefaults, Order, Start
from decar.training.data.masked_blocks import denoised
from decar.training.evaluate.held_out import Text
from decar.training.evaluate.systems import Scores

# log p of the mask token, which nothing reveals: finite, as a weight of 0 times -inf would be no number.
_NEVER = -1e30


def measured_order(flow: FlowDefaults) -> Order:
    """In which order texts are revealed: not the most confident first, as that depends on what is sampled."""
    return "random" if flow.order == "confident" else flow.order


@dataclass(frozen=True)
class Reveals:
    """How texts are revealed: as ``flow`` says, but in ``steps`` steps, and in the `measured_order`.

    ``vocab_size``: ids that all models have. ``rows``: how many masked texts are in memory at once.
    """

    flow: Flow
    steps: int
    seed: int
    vocab_size: int
    rows: int

    def scores(
        self, models: Sequence[Any], text: Text, number: int, starts: Mapping[Start, NDArray[np.float64]]
    ) -> Scores:
        """Of text ``number``, whose noise is that of the seed and the number.

        Raises:
            TrainingError: a model says NaN.
        """
        ids = np.array(text.ids)
        known, hidden = (
            np.flatnonzero(part != self.flow.mask_token_id) + start
            for part, start in (
                (ids[: text.prompt_tokens], 0),
                (ids[text.prompt_tokens :], text.prompt_tokens),
            )
        )
        flow = self.flow
        seed = self.seed * 2**32 + number
        steps = plan(hidden, measured_order(flow), flow.schedule, self.steps, flow.block_length, seed)
        chunks = prompt_chunks(len(known), flow.prompt_chunks) if starts else []
        asked = [known[chunk.start : chunk.stop] for chunk in chunks] + [step.positions for step in steps]
        # A chunk of the prompt is read with all that follows masked; a step of the answer, with what is yet to come.
        masked = [np.concatenate([known[chunk.start :], hidden]) for chunk in chunks]
        masked += [np.concatenate([later.positions for later in steps[i:]]) for i in range(len(steps))]
        rows = self._log_probs(models, ids, masked, asked)
        places = np.concatenate(asked)
        split = sum(map(len, asked[: len(chunks)]))
        tokens = torch.from_numpy(ids[places])
        own = rows.gather(2, tokens[:, None, None].expand(-1, len(models), 1))[..., 0].double().numpy()
        return Scores(
            prompt=own[:split].sum(axis=0),
            tokens=own[split:],
            rows=rows[split:],
            ids=tokens[split:],
            starts=starts,
            steps=np.repeat(np.arange(len(steps)), [len(step.positions) for step in steps]),
        )

    @torch.inference_mode()
    def _log_probs(
        self,
        models: Sequence[Any],
        ids: NDArray[np.int64],
        masked: Sequence[NDArray[np.int64]],
        asked: Sequence[NDArray[np.int64]],
    ) -> Tensor:
        """Log-probabilities [positions asked for, K, V] float32, on the CPU.

        Args:
            ids: [L].
            masked: which of them are hidden, once for each row of ``asked``.
            asked: positions whose tokens are asked for then.
        """
        texts = torch.from_numpy(ids).repeat(len(masked), 1)
        for text, places in zip(texts, masked, strict=True):
            text[torch.from_numpy(places)] = self.flow.mask_token_id
        positions = torch.arange(len(ids))
        found: list[list[Tensor]] = [[] for _ in models]
        for start in range(0, len(texts), self.rows):
            batch = texts[start : start + self.rows]
            for model, of_model in zip(models, found, strict=True):
                inputs = batch.to(model.device), positions.expand(batch.shape).to(model.device)
                logits = denoised(model, *inputs, self.flow.mask_token_id)[..., : self.vocab_size]
                for row, places in zip(logits, asked[start : start + self.rows], strict=True):
                    of_model.append(row[torch.from_numpy(places).to(row.device)].log_softmax(dim=-1).cpu())
                    if of_model[-1].isnan().any():
                        raise TrainingError(
                            f"the model in {model.name_or_path} gives NaN on held-out text, so its training went "
                            "wrong; lower training.learning_rate and train it again"
                        )
        rows = torch.stack([torch.cat(of_model) for of_model in found], dim=1)
        rows[..., self.flow.mask_token_id] = _NEVER
        return rows
