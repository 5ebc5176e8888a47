"""Texts and chats as rows of tokens with labels, and the loss on them. Knows tokenizers, nothing about experts.

Shapes: N rows, B rows of a batch, T tokens.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, zip_longest
from typing import Any, NamedTuple, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from decar.router.errors import TrainingError
from decar.training.data.sources import Chat, Example, Messages, Piece, Tools, is_learned

IGNORED = -100
# What of the documents an expert does not learn, as it goes on after "dropped 3".
UNTAUGHT = "rows without a token to learn"
# What kinds of documents there are, for a model.
TEXTS, CHATS = "texts", "chats"
# How a chat template marks what an assistant writes; transformers gives a mask only for those that do.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class PackedDocument(NamedTuple):
    """What of one document a model learns, in tokens.

    A text has a target in every token but its first, a chat in those of its answers. ``unlearned`` targets are those
    that begin one of its later rows, where nothing predicts them, or that are cut off; ``detached`` ones are learned in
    a later row, without what stands in the rows before it. ``kind``: `TEXTS`, `CHATS`, or those with images.
    """

    kind: str
    begins: str
    tokens: int
    targets: int
    unlearned: int
    detached: int
    rows: int
    cut_off: int = 0


@dataclass
class Blocks(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Documents packed one after another into rows of one length.

    ``input_ids``, ``labels`` and ``position_ids``: [N, T] int64 on the CPU. Labels are -100 where nothing is learned:
    in padding, at the end of some rows, at a document's first token, and in what of a chat is not an answer. Positions
    start at 0 with every document and every row, by which transformers keeps a row's documents from seeing each other;
    they are None where no row has two. ``num_tokens`` counts all but padding; ``dropped``, rows that teach nothing.
    ``documents``, in order: adjacent pieces of one text are one of them.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None
    num_tokens: int
    dropped: Counter[str]
    documents: list[PackedDocument]

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
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def row_losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return row_losses(model, batch)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.input_ids[index], "labels": self.labels[index]}
        return row if self.position_ids is None else {**row, "position_ids": self.position_ids[index]}


class Rows(Protocol):
    """What a model is trained on: `Blocks`, `MaskedBlocks` or `ImageBlocks`, which say what their members mean."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_targets(self) -> int: ...
    @property
    def row_tokens(self) -> tuple[float, int]: ...
    @property
    def dropped(self) -> Mapping[str, int]: ...
    @property
    def documents(self) -> Sequence[PackedDocument]: ...
    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]: ...
    def row_losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


def pack(
    examples: Sequence[Example],
    tokenizer: Any,
    length: int,
    keeps_apart: bool = True,
    causal: bool = True,
) -> Blocks:
    """``examples`` in rows of ``length`` tokens.

    Texts are the tokens that the tokenizer gives for them, with an eos, and go on in the next row. Adjacent pieces of
    one text are one; eos stands after its last alone, bos (where the tokenizer adds one) before its first. Chats are
    rendered with the chat template; one that does not fit into what is left of a row starts a new one.

    Args:
        keeps_apart: whether the model keeps a row's documents apart by their positions; if not, each has its own rows.
        causal: whether tokens are predicted from those before them alone, so that nothing predicts the first of a row.

    Raises:
        TrainingError: the chat template cannot render a chat.
    """
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    stream: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    documents: list[PackedDocument] = []
    padding = 0

    def pad() -> int:
        missing = -len(stream) % length
        stream.extend([fill] * missing)
        labels.extend([IGNORED] * missing)
        positions.extend(range(missing))
        return missing

    whole = _whole(examples)
    for example, (ids, wanted, is_chat) in zip(whole, _encoded(whole, tokenizer), strict=True):
        room = -len(stream) % length
        if not keeps_apart or (is_chat and len(ids) > room):
            padding += pad()
            room = 0
        positions += [i if i < room else (i - room) % length for i in range(len(ids))]
        stream += ids
        if causal:
            wanted = [IGNORED, *wanted[1:]]  # nothing of the document predicts its first token
        labels += wanted
        documents.append(_packed(example, wanted, room or length, length, causal))
    padding += pad()
    shape = len(stream) // length, length
    rows, learned, places = (torch.tensor(all_).long().view(shape) for all_ in (stream, labels, positions))
    # A batch of rows without a target would have the loss 0 / 0, and its gradient would spoil every weight.
    taught = (learned[:, causal:] != IGNORED).any(dim=1)
    dropped = Counter({UNTAUGHT: int((~taught).sum())})
    return Blocks(
        rows[taught],
        learned[taught],
        places[taught] if keeps_apart else None,
        len(stream) - padding,
        +dropped,
        documents,
    )


