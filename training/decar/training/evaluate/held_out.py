"""Held-out examples, and what models say of them: the one place that makes examples, and the one that runs models.

Knows shards, tokenizers and models in memory. What a system makes of it is `systems.py`'s.

Shapes: B texts, L tokens of a text, T of what follows its prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decar.router.errors import TrainingError
from decar.router.images import decode_image
from decar.router.manifest import Start
from decar.training.config import EvaluateConfig
from decar.training.data.blocks import IGNORED, render_chat
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.image_blocks import ImageRenderer, ShardImages, image_inputs, image_sizes
from decar.training.data.shards import has_column, read_examples
from decar.training.data.sources import Chat, Piece
from decar.training.evaluate.systems import Scores
from decar.training.run import Run


@dataclass(frozen=True)
class Text:
    """One example: ``ids``, as the tokenizer gives them; the first ``prompt_tokens`` are given, the others scored.

    ``domain``: whose held-out text it is. An answer is an assistant's, its end included; what else is scored goes on
    after a prompt of any text. ``places``: which of the ids stand for each image; ``images`` decodes those.
    """

    domain: int
    ids: list[int]
    prompt_tokens: int
    is_answer: bool = False
    places: Sequence[range] = ()
    images: Callable[[], Sequence[Any]] = tuple


@dataclass(frozen=True)
class HeldOut:
    """``texts`` by length. Left out are texts that end with the prompt, and answers that end after ``max_tokens``."""

    texts: list[Text]
    too_short: int
    too_long: int


def read_texts(
    run: Run, settings: EvaluateConfig, seed: int, tokenizer: Any, max_tokens: int, processor: Any = None
) -> HeldOut:
    """Of every expert's held-out documents, drawn by the seed: texts cut to ``max_tokens``, and all answers of chats.

    Args:
        processor: that of image-text models.

    Raises:
        TrainingError: an expert has none that can be scored.
    """
    rng = np.random.default_rng(seed)
    found: list[Text] = []
    too_short = too_long = 0
    for domain, name in enumerate(run.experts):
        shard = run.shard(name, "held_out")
        examples = read_examples(shard)
        drawn = rng.permutation(len(examples))[: settings.max_texts].tolist()
        texts = [
            example.text if isinstance(example, Piece) else example
            for example in (examples[i] for i in drawn)
            if not isinstance(example, Chat)
        ]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, verbose=False) if texts else {}
        long_enough = [ids for ids in encoded.get("input_ids", []) if len(ids) > settings.prompt_tokens]
        chats = {i: example for i in drawn if isinstance(example := examples[i], Chat)}
        answers = []
        if processor is None:
            for chat in chats.values():
                answers += _answers(domain, *render_chat(chat.messages, tokenizer, chat.tools))
        else:
            render = ImageRenderer(processor)
            any_images = has_column(shard, IMAGES_FIELD)
            sizes = list(image_sizes(shard)) if any_images else [[] for _ in examples]
            of_shard = ShardImages(shard)
            for i, chat in chats.items():
                rendered = render(chat.messages, sizes[i], chat.tools)
                answers += _answers(domain, *rendered, partial(of_shard.__getitem__, i))
        fitting = [answer for answer in answers if len(answer.ids) <= max_tokens]
        if not long_enough and not fitting:
            problem = f"no held-out text of {name!r} is longer than evaluate.prompt_tokens, {settings.prompt_tokens}"
            if answers:
                problem += (
                    f", and no answer in its held-out chats ends within evaluate.max_tokens, {max_tokens}"
                )
            raise TrainingError(problem)
        too_short += len(texts) - len(long_enough)
        too_long += len(answers) - len(fitting)
        found += [Text(domain, ids, settings.prompt_tokens) for ids in long_enough] + fitting
    return HeldOut(sorted(found, key=lambda text: len(text.ids)), too_short, too_long)


def _answers(
    domain: int,
    ids: list[int],
    labels: list[int],
    places: Sequence[range] = (),
    encoded: Callable[[], Sequence[bytes]] = tuple,
) -> list[Text]:
    """Each answer of a chat, after all that comes before it; ``encoded`` reads the chat's images."""
    answers = []
    start = 0
    for is_answer, run in groupby(label != IGNORED for label in labels):
        end = start + len(list(run))
        if is_answer and start:  # nothing predicts the first token of all
            seen = [place for place in places if place.stop <= start]
            images = partial(_decoded, encoded, len(seen))
            answers.append(Text(domain, ids[:end], start, True, seen, images))
        start = end
    return answers


def _decoded(encoded: Callable[[], Sequence[bytes]], count: int) -> list[Any]:
    return [decode_image(data) for data in encoded()[:count]]


@torch.inference_mode()
def scored(
    models: Sequence[Any], texts: Sequence[Text], batch_size: int, vocab_size: int, processor: Any = None
) -> Iterator[tuple[Text, Tensor]]:
    """Each text with the log-probabilities [L - 1, models, V] of its tokens after the first, float32, on the CPU.

    The rows of one batch are held at a time.

    Raises:
        TrainingError: a model says NaN.
    """
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        # Padding is on the right, where no token of the text attends to it.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True)
        inputs = {"input_ids": ids} | image_inputs(
            [image for text in batch for image in text.images()], processor
        )
        rows = []
        for model in models:
            logits = model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).logits
            rows.append(logits[:, :-1, :vocab_size].float().log_softmax(-1).cpu())
            if rows[-1][..., 0].isnan().any():  # one NaN makes its whole row NaN
                raise TrainingError(
                    f"the model in {model.name_or_path} gives NaN on held-out text, so its training went wrong; "
                    "lower training.learning_rate and train it again"
                )
        for i, text in enumerate(batch):
            yield text, torch.stack([row[i, : len(text.ids) - 1] for row in rows], dim=1)


def chosen(text: Text, rows: Tensor) -> NDArray[np.float64]:
    """Log-probabilities [L - 1, models] of the text's own tokens."""
    ids = torch.tensor(text.ids[1:])[:, None, None].expand(-1, rows.shape[1], 1)
    return rows.gather(2, ids)[..., 0].double().numpy()


def scores_of(text: Text, rows: Tensor, starts: Mapping[Start, NDArray[np.float64]]) -> Scores:
    """``rows`` [L - 1, K, V], split after the prompt's tokens; the first token has no row.

    As in the server, what stands for an image was not written by anybody, and says nothing about experts.
    """
    own, split = chosen(text, rows), text.prompt_tokens - 1
    written = np.ones(len(text.ids), dtype=bool)
    for place in text.places:
        written[place] = False
    return Scores(
        prompt=own[:split][written[1 : split + 1]].sum(axis=0),
        tokens=own[split:],
        rows=rows[split:],
        ids=torch.tensor(text.ids[text.prompt_tokens :]),
        starts=starts,
    )
