"""Routers from files: what they compute, that files keep it, and what is said of files that are wrong."""

from __future__ import annotations

import contextlib
import json
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from decar.router import Ensemble, EnsembleError, RouterEntry, available_routers, load_router, write_manifest
from decar.router.features import TERM, EmbeddingFeatures, TfidfFeatures
from decar.router.files import Centroids, Classifier, TrainedRouter, read_router, write_router
from decar.router.manifest import Start
from decar.router.posterior import log_prior
from decar.router.routers import CentroidRouter, ClassifierRouter
from tests.reference import Reference, stdlib_text

TEXTS = ["def f(x): return x", "the whale and the sea", "x = y + 2", "", "∑ 漢字", "the " * 500]
NAMES = ("maths", "code", "prose")
KINDS: tuple[Start, ...] = ("prior", "classifier", "centroid")


def lines(module: str) -> list[str]:
    return [line for line in stdlib_text(module).splitlines() if line.strip()]


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, Any]:
    vectorizer = TfidfVectorizer(max_features=300, sublinear_tf=True, token_pattern=TERM)
    svd = TruncatedSVD(12, random_state=0).fit(vectorizer.fit_transform(lines("textwrap")))
    return vectorizer, svd


@pytest.fixture(scope="module")
def router(fitted: tuple[Any, Any]) -> TrainedRouter:
    """Of the trio's experts, with random weights."""
    vectorizer, svd = fitted
    features = TfidfFeatures(
        tuple(vectorizer.get_feature_names_out()),
        vectorizer.idf_.astype(np.float32),
        svd.components_.astype(np.float32),
    )
    rng = np.random.default_rng(0)
    weight, bias, centroids = (
        rng.normal(size=shape).astype(np.float32) for shape in ((3, 12), (3,), (3, 12))
    )
    return TrainedRouter(NAMES, features, Classifier(weight, bias, 0.7), Centroids(centroids, "cosine", 0.05))


@pytest.fixture
def directory(trio: Reference, router: TrainedRouter, tmp_path: Path) -> Path:
    """A good ensemble with a trained router, for a test to break."""
    copy = Path(shutil.copytree(trio.directory, tmp_path / "trio"))
    (copy / "router").mkdir(exist_ok=True)
    write_router(router, copy / "router")
    return copy


def set_router(directory: Path, **entry: Any) -> None:
    manifest = Ensemble.inspect(directory)[0]
    assert manifest is not None
    write_manifest(directory, manifest.manifest.model_copy(update={"router": RouterEntry(**entry)}))


# ---------------------------------------------------------------------------------------------- arithmetic


def test_features_are_scikit_learns(fitted: tuple[Any, Any], router: TrainedRouter) -> None:
    vectorizer, svd = fitted
    texts = [*TEXTS, *lines("json.encoder")]
    expected = normalize(svd.transform(vectorizer.transform(texts)))
    # idf and components are kept in float32, whose rounding is 6e-8 of values up to 1
    np.testing.assert_allclose(router.features(texts), expected, atol=1e-6)
    assert router.features([]).shape == (0, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one(directory: Path, kind: Start) -> None:
    loaded = load_router(Ensemble.load(directory), kind)
    log_weights = loaded.log_weights(TEXTS)
    assert log_weights.shape == (len(TEXTS), loaded.num_experts) == (len(TEXTS), 3)
    assert log_weights.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_weights).sum(axis=1), 1.0, rtol=1e-12)


def test_prior_is_the_manifests(directory: Path) -> None:
    log_weights = load_router(Ensemble.load(directory), "prior").log_weights(["a", "b"])
    np.testing.assert_allclose(np.exp(log_weights), [[0.2, 0.5, 0.3]] * 2)


