"""The processor of an image-text model: how an image becomes tokens and pixels. Knows no data and no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from decar.router.errors import TrainingError
from decar.router.manifest import PROCESSOR_FILES


def processor_files(directory: Path) -> list[Path]:
    """What ``directory`` has of a processor."""
    return sorted(file for file in directory.glob("*processor*.json") if file.is_file())


def reads_images(model_config: Any) -> bool:
    """Whether a model of this transformers configuration takes images beside text."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(model_config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and hasattr(
        model_config, "vision_config"
    )


def load_processor(directory: Path, image_token: str, model_config: Any, tokenizer: Any) -> Any:
    """The processor for a model of ``model_config``: the one that came with the tokenizer, or a fresh one for LLaVA and
    InternVL.

    Args:
        directory: the tokenizer's.
        image_token: that of a fresh processor.

    Raises:
        TrainingError: there is none and transformers makes none, or tokenizer, chat template and processor do not fit.
    """
    if processor_files(directory):
        processor = _read(directory)
    elif model_config.model_type == "llava" and model_config.vision_config.model_type == "clip_vision_model":
        processor = _llava(model_config, tokenizer, image_token)
    elif model_config.model_type == "internvl":
        processor = _internvl(model_config, tokenizer, image_token)
    else:
        raise TrainingError(
            f"transformers makes no processor for a fresh {model_config.model_type}; set tokenizer.path to a directory "
            f"with a tokenizer and its processor ({' or '.join(PROCESSOR_FILES)})"
        )
    processor.tokenizer = tokenizer
    processor.chat_template = tokenizer.chat_template
    _check(processor, tokenizer)
    return processor


def _read(directory: Path) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        # Pillow resizes alike everywhere, torchvision a little differently and not everywhere.
        images = AutoImageProcessor.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError) as error:
        raise TrainingError(
            f"no processor can be read from {directory} ({' '.join(str(error).split())})"
        ) from None
    if not hasattr(processor, "image_processor"):
        raise TrainingError(f"the processor in {directory} is none for images and text")
    processor.image_processor = images
    return processor


def _llava(model_config: Any, tokenizer: Any, image_token: str) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _check_in_vocabulary(image_token, tokenizer)
    vision = model_config.vision_config
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size},
        ),
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=model_config.vision_feature_select_strategy,
        image_token=image_token,
        num_additional_image_tokens=1,  # CLIP's class embedding
    )


_AROUND = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
"""What an InternVL has besides the token that images stand at, as OpenGVLab's checkpoints call them."""


def name_marks(tokenizer: Any, image_token: str) -> None:
    """Let a tokenizer that has an InternVL's marks say which they are, as its processor asks for them by these names;
    they are saved with the tokenizer."""
    if not {image_token, *_AROUND.values()} <= set(tokenizer.get_vocab()):
        return
    for name, token in {**_AROUND, "context_image_token": image_token}.items():
        tokenizer.init_kwargs[name] = token


def _internvl(model_config: Any, tokenizer: Any, image_token: str) -> Any:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        raise TrainingError(
            "transformers' processor of an InternVL needs torchvision: pip install torchvision"
        )
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    missing = [token for token in _AROUND.values() if token not in tokenizer.get_vocab()]
    if missing:
        raise TrainingError(
            f"an InternVL needs the tokens {', '.join(_AROUND.values())} beside tokenizer.image_token, and the "
            f"tokenizer has no {missing[0]!r}: add them to tokenizer.chat_tokens, or take a tokenizer that has them"
        )
    _check_in_vocabulary(image_token, tokenizer)
    vision = model_config.vision_config
    (height, width), (down, across) = vision.image_size, vision.patch_size
    size = {"height": height, "width": width}
    return InternVLProcessor(
        GotOcr2ImageProcessorPil(size=size),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=int((height // down) * (width // across) * model_config.downsample_ratio**2),
    )


def _check_in_vocabulary(image_token: str, tokenizer: Any) -> None:
    if image_token not in tokenizer.get_vocab():
        raise TrainingError(
            f"the tokenizer has no token {image_token!r} (tokenizer.image_token) for images to stand at; a trained one "
            "gets it where the data have images, one at tokenizer.path has to bring it"
        )


def _check(processor: Any, tokenizer: Any) -> None:
    _check_in_vocabulary(processor.image_token, tokenizer)
    parts = [{"type": "image"}, {"type": "text", "text": "?"}]
    try:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        problem = f"it renders {rendered!r}"
    except Exception as error:  # whatever a template in Jinja can raise
        rendered, problem = "", " ".join(str(error).split())
    if rendered.count(processor.image_token) != 1 or "?" not in rendered:
        raise TrainingError(
            f"the chat template (tokenizer.chat_template) has to render a message of parts, "
            f"{{type: image}} as {processor.image_token} and {{type: text}} as its text, but of one each {problem}"
        )
