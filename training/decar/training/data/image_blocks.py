"""Chats about images as rows of tokens with labels and pixels. Knows processors and shards, nothing about experts.

Shapes: N rows, T tokens of the longest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decar.router.errors import TrainingError
from decar.router.images import decode_image
from decar.training.data.blocks import (
    IGNORED,
    UNTAUGHT,
    Blocks,
    PackedDocument,
    beginning,
    num_learned,
    pack,
    render_chat,
    row_losses,
)
from decar.training.data.corpus import IMAGES_FIELD, read_columns, read_row_groups
from decar.training.data.sources import Chat, Example, Messages, Piece, Tools, split_at_images

# A row group is about a megabyte, unless a document alone has more.
_ROW_GROUPS_KEPT = 128
_EXIF_ORIENTATION = 0x0112
IMAGE_CHATS = "image chats"
CUT_OFF = "tokens of chats about images beyond training.sequence_length"


class ShardImages:
    """The encoded images of a shard's rows, read as they are asked for; the last ones read stay in memory."""

    def __init__(self, file: Path):
        self.file = file
        self._row_group = lru_cache(_ROW_GROUPS_KEPT)(self._read_row_group)

    @cached_property
    def _table(self) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(self.file)

    @cached_property
    def _ends(self) -> list[int]:
        metadata = self._table.metadata
        return list(accumulate(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)))

    def _read_row_group(self, group: int) -> Any:
        return self._table.read_row_group(group, columns=[IMAGES_FIELD]).column(IMAGES_FIELD)

    def __getitem__(self, row: int) -> list[bytes]:
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        images: list[bytes] = self._row_group(group)[row - first].as_py()
        return images


@dataclass(frozen=True)
class ImageChat:
    """One chat: ``input_ids`` and ``labels`` [T], with as many image tokens as its images have places, and where its
    images are."""

    input_ids: Tensor
    labels: Tensor
    shard: ShardImages
    row: int

    def images(self) -> list[Any]:
        """Decoded, RGB."""
        return [decode_image(encoded) for encoded in self.shard[self.row]]


