"""Routers for images: their features, their files, and images as vLLM reads them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from sklearn.datasets import load_digits
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from vllm.multimodal.media.image import ImageMediaIO

from decar.router import Ensemble, EnsembleError, load_trained_images
from decar.router.files import Centroids, Classifier, TrainedRouter, read_image_router, write_router
from decar.router.images import ImageEmbeddingFeatures, PixelFeatures, UnreadableImage, decode_image, pixels
from tests.reference import Reference

NAMES = ("maths", "code", "prose")
SIDE, NUM_FEATURES = 8, 5


def digits(count: int) -> list[Image.Image]:
    return [Image.fromarray(image.astype(np.uint8) * 15) for image in load_digits().images[:count]]


@pytest.fixture(scope="module")
def features() -> PixelFeatures:
    values = pixels(digits(50), SIDE)
    components = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)[2][:NUM_FEATURES]
    return PixelFeatures(SIDE, values.mean(axis=0).astype(np.float32), components.astype(np.float32))


@pytest.fixture(scope="module")
def router(features: PixelFeatures) -> TrainedRouter[Any]:
    rng = np.random.default_rng(0)
    weight, bias, centroids = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, NUM_FEATURES), (3,), (3, NUM_FEATURES))
    )
    return TrainedRouter(NAMES, features, Classifier(weight, bias, 0.7), Centroids(centroids, "cosine", 0.05))


@pytest.fixture
def directory(trio: Reference, router: TrainedRouter[Any], tmp_path: Path) -> Path:
    """An ensemble with a router for images, and none for texts."""
    copy = Path(shutil.copytree(trio.directory, tmp_path / "trio"))
    shutil.rmtree(copy / "router", ignore_errors=True)
    (copy / "router/image").mkdir(parents=True)
    write_router(router, copy / "router/image")
    return copy


def test_pixel_features_are_projections_of_the_mean_direction(features: PixelFeatures) -> None:
    one, two, three = digits(3)

    def direction(image: Image.Image) -> Any:
        # 8 × 8 pixels of one channel are those of three alike, unresized.
        flat = np.repeat(np.asarray(image).ravel() / 255, 3)
        projected = features.components @ (flat - features.mean)
        return projected / np.linalg.norm(projected)

    got = features([[one], [two, three], []])
    both = direction(two) + direction(three)
    expected = [direction(one), both / np.linalg.norm(both), np.zeros(NUM_FEATURES)]
    # mean and components are float32, whose rounding is 6e-8 of values up to 1, summed over 192
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert features([]).shape == (0, NUM_FEATURES)


def test_an_ensemble_gives_weights_for_images(directory: Path, router: TrainedRouter[Any]) -> None:
    routers = load_trained_images(Ensemble.load(directory))
    one, two, three = digits(3)
    for kind in ("classifier", "centroid"):
        log_weights = routers[kind].log_weights([[one], [two, three]])  # type: ignore[index]
        assert log_weights.shape == (2, 3)
        np.testing.assert_allclose(np.exp(log_weights).sum(axis=1), 1.0, rtol=1e-12)
    scores = router.features([[one]]) @ router.classifier.weight.T + router.classifier.bias
    expected = np.exp(scores[0] / 0.7) * [0.2, 0.5, 0.3]
    got = routers["classifier"].log_weights([[one]])
    np.testing.assert_allclose(np.exp(got[0]), expected / expected.sum(), rtol=1e-6)


def test_an_ensemble_without_image_router_has_none(trio: Reference) -> None:
    assert load_trained_images(Ensemble.load(trio.directory)) == {}


def test_files_keep_every_bit(directory: Path, router: TrainedRouter[Any]) -> None:
    read = read_image_router(directory / "router/image", NAMES)
    assert np.array_equal(read.features([[d] for d in digits(9)]), router.features([[d] for d in digits(9)]))
    assert np.array_equal(read.classifier.weight, router.classifier.weight)
    assert np.array_equal(read.centroids.centroids, router.centroids.centroids)


def edit_json(directory: Path, **changes: Any) -> None:
    file = directory / "router/image/router.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop_array(directory: Path, name: str) -> None:
    file = directory / "router/image/router.safetensors"
    arrays = load_file(file)
    del arrays[name]
    save_file(arrays, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "router/image/router.json").write_text("{"), r"router\.json is damaged \(JSON: "),
        (lambda d: (d / "router/image/router.safetensors").unlink(), r"router\.safetensors is missing"),
        (lambda d: edit_json(d, side=0), r"router\.json is damaged \(side"),
        (lambda d: edit_json(d, side=9), r"pixels\.mean is no finite float32 array of shape \[243\]"),
        (lambda d: edit_json(d, side=None), r"image/embedding/config\.json is missing"),
        (lambda d: edit_json(d, experts=["a"]), r"router of the experts a, but the manifest has maths"),
        (lambda d: edit_json(d, terms=["a"]), r"router\.json is damaged \(terms"),
        (lambda d: drop_array(d, "pixels.components"), r"pixels\.components is no finite"),
    ],
)
def test_wrong_files_are_named(directory: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(directory)
    with pytest.raises(EnsembleError, match=message) as caught:
        Ensemble.load(directory)
    assert "\n" not in str(caught.value)
    assert "decar-train router" in str(caught.value)


# ---------------------------------------------------------------------------------------------- reading images


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    with BytesIO() as buffer:
        image.save(buffer, kind, **settings)
        return buffer.getvalue()


def variants() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    clear = Image.fromarray(rng.integers(0, 256, (7, 9, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    return {
        "RGB": encoded(colour, "PNG"),
        "grey": encoded(colour.convert("L"), "PNG"),
        "RGBA": encoded(clear, "PNG"),
        "grey with alpha": encoded(clear.convert("LA"), "PNG"),
        "palette": encoded(colour.quantize(8), "PNG"),
        "transparent palette": encoded(colour.quantize(8), "PNG", transparency=3),
        "JPEG": encoded(colour, "JPEG"),
        "CMYK": encoded(colour.convert("CMYK"), "JPEG"),
        "turned": encoded(colour, "JPEG", exif=exif),
        "turned TIFF": encoded(colour, "TIFF", exif=exif),
        "GIF": encoded(colour.quantize(8), "GIF"),
        "WebP": encoded(clear, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("name", list(variants()))
def test_images_are_read_as_vllm_reads_them(name: str) -> None:
    data = variants()[name]
    ours, theirs = decode_image(data), ImageMediaIO().load_bytes(data).media
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
    # Pillow's two ways to lay an image on white round differently.
    difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", variants()["RGB"][:60], variants()["JPEG"][:300], b"\x89PNG\r\n\x1a\n"],
    ids=["empty", "text", "half a PNG", "half a JPEG", "signature"],
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(UnreadableImage, match=r"\w"):
        decode_image(data)


# ---------------------------------------------------------------------------------------------- embedding models

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, as a whole; `vision` beside it is its image half."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {key: VISION[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = CLIPConfig(
        text_config={**text, "num_attention_heads": 2, "vocab_size": 32},
        vision_config=VISION,
        projection_dim=12,
    )
    model = CLIPModel(config)
    model.save_pretrained(path)
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=12))
    vision.vision_model.load_state_dict(model.vision_model.state_dict())
    vision.visual_projection.load_state_dict(model.visual_projection.state_dict())
    vision.save_pretrained(path / "vision")
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    for folder in (path, path / "vision"):
        processor.save_pretrained(folder)
    return path


@pytest.mark.parametrize("part", ["", "vision"])
def test_embeddings_are_clips(clip: Path, part: str) -> None:
    images = [image.resize((24, 20)) for image in digits(20)]
    got = ImageEmbeddingFeatures(clip / part)([[image] for image in images])
    model = CLIPModel.from_pretrained(clip).eval()
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    for row, image in zip(got, images, strict=True):
        # The shorter side to 16 pixels, then the middle 16 of the longer one's 19.
        square = image.convert("RGB").resize((19, 16), Image.Resampling.BICUBIC).crop((1, 0, 17, 16))
        values = ((np.asarray(square) / 255 - mean) / std).transpose(2, 0, 1)
        with torch.inference_mode():
            hidden = model.vision_model(torch.tensor(values[None], dtype=torch.float32)).pooler_output
            vector = model.visual_projection(hidden)[0].numpy()
        # float32 through two layers: some ten roundings of 6e-8 times the condition of the layer norms
        np.testing.assert_allclose(row, vector / np.linalg.norm(vector), atol=1e-5)


def test_a_router_on_embeddings_keeps_its_model_beside_it(
    clip: Path, router: TrainedRouter[Any], tmp_path: Path
) -> None:
    weight = np.eye(3, 12, dtype=np.float32)
    on_embeddings: TrainedRouter[Any] = TrainedRouter(
        NAMES,
        ImageEmbeddingFeatures(clip),
        Classifier(weight, router.classifier.bias, 1.0),
        Centroids(weight, "euclidean", 1.0),
    )
    shutil.copytree(clip, tmp_path / "embedding")
    write_router(on_embeddings, tmp_path)
    read = read_image_router(tmp_path, NAMES)
    assert read.features == ImageEmbeddingFeatures(tmp_path / "embedding")
    (tmp_path / "embedding/preprocessor_config.json").unlink()
    with pytest.raises(EnsembleError, match="no image-embedding model can be read from"):
        read.features([digits(1)])


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "one of its own"])
def test_an_encoder_that_brings_code_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, known: bool
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    directory, marker = tmp_path / "embedding", tmp_path / "run"
    shutil.copytree(clip, directory)
    kinds = ("AutoConfig", "AutoModel") if file == "config.json" else ("AutoImageProcessor",)
    config = json.loads((directory / file).read_text())
    config["auto_map"] = dict.fromkeys(kinds, "theirs.Theirs")
    if not known:
        config["model_type" if file == "config.json" else "image_processor_type"] = "Theirs"
        config.pop("architectures", None)
    (directory / file).write_text(json.dumps(config))
    (directory / "theirs.py").write_text(
        f'from pathlib import Path\nPath("{marker}").touch()\nclass Theirs: ...\n'
    )
    with contextlib.nullcontext() if known else pytest.raises(EnsembleError) as caught:
        ImageEmbeddingFeatures(directory)([digits(1)])
    assert not marker.exists()
    if caught is not None:
        assert "\n" not in str(caught.value)
        assert str(directory) in str(caught.value)