def _packed(example: Example, labels: list[int], room: int, length: int, causal: bool) -> PackedDocument:
    """A document of these ``labels``, of which the first ``room`` lie in its first row."""
    later = labels[room:]
    starts = later[::length]
    unlearned = num_learned(starts) if causal else 0
    return PackedDocument(
        kind=CHATS if isinstance(example, Chat) else TEXTS,
        begins=beginning(example),
        tokens=len(labels),
        targets=num_learned(labels),
        unlearned=unlearned,
        detached=num_learned(later) - unlearned,
        rows=1 + len(starts),
    )


def length_quantiles(documents: Sequence[PackedDocument], *shares: float) -> list[int]:
    """Lengths in tokens that such ``shares`` of ``documents`` do not exceed; some document has each."""
    ordered = sorted(document.tokens for document in documents)
    return [ordered[max(math.ceil(share * len(ordered)) - 1, 0)] for share in shares]


def num_learned(labels: list[int]) -> int:
    """How many of ``labels`` are tokens to learn."""
    return len(labels) - labels.count(IGNORED)


def encode(example: Example, tokenizer: Any, causal: bool = True) -> tuple[list[int], list[int]]:
    """The tokens and labels of a text or chat by itself, as `pack` has them.

    Raises:
        TrainingError: the chat template cannot render the chat.
    """
    ids, wanted, _ = next(_encoded([example], tokenizer))
    return ids, [IGNORED, *wanted[1:]] if causal else wanted


def _whole(examples: Sequence[Example]) -> list[Example]:
    """``examples``, adjacent pieces of one text put together."""
    whole: list[Example] = []
    run: list[Piece] = []
    for example, after in zip_longest(examples, examples[1:]):
        if not isinstance(example, Piece):
            whole.append(example)
            continue
        run.append(example)
        next_piece = example.origin, example.number + 1
        if not isinstance(after, Piece) or (after.origin, after.number) != next_piece:
            text = "".join(piece.text for piece in run)
            whole.append(Piece(text, example.origin, run[0].number, example.is_last))
            run = []
    return whole


def _encoded(examples: Sequence[Example], tokenizer: Any) -> Iterator[tuple[list[int], list[int], bool]]:
    """(tokens, labels, whether it is a chat) of each."""
    beginnings = [
        example if isinstance(example, str) else example.text
        for example in examples
        if isinstance(example, str) or (isinstance(example, Piece) and example.number == 0)
    ]
    encoded = iter(tokenizer(beginnings, verbose=False)["input_ids"] if beginnings else ())
    for example in examples:
        if isinstance(example, Chat):
            yield *render_chat(example.messages, tokenizer, example.tools), True
            continue
        if isinstance(example, Piece) and example.number > 0:
            ids = _encode_apart(example.text, tokenizer)
        else:
            ids = next(encoded)
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it themselves
            ids = ids[:-1]
        if isinstance(example, str) or example.is_last:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, ids, False


