"""Held-out examples, and what models say of them: the one place that makes examples, and the one that runs models.

Knows shards, tokenizers and checkpoints as transformers loads them. What a system makes of it is `systems.py`'s.

Shapes: B texts, L tokens of a text, T of what follows its prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decar.router.errors import TrainingError
from decar.router.manifest import Start
from decar.training.blocks import IGNORED, render_chat
from decar.training.config import TrainConfig
from decar.training.partition import read_examples
from decar.training.sources import Messages
from decar.training.systems import Scores


@dataclass(frozen=True)
class Text:
    """One example: ``ids``, bos in front, of which the first ``prompt_tokens`` are given and the others scored.

    ``domain``: whose held-out text it is. An answer is an assistant's, its end included; what else is scored goes on
    after a prompt of any text.
    """

    domain: int
    ids: list[int]
    prompt_tokens: int
    is_answer: bool = False


@dataclass(frozen=True)
class HeldOut:
    """``texts`` by length. Left out are texts that end with the prompt, and answers that end after ``max_tokens``."""

    texts: list[Text]
    too_short: int
    too_long: int


def read_texts(config: TrainConfig, tokenizer: Any, max_tokens: int) -> HeldOut:
    """Of every expert's held-out documents, drawn by the seed: texts cut to ``max_tokens``, and all answers of chats.

    Raises:
        TrainingError: an expert has none that can be scored.
    """
    rng = np.random.default_rng(config.seed)
    settings = config.evaluate
    found: list[Text] = []
    too_short = too_long = 0
    for domain, name in enumerate(config.expert_names):
        examples = read_examples(config, name, "held_out")
        drawn = [examples[i] for i in rng.permutation(len(examples))[: settings.max_texts]]
        texts = [example for example in drawn if isinstance(example, str)]
        encoded = tokenizer(texts, truncation=True, max_length=max_tokens, verbose=False) if texts else {}
        long_enough = [ids for ids in encoded.get("input_ids", []) if len(ids) > settings.prompt_tokens]
        answers = [
            answer
            for example in drawn
            if not isinstance(example, str)
            for answer in _answers(domain, example, tokenizer)
        ]
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


def _answers(domain: int, messages: Messages, tokenizer: Any) -> list[Text]:
    """Each answer of a chat, after all that comes before it."""
    ids, labels = render_chat(messages, tokenizer)
    answers = []
    start = 0
    for is_answer, run in groupby(label != IGNORED for label in labels):
        end = start + len(list(run))
        if is_answer and start:  # nothing predicts the first token of all
            answers.append(Text(domain, ids[:end], start, is_answer=True))
        start = end
    return answers


def load_model(directory: Path) -> Any:
    """The causal language model in ``directory``, fp32, on the GPU where there is one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


@torch.inference_mode()
def scored(
    models: Sequence[Any], texts: Sequence[Text], batch_size: int, vocab_size: int
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
        rows = []
        for model in models:
            logits = model(input_ids=ids.to(model.device)).logits
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
    """``rows`` [L - 1, K, V], split after the prompt's tokens; the first token has no row."""
    own, split = chosen(text, rows), text.prompt_tokens - 1
    return Scores(
        prompt=own[:split].sum(axis=0),
        tokens=own[split:],
        rows=rows[split:],
        ids=torch.tensor(text.ids[text.prompt_tokens :]),
        starts=starts,
    )