def test_the_classifier_is_bayes_rule_with_the_ensembles_prior(router: TrainedRouter) -> None:
    even, skewed = (
        ClassifierRouter(router.features, router.classifier, log_prior(prior)).log_weights(TEXTS)
        for prior in ([1, 1, 1], [6, 3, 1])
    )
    odds = (skewed[:, :1] - skewed) - (even[:, :1] - even)
    np.testing.assert_allclose(np.exp(odds), [[1, 2, 6]] * len(TEXTS))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_centroids_attract_by_closeness(router: TrainedRouter, metric: Any) -> None:
    centroids = Centroids(router.centroids.centroids, metric, 0.5)
    got = CentroidRouter(router.features, centroids).log_weights(TEXTS)
    for features, row in zip(router.features(TEXTS), got, strict=True):
        if metric == "cosine":
            scores = [features @ c / np.linalg.norm(c) / 0.5 for c in centroids.centroids]
        else:
            scores = [-(np.linalg.norm(features - c) ** 2) / 0.5 for c in centroids.centroids]
        np.testing.assert_allclose(np.exp(row), np.exp(scores) / np.exp(scores).sum(), rtol=1e-6)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["classifier", "centroid"])
def test_files_keep_every_bit(directory: Path, router: TrainedRouter, kind: Start) -> None:
    ensemble = Ensemble.load(directory)
    priors = log_prior([expert.prior for expert in ensemble.experts])
    before = {
        "classifier": ClassifierRouter(router.features, router.classifier, priors),
        "centroid": CentroidRouter(router.features, router.centroids),
    }[kind]
    assert np.array_equal(load_router(ensemble, kind).log_weights(TEXTS), before.log_weights(TEXTS))


def test_no_file_is_a_pickle(directory: Path) -> None:
    for file in (directory / "router").iterdir():
        with pytest.raises((ValueError, IndexError)):
            list(pickletools.genops(file.read_bytes()))


def test_what_is_available(directory: Path) -> None:
    assert available_routers(Ensemble.load(directory)) == ("posterior", "prior", "classifier", "centroid")
    shutil.rmtree(directory / "router")
    ensemble = Ensemble.load(directory)
    assert available_routers(ensemble) == ("posterior", "prior")
    assert load_router(ensemble, "prior").num_experts == 3
    with pytest.raises(
        EnsembleError,
        match=r"router\.json is missing; `decar-train router CONFIG\.yaml`, or `decar new` with --data, makes it",
    ):
        load_router(ensemble, "centroid")


@pytest.mark.parametrize(
    ("entry", "needed"),
    [
        ({"kind": "posterior"}, False),
        ({"kind": "posterior", "start": "classifier"}, False),
        ({"kind": "posterior", "scope": "output"}, False),
        ({"kind": "posterior", "scope": "output", "start": "centroid"}, True),
        ({"kind": "prior"}, False),
        ({"kind": "classifier"}, True),
        ({"kind": "centroid"}, True),
    ],
)
def test_missing_files_matter_where_the_manifest_needs_them(
    directory: Path, entry: dict[str, str], needed: bool
) -> None:
    shutil.rmtree(directory / "router")
    set_router(directory, **entry)
    _, problems = Ensemble.inspect(directory)
    assert len(problems) == needed
    if needed:
        assert problems[0].endswith(
            "router.json is missing; `decar-train router CONFIG.yaml`, or `decar new` with --data, makes it"
        )


def edit_json(directory: Path, **changes: Any) -> None:
    file = directory / "router/router.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_arrays(directory: Path, **changes: Any) -> None:
    file = directory / "router/router.safetensors"
    arrays = load_file(file) | {name.replace("_", "."): array for name, array in changes.items()}
    save_file({name: array for name, array in arrays.items() if array is not None}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "router/router.json").write_text("{"), r"router\.json is damaged \(JSON: "),
        (lambda d: (d / "router/router.json").write_bytes(b"\xff"), r"router\.json is damaged \(JSON: "),
        (
            lambda d: edit_json(d, classifier_temperature=0),
            r"router\.json is damaged \(classifier_temperature",
        ),
        (lambda d: edit_json(d, surprise=1), r"router\.json is damaged \(surprise"),
        (
            lambda d: edit_json(d, experts=["code", "maths", "prose"]),
            r"router of the experts code, maths, prose, but the manifest has maths, code, prose",
        ),
        (
            lambda d: edit_json(d, terms=["one"]),
            r"damaged \(tfidf\.idf is no finite float32 array of shape \[1\]",
        ),
        (lambda d: edit_json(d, terms=None), r"embedding/config\.json is missing"),
        (lambda d: (d / "router/router.safetensors").unlink(), r"router\.safetensors is missing"),
        (
            lambda d: (d / "router/router.safetensors").write_bytes(b"\x80\x04not"),
            r"router\.safetensors is damaged",
        ),
        (
            lambda d: edit_arrays(d, centroids=None),
            r"centroids is no finite float32 array of shape \[3, 12\]",
        ),
        (lambda d: edit_arrays(d, tfidf_components=None), r"tfidf\.components is no finite"),
        (
            lambda d: edit_arrays(d, classifier_weight=np.zeros((2, 12), np.float32)),
            r"classifier\.weight is no finite float32 array of shape \[3, 12\]",
        ),
        (
            lambda d: edit_arrays(d, classifier_bias=np.full(3, np.nan, np.float32)),
            r"classifier\.bias is no finite",
        ),
    ],
)
def test_wrong_files_are_named(directory: Path, damage: Callable[[Path], Any], message: str) -> None:
    """Though the manifest does not need them: a request might ask for them."""
    damage(directory)
    with pytest.raises(EnsembleError, match=message) as caught:
        Ensemble.load(directory)
    assert "\n" not in str(caught.value)
    assert "decar-train router" in str(caught.value)


