"""The router stage: on real text better than chance, calibrated, better with longer prefixes; made once, exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from decar.router import Ensemble, load_router
from decar.router.errors import TrainingError
from decar.router.files import read_router
from decar.router.posterior import log_prior
from decar.router.routers import ClassifierRouter
from decar.training.cli import main
from decar.training.config import TrainConfig, load_config
from decar.training.data.shards import count_documents, read_texts
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.stage import expert_stage, train_expert
from decar.training.export.stage import export, export_stage
from decar.training.partition.stage import make_partition, partition_stage
from decar.training.router.stage import (
    RouterReport,
    draw_prefixes,
    fit_classifier,
    fit_temperature,
    held_out_prefixes,
    quality_of,
    router_stage,
    train_router,
)
from tests.training.conftest import WriteConfig, tiny_config


@pytest.fixture
def prepared(config: TrainConfig) -> TrainConfig:
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


# ---------------------------------------------------------------------------------------------- real text


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, RouterReport]:
    """Library code and the language reference, 400 kB each, told apart by the partition and then by the router."""
    root = tmp_path_factory.mktemp("real")
    data = tiny_config(root) | {
        "data": {"builtin": ["python-stdlib", "pydoc-topics"], "builtin_max_bytes": 400_000},
        "documents": {"max_chars": 2_000},
        "partition": {"held_out": 0.2, "name_by": {"code": "python-stdlib"}},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(data))
    config = load_config(root / "config.yaml")
    make_partition(config, partition_stage(config))
    return config, train_router(config.run, config.router, config.seed, router_stage(config))


@pytest.mark.parametrize("name", ["classifier", "centroid"])
def test_routers_know_code_from_prose(real: tuple[TrainConfig, RouterReport], name: str) -> None:
    _, report = real
    mine, prior = report.routers[name], report.routers["prior"]
    assert mine.all_lengths.accuracy > 0.85
    assert mine.all_lengths.nll < prior.all_lengths.nll / 2
    assert mine.all_lengths.ece < 0.05
    assert (
        mine.by_length["512"].nll
        < mine.by_length["64"].nll
        < mine.by_length["16"].nll
        < prior.all_lengths.nll
    )


def test_the_report_is_of_what_the_files_compute(real: tuple[TrainConfig, RouterReport]) -> None:
    """At the saved temperature, tuned on all held-out text, the likelihood is no worse than across halves."""
    config, report = real
    saved = read_router(config.work_dir / "router", config.expert_names)
    shares = log_prior([count_documents(config.run.shard(name, "train")) for name in config.expert_names])
    prefixes = held_out_prefixes(
        [list(read_texts(config.run.shard(name, "held_out"))) for name in config.expert_names]
    )
    router = ClassifierRouter(saved.features, saved.classifier, shares)
    quality = quality_of(router.log_weights(prefixes.texts), prefixes.labels)
    assert quality.nll == pytest.approx(report.routers["classifier"].all_lengths.nll, rel=0.05)
    assert report.routers["classifier"].temperature == saved.classifier.temperature


def test_a_plot_and_no_pickle(real: tuple[TrainConfig, RouterReport]) -> None:
    files = {file.name for file in (real[0].work_dir / "router").iterdir()}
    assert files == {"DONE", "calibration.png", "report.json", "router.json", "router.safetensors"}


# ---------------------------------------------------------------------------------------------- parts


def test_prefixes_begin_documents_at_lengths_even_in_the_logarithm() -> None:
    text = "".join(chr(97 + i % 26) for i in range(1024))
    prefixes = draw_prefixes([text, "short", "x"], np.array([0, 1, 2]), 500, seed=0)
    assert prefixes.labels.tolist() == [0] * 500 + [1] * 500 + [2] * 500
    assert all(text.startswith(prefix) for prefix in prefixes.texts[:500])
    assert prefixes.texts[500:] == ["short"] * 500 + ["x"] * 500
    lengths = prefixes.lengths[:500]
    assert (lengths.min(), lengths.max()) >= (16, 900)
    # half of 500 below the geometric mean of 16 and 1024; five standard deviations are 56
    assert abs((lengths < 128).sum() - 250) < 56


def test_held_out_prefixes_double_in_length() -> None:
    prefixes = held_out_prefixes([["a" * 70, "bc"], ["d" * 16]])
    assert prefixes.lengths.tolist() == [16, 32, 64, 2, 16]
    assert prefixes.labels.tolist() == [0, 0, 0, 0, 1]
    assert prefixes.documents.tolist() == [0, 0, 0, 1, 2]


def test_the_classifier_believes_no_prior() -> None:
    """Nine in ten are of one expert, but features that say nothing leave both equally likely."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [900, 100])
    weight, bias = fit_classifier(rng.normal(size=(1000, 2)) * 1e-6, labels, 2)
    assert bias == pytest.approx([0, 0], abs=1e-3)
    assert weight.shape == (2, 2)


def test_the_temperature_undoes_a_scale() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 3)) * 2
    noise = rng.gumbel(size=scores.shape)
    labels = (scores + noise).argmax(axis=1)  # drawn from the softmax of the scores
    # standard error of T is about 1 / sqrt(N) of it
    assert fit_temperature(scores * 10, labels, np.zeros(3)) == pytest.approx(10, rel=0.05)


