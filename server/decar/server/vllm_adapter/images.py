"""The images of a prompt, where vLLM's renderer has replaced them by pixel tensors. Knows the renderer, no engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_KEY = "decar_images"


def keep_images(renderer: Any) -> None:
    """Have ``renderer`` keep the images in the prompts that it makes, so that routers can look at them."""
    process = renderer._process_tokens_async

    async def process_and_keep(prompt: Any, **kwargs: Any) -> Any:
        made = await process(prompt, **kwargs)
        images = (prompt.get("multi_modal_data") or {}).get("image")
        if images is not None:
            images = images if isinstance(images, list) else [images]
            made[_KEY] = [getattr(image, "media", image) for image in images]
        return made

    renderer._process_tokens_async = process_and_keep


def images_of(prompt: Any) -> list[Image]:
    """The images of ``prompt`` that `keep_images` kept."""
    kept: list[Image] = prompt.get(_KEY, [])
    return kept


def is_text(prompt: Any) -> np.ndarray:
    """Which tokens [T] of ``prompt`` are text; the others hold the places of images, and carry no likelihood."""
    found = np.ones(len(prompt["prompt_token_ids"]), dtype=bool)
    for ranges in (prompt.get("mm_placeholders") or {}).values():
        for of in ranges:
            found[of.offset : of.offset + of.length] = False
    return found
