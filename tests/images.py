"""Image–text experts for tests: tiny LLaVAs and InternVLs, real digits, and the mixture by plain transformers forwards.

Imports nothing from decar, as `reference.py`.

Shapes: K experts, T positions, V vocabulary.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from tests.reference import HEAD_DIM, MAX_POSITIONS, Decoded, make_tokenizer, mix

Kind = Literal["llava", "internvl"]

# The tokens that stand for an image: one a position, and InternVL's marks around them.
PLACES: dict[Kind, tuple[str, ...]] = {
    "llava": ("<image>",),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>"),
}
IMAGE_SIZE = 32  # pixels a side
PATCH_SIZE = 8  # pixels a side
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def digit_images(count: int) -> list[Image.Image]:
    """Handwritten digits (scikit-learn's, 8 x 8 pixels), enlarged."""
    pictures = load_digits().images[:count]
    return [
        Image.fromarray(np.uint8(np.repeat(np.repeat(picture, 4, 0), 4, 1) / 16 * 255)).convert("RGB")
        for picture in pictures
    ]


def data_url(image: Image.Image) -> str:
    """``image`` as the URL of a PNG, which is what clients send."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def image_chat(image: Image.Image, text: str) -> list[dict[str, Any]]:
    """One user's message with an image, as OpenAI's API takes it."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def make_processor(kind: Kind, directory: Path) -> Any:
    """A processor over `make_tokenizer`'s vocabulary and the tokens that stand for images."""
    tokenizer = make_tokenizer(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": [*PLACES[kind], "<video>"]})
    template = CHAT_TEMPLATE.replace("IMAGE", PLACES[kind][0])
    tokenizer.chat_template = template
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if kind == "llava":
        return LlavaProcessor(
            image_processor=CLIPImageProcessor(size=size, crop_size=size),
            tokenizer=tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            chat_template=template,
            num_additional_image_tokens=1,  # the class token, which the strategy "default" then leaves out
        )
    # InternVL's processor looks for these on the tokenizer.
    names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
    for name, token in zip(names, (*PLACES[kind], "<video>"), strict=True):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        tokenizer.init_kwargs[name] = token
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE // 2) ** 2,
        chat_template=template,
    )


def make_model(kind: Kind, tokenizer: Any) -> Any:
    """An untrained model that takes what `make_processor`'s processor gives."""
    vision = {
        "hidden_size": 2 * HEAD_DIM,
        "intermediate_size": 4 * HEAD_DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = {
        **vision,
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 1,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    common = {
        "image_token_id": tokenizer.convert_tokens_to_ids(PLACES[kind][0]),
        "tie_word_embeddings": False,
    }
    if kind == "llava":
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**vision, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE),
                text_config=LlamaConfig(**text, head_dim=HEAD_DIM),
                **common,
            )
        )
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=InternVLVisionConfig(
                **vision, image_size=[IMAGE_SIZE, IMAGE_SIZE], patch_size=[PATCH_SIZE, PATCH_SIZE]
            ),
            text_config=Qwen2Config(**text),
            **common,
        )
    )


def make_expert(kind: Kind, seed: int, directory: Path, processor: Any, own_share: float) -> None:
    """Save a model with random weights near those that all seeds have in common, and its processor."""
    model = make_model(kind, processor.tokenizer)
    common, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name or "lambda" in name:
                continue
            shared = torch.randn(parameter.shape, generator=common)
            noise = torch.randn(parameter.shape, generator=own)
            parameter.copy_(0.1 * (math.sqrt(1 - own_share**2) * shared + own_share * noise))
            if name.startswith("lm_head"):
                parameter *= 2
    model.to(torch.float32).save_pretrained(directory)
    if kind == "llava":
        # As vLLM reads a CLIP's weights, and hubs hold them; transformers reads both spellings, and writes the other.
        file = directory / "model.safetensors"
        weights = {
            name.replace("vision_tower.", "vision_tower.vision_model."): tensor
            for name, tensor in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})
    processor.save_pretrained(directory)