def _encode_apart(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a ``text`` that goes on with another: without bos, and without the space that sentencepiece
    tokenizers put before all they are given."""
    for before in ("\n", "a"):
        alone, both = tokenizer([before, before + text], add_special_tokens=False, verbose=False)["input_ids"]
        if both[: len(alone)] == alone:
            return list(both[len(alone) :])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def render_chat(
    messages: Messages, tokenizer: Any, tools: Tools | None = None
) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and their labels: the token itself within the assistant's answers, -100 elsewhere.

    The tokens are those of ``apply_chat_template``, but that none reaches across the start or end of an answer: there
    they are cut as in generation, where the prompt is all there is. An answer's end belongs to it: the eos or other
    special token that follows, or an eos put there if the last answer has none. Answers are what ``{% generation %}``
    marks in the chat template, or else what each adds to the chat before it. Those of ``weight`` 0 are not learned.

    Raises:
        TrainingError: the chat template refuses the chat, or rewrites earlier messages when later ones come.
    """
    sent = [{key: said for key, said in message.items() if key != "weight"} for message in messages]
    try:
        template = tokenizer.get_chat_template(tools=tools)
        if _GENERATION.search(template):
            pieces = _marked_pieces(messages, sent, template, tokenizer, tools)
        else:
            pieces = _pieces_by_prefixes(messages, sent, tokenizer, tools)
    except (TemplateError, ValueError, TypeError) as error:
        raise TrainingError(
            f"the chat template cannot render the chat that begins with {beginning(messages)!r} "
            f"({' '.join(str(error).split())})"
        ) from None
    ids, labels = _encode_pieces([(text, wanted) for text, wanted in pieces if text], tokenizer)
    eos = tokenizer.eos_token_id
    for i in range(1, len(ids)):
        if ids[i] == eos and labels[i - 1] not in (IGNORED, eos):
            labels[i] = eos
    if is_learned(messages[-1]) and eos not in _last_answer(labels):
        ids, labels = [*ids, eos], [*labels, eos]
    return ids, labels


def _encode_pieces(pieces: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens and labels of the text that ``pieces`` are joined, each learned or not."""
    so_far = list(accumulate(text for text, _ in pieces))
    ids: list[int] = []
    labels: list[int] = []
    encoded = tokenizer(so_far, add_special_tokens=False, verbose=False)["input_ids"] if so_far else []
    for (text, wanted), both in zip(pieces, encoded, strict=True):
        tokens = both[len(ids) :] if both[: len(ids)] == ids else _encode_apart(text, tokenizer)
        ids += tokens
        labels += tokens if wanted else [IGNORED] * len(tokens)
    return ids, labels


def beginning(example: Example | Messages) -> str:
    """What a text or a chat begins with, to name it by."""
    if isinstance(example, Piece):
        example = example.text
    messages = example.messages if isinstance(example, Chat) else example
    content = messages if isinstance(messages, str) else messages[0]["content"]
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


def _marked_pieces(
    messages: Messages, sent: Messages, template: str, tokenizer: Any, tools: Tools | None
) -> list[tuple[str, bool]]:
    """The rendered chat cut at its answers' starts and ends, and which pieces are learned: those that it marks."""
    (whole,), (marks,) = render_jinja_template(
        [sent],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    answers = [message for message in messages if message["role"] == "assistant"]
    learned = [is_learned(message) for message in answers]
    if not all(learned) and len(marks) != len(answers):
        raise ValueError(
            f"it marks {len(marks)} answers of {len(answers)}, so that those of weight 0 cannot be told from others"
        )
    cuts = [0, *(place for mark in marks for place in mark), len(whole)]
    wanted = [False] * (len(cuts) - 1)
    wanted[1::2] = learned if len(marks) == len(answers) else [True] * len(marks)
    return [(whole[start:end], want) for (start, end), want in zip(pairwise(cuts), wanted, strict=True)]


def _pieces_by_prefixes(
    messages: Messages, sent: Messages, tokenizer: Any, tools: Tools | None
) -> list[tuple[str, bool]]:
    """As `_marked_pieces`, where an answer is what its message adds to the chat before it."""
    render = partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    whole = render(sent)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(sent[:i], add_generation_prompt=True), render(sent[: i + 1])
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
            raise ValueError(
                f"it renders message {i + 1} differently in different surroundings, so that answers cannot be told "
                "apart; put {% generation %} and {% endgeneration %} around them in the template"
            )
        is_last = i == len(messages) - 1
        end = len(before) + _answer_length(after[len(before) :], message["content"], tokenizer, is_last)
        pieces += [(whole[done : len(before)], False), (whole[len(before) : end], is_learned(message))]
        done = end
    return [*pieces, (whole[done:], False)]


def _answer_length(added: str, content: Any, tokenizer: Any, is_last: bool) -> int:
    """How much of the text that an answer has ``added`` is the answer with its end marker: the line ends that some
    templates write after that are never generated, unless an eos has to be put behind them."""
    said = content.strip() if isinstance(content, str) else ""
    start = max(added.find(said), 0) + len(said)
    eos = added.find(tokenizer.eos_token, start)
    if eos >= 0:
        return eos + len(tokenizer.eos_token)
    if is_last:
        return len(added)
    special = {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    return max((end + len(t) for t in special if (end := added.rfind(t, start)) >= 0), default=len(added))


@torch.inference_mode()
def mean_loss(model: Any, blocks: Rows, batch_size: int) -> float:
    """Nats per predicted token of ``blocks``."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        batch = {name: value.to(model.device) for name, value in blocks.collate(rows).items()}
        nats, targets = blocks.row_losses(model, batch)
        total += nats.sum().item()
        count += int(targets.sum())
    return total / max(count, 1)


def row_losses(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(nats [B] float64, predicted tokens [B] int64) of the rows of a ``batch``, summed over each row."""
    targets = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # With a cache, transformers takes positions that start anew for one document's.
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets.shape).sum(dim=1, dtype=torch.float64), (targets != IGNORED).sum(dim=1)