@dataclass
class ImageBlocks(torch.utils.data.Dataset[dict[str, Any]]):
    """``texts`` packed into rows of one length, and ``chats`` about images, each a row of its own length.

    ``dropped`` counts what the experts do not learn, by what it is; ``documents`` are the texts', then all chats about
    images.
    """

    texts: Blocks
    chats: list[ImageChat]
    processor: Any
    fill: int
    dropped: Counter[str]
    documents: list[PackedDocument]

    @property
    def num_tokens(self) -> int:
        return self.texts.num_tokens + sum(len(chat.input_ids) for chat in self.chats)

    @property
    def num_targets(self) -> int:
        return self.texts.num_targets + sum(int((chat.labels[1:] != IGNORED).sum()) for chat in self.chats)

    @property
    def row_tokens(self) -> tuple[float, int]:
        """(mean, largest) number of tokens in a row."""
        lengths = [len(chat.input_ids) for chat in self.chats] + [self.texts.length] * len(self.texts)
        return sum(lengths) / len(lengths), max(lengths)

    def row_losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return row_losses(model, batch)

    def __len__(self) -> int:
        return len(self.texts) + len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.texts):
            return {**self.texts[index], "images": []}
        chat = self.chats[index - len(self.texts)]
        return {"input_ids": chat.input_ids, "labels": chat.labels, "images": chat.images()}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` and, where documents share a row, ``position_ids`` [N, T], padded on the right,
        where no token of a row attends to it; and what the model needs of all images, in order."""
        images = [image for row in rows for image in row["images"]]
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.fill),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
            **image_inputs(images, self.processor),
        }
        if any("position_ids" in row for row in rows):
            positions = [row.get("position_ids", torch.arange(len(row["input_ids"]))) for row in rows]
            batch["position_ids"] = _padded(positions, 0)
        return batch


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def image_inputs(images: Sequence[Any], processor: Any) -> dict[str, Tensor]:
    """What a model takes beside tokens for ``images`` (decoded, RGB), e.g. ``pixel_values``; nothing for none."""
    if not images:
        return {}
    # A processor wants a place for each image; the tokens it makes of these are those of the rows already.
    inputs = processor(text=processor.image_token * len(images), images=list(images), return_tensors="pt")
    return {
        name: value for name, value in inputs.items() if name not in processor.tokenizer.model_input_names
    }


def read_image_blocks(
    examples: Sequence[Sequence[Example]],
    files: Sequence[Path],
    processor: Any,
    length: int,
    keeps_apart: bool = True,
) -> ImageBlocks:
    """The rows that an image-text model is trained on; see `pack` for those without images.

    A chat about images is a row of its own, cut after ``length`` tokens.

    Args:
        examples: of each shard, its texts and chats, as `read_examples` gives them.
        files: the shards.
        keeps_apart: as for `pack`.

    Raises:
        TrainingError: an image reaches beyond ``length`` tokens, the image token is in a text without images, or the
            chat template cannot render a chat.
    """
    tokenizer, render = processor.tokenizer, ImageRenderer(processor)
    texts: list[Example] = []
    chats = []
    dropped: Counter[str] = Counter()
    documents: list[PackedDocument] = []
    for shard, file in zip(examples, files, strict=True):
        images = ShardImages(file)
        for row, (example, sizes) in enumerate(zip(shard, image_sizes(file), strict=True)):
            if not sizes:
                texts.append(without_images(example, processor.image_token))
                continue
            assert isinstance(example, Chat)
            ids, labels, _ = render(example.messages, sizes, example.tools)
            if processor.image_token_id in ids[length:]:
                raise TrainingError(
                    f"the images of the chat that begins with {beginning(example)!r} reach beyond "
                    f"{length} tokens; raise training.sequence_length, or leave the chat out"
                )
            dropped[CUT_OFF] += max(len(ids) - length, 0)
            documents.append(
                PackedDocument(
                    kind=IMAGE_CHATS,
                    begins=beginning(example),
                    tokens=len(ids),
                    targets=num_learned(labels[1:]),
                    unlearned=num_learned(labels[length:]),
                    detached=0,
                    rows=1,
                    cut_off=max(len(ids) - length, 0),
                )
            )
            ids, labels = ids[:length], labels[:length]
            if any(label != IGNORED for label in labels[1:]):
                chats.append(ImageChat(torch.tensor(ids), torch.tensor(labels), images, row))
            else:
                dropped[UNTAUGHT] += 1
    fill = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    packed = pack(texts, tokenizer, length, keeps_apart)
    return ImageBlocks(packed, chats, processor, fill, packed.dropped + dropped, packed.documents + documents)


class ImageRenderer:
    """Chats about images to tokens and labels, as ``processor`` would write them."""

    def __init__(self, processor: Any):
        self.processor = processor
        self._known: dict[tuple[int, int], list[int]] = {}

    def __call__(
        self, messages: Messages, sizes: Sequence[tuple[int, int]], tools: Tools | None = None
    ) -> tuple[list[int], list[int], list[range]]:
        """The tokens of a chat about images of these (width, height), their labels (see `render_chat`), and which of
        the tokens stand for each image.

        Raises:
            TrainingError: the chat template cannot render the chat, or not with each image once.
        """
        image = self.processor.image_token_id
        ids, labels = render_chat(as_parts(messages), self.processor.tokenizer, tools)
        if ids.count(image) != len(sizes):
            raise TrainingError(
                f"the chat template renders {ids.count(image)} images of the {len(sizes)} in the chat that begins "
                f"with {beginning(messages)!r}"
            )
        remaining = iter(sizes)
        whole: list[int] = []
        wanted: list[int] = []
        places: list[range] = []
        for token, label in zip(ids, labels, strict=True):
            if token == image:
                whole += self._places(next(remaining))
                places.append(range(len(wanted), len(whole)))
                wanted += [IGNORED] * len(places[-1])
            else:
                whole.append(token)
                wanted.append(label)
        return whole, wanted, places

    def _places(self, size: tuple[int, int]) -> list[int]:
        """The tokens that stand for an image of ``size``."""
        if size not in self._known:
            from PIL import Image

            text, images = self.processor.image_token, [Image.new("RGB", size)]
            inputs = self.processor(text=text, images=images, add_special_tokens=False)
            self._known[size] = list(inputs["input_ids"][0])
        return self._known[size]


def as_parts(messages: Messages) -> Messages:
    """``messages`` as OpenAI's API has them, with text and images as parts of their content."""
    return [{**message, "content": _parts(message["content"])} for message in messages]


def _parts(content: str) -> list[dict[str, str]]:
    first, *rest = split_at_images(content)
    parts = [{"type": "text", "text": first}] if first or not rest else []
    for text in rest:
        parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def without_images(example: Example, image_token: str) -> Example:
    """A text or chat without images as an image-text model is trained on it.

    Raises:
        TrainingError: it has the image token.
    """
    if isinstance(example, Chat):
        said = [message["content"] for message in example.messages]
    else:
        said = [example.text if isinstance(example, Piece) else example]
    if any(image_token in text for text in said):
        raise TrainingError(
            f"the text that begins with {beginning(example)!r} has the token {image_token}, but no image; "
            "take it out, or choose another tokenizer.image_token"
        )
    return Chat(as_parts(example.messages), example.tools) if isinstance(example, Chat) else example


def image_sizes(file: Path) -> Iterator[list[tuple[int, int]]]:
    """(width, height) of each row's images, which the first bytes of an image say."""
    if IMAGES_FIELD not in read_columns(file):
        for rows in read_row_groups(file, ["source"]):
            yield from ([] for _ in range(len(rows)))
        return
    for rows in read_row_groups(file, [IMAGES_FIELD]):
        for images in rows.column(IMAGES_FIELD).to_pylist():
            yield [image_size(encoded) for encoded in images]


def image_size(encoded: bytes) -> tuple[int, int]:
    """(width, height), upright, which the first bytes of an image say."""
    from PIL import Image

    with Image.open(BytesIO(encoded)) as image:
        # TIFF's size is already that of the turned image.
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5 and image.format != "TIFF"
        return image.size[::-1] if turned else image.size
