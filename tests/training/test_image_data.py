"""Images in the data: rows in LLaVA's format, every way they can be wrong, and shards parted by their images."""

from __future__ import annotations

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig, TrainConfig, load_config
from decar.training.data.corpus import IMAGES_FIELD
from decar.training.data.digits import WHICH, write_digits
from decar.training.data.sources import BadLines, Document, read_documents
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig


def png(colour: str = "red", size: tuple[int, int] = (6, 4)) -> bytes:
    with BytesIO() as buffer:
        Image.new("RGB", size, colour).save(buffer, "PNG")
        return buffer.getvalue()


def said(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def read(root: Path, *rows: Any, **data: Any) -> list[Document]:
    file = root / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_documents(DataConfig(files=[str(file)], **data), DocumentConfig(min_chars=1), 0))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("red", "blue"):
        (tmp_path / f"in/{name}.png").write_bytes(png(name))
    (tmp_path / "in/text.png").write_text("no image")
    (tmp_path / "in/half.png").write_bytes(png(size=(300, 300))[:-80])
    return tmp_path


def test_rows_with_images_are_read(pictures: Path) -> None:
    one = {"id": 1, "image": "in/red.png", "conversations": said("<image>\nWhat?", "Red.", "Sure?", "Yes.")}
    two = {"image": ["in/red.png", "in/blue.png"], "conversations": said("<image> or\n<image>?", "Both.")}
    chat = [{"role": "user", "content": "See <image>"}, {"role": "assistant", "content": "Blue."}]
    ours = {"image": "in/blue.png", "messages": chat}
    none = {"conversations": [{"from": "system", "value": "Be."}, *said("Hello", "Hi")]}
    # A chat of a corpus without images may speak of the mark.
    about = {
        "messages": [
            {"role": "user", "content": "What is <image>?"},
            {"role": "assistant", "content": "A tag"},
        ]
    }
    first, second, third, fourth, fifth, text = read(
        pictures, one, two, ours, none, about, {"text": "<image>"}
    )
    assert first.text == "What?\n\nRed.\n\nSure?\n\nYes."
    assert first.images == (png("red"),)
    assert first.messages is not None
    assert first.messages[0] == {"role": "user", "content": "<image>\nWhat?"}
    assert [message["role"] for message in first.messages] == ["user", "assistant"] * 2
    assert (second.text, second.images) == (" or\n?\n\nBoth.", (png("red"), png("blue")))
    assert (third.text, third.messages, third.images) == ("See \n\nBlue.", chat, (png("blue"),))
    assert fourth.messages is not None
    assert ([m["role"] for m in fourth.messages], fourth.images) == (["system", "user", "assistant"], ())
    assert fifth.text == "What is <image>?\n\nA tag"
    assert (text.text, text.messages) == ("<image>", None)

    moved = {**one, "image": "red.png"}
    assert read(pictures, moved, image_dir=pictures / "in")[0].images == (png("red"),)
    renamed = {"conversations": one["conversations"], "picture": "in/red.png"}
    assert read(pictures, renamed, image_field="picture")[0].images == (png("red"),)


def test_parquet_may_hold_the_images_themselves(pictures: Path) -> None:
    import pyarrow

    chat = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "Red."}]
    images = [{"bytes": png("red"), "path": None}, None]
    rows = [{"messages": chat, "image": image} for image in images]
    rows[1]["messages"] = [{**chat[0], "content": "No image"}, chat[1]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), pictures / "a.parquet")
    found = list(read_documents(DataConfig(files=[str(pictures / "a.parquet")]), DocumentConfig(), 0))
    assert [document.images for document in found] == [(png("red"),), ()]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"image": "in/gone.png", "conversations": said("<image>", "a")},
        r"gone\.png cannot be read \(No such file or directory\); paths are relative to the file's folder",
    ),
    "a folder": (
        {"image": "in", "conversations": said("<image>", "a")},
        r"in cannot be read \(Is a directory\)",
    ),
    "no image": (
        {"image": "in/text.png", "conversations": said("<image>", "a")},
        r"image .*text\.png cannot be decoded \(it is no PNG, JPEG, .* file",
    ),
    "half": (
        {"image": "in/half.png", "conversations": said("<image>", "a")},
        r"half\.png cannot be decoded \(.*truncated",
    ),
    "a number": ({"image": 3, "conversations": said("<image>", "a")}, r"field 'image' is neither a path nor"),
    "no mark": (
        {"image": "in/red.png", "conversations": said("What?", "a")},
        r"0 <image> marks in the messages, but 1 images; each image needs one",
    ),
    "too many marks": (
        {"image": ["in/red.png"], "conversations": said("<image><image>", "a")},
        r"2 <image> marks in the messages, but 1 images",
    ),
    "a mark without image": (
        {"image": None, "conversations": said("<image>", "a")},
        r"1 <image> marks .* but 0 images",
    ),
    "images of another name": (
        {"images": ["in/red.png"], "conversations": said("<image>", "a")},
        r"1 <image> marks .* but 0 images",
    ),
    "a mark in an answer": (
        {"image": "in/red.png", "conversations": said("What?", "<image>")},
        r"an <image> mark in an answer",
    ),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        r"field 'conversations': message 1 is from 'narrator', which is none of human, user, gpt, .*system",
    ),
    "no value": ({"conversations": [{"from": "human"}]}, r"message 1 needs a from and a value, both strings"),
    "no answer": (
        {"conversations": said("a")},
        r"field 'conversations': a chat needs an assistant's message",
    ),
    "an image and no chat": ({"text": "a", "image": "in/red.png"}, r"an image needs a chat to stand in"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_what_is_wrong_with_a_row_is_named(pictures: Path, name: str) -> None:
    row, message = WRONG[name]
    good = {"image": "in/red.png", "conversations": said("<image>", "a")}
    with pytest.raises(TrainingError, match=rf"rows\.jsonl, line 2: .*{message}") as caught:
        read(pictures, good, row)
    assert "\n" not in str(caught.value)
    assert "data.on_bad_line" in str(caught.value)
    file = pictures / "rows.jsonl"
    bad = BadLines(skip=True)
    data = DataConfig(files=[str(file)], on_bad_line="skip")
    assert len(list(read_documents(data, DocumentConfig(min_chars=1), 0, bad=bad))) == 1
    assert bad.counts == {"rows.jsonl": 1}


# ---------------------------------------------------------------------------------------------- partition


@pytest.fixture
def digits(write_config: WriteConfig, tmp_path: Path) -> TrainConfig:
    """420 questions about 120 digits."""
    write_digits(tmp_path / "digits", limit=120)
    return load_config(
        write_config(
            data={"files": [str(tmp_path / "digits/train.jsonl")]},
            partition={"held_out": 0.2, "name_by": {}},
            experts=["first", "second"],
        )
    )


def rows_of(config: TrainConfig) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {**row, "split": split}
            for split in ("train", "held_out")
            for row in parquet.read_table(config.run.shard(name, split)).to_pylist()
        ]
        for name in config.expert_names
    }


