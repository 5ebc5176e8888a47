"""The images of a prompt, where vLLM's renderer has replaced them by pixel tensors. Knows prompts alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES_KEY = "decar_images"
"""Where `Engine.keep_images` has them kept in a prompt, so that routers can look at them."""


def images_of(prompt: Any) -> list[Image]:
    """The images of ``prompt`` that were kept."""
    kept: list[Image] = prompt.get(IMAGES_KEY, [])
    return kept


def is_text(prompt: Any) -> np.ndarray:
    """Which tokens [T] of ``prompt`` are text; the others hold the places of images, and carry no likelihood."""
    text = np.ones(len(prompt["prompt_token_ids"]), dtype=bool)
    for places in (prompt.get("mm_placeholders") or {}).values():
        for place in places:
            text[place.offset : place.offset + place.length] = False
    return text
