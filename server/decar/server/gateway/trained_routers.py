"""The ensemble's trained routers, asked about prompts. Knows prompts; what a router does with them is `decar.router`.

C places of experts.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError

from decar.router import Ensemble, available_routers, load_trained, load_trained_images
from decar.router.manifest import Trained
from decar.server.gateway.engine import Engine
from decar.server.gateway.images import IMAGES_KEY, images_of, is_text
from decar.server.gateway.prompt import tokens_of
from decar.server.gateway.seats import Seats


class TrainedRouters:
    """Loads what training has put into the directory of ``ensemble``; ``engine`` makes the prompts, and reads them."""

    def __init__(self, ensemble: Ensemble, engine: Engine, seats: Seats):
        self._engine, self._seats = engine, seats
        self._of_texts = load_trained(ensemble) if "classifier" in available_routers(ensemble) else {}
        for text_router in self._of_texts.values():
            text_router.log_weights(["what loads on first use, loads before the first request"])
        self._of_images = load_trained_images(ensemble)
        for image_router in self._of_images.values():
            image_router.log_weights([[]])  # as above: no images are enough for the model to load
        if self._of_images:
            engine.keep_images(IMAGES_KEY)

    def of(self, ensemble: Ensemble, seats: Seats) -> TrainedRouters:
        """Those of another ensemble, over the same engine.

        Raises:
            EnsembleError: they cannot be loaded.
        """
        return TrainedRouters(ensemble, self._engine, seats)

    async def log_weights(self, prompt: Any, kind: Trained) -> np.ndarray:
        """Log weights [C] that a router gives for a prompt: for its images, if any, and else for its text.

        Raises:
            VLLMValidationError: its images were not kept.
        """
        images = images_of(prompt)
        if images and self._of_images:
            [weights] = await asyncio.to_thread(self._of_images[kind].log_weights, [images])
            return self._seats.seated(weights)
        if self._of_images and not is_text(prompt).all():  # vLLM makes a beam's prompt anew, without them
            raise VLLMValidationError(
                "a beam search cannot be routed by its images: leave use_beam_search out, or choose another route",
                parameter="use_beam_search",
            )
        tokenizer = self._engine.client.renderer.get_tokenizer()
        # Routers learn from documents, which have no special tokens.
        text = tokenizer.decode(np.asarray(tokens_of(prompt))[is_text(prompt)], skip_special_tokens=True)
        [weights] = await asyncio.to_thread(self._of_texts[kind].log_weights, [text])
        return self._seats.seated(weights)
