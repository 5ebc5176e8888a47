"""The partition stage: balanced, named, repeatable, and clear about what it cannot split."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from transformers import BertConfig, BertModel

from decar.router.errors import TrainingError
from decar.training.cli import main
from decar.training.config import TrainConfig, load_config
from decar.training.data.features import fit_components, fit_features
from decar.training.data.shards import read_texts
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
from tests.training.conftest import CODE, PROSE, WriteConfig


def shards(config: TrainConfig) -> dict[str, list[str]]:
    make_partition(config, partition_stage(config))
    return {
        f"{n}/{s}": list(read_texts(config.run.shard(n, s)))
        for n in config.expert_names
        for s in ("train", "held_out")
    }


def test_documents_are_split_evenly_and_clusters_named_by_source(config: TrainConfig, tmp_path: Path) -> None:
    report = make_partition(config, partition_stage(config))
    assert [shard.expert for shard in report.shards] == ["code", "prose"]
    assert [shard.train_documents + shard.held_out_documents for shard in report.shards] == [15, 15]
    assert [shard.sources for shard in report.shards] == [{"code.jsonl": 15}, {"prose.jsonl": 15}]
    assert "whale" in report.shards[1].top_terms
    assert read_partition_report(partition_stage(config)) == report
    every = [
        text
        for name in ("code", "prose")
        for s in ("train", "held_out")
        for text in read_texts(config.run.shard(name, s))
    ]
    assert len(every) == len(set(every)) == 30


def test_a_seed_gives_one_partition(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    first = shards(config)
    shutil.rmtree(config.work_dir)
    assert shards(config) == first
    assert shards(load_config(write_config(), ["seed=5"])) != first


def test_whole_inputs_are_held_out(write_config: WriteConfig) -> None:
    config = load_config(write_config(documents={"max_chars": 60, "min_chars": 1}))
    found = shards(config)
    originals = [
        line for name in ("code", "prose") for line in (config.work_dir.parent / f"{name}.jsonl").open()
    ]
    for original in originals:
        held_out = [
            text in original for n in config.expert_names for text in found[f"{n}/held_out"] if len(text) > 40
        ]
        trained = [
            text in original for n in config.expert_names for text in found[f"{n}/train"] if len(text) > 40
        ]
        assert not (any(held_out) and any(trained))


def test_done_until_configuration_or_data_change(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    assert partition_stage(config).is_done
    assert partition_stage(load_config(write_config(), ["training.max_steps=99"])).is_done
    assert not partition_stage(load_config(write_config(), ["partition.held_out=0.3"])).is_done
    with (tmp_path / "code.jsonl").open("a") as stream:
        stream.write('{"text": "return self"}\n')
    assert not partition_stage(config).is_done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"experts": [f"e{i}" for i in range(16)], "partition": {"name_by": {}}, "data": {"files": []}},
            "2 documents cannot be split among 16 experts",
        ),
        (
            {"partition": {"name_by": {"code": "nothing"}}},
            "no source 'nothing'; the sources are code.jsonl, prose",
        ),
        ({"partition": {"held_out": 0.99}}, "left without training documents"),
    ],
)
def test_what_cannot_be_split(
    write_config: WriteConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "one word"}\n{"text": "and another"}\n')
    if "data" in changes:
        changes = changes | {"data": {"files": [str(few)]}}
    config = load_config(write_config(**changes))
    with pytest.raises(TrainingError, match=message):
        make_partition(config, partition_stage(config))
    assert not (config.work_dir / "partition").exists()


@pytest.mark.parametrize("method", ["kmeans", "two-stage", "random"])
def test_every_document_gets_one_expert_by_seed(write_config: WriteConfig, method: str) -> None:
    config = load_config(write_config(partition={"method": method}))
    report = make_partition(config, partition_stage(config))
    first = shards(config)
    assert sorted(text for texts in first.values() for text in texts) == sorted(every_text(config))
    assert [s.train_documents + s.held_out_documents for s in report.shards] == [15, 15]
    assert sum(len(texts) for name, texts in first.items() if "held_out" in name) == 6
    assert report.balance == 1
    # Chance mixes what the clusters separate.
    assert [len(s.sources) for s in report.shards] == ([2, 2] if method == "random" else [1, 1])
    assert report.silhouette is not None
    assert (report.silhouette < 0.1) == (method == "random")
    assert shards(config) == first
    if method == "random":
        assert shards(load_config(write_config(partition={"method": method}), ["seed=1"])) != first


def every_text(config: TrainConfig) -> list[str]:
    root = config.work_dir.parent
    return [
        json.loads(line)["text"] for name in ("code", "prose") for line in (root / f"{name}.jsonl").open()
    ]


def test_the_report_shows_what_is_typical_and_a_map(config: TrainConfig) -> None:
    report = make_partition(config, partition_stage(config))
    for shard, words in zip(report.shards, (CODE, PROSE), strict=True):
        assert shard.top_terms
        assert set(shard.top_terms) <= {word.lower() for word in words}
        train, held_out = (
            list(read_texts(config.run.shard(shard.expert, split))) for split in ("train", "held_out")
        )
        assert len(shard.nearest) == 3
        assert all(any(text.startswith(near) for text in train + held_out) for near in shard.nearest)
        assert shard.train_chars == sum(map(len, train))
    directory = config.work_dir / "partition"
    assert (directory / "map.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in directory.iterdir()} == {"DONE", "report.json", "map.png", "code", "prose"}


def test_one_expert_gets_everything(write_config: WriteConfig) -> None:
    config = load_config(write_config(experts=["code"]))
    report = make_partition(config, partition_stage(config))
    assert (report.balance, report.silhouette, report.documents) == (1, None, 30)


def test_documents_are_compared_by_an_embedding_model(write_config: WriteConfig, tmp_path: Path) -> None:
    directory = tmp_path / "encoder"
    plain = load_config(write_config())
    make_partition(plain, partition_stage(plain))
    make_tokenizer(plain.run, plain.tokenizer, tokenizer_stage(plain.run, plain.tokenizer))
    tokenizer = load_tokenizer(plain.work_dir / "tokenizer")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(directory)
    config = load_config(write_config(partition={"embedding": str(directory)}))
    stage = partition_stage(config)
    report = make_partition(config, stage)
    # Even an untrained encoder's mean of its words' vectors tells words apart.
    assert [max(shard.sources.values()) for shard in report.shards] >= [12, 12]
    assert stage.is_done
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    assert not partition_stage(config).is_done
    with pytest.raises(TrainingError, match=r"partition.embedding: /nowhere holds no config.json"):
        partition_stage(load_config(write_config(partition={"embedding": "/nowhere"})))


# ---------------------------------------------------------------------------------------------- by field


@pytest.fixture
def languages(write_config: WriteConfig, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A configuration by field, of 20 rows each in de, en-gb and en-us."""
    rows = [
        {"text": f"word {i} {lang}", "lang": lang} for i in range(20) for lang in ("de", "en-gb", "en-us")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(files: tuple[str, ...] = ("rows.jsonl",), **settings: Any) -> TrainConfig:
        partition = {"method": "by-field", "held_out": 0.2, **settings}
        path = write_config(data={"files": [str(tmp_path / name) for name in files]})
        path.write_text(path.read_text().replace("name_by:\n    code: code.jsonl\n", "held_out: 0.2\n"))
        return load_config(path, [f"partition={json.dumps(partition)}", 'experts=["english", "german"]'])

    return make


def test_the_users_domains(languages: Callable[..., TrainConfig]) -> None:
    config = languages(field="lang", domains={"english": ["en-*"], "german": ["de"]})
    report = make_partition(config, partition_stage(config))
    assert [s.train_documents + s.held_out_documents for s in report.shards] == [40, 20]
    assert report.balance == 2
    found = shards(config)
    assert all("en-" in text for split in ("train", "held_out") for text in found[f"english/{split}"])
    assert all("de" in text for split in ("train", "held_out") for text in found[f"german/{split}"])


def test_files_are_domains_where_no_field_is_named(languages: Callable[..., TrainConfig]) -> None:
    domains = {"english": ["code.jsonl"], "german": ["rows.jsonl", "prose.*"]}
    config = languages(("code.jsonl", "prose.jsonl", "rows.jsonl"), domains=domains)
    report = make_partition(config, partition_stage(config))
    assert [list(shard.sources) for shard in report.shards] == [["code.jsonl"], ["rows.jsonl", "prose.jsonl"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"field": "lang"}, r"lang 'de' belongs to no expert; list it, or a pattern of it"),
        (
            {"field": "lang", "domains": {"english": ["en-*", "en-gbb"], "german": ["d"]}},
            r"lang 'de' belongs to no expert \(is it 'd' there\?\)",
        ),
        (
            {"field": "lang", "domains": {"english": ["en-*"], "german": ["de", "*-us"]}},
            r"lang 'en-us' belongs to english and german; list it under one",
        ),
        (
            {"field": "lang", "domains": {"english": ["*"], "german": ["at"]}},
            r"expert 'german' is left without documents: no lang is 'at'; there are de, en-gb, en-us",
        ),
        ({"field": "lnag"}, r"rows.jsonl, line 1: no field 'lnag' \(partition.field\); did you mean 'lang'"),
        (
            {"field": "lang", "domains": {"english": ["en-*"]}},
            r"partition.domains leaves expert 'german' without a domain",
        ),
        (
            {"domains": {"englsh": ["x"]}},
            r"partition.domains names 'englsh', which is not one of the experts",
        ),
        ({"name_by": {"german": "x"}}, r"name_by names clusters, .* use domains"),
        ({"method": "kmeans", "field": "lang"}, r"partition: field is for method by-field"),
        ({"method": "kmean"}, r"partition.method: .*\(got 'kmean'\); did you mean 'kmeans'\?"),
    ],
)
def test_domains_that_do_not_fit(
    languages: Callable[..., TrainConfig], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=message):
        make_partition(config := languages(**settings), partition_stage(config))
    assert not (tmp_path / "work" / "partition").exists()