# ---------------------------------------------------------------------------------------------- embedding models


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights."""
    path = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "the", "whale", "def", "return", "x"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    return path


def test_embeddings_are_means_over_a_texts_own_tokens(encoder: Path) -> None:
    model = BertModel.from_pretrained(encoder).eval()
    features = EmbeddingFeatures(encoder)
    batch = features(["the whale", "def x return the x"])
    for ids, got in zip(([2, 3], [4, 6, 5, 2, 6]), batch, strict=True):
        with torch.inference_mode():
            mean = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy()
        np.testing.assert_allclose(got, mean / np.linalg.norm(mean), atol=1e-6)
    rows = features(["", "x " * 100])  # nothing, and more than the model has positions for
    assert np.linalg.norm(rows, axis=1) == pytest.approx([0, 1])
    assert np.array_equal(features([""]), np.zeros((1, 16)))


def test_a_router_on_embeddings_keeps_its_model_beside_it(
    encoder: Path, router: TrainedRouter, tmp_path: Path
) -> None:
    weight = np.eye(3, 16, dtype=np.float32)
    on_embeddings = TrainedRouter(
        NAMES,
        EmbeddingFeatures(encoder),
        Classifier(weight, router.classifier.bias, 1.0),
        Centroids(weight, "euclidean", 1.0),
    )
    shutil.copytree(encoder, tmp_path / "embedding")
    write_router(on_embeddings, tmp_path)
    read = read_router(tmp_path, NAMES)
    assert read.features == EmbeddingFeatures(tmp_path / "embedding")
    assert np.array_equal(read.features(TEXTS), on_embeddings.features(TEXTS))
    (tmp_path / "embedding" / "model.safetensors").unlink()
    with pytest.raises(EnsembleError, match="no embedding model can be read from"):
        read_router(tmp_path, NAMES).features(TEXTS)


CODE = 'from pathlib import Path\nPath("{marker}").touch()\nclass Theirs:\n    pass\n'


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "one of its own"])
def test_an_encoder_that_brings_code_is_refused(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, known: bool
) -> None:
    """Nothing of it is run, and nobody is asked: whoever starts a server may not be at its terminal."""

    def asked(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    directory, marker = tmp_path / "embedding", tmp_path / "run"
    shutil.copytree(encoder, directory)
    kinds = ("AutoConfig", "AutoModel") if file == "config.json" else ("AutoTokenizer",)
    reference = "theirs.Theirs"
    config = json.loads((directory / file).read_text())
    config["auto_map"] = {kind: [reference, None] if kind == "AutoTokenizer" else reference for kind in kinds}
    if not known:
        config["model_type" if file == "config.json" else "tokenizer_class"] = "Theirs"
    (directory / file).write_text(json.dumps(config))
    (directory / "theirs.py").write_text(CODE.format(marker=marker))
    may_be_read = known or file == "tokenizer_config.json"  # by a class that transformers has
    with contextlib.nullcontext() if may_be_read else pytest.raises(EnsembleError) as caught:
        EmbeddingFeatures(directory)(["the whale"])
    assert not marker.exists()
    if caught is not None:
        assert "\n" not in str(caught.value)
        assert str(directory) in str(caught.value)
