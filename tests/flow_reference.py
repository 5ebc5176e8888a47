"""Tiny flow ensembles of real models, and their rows by plain transformers forwards.

Written from the definitions alone and importing nothing from decar, so that a mistake there cannot hide here.

Shapes: K experts, T positions of a sequence, V token ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tests.reference import VOCAB_SIZE, make_tokenizer

FLOW_POSITIONS = 160
MASK = "<mask>"
_SPREAD = 0.1
OWN_SHARE = 0.3  # of an expert's weights; the rest is common to all


def make_flow_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tests' own tokenizer, with a mask token."""
    tokenizer = make_tokenizer(directory, VOCAB_SIZE - 1)
    tokenizer.add_special_tokens({"mask_token": AddedToken(MASK, special=True)})
    tokenizer.model_max_length = FLOW_POSITIONS
    return tokenizer


def make_denoiser(seed: int, directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Save an fp32 BERT with random weights, near one that is common to all seeds."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=FLOW_POSITIONS,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = BertForMaskedLM(config)
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "LayerNorm" in name:
                continue
            shared = torch.randn(parameter.shape, generator=common)
            noise = torch.randn(parameter.shape, generator=own)
            spread = 2 * _SPREAD if "embeddings" in name else _SPREAD
            parameter.copy_(spread * (math.sqrt(1 - OWN_SHARE**2) * shared + OWN_SHARE * noise))
    model.to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_flow_ensemble(
    directory: Path, seeds: dict[str, int], priors: Sequence[float], *, name: str, **flow: Any
) -> Path:
    """Write a flow ensemble's directory."""
    directory.mkdir(parents=True)
    tokenizer = make_flow_tokenizer(directory / "tokenizer-source")
    for expert, seed in seeds.items():
        make_denoiser(seed, directory / "experts" / expert, tokenizer)
    manifest = {
        "format_version": 1,
        "name": name,
        "kind": "flow",
        "flow": {"mask_token_id": tokenizer.mask_token_id, **flow},
        "experts": [
            {"name": expert, "path": f"experts/{expert}", "prior": prior}
            for expert, prior in zip(seeds, priors, strict=True)
        ],
    }
    (directory / "ensemble.json").write_text(json.dumps(manifest, indent=2))
    return directory


@dataclass(frozen=True)
class FlowReference:
    """A flow ensemble as transformers models."""

    directory: Path
    name: str
    experts: tuple[str, ...]
    models: tuple[Any, ...] = field(repr=False)
    prior: np.ndarray
    mask: int
    flow: dict[str, Any]
    tokenizer: PreTrainedTokenizerFast = field(repr=False)

    @classmethod
    def load(cls, directory: Path) -> FlowReference:
        manifest = json.loads((directory / "ensemble.json").read_text())
        paths = [directory / entry["path"] for entry in manifest["experts"]]
        total = math.fsum(entry["prior"] for entry in manifest["experts"])
        return cls(
            directory=directory,
            name=manifest["name"],
            experts=tuple(entry["name"] for entry in manifest["experts"]),
            models=tuple(BertForMaskedLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths),
            prior=np.array([entry["prior"] / total for entry in manifest["experts"]]),
            mask=manifest["flow"]["mask_token_id"],
            flow=manifest["flow"],
            tokenizer=PreTrainedTokenizerFast.from_pretrained(paths[0]),
        )

    @property
    def vocabulary(self) -> int:
        return len(self.tokenizer)

    @torch.inference_mode()
    def log_probabilities(self, text: Sequence[int]) -> np.ndarray:
        """log p_k of each token at each position, without the mask token's logit: [K, T, V]."""
        ids = torch.tensor([list(text)])
        logits = torch.cat(
            [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in self.models]
        )
        logits = logits.double()
        logits[:, :, self.mask] = -torch.inf
        return np.asarray(logits.log_softmax(dim=-1).numpy())

    def probabilities(self, text: Sequence[int]) -> np.ndarray:
        """As `tests.flow.slowly_revealed` asks for them."""
        return np.exp(self.log_probabilities(text))

    def alone(self, expert: str) -> FlowReference:
        """The ensemble of this one expert."""
        k = self.experts.index(expert)
        return replace(self, experts=(expert,), models=(self.models[k],), prior=np.ones(1))

    def after(self, prompt: Sequence[int], answer_tokens: int) -> FlowReference:
        """With the weights that the known tokens of a prompt leave, revealed in chunks from left to right."""
        text = [*prompt, *[self.mask] * answer_tokens]
        known = [position for position, token in enumerate(prompt) if token != self.mask]
        chunks = min(self.flow.get("prompt_chunks", 4), len(known))
        log_weights = np.log(self.prior)
        for i in range(chunks):
            begin, end = len(known) * i // chunks, len(known) * (i + 1) // chunks
            hidden = [
                self.mask if position in known[begin:] else token for position, token in enumerate(text)
            ]
            rows = self.log_probabilities(hidden)
            log_weights = log_weights + sum(
                rows[:, position, text[position]] for position in known[begin:end]
            )
        weights = np.exp(log_weights - log_weights.max())
        return replace(self, prior=weights / weights.sum())

    def weights_of(self, text: Sequence[int], revealed_at: dict[int, int]) -> dict[int, np.ndarray]:
        """By position that was revealed, the weights [K] that mixed its token: the prior's, moved by what earlier steps
        revealed."""
        weights, found = self.prior.copy(), {}
        for step in sorted(set(revealed_at.values())):
            now = [position for position, at in revealed_at.items() if at == step]
            z = [self.mask if revealed_at.get(p, 0) >= step else token for p, token in enumerate(text)]
            rows = self.probabilities(z)
            found.update(dict.fromkeys(now, weights))
            weights = weights * np.prod([rows[:, p, text[p]] for p in now], axis=0)
            weights = weights / weights.sum()
        return found

    def shaken(self, seed: int, by: float) -> Shaken:
        return Shaken(self, seed, by)


class Shaken:
    """The same with probabilities that are off by a little: what comes of them anyway was not decided by a hair."""

    def __init__(self, reference: FlowReference, seed: int, by: float):
        self._reference, self._by, self._rng = reference, by, np.random.default_rng(seed)
        self.mask, self.prior, self.vocabulary = reference.mask, reference.prior, reference.vocabulary

    def probabilities(self, text: Sequence[int]) -> np.ndarray:
        found = self._reference.probabilities(text)
        return found * np.exp(self._by * self._rng.uniform(-1, 1, found.shape))
