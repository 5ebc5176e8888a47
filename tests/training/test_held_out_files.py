"""Validation files of one's own: only ever held out, dealt to experts as others are, and no change for the others."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.shards import read_texts
from decar.training.data.sources import input_files
from decar.training.evaluate.random_split import random_config
from decar.training.fingerprints import partition_fingerprint
from decar.training.partition.stage import (
    make_partition,
    partition_stage,
    read_partition_report,
)
from tests.training.conftest import CODE, PROSE, WriteConfig

ROOT = Path(__file__).parents[2]
Run = Callable[..., TrainConfig]


def write(file: Path, texts: list[str]) -> list[str]:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def shards(config: TrainConfig, split: str) -> dict[str, list[str]]:
    return {name: list(read_texts(config.run.shard(name, split))) for name in config.expert_names}


def documents(config: TrainConfig, split: str) -> list[str]:
    return sorted(text for shard in shards(config, split).values() for text in shard)


@pytest.fixture
def held_out(write_config: WriteConfig, tmp_path: Path) -> list[str]:
    """8 texts like code and 5 like prose, in files called as those of the training texts are."""
    rng = random.Random(7)
    texts = []
    for name, words, count in (("code", CODE, 8), ("prose", PROSE, 5)):
        texts += write(
            tmp_path / f"valid/{name}.jsonl", [" ".join(rng.choices(words, k=30)) for _ in range(count)]
        )
    return sorted(texts)


@pytest.fixture
def run(write_config: WriteConfig, tmp_path: Path, held_out: list[str]) -> Run:
    """A finished partition."""

    def run(with_files: bool = True, held_out: float | None = None, **partition: Any) -> TrainConfig:
        path = write_config(data={"held_out_files": [str(tmp_path / "valid")] if with_files else []})
        data = yaml.safe_load(path.read_text())
        data["partition"] = {"name_by": {}, **partition}
        if held_out is not None:
            data["partition"]["held_out"] = held_out
        data["work_dir"] = str(tmp_path / f"work-{with_files}-{held_out}-{len(partition)}")
        path.write_text(yaml.safe_dump(data))
        config = load_config(path)
        make_partition(config, partition_stage(config))
        return config

    return run


def test_they_are_held_out_and_nothing_else(run: Run, tmp_path: Path, held_out: list[str]) -> None:
    config = run()
    assert documents(config, "held_out") == held_out
    rows = [json.loads(line) for name in ("code", "prose") for line in (tmp_path / f"{name}.jsonl").open()]
    assert documents(config, "train") == sorted(row["text"] for row in rows)
    # Each goes to the expert whose texts are like it.
    by_expert = shards(config, "held_out")
    assert sorted(map(len, by_expert.values())) == [5, 8]
    report = read_partition_report(partition_stage(config))
    assert (report.documents, report.balance, report.sample) == (43, 1.0, 30)
    # Of equal names, the folder tells which is which.
    sources = {source for shard in report.shards for source in shard.sources}
    assert sources == {
        f"{tmp_path.name}/code.jsonl",
        "valid/code.jsonl",
        f"{tmp_path.name}/prose.jsonl",
        "valid/prose.jsonl",
    }


@pytest.mark.parametrize("partition", [{}, {"method": "random"}, {"method": "two-stage", "fine_clusters": 4}])
def test_who_gets_a_training_document_does_not_depend_on_them(run: Run, partition: dict[str, Any]) -> None:
    with_files, without = run(held_out=0.2, **partition), run(with_files=False, held_out=0.2, **partition)

    def dealt(config: TrainConfig) -> dict[str, set[str]]:
        given = set(documents(with_files, "held_out")) - set(documents(without, "held_out"))
        both = [shards(config, split) for split in ("train", "held_out")]
        return {name: {text for by in both for text in by[name]} - given for name in config.expert_names}

    assert len(documents(with_files, "held_out")) > len(documents(without, "held_out"))
    assert len(documents(with_files, "train")) == len(documents(without, "train")) == 24
    # The same groups, whichever of the experts has them.
    assert sorted(dealt(with_files).values(), key=min) == sorted(dealt(without).values(), key=min)


def test_a_share_of_the_others_is_held_out_where_it_is_asked_for(run: Run, held_out: list[str]) -> None:
    config = run(held_out=0.2)
    assert set(held_out) < set(documents(config, "held_out"))
    assert len(documents(config, "held_out")) == len(held_out) + 6
    assert len(documents(config, "train")) == 24


@pytest.mark.parametrize("handling", ["remove", "keep"])
def test_duplicates_of_training_documents_are_told(
    run: Run, tmp_path: Path, held_out: list[str], handling: str
) -> None:
    seen = json.loads((tmp_path / "code.jsonl").open().readline())["text"]
    write(tmp_path / "valid/more.jsonl", [seen, seen])
    config = run(held_out_duplicates=handling)
    report = read_partition_report(partition_stage(config))
    assert (report.held_out_duplicates, report.duplicates_removed) == (2, handling == "remove")
    assert documents(config, "held_out") == (
        held_out if handling == "remove" else sorted([*held_out, seen, seen])
    )
    assert seen in documents(config, "train")


def test_a_file_named_twice_is_held_out(write_config: WriteConfig, tmp_path: Path) -> None:
    write(tmp_path / "all/valid.jsonl", ["a", "b"])
    write(tmp_path / "all/train.jsonl", ["c", "d"])
    path = write_config(
        data={"files": [str(tmp_path / "all")], "held_out_files": [str(tmp_path / "all/valid.jsonl")]}
    )
    assert [file.name for file in input_files(load_config(path).data)] == ["train.jsonl", "valid.jsonl"]


def test_the_random_split_holds_out_the_same_and_trains_on_none_of_them(
    run: Run, held_out: list[str], tmp_path: Path
) -> None:
    seen = json.loads((tmp_path / "code.jsonl").open().readline())["text"]
    write(tmp_path / "valid/more.jsonl", [seen])
    config = run()
    split = random_config(config)
    make_partition(split, partition_stage(split))
    assert documents(split, "held_out") == held_out
    assert documents(split, "train") == documents(config, "train")


def test_by_field_deals_them_out_too(run: Run, held_out: list[str]) -> None:
    domains = {"code": ["code"], "prose": ["prose"]}
    config = run(method="by-field", field="path.stem", domains=domains)
    assert {name: len(texts) for name, texts in shards(config, "held_out").items()} == {"code": 8, "prose": 5}


def test_an_expert_without_any_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "valid/prose.jsonl").unlink()
    with pytest.raises(
        TrainingError, match=r"left without held-out documents; add such to data\.held_out_files"
    ):
        run()


def test_files_that_are_not_there(run: Run, tmp_path: Path) -> None:
    for name in ("code", "prose"):
        (tmp_path / f"valid/{name}.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"data.held_out_files: '.*valid' matches no file"):
        run()


def test_done_until_they_change(run: Run, tmp_path: Path) -> None:
    config = run()
    assert partition_stage(config).is_done
    write(tmp_path / "valid/code.jsonl", ["another text"])
    assert not partition_stage(config).is_done


# Of configurations from before there were own validation files, data sets of the Hub and mapped columns.
_OLDER = {
    "base": "e80323f75573ea40",
    "branch": "5af0828adfe7d526",
    "demo": "e1a6e5f251aea5b3",
    "digits": "c0e0390ca5d8b569",
    "four": "dd5f2525deefaae6",
    "llava": "a3e520eac14f860e",
    "lora": "6ea0b19a411a04b6",
    "text": "19af2fbdda045266",
}


@pytest.mark.parametrize("name", list(_OLDER))
def test_finished_partitions_stay_finished(name: str) -> None:
    assert partition_fingerprint(load_config(ROOT / f"configs/{name}.yaml")) == _OLDER[name]


def test_what_is_new_counts_where_it_is_set(write_config: WriteConfig) -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"data": {"columns": {"text": "body"}}},
        {"data": {"hub": ["org/name"]}},
        {"data": {"hub": [{"id": "org/name", "split": "test"}]}},
        {"data": {"held_out_files": ["valid.jsonl"]}},
    ]
    found = {partition_fingerprint(load_config(write_config(**changes))) for changes in settings}
    # 0.05 is what is drawn where nothing is said, and nothing is where files are held out.
    path = write_config(data={"held_out_files": ["valid.jsonl"]})
    data = yaml.safe_load(path.read_text())
    for partition in ({}, {"held_out": 0.05}):
        path.write_text(yaml.safe_dump({**data, "partition": partition}))
        found.add(partition_fingerprint(load_config(path)))
    assert len(found) == len(settings) + 2
