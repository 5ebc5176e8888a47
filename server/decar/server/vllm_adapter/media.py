"""Where images may come from. Knows vLLM's media connector, no engines.

A server that fetches whatever URL a request names can be sent to places that only it can reach. So a request brings its
images along, as data: URLs, unless the operator names hosts with --allowed-media-domains.
"""

from __future__ import annotations

import re
from typing import Any

import aiohttp
from vllm.exceptions import VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-f]+>")


@MEDIA_CONNECTOR_REGISTRY.register("decar")
class Connector(MediaConnector):
    """vLLM's own, but for what may be fetched, and for errors: whatever is wrong with an image, the request is."""

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """The image at ``url``.

        Raises:
            VLLMValidationError: it may not or cannot be fetched, or is no image.
        """
        if url[:4].lower() == "http" and not self.allowed_media_domains:
            raise VLLMValidationError(
                "this server fetches no images: send them as data: URLs, or start it with --allowed-media-domains",
                parameter="image_url",
            )
        try:
            return await super().load_from_url_async(url, *args, **kwargs)
        except (
            ValueError,
            OSError,
            RuntimeError,
            aiohttp.ClientError,
            VLLMUnprocessableEntityError,
        ) as error:
            reason = _ADDRESS.sub("", str(error)) or type(error).__name__
            raise VLLMValidationError(f"an image cannot be read ({reason})", parameter="image_url") from None
