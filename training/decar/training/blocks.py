"""Texts and chats as rows of tokens with labels, and the loss on them. Knows tokenizers, nothing about experts.

Shapes: N rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor

from decar.router.errors import TrainingError
from decar.training.sources import Messages

IGNORED = -100
# How a chat template marks what an assistant writes; transformers gives a mask only for those that do.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Documents packed one after another into rows of one length.

    ``input_ids`` and ``labels``: [N, T] int64 on the CPU. Labels are -100 where nothing is learned: in padding, at the
    end of some rows, and in what of a chat is not an answer. ``num_tokens`` counts all but padding.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: int

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: those with a label, but for the first of a row."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    @property
    def row_tokens(self) -> tuple[float, int]:
        """(mean, largest) number of tokens in a row, padding included."""
        return self.length, self.length

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of ``rows`` of this dataset."""
        return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


class Rows(Protocol):
    """What a model is trained on: `Blocks`, or `ImageBlocks`, which says what its members mean."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def row_tokens(self) -> tuple[float, int]: ...
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


def pack(examples: Sequence[str | Messages], tokenizer: Any, length: int) -> Blocks:
    """``examples`` in rows of ``length`` tokens.

    Texts stand between bos (where the tokenizer has one) and eos, and go on in the next row. Chats are rendered with
    the chat template; one that does not fit into what is left of a row starts a new one.

    Raises:
        TrainingError: the chat template cannot render a chat.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    texts = [example for example in examples if isinstance(example, str)]
    encoded = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    stream: list[int] = []
    labels: list[int] = []
    padding = 0

    def pad() -> int:
        missing = -len(stream) % length
        stream.extend([fill] * missing)
        labels.extend([IGNORED] * missing)
        return missing

    for example in examples:
        if isinstance(example, str):
            ids = [*start, *next(encoded), tokenizer.eos_token_id]
            wanted = ids
        else:
            ids, wanted = render_chat(example, tokenizer)
            if len(ids) > -len(stream) % length:
                padding += pad()
        stream += ids
        labels += wanted
    padding += pad()
    shape = len(stream) // length, length
    blocks = Blocks(torch.tensor(stream).long().view(shape), torch.tensor(labels).long().view(shape), 0)
    # A batch of rows without a target would have the loss 0 / 0, and its gradient would spoil every weight.
    taught = (blocks.labels[:, 1:] != IGNORED).any(dim=1)
    return Blocks(blocks.input_ids[taught], blocks.labels[taught], len(stream) - padding)


def render_chat(messages: Messages, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and their labels: the token itself within the assistant's answers, -100 elsewhere.

    An answer's end belongs to it: the eos that follows it, or one put there if the last answer has none. Without
    ``{% generation %}`` in the chat template, answers are found as what each adds to the chat before it, and are
    tokenized apart from that, as when the prompt is all there is.

    Raises:
        TrainingError: the chat template refuses the chat, or rewrites earlier messages when later ones come.
    """
    try:
        if _GENERATION.search(tokenizer.chat_template or ""):
            rendered = tokenizer.apply_chat_template(
                messages, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = rendered["input_ids"], rendered["assistant_masks"]
        else:
            ids, mask = _mask_by_prefixes(messages, tokenizer)
    except (TemplateError, ValueError) as error:
        raise TrainingError(
            f"the chat template cannot render the chat that begins with {beginning(messages)!r} "
            f"({' '.join(str(error).split())})"
        ) from None
    eos = tokenizer.eos_token_id
    for i in range(1, len(ids)):
        if ids[i] == eos and mask[i - 1]:
            mask[i] = 1
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, mask, strict=True)]
    if messages[-1]["role"] == "assistant" and eos not in _last_answer(labels):
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels


def beginning(example: str | Messages) -> str:
    """What a text or a chat begins with, to name it by."""
    content = example if isinstance(example, str) else example[0]["content"]
    if not isinstance(content, str):
        content = "".join(part.get("text", "") for part in content)
    return str(content[:60])


def _last_answer(labels: list[int]) -> list[int]:
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return labels[start:end]


def _mask_by_prefixes(messages: Messages, tokenizer: Any) -> tuple[list[int], list[int]]:
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    whole = render(messages)
    pieces: list[tuple[str, int]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:i], add_generation_prompt=True), render(messages[: i + 1])
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(
                f"it renders message {i + 1} differently in different surroundings, so that answers cannot be told "
                "apart; put {% generation %} and {% endgeneration %} around them in the template"
            )
        pieces += [(whole[done : len(before)], 0), (whole[len(before) : len(after)], 1)]
        done = len(after)
    pieces.append((whole[done:], 0))
    ids: list[int] = []
    mask: list[int] = []
    for text, wanted in pieces:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += tokens
        mask += [wanted] * len(tokens)
    return ids, mask


@torch.inference_mode()
def mean_loss(model: Any, blocks: Rows, batch_size: int) -> float:
    """Nats per predicted token of ``blocks``."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        batch = {name: value.to(model.device) for name, value in blocks.collate(rows).items()}
        targets = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((targets != IGNORED).sum())
    return total / max(count, 1)
