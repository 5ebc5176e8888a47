"""What is seen of a model while it is trained: losses by step, and how it continues prompts.

Reads the Trainer's log, which checkpoints hold, so that an interrupted training is seen as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from decar.router.errors import TrainingError
from decar.training.config import TrainingConfig
from decar.training.data.formats import MESSAGES_FIELD
from decar.training.data.shards import has_column
from decar.training.plots import pyplot

Log = Sequence[Mapping[str, Any]]
"""``trainer.state.log_history``."""


class CurvePoint(BaseModel):
    """Losses in nats per token; the training loss is the mean since the point before. None: not measured there."""

    step: int
    train_loss: float | None = None
    held_out_loss: float | None = None
    learning_rate: float | None = None


class Sample(BaseModel):
    """How the model went on after ``prompt`` when it had been trained for ``step`` steps."""

    step: int
    prompt: str
    text: str


def curve(log: Log) -> list[CurvePoint]:
    """What ``log`` says of losses and learning rate, a point for every step of which it says anything."""
    names = {"loss": "train_loss", "eval_loss": "held_out_loss", "learning_rate": "learning_rate"}
    points: dict[int, CurvePoint] = {}
    for entry in log:
        found = {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
        if found:
            point = points.setdefault(entry["step"], CurvePoint(step=entry["step"]))
            points[point.step] = point.model_copy(update=found)
    return [points[step] for step in sorted(points)]


def plot_curve(points: Sequence[CurvePoint], title: str, path: Path, kept_step: int | None = None) -> None:
    """Training and held-out loss by step; a line marks the step whose weights are kept."""
    plt = pyplot()

    figure, axis = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for name, label in (("train_loss", "training"), ("held_out_loss", "held out")):
        measured = [
            (point.step, getattr(point, name)) for point in points if getattr(point, name) is not None
        ]
        if measured:
            axis.plot(*zip(*measured, strict=True), marker=".", label=label)
    if kept_step is not None:
        axis.axvline(kept_step, color="grey", linestyle=":", label=f"kept: step {kept_step:,}")
    axis.set(title=title, xlabel="step", ylabel="loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


@dataclass(frozen=True)
class Prompts:
    """``training.sample_prompts`` and their tokens; ``num_tokens`` is how many a continuation has at most."""

    texts: list[str]
    ids: list[list[int]]
    num_tokens: int
    tokenizer: Any

    @torch.no_grad()
    def continuations(self, model: Any) -> list[str]:
        """How ``model`` continues each, by its likeliest tokens, until its eos."""
        from transformers import GenerationConfig

        model.eval()
        if not self.ids:  # not every model can go on
            return []
        end = model.generation_config.eos_token_id
        # A configuration of its own: the checkpoint's may draw tokens, or penalise some.
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.num_tokens,
            use_cache=True,
            eos_token_id=self.tokenizer.eos_token_id if end is None else end,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        texts = []
        for ids in self.ids:
            given = torch.tensor([ids], device=model.device)
            whole = model.generate(given, attention_mask=torch.ones_like(given), generation_config=greedy)
            texts.append(self.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))
        return texts

    def log_entry(self, model: Any) -> dict[str, str]:
        """The continuations as the Trainer logs them."""
        return {sample_key(i): text for i, text in enumerate(self.continuations(model))}

    def samples(self, log: Log) -> list[Sample]:
        """The continuations that ``log`` holds, of two at one step the later one."""
        found = {
            (entry["step"], i): Sample(step=entry["step"], prompt=prompt, text=entry[sample_key(i)])
            for entry in log
            for i, prompt in enumerate(self.texts)
            if sample_key(i) in entry
        }
        return list(found.values())


def sample_key(i: int) -> str:
    """What prompt ``i`` is called in logs and in TensorBoard."""
    return f"sample_{i + 1}"


def read_prompts(training: TrainingConfig, shard: Path, tokenizer: Any, model: Any) -> Prompts:
    """The prompts of ``training``, tokenized as a server does; where the ``shard`` has chats, each is a user's message.

    Raises:
        TrainingError: one is longer than ``model`` can read and continue.
    """
    is_chat = bool(training.sample_prompts) and has_column(shard, MESSAGES_FIELD)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    encoded = []
    for prompt in training.sample_prompts:
        if is_chat:
            message = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = tokenizer(prompt, verbose=False)["input_ids"]
            if ids[-1:] == [tokenizer.eos_token_id]:  # some tokenizers add it themselves
                ids = ids[:-1]
        if not ids:
            raise TrainingError(f"training.sample_prompts: {prompt!r} has no token; leave it out")
        if longest and len(ids) + training.sample_tokens > longest:
            raise TrainingError(
                f"training.sample_prompts: the {len(ids)} tokens of {prompt[:60]!r} and training.sample_tokens "
                f"{training.sample_tokens} are more than the max_position_embeddings {longest}; shorten one of them"
            )
        encoded.append(ids)
    return Prompts(training.sample_prompts, encoded, training.sample_tokens, tokenizer)
