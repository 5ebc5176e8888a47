"""What is held out: a share of each expert's documents, whole inputs, and nothing that is trained on as well."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config
from decar.training.data.shards import read_examples, read_texts
from decar.training.evaluate.random_split import random_config
from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
from decar.training.run import SPLITS
from tests.training.conftest import WriteConfig
from tests.training.test_run import command

Rows = list[dict[str, Any]]


@pytest.fixture
def by_field(write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """A configuration of rows by their field ``kind``, one of ``large`` and ``small``."""

    def make(rows: Rows, **changes: Any) -> Path:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"method": "by-field", "field": "kind", "name_by": {}}
        partition = {**settings, **changes.pop("partition", {})}
        data = {"files": [str(tmp_path / "rows.jsonl")]}
        return write_config(data=data, partition=partition, experts=["large", "small"], **changes)

    return make


def rows_of(large: int, small: int) -> Rows:
    sizes = {"large": large, "small": small}
    return [
        {"kind": kind, "text": f"{kind}{i} no{i}{kind}"} for kind, size in sizes.items() for i in range(size)
    ]


def shards(config: TrainConfig) -> dict[str, list[str]]:
    return {f"{n}/{s}": list(read_texts(config.run.shard(n, s))) for n in config.expert_names for s in SPLITS}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25])
def test_the_share_is_each_experts(by_field: Callable[..., Path], seed: int, share: float) -> None:
    path = by_field(rows_of(200, 20), partition={"held_out": share})
    config = load_config(path, [f"seed={seed}"])
    report = make_partition(config, partition_stage(config))
    assert [shard.held_out_documents for shard in report.shards] == [200 * share, 20 * share]


def test_whole_inputs_are_held_out_also_where_their_pieces_are_apart(write_config: WriteConfig) -> None:
    path = write_config(
        documents={"max_chars": 40, "min_chars": 1}, partition={"method": "random", "name_by": {}}
    )
    config = load_config(path)
    report = make_partition(config, partition_stage(config))
    origins: dict[str, set[int]] = {}
    for split in SPLITS:
        examples = [e for name in config.expert_names for e in read_examples(config.run.shard(name, split))]
        origins[split] = {getattr(example, "origin", -1) for example in examples} - {-1}
    assert not origins["train"] & origins["held_out"]
    for shard in report.shards:
        documents = shard.train_documents + shard.held_out_documents
        assert 0.2 <= shard.held_out_documents / documents < 0.3


def test_held_out_documents_that_are_trained_on_are_removed_and_reported(
    by_field: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(40, 40)
    # Of each expert's, and across both.
    rows += [*rows[::8], *rows[::8], *({"kind": "small", "text": row["text"]} for row in rows[1:40:8])]
    path = by_field(rows, partition={"held_out": 0.2})
    line = r"held-out documents that are trained on too +all experts +(\d+) *"
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    removed = [found[1] for text in lines if (found := re.fullmatch(line, text))]
    config = load_config(path)
    report = make_partition(config, partition_stage(config))
    assert removed == [str(report.held_out_duplicates)]
    found = shards(config)
    trained = {text for name in config.expert_names for text in found[f"{name}/train"]}
    for name in config.expert_names:
        assert not trained & set(found[f"{name}/held_out"])
        assert found[f"{name}/held_out"]
    count = sum(map(len, found.values()))
    assert report.held_out_duplicates == report.documents - count > 0
    assert read_partition_report(partition_stage(config)) == report

    kept = load_config(path, ["partition.held_out_duplicates=keep"])
    report = make_partition(kept, partition_stage(kept))
    assert sum(map(len, shards(kept).values())) == report.documents
    assert report.held_out_duplicates == len(rows) - count
    assert not report.duplicates_removed


def test_chats_are_told_apart_by_all_that_they_say(by_field: Callable[..., Path]) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [[{"type": "function", "function": {"name": f"f{i}"}}] for i in range(20)]
    rows = [{"kind": kind, "messages": asked, "tools": tool} for kind in ("large", "small") for tool in tools]
    config = load_config(by_field(rows[:20] + rows_of(0, 20)))
    assert make_partition(config, partition_stage(config)).held_out_duplicates == 0
    rows = [{**row, "messages": [*asked, {"role": "user", "content": str(i)}]} for i, row in enumerate(rows)]
    config = load_config(by_field(rows))
    assert make_partition(config, partition_stage(config)).held_out_duplicates == 0


def test_nothing_but_duplicates_is_refused_with_the_way_out(by_field: Callable[..., Path]) -> None:
    rows = [*rows_of(20, 0), *[{"kind": "small", "text": "the same"}] * 20]
    path = by_field(rows)
    config = load_config(path)
    message = (
        r"expert 'small' is left without held-out documents: all .* set partition.held_out_duplicates to keep"
    )
    with pytest.raises(TrainingError, match=message):
        make_partition(config, partition_stage(config))
    assert not config.run.partition.exists()
    kept = load_config(path, ["partition.held_out_duplicates=keep"])
    assert make_partition(kept, partition_stage(kept)).held_out_duplicates == 4


@pytest.mark.parametrize("max_chars", [None, 12])
def test_another_run_holds_out_the_same(by_field: Callable[..., Path], max_chars: int | None) -> None:
    rows = rows_of(60, 12)
    path = by_field(rows, partition={"held_out": 0.25}, documents={"max_chars": max_chars, "min_chars": 1})
    config = load_config(path)
    split = random_config(config)
    with pytest.raises(TrainingError, match=r"partition.held_out_as: .* holds no held-out documents"):
        partition_stage(split)
    make_partition(config, partition_stage(config))
    make_partition(split, partition_stage(split))
    for part in SPLITS:
        own, other = (
            sorted(text for name in one.expert_names for text in read_texts(one.run.shard(name, part)))
            for one in (config, split)
        )
        assert own == other
    assert partition_stage(split).is_done
    again = load_config(path, ["seed=1"])
    make_partition(again, partition_stage(again))
    assert not partition_stage(split).is_done
