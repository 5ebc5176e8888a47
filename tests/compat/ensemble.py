"""The ensemble that clients are tried on: two experts without any skill but that of closing what a grammar has opened.

Random experts never end a text within JSON, and would fail every check of a structured answer. These prefer, in this
order and whatever was said before, `"`, `}`, `]`, `,`, `3`, `:` and the end, and blanks least of all: a grammar makes
an object of that which fits its schema.
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
PREFERRED = {'"': 24.0, "}": 21.0, "]": 18.0, ",": 15.0, "3": 12.0, ":": 9.0, "</s>": 8.0}
"""Token -> about how many nats it has before what a random expert makes of the text so far."""
BLANK_NATS = -24.0
"""The same of blanks, which grammars of tool calls allow anywhere, and any number of."""
_CONSTANT = 2.0  # what the first dimension of every embedding is, so that it says nothing of the text


def make(directory: Path) -> Path:
    """Write the ensemble to ``directory``."""
    source = directory.with_name(directory.name + "-tokenizer")
    tokenizer = make_tokenizer(source)
    tokenizer.model_max_length = POSITIONS
    specs = [ExpertSpec(name, "llama", seed, 0.5) for seed, name in enumerate(EXPERTS, 1)]
    make_ensemble(directory, specs, name=NAME, tokenizer=tokenizer)
    nats = {tokenizer.convert_tokens_to_ids(text): more for text, more in PREFERRED.items()}
    nats |= {token: BLANK_NATS for token in range(3, len(tokenizer)) if tokenizer.decode([token]).isspace()}
    for spec in specs:
        _prefer(directory / "experts" / spec.name, nats)
    return directory


def _prefer(path: Path, nats: dict[int, float]) -> None:
    """Give each token so many nats more than what is random."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
    model.config.max_position_embeddings = POSITIONS
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = _CONSTANT
        hidden = model.model(torch.arange(64).unsqueeze(0)).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight[:, 0] = 0
        for token, more in nats.items():
            model.lm_head.weight[token] = 0
            model.lm_head.weight[token, 0] = more / hidden
    model.save_pretrained(path)
