"""Images to unit vectors: pixels and truncated SVD, or an image-embedding model. Knows nothing about experts.

Shapes: G groups of images (each those of one prompt or document), N images, D features, S side of a square in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from decar.router.errors import EnsembleError
from decar.router.features import Float32s, unit_rows
from decar.router.posterior import Float64s

if TYPE_CHECKING:
    from PIL.Image import Image

_EMBEDDING_BATCH = 16
# All that Pillow decodes by itself and people store photographs and drawings in. For some others it calls programs.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")


class UnreadableImage(Exception):
    """Bytes that are no image, or only the beginning of one."""


def decode_image(data: bytes) -> Image:
    """The image that ``data`` encodes, in RGB and to its last pixel.

    As vLLM reads it: turned as its EXIF data say, what is transparent on white.

    Raises:
        UnreadableImage: ``data`` cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image: Image.Image = Image.open(BytesIO(data), formats=_FORMATS)
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode != "RGB" and image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise UnreadableImage(f"it is no {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]} file") from None
    # Beside its own errors, Pillow lets those of its parsers through: SyntaxError, struct.error, ...
    except Exception as error:
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None


@dataclass(frozen=True)
class PixelFeatures:
    """Images as squares of ``side`` pixels, less their mean, projected on the components of a truncated SVD.

    Args:
        side: S.
        mean: [S·S·3], of values from 0 to 1.
        components: [D, S·S·3].
    """

    side: int
    mean: Float32s
    components: Float32s

    def __call__(self, groups: Sequence[Sequence[Image]]) -> Float64s:
        return _of_groups(groups, self._project)

    def _project(self, images: Sequence[Image]) -> Float64s:
        centred = pixels(images, self.side) - self.mean
        return np.asarray(centred @ self.components.T.astype(np.float64))


def pixels(images: Sequence[Image], side: int) -> Float64s:
    """``images`` as squares of ``side`` pixels, values from 0 to 1: [N, S·S·3]."""
    from PIL.Image import Resampling

    squares = [np.asarray(image.convert("RGB").resize((side, side), Resampling.BILINEAR)) for image in images]
    return np.array(squares, dtype=np.float64).reshape(len(images), -1) / 255


@dataclass(frozen=True)
class ImageEmbeddingFeatures:
    """What the Hugging Face model in ``directory`` makes of an image; no remote code, no network.

    That is, for CLIP and SigLIP, the vector that they compare with a text's; for a vision encoder alone, its projected
    or else its pooled output.
    """

    directory: Path

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        import torch
        import transformers

        try:
            # Pillow resizes alike everywhere, torchvision a little differently and not everywhere.
            processor = transformers.AutoImageProcessor.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False, backend="pil"
            )
            config = transformers.AutoConfig.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False
            )
            # The automatic class for a vision encoder would leave its projection out.
            architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
            model = architecture.from_pretrained(
                self.directory,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise EnsembleError(
                f"no image-embedding model can be read from {self.directory} ({' '.join(str(error).split())})"
            ) from None
        return processor, model.eval()

    def __call__(self, groups: Sequence[Sequence[Image]]) -> Float64s:
        return _of_groups(groups, self._embed_all)

    def _embed_all(self, images: Sequence[Image]) -> Float64s:
        starts = range(0, len(images), _EMBEDDING_BATCH)
        return np.concatenate([self._embed(images[start : start + _EMBEDDING_BATCH]) for start in starts])

    def _embed(self, images: Sequence[Image]) -> Float64s:
        import torch

        processor, model = self._model
        pixel_values = processor(list(images), return_tensors="pt")["pixel_values"]
        embed = getattr(model, "get_image_features", model)
        with torch.inference_mode():
            output = embed(pixel_values=pixel_values)
        if not isinstance(output, torch.Tensor):
            vectors = output.get("image_embeds")
            output = output.get("pooler_output") if vectors is None else vectors
        if output is None:
            raise EnsembleError(f"the model in {self.directory} makes no vectors of images; use e.g. CLIP's")
        return output.double().numpy()


def _of_groups(groups: Sequence[Sequence[Image]], embed: Callable[[Sequence[Image]], Float64s]) -> Float64s:
    """[G, D]: the mean direction of each group's images; zeros for a group without any."""
    from PIL import Image

    images = [image for group in groups for image in group]
    if not images:  # a blank one says what D is
        return np.zeros((len(groups), embed([Image.new("RGB", (8, 8))]).shape[1]))
    rows = unit_rows(embed(images))
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    sums = np.zeros((len(groups), rows.shape[1]))
    np.add.at(sums, group_of, rows)
    return unit_rows(sums)
