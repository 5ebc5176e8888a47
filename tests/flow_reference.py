"""The yardstick of flow ensembles: tiny denoisers, and answers revealed by plain transformers forwards.

Written from the definitions alone and importing nothing from decar, so that a mistake there cannot hide here.

Shapes: K experts, T positions of a sequence, V token ids.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    prior: tuple[float, ...]
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
            prior=tuple(entry["prior"] / total for entry in manifest["experts"]),
            mask=manifest["flow"]["mask_token_id"],
            flow=manifest["flow"],
            tokenizer=PreTrainedTokenizerFast.from_pretrained(paths[0]),
        )

    @torch.inference_mode()
    def rows(self, sequence: Sequence[int]) -> torch.Tensor:
        """log p_k of each token at each position, without the mask token's logit: [K, T, V] float64."""
        ids = torch.tensor([list(sequence)])
        logits = torch.cat([model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in self.models])
        logits = logits.double()
        logits[:, :, self.mask] = -torch.inf
        return logits.log_softmax(dim=-1)