def test_digits_are_parted_by_what_they_look_like(digits: TrainConfig) -> None:
    report = make_partition(digits, partition_stage(digits))
    shards = rows_of(digits)
    assert report.balance < 1.01
    answers = {
        name: Counter(row["text"].split()[-1] for row in rows if row["text"].startswith(WHICH))
        for name, rows in shards.items()
    }
    pairs = [(d, k) for k, counter in enumerate(answers.values()) for d in counter.elements()]
    found = normalized_mutual_info_score([d for d, _ in pairs], [k for _, k in pairs])
    # By chance 120 digits of ten kinds in two halves have a mutual information of about (10-1)(2-1)/(2·120) nats.
    assert found > 4 * 9 / 240
    # The same image, the same expert; and never on both sides.
    for rows in shards.values():
        train, held_out = (
            {image for row in rows if row["split"] == split for image in row[IMAGES_FIELD]}
            for split in ("train", "held_out")
        )
        assert train
        assert held_out
    images = {
        split: {
            i for rows in shards.values() for row in rows if row["split"] == split for i in row[IMAGES_FIELD]
        }
        for split in ("train", "held_out")
    }
    assert not images["train"] & images["held_out"]
    directory = digits.work_dir / "partition"
    assert {file.name for file in directory.iterdir()} == {
        "DONE",
        "first",
        "map.png",
        "nearest.png",
        "report.json",
        "second",
    }
    assert Image.open(directory / "nearest.png").size[0] > 1_000


def test_equal_settings_give_equal_shards(digits: TrainConfig, tmp_path: Path) -> None:
    make_partition(digits, partition_stage(digits))
    again = digits.model_copy(update={"work_dir": tmp_path / "again"})
    make_partition(again, partition_stage(again))
    for name in digits.expert_names:
        assert digits.run.shard(name, "train").read_bytes() == again.run.shard(name, "train").read_bytes()


@pytest.mark.parametrize(
    ("method", "texts"),
    [("kmeans", 1), ("kmeans", 15), ("two-stage", 15), ("random", 15), ("by-field", 15)],
)
def test_every_row_of_a_mixed_corpus_gets_one_expert(
    write_config: WriteConfig, tmp_path: Path, method: str, texts: int
) -> None:
    path = write_config()
    write_digits(tmp_path / "digits", limit=30)
    prose = (tmp_path / "prose.jsonl").read_text().splitlines(keepends=True)[:texts]
    (tmp_path / "prose.jsonl").write_text("".join(prose))
    files = [str(tmp_path / "digits/train.jsonl"), str(tmp_path / "prose.jsonl")]
    settings = {"held_out": 0.3, "held_out_by": "piece", "method": method, "name_by": {}}
    if method == "by-field":
        settings["domains"] = {"code": ["train.*"], "prose": ["prose.*"]}
    path = write_config(data={"files": files}, partition=settings)
    (tmp_path / "prose.jsonl").write_text("".join(prose))
    config = load_config(path)
    report = make_partition(config, partition_stage(config))
    shards = rows_of(config)
    assert sum(map(len, shards.values())) == report.documents == 30 * 3 + 15 + texts
    without = [row["text"] for rows in shards.values() for row in rows if not row[IMAGES_FIELD]]
    assert sorted(without) == sorted(json.loads(line)["text"] for line in prose)
    if method != "by-field":
        sizes = [sum(not row[IMAGES_FIELD] for row in rows) for rows in shards.values()]
        assert sum(sizes) == texts
        if method != "random":
            assert abs(sizes[0] - sizes[1]) <= 1


def test_a_bad_image_leaves_nothing_behind(digits: TrainConfig, tmp_path: Path) -> None:
    image = next((tmp_path / "digits/images").iterdir())
    image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(
        TrainingError, match=rf"train\.jsonl, line \d+: image .*{image.name} cannot be decoded"
    ):
        make_partition(digits, partition_stage(digits))
    assert not list(digits.work_dir.iterdir())


def test_digits_are_the_same_for_a_seed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert write_digits(tmp_path / name, seed=3, limit=10) == 35
    assert (tmp_path / "a/train.jsonl").read_bytes() == (tmp_path / "b/train.jsonl").read_bytes()
    row = json.loads((tmp_path / "a/train.jsonl").read_text().splitlines()[0])
    first = row["image"] if isinstance(row["image"], str) else row["image"][0]
    with Image.open(tmp_path / "a" / first) as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
        assert np.asarray(image).max() > 200