# ---------------------------------------------------------------------------------------------- bad data


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *overrides: str) -> int:
    arguments = [word for override in overrides for word in ("--set", override)]
    monkeypatch.setattr("sys.argv", ["decar-train", "partition", str(path), *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_a_corrupt_line_is_named_or_skipped_and_counted(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    with (tmp_path / "prose.jsonl").open("a") as stream:
        stream.write('{"text": "cut off\n')
    path = write_config()
    assert run(monkeypatch, path) == 1
    error = capsys.readouterr().err
    assert "prose.jsonl, line 16: not valid JSON" in error
    assert "mend it, or set data.on_bad_line to skip" in error
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
    assert run(monkeypatch, path, "data.on_bad_line=skip") == 0
    out = capsys.readouterr().out
    assert "skipped 1 bad lines (prose.jsonl 1); the first: " in out
    assert "map " + str(tmp_path / "work" / "partition" / "map.png") in out
    config = load_config(path, ["data.on_bad_line=skip"])
    assert read_partition_report(partition_stage(config)).skipped_lines == {"prose.jsonl": 1}


@pytest.mark.parametrize("full", ["documents.parquet", "train.parquet", "held_out.parquet"])
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    make_partition(config, partition_stage(config))
    before = sorted(config.work_dir.rglob("*"))
    writer = pyarrow.parquet.ParquetWriter

    def on_full_disk(file: Path, *args: Any, **settings: Any) -> Any:
        # The kernel itself then says that no space is left.
        return writer("/dev/full" if file.name == full else file, *args, **settings)

    monkeypatch.setattr(pyarrow.parquet, "ParquetWriter", on_full_disk)
    message = (
        r"no space is left for .*partition; free some or set work_dir to another disk. Nothing .* was kept"
    )
    with pytest.raises(TrainingError, match=message):
        make_partition(config, partition_stage(config))
    assert sorted(config.work_dir.rglob("*")) == before
    assert partition_stage(config).is_done


def test_a_damaged_shard_is_named(config: TrainConfig) -> None:
    make_partition(config, partition_stage(config))
    (config.work_dir / "partition" / "code" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(TrainingError, match=r"train.parquet is damaged .* run `decar-train partition` again"):
        list(read_texts(config.run.shard("code", "train")))


def test_memory_does_not_grow_with_the_texts(write_config: WriteConfig, tmp_path: Path) -> None:
    """As many documents, ten times as long: 38 MB more of text, which held in memory shows (see the last line)."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i:04}" for i in range(5_000)])
    peaks = []
    for words_each in (350, 3_500):
        file = tmp_path / "long.jsonl"
        with file.open("w") as stream:
            for _ in range(2_000):
                stream.write(
                    json.dumps({"text": " ".join(words[rng.integers(5_000, size=words_each)])}) + "\n"
                )
        changes = {"files": [str(file)]}
        partition = {"sample": 50, "num_components": 8, "restarts": 1}
        path = write_config(
            data=changes, documents={"max_chars": 30_000}, partition=partition | {"name_by": {}}
        )
        command = [sys.executable, "-m", "tests.training.measure_partition", str(path)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        documents, peak_bytes = map(int, done.stdout.split())
        assert documents == 2_000
        peaks.append(peak_bytes)
    assert peaks[1] - peaks[0] < 20e6


@pytest.mark.filterwarnings("error")
def test_texts_that_are_all_alike_have_features() -> None:
    features = fit_features(["the whale and the sea"] * 4, 100, 3, seed=0)
    np.testing.assert_allclose(np.linalg.norm(features(["the whale and the sea"]), axis=1), 1.0)
    assert np.isfinite(fit_components(np.ones((4, 5)), 3, seed=0)).all()
