"""The ensemble that clients are tried on: two experts without any skill but that of closing what a grammar has opened.

Random experts never end a text within JSON, and would fail every check of a structured answer. These prefer, in this
order and whatever was said before, `"`, `}`, `]`, `,` and `3`: a grammar makes an object of that which fits its schema.
What a client makes of an answer is the check, not the answer.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.reference import ExpertSpec, make_ensemble, make_tokenizer

NAME = "demo"
EXPERTS = ("code", "prose")
POSITIONS = 8192
PREFERRED = {'"': 24.0, "}": 21.0, "]": 18.0, ",": 15.0, "3": 12.0}
"""Token -> about how many nats it has before what a random expert makes of the text so far."""
_CONSTANT = 2.0  # what the first dimension of every embedding is, so that it says nothing of the text


def make(directory: Path) -> Path:
    """Write the ensemble to ``directory``."""
    source = directory.with_name(directory.name + "-tokenizer")
    tokenizer = make_tokenizer(source)
    tokenizer.model_max_length = POSITIONS
    specs = [ExpertSpec(name, "llama", seed, 0.5) for seed, name in enumerate(EXPERTS, 1)]
    make_ensemble(directory, specs, name=NAME, tokenizer=tokenizer)
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in PREFERRED}
    assert tokenizer.unk_token_id not in ids.values()
    for spec in specs:
        _prefer(directory / "experts" / spec.name, ids)
    return directory


def _prefer(path: Path, ids: dict[str, int]) -> None:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model.config.max_position_embeddings = POSITIONS
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        hidden = model.model(torch.arange(64).unsqueeze(0)).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight[:, 0] = 0
        for text, nats in PREFERRED.items():
            model.lm_head.weight[ids[text]] = 0
            model.lm_head.weight[ids[text], 0] = nats / hidden
    model.save_pretrained(path)