def make_image_ensemble(
    directory: Path, priors: Sequence[float], kind: Kind = "llava", own_share: float = 0.04
) -> Path:
    """Write an ensemble named ``kind`` of experts named ``expert0``, ``expert1``, ..."""
    directory.mkdir(parents=True)
    processor = make_processor(kind, directory / "tokenizer-source")
    names = [f"expert{k}" for k in range(len(priors))]
    for k, name in enumerate(names):
        make_expert(kind, k + 1, directory / "experts" / name, processor, own_share)
    manifest = {
        "format_version": 1,
        "name": kind,
        "experts": [
            {"name": n, "path": f"experts/{n}", "prior": p} for n, p in zip(names, priors, strict=True)
        ],
    }
    (directory / "ensemble.json").write_text(json.dumps(manifest, indent=2))
    return directory


# ---------------------------------------------------------------------------------------------- decoding


@dataclass(frozen=True)
class ImageReference:
    """An ensemble of image–text experts as transformers models."""

    directory: Path
    name: str
    experts: tuple[str, ...]
    prior: tuple[float, ...]
    models: tuple[Any, ...] = field(repr=False)
    processor: Any = field(repr=False)
    places: tuple[int, ...]  # ids of the tokens that stand for images

    @classmethod
    def load(cls, directory: Path, kind: Kind = "llava") -> ImageReference:
        manifest = json.loads((directory / "ensemble.json").read_text())
        entries = manifest["experts"]
        paths = [directory / entry["path"] for entry in entries]
        total = math.fsum(entry["prior"] for entry in entries)
        processor = AutoProcessor.from_pretrained(paths[0])
        return cls(
            directory,
            manifest["name"],
            tuple(entry["name"] for entry in entries),
            tuple(entry["prior"] / total for entry in entries),
            tuple(
                AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
                for path in paths
            ),
            processor,
            tuple(processor.tokenizer.convert_tokens_to_ids(list(PLACES[kind]))),
        )

    def encode(self, images: Sequence[Image.Image], text: str) -> dict[str, torch.Tensor]:
        """The inputs [1, T] of a user's message of ``images`` and ``text``, by transformers' own processor."""
        parts = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
        rendered = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True
        )
        # As for every chat: the template has put the special tokens that there are to be.
        inputs = self.processor(
            text=[rendered], images=list(images) or None, add_special_tokens=False, return_tensors="pt"
        )
        return dict(inputs)

    def is_text(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Which tokens [T] of a prompt were written by somebody."""
        return ~torch.isin(inputs["input_ids"][0], torch.tensor(self.places))

    @torch.inference_mode()
    def rows(self, inputs: dict[str, torch.Tensor], answer: Sequence[int]) -> torch.Tensor:
        """What each expert says after every token: log-probabilities [K, T, V] float64."""
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], dim=1)
        given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = [model(**given, use_cache=False).logits[0] for model in self.models]
        return torch.stack(logits).double().log_softmax(dim=-1)

    def prompt_log_weights(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The posterior [K] after a prompt, of which only the text counts: an image's places say nothing."""
        ids = inputs["input_ids"][0]
        said = self.rows(inputs, [])[:, :-1].gather(2, ids[None, 1:, None].expand(len(self.models), -1, 1))
        said[:, ~self.is_text(inputs)[1:]] = 0
        return (torch.tensor(self.prior).double().log() + said[..., 0].sum(dim=1)).log_softmax(dim=0)

    def decode(
        self, inputs: dict[str, torch.Tensor], log_weights: torch.Tensor, max_tokens: int, posterior: bool
    ) -> Decoded:
        """Greedily, by the velocity rule, from weights [K] that the answer moves on if ``posterior``."""
        answer = Decoded(inputs["input_ids"][0].tolist())
        for _ in range(max_tokens):
            rows = self.rows(inputs, answer.tokens)[:, -1]
            mixed = mix(log_weights, rows, "velocity")
            lead = mixed.topk(2)
            answer.weights.append(log_weights.exp().tolist())
            answer.tokens.append(int(lead.indices[0]))
            answer.logprobs.append(float(lead.values[0]))
            answer.margin = min(answer.margin, float(lead.values[0] - lead.values[1]))
            if posterior:
                log_weights = (log_weights + rows[:, answer.tokens[-1]]).log_softmax(dim=0)
        return answer
