"""The ensemble's trained routers, asked about prompts. Knows prompts; what a router does with them is `decar.router`.

K experts.
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


class TrainedRouters:
    """Loads what training has put into the directory of ``ensemble``; ``engine`` makes the prompts, and reads them."""

    def __init__(self, ensemble: Ensemble, engine: Engine):
        self._engine = engine
        self._of_texts = load_trained(ensemble) if "classifier" in available_routers(ensemble) else {}
        for text_router in self._of_texts.values():
            text_router.log_weights(["what loads on first use, loads before the first request"])
        self._of_images = load_trained_images(ensemble)
        for image_router in self._of_images.values():
            image_router.log_weights([[]])  # as above: no images are enough for the model to load
        if self._of_images:
            engine.keep_images(IMAGES_KEY)

    def of(self, ensemble: Ensemble) -> TrainedRouters:
        """Those of another ensemble, over the same engine.

        Raises:
            EnsembleError: they cannot be loaded.
        """
        return TrainedRouters(ensemble, self._engine)

    async def log_weights(self, prompt: Any, kind: Trained) -> np.ndarray:
        """Log weights [K] that a router gives for a prompt: for its images, if any, and else for its text.

        Raises:
            VLLMValidationError: there was such a router when the request came, and there is none any more; or
                its images were not kept.
        """
        if kind not in self._of_texts:
            raise VLLMValidationError(
                f"router {kind!r} is not trained any more: ask for another", parameter="decar"
            )
        images = images_of(prompt)
        if images and self._of_images:
            return (await asyncio.to_thread(self._of_images[kind].log_weights, [images]))[0]
        if self._of_images and not is_text(prompt).all():  # vLLM makes a beam's prompt anew, without them
            raise VLLMValidationError(
                "a beam search cannot be routed by its images: leave use_beam_search out, or choose another route",
                parameter="use_beam_search",
            )
        tokenizer = self._engine.client.renderer.get_tokenizer()
        text = tokenizer.decode(np.asarray(tokens_of(prompt))[is_text(prompt)])
        return (await asyncio.to_thread(self._of_texts[kind].log_weights, [text]))[0]