def test_experts_told_apart_without_error_do_not_ask_for_endless_confidence() -> None:
    labels = np.array([0, 1] * 20)
    scores = np.where(labels[:, None] == [0, 1], 1.0, -1.0)
    weight = 1 / (1 + np.exp(-2 / fit_temperature(scores, labels, np.zeros(2))))
    assert weight == pytest.approx(41 / 42, abs=1e-3)  # Platt's (n + 1) / (n + 2) over all


def test_quality_of_known_weights() -> None:
    log_weights = np.log([[0.75, 0.25]] * 4)
    quality = quality_of(log_weights, np.array([0, 0, 1, 1]))
    assert (quality.accuracy, quality.prefixes) == (0.5, 4)
    assert quality.nll == pytest.approx(-(np.log(0.75) + np.log(0.25)) / 2)
    assert quality.ece == pytest.approx(0.25)


# ---------------------------------------------------------------------------------------------- stage and export


def test_done_until_what_it_depends_on_changes(prepared: TrainConfig, write_config: WriteConfig) -> None:
    train_router(prepared.run, prepared.router, prepared.seed, router_stage(prepared))
    for change in ("router.kind=centroid", "training.max_steps=9", "mixing.prune=0.1"):
        assert router_stage(load_config(write_config(), [change])).is_done
    for change in ("router.prefixes_per_document=2", "router.centroid_metric=euclidean"):
        assert not router_stage(load_config(write_config(), [change])).is_done
    with pytest.raises(TrainingError, match="was made with another configuration"):
        router_stage(load_config(write_config(), ["seed=1"]))


def test_a_large_corpus_is_thinned_out(prepared: TrainConfig, write_config: WriteConfig) -> None:
    """Memory follows the sample; every shard keeps its share."""
    counts = [count_documents(prepared.run.shard(name, "train")) for name in prepared.expert_names]
    config = load_config(
        write_config(), [f"router.sample={sum(counts) // 4}", "router.prefixes_per_document=2"]
    )
    report = train_router(config.run, config.router, config.seed, router_stage(config))
    step = -(-sum(counts) // config.router.sample)
    assert step >= 4
    assert report.train_prefixes == 2 * sum(-(-count // step) for count in counts)


def test_a_seed_gives_one_router(prepared: TrainConfig) -> None:
    directory = prepared.work_dir / "router"
    files = []
    for _ in range(2):
        train_router(prepared.run, prepared.router, prepared.seed, router_stage(prepared))
        files.append([(directory / name).read_bytes() for name in ("router.json", "router.safetensors")])
        shutil.rmtree(directory)
    assert files[0] == files[1]


@pytest.mark.parametrize("num_experts", [1, 3])
def test_any_number_of_experts(write_config: WriteConfig, num_experts: int) -> None:
    names = [f"e{k}" for k in range(num_experts)]
    config = load_config(write_config(experts=names, partition={"name_by": {}, "held_out": 0.3}))
    make_partition(config, partition_stage(config))
    report = train_router(config.run, config.router, config.seed, router_stage(config))
    assert report.experts == names
    saved = read_router(config.work_dir / "router", names)
    assert saved.classifier.weight.shape[0] == saved.centroids.centroids.shape[0] == num_experts


def test_an_exported_ensemble_routes_as_configured(prepared: TrainConfig, write_config: WriteConfig) -> None:
    for name in prepared.expert_names:
        train_expert(prepared, name, expert_stage(prepared, name))
    assert load_router(export(prepared, export_stage(prepared)), "prior").num_experts == 2

    changes = ["router.kind=posterior", "router.scope=output", "router.start=classifier"]
    config = load_config(write_config(), changes)
    with pytest.raises(TrainingError, match="router is not trained; run `decar-train router` first"):
        export_stage(config)
    train_router(config.run, config.router, config.seed, router_stage(config))
    ensemble = export(config, export_stage(config))
    entry = ensemble.manifest.router
    assert (entry.kind, entry.scope, entry.start) == ("posterior", "output", "classifier")
    code, prose = np.exp(
        load_router(ensemble, "classifier").log_weights(["def return self (", "the whale, the ocean"])
    )
    assert code[0] > 0.8
    assert prose[1] > 0.8
    with pytest.raises(TrainingError, match="router was trained with another configuration"):
        export_stage(load_config(write_config(), ["router.num_components=3"]))


def test_an_embedding_model_travels_with_the_router(
    prepared: TrainConfig, write_config: WriteConfig, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder"
    tokenizer = load_tokenizer(prepared.work_dir / "tokenizer")
    tokenizer.save_pretrained(encoder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(encoder)
    (encoder / "pytorch_model.bin").write_bytes(b"a pickle, to be left behind")
    config = load_config(write_config(router={"embedding": str(encoder)}))
    report = train_router(config.run, config.router, config.seed, router_stage(config))
    assert report.routers["classifier"].all_lengths.accuracy > 0.8
    saved = config.work_dir / "router"
    assert (saved / "embedding/model.safetensors").is_file()
    assert not (saved / "embedding/pytorch_model.bin").exists()
    shutil.rmtree(encoder)
    assert read_router(saved, config.expert_names).features(["def"]).shape == (1, 16)
    with pytest.raises(TrainingError, match=r"router\.embedding: .* holds no config\.json"):
        router_stage(config)


def test_the_command_shows_a_table(
    prepared: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["decar-train", "router", str(prepared.work_dir.parent / "config.yaml")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code
    out = capsys.readouterr().out
    assert "classifier" in out
    assert "64 chars" in out
    assert Ensemble.inspect(prepared.run.ensemble)[0] is None  # nothing but the router was made
