"""The partition stage: balanced, named, repeatable, and clear about what it cannot split."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.partition import make_partition, partition_stage, read_report, read_shard
from tests.training.conftest import WriteConfig


def shards(config: TrainConfig) -> dict[str, list[str]]:
    make_partition(config, partition_stage(config))
    return {f"{n}/{s}": read_shard(config, n, s) for n in config.expert_names for s in ("train", "held_out")}


def test_documents_are_split_evenly_and_clusters_named_by_source(config: TrainConfig, tmp_path: Path) -> None:
    report = make_partition(config, partition_stage(config))
    assert [shard.expert for shard in report.shards] == ["code", "prose"]
    assert [shard.train_documents + shard.held_out_documents for shard in report.shards] == [15, 15]
    assert [shard.sources for shard in report.shards] == [{"code.jsonl": 15}, {"prose.jsonl": 15}]
    assert "whale" in report.shards[1].top_terms
    assert read_report(partition_stage(config)) == report
    every = [
        text
        for name in ("code", "prose")
        for s in ("train", "held_out")
        for text in read_shard(config, name, s)
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
