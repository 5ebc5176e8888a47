"""Data sets of the Hugging Face Hub: the library `datasets`, with a folder, and asking a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig, HubConfig, load_config
from decar.training.data.sources import BadLines, Document, read_documents
from decar.training.partition.stage import partition_stage
from tests.training.conftest import WriteConfig
from tests.training.fake_hub import COMMIT, hub
from tests.training.test_image_data import png

ROOT = Path(__file__).parents[2]
ROWS = [
    {"instruction": "Add.", "input": "2, 3", "output": "Five."},
    {"instruction": "Count.", "input": None, "output": "1"},
]
SAID = ["Add.\n\n2, 3\n\nFive.", "Count.\n\n1"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "set"
    root.mkdir()
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (root / "test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    return root


def read(dataset: Any, bad: BadLines | None = None, **data: Any) -> list[Document]:
    config = DataConfig(hub=[dataset], **data)
    return list(read_documents(config, DocumentConfig(min_chars=1), 0, "instruction", bad))


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_pass_through_the_same_formats(folder: Path, streaming: bool) -> None:
    documents = read({"id": str(folder), "streaming": streaming})
    assert [(d.text, d.format, d.domain) for d in documents] == [
        (SAID[0], "Alpaca", "Add."),
        (SAID[1], "Alpaca", "Count."),
    ]
    assert {document.source for document in documents} == {str(folder)}
    documents = read({"id": str(folder), "split": "test", "streaming": streaming})
    assert [document.text for document in documents] == SAID[1:]


def test_an_id_alone_will_do() -> None:
    (dataset,) = DataConfig.model_validate({"hub": ["org/name"]}).hub
    assert dataset == HubConfig(id="org/name", split="train")


def test_images_stay_as_they_are_encoded(tmp_path: Path, folder: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    chat = {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Red."}
    message = {"from": Value("string"), "value": Value("string")}
    features = Features(conversations=[message], image=Image(), instruction=Value("string"))
    rows = {"conversations": [list(chat)], "image": [{"bytes": png(), "path": None}], "instruction": ["x"]}
    (tmp_path / "pictures").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "pictures/train.parquet"))
    (document,) = read(str(tmp_path / "pictures"))
    assert (document.images, document.format) == ((png(),), "LLaVA")


def test_bad_rows_are_named_or_counted(folder: Path) -> None:
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [ROWS[0], {**ROWS[0], "output": None}])
    )
    with pytest.raises(TrainingError, match=rf"{folder}, row 2: field 'output' is not a string; .*mend it"):
        read(str(folder))
    bad = BadLines(skip=True)
    assert len(read(str(folder), bad)) == 1
    assert bad.counts == {str(folder): 1}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"split": "valid"}, r"split valid cannot be loaded \(Unknown split \"valid\".*'train'"),
        ({"config": "other"}, r"\(other\), split train cannot be loaded \(BuilderConfig 'other' not found"),
    ],
)
def test_what_a_data_set_has_not(folder: Path, dataset: dict[str, str], message: str) -> None:
    with pytest.raises(TrainingError, match=f"data.hub: {folder}.*{message}") as caught:
        read({"id": str(folder), **dataset})
    assert "\n" not in str(caught.value)


def test_columns_that_make_nothing_are_told_once(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_text(json.dumps({"bodies": "a"}))
    with pytest.raises(TrainingError, match=r"data.hub: .*split train: no field 'text' .*it has bodies"):
        read(str(folder))


def test_done_until_the_folder_changes(write_config: WriteConfig, folder: Path) -> None:
    config = load_config(write_config(data={"hub": [str(folder)]}))
    before = partition_stage(config).inputs
    (folder / "train.jsonl").write_text(json.dumps(ROWS[0]))
    assert partition_stage(config).inputs != before


# ------------------------------------------------------------------------------------------------ a hub

_READ = """
import sys, yaml
from decar.router.errors import TrainingError
from decar.training.config import DataConfig, DocumentConfig
from decar.training.data.sources import read_documents
for dataset in yaml.safe_load(sys.argv[1]):
    try:
        documents = list(read_documents(DataConfig(hub=[dataset]), DocumentConfig(min_chars=1), 0))
    except TrainingError as error:
        print(error)
    else:
        print([document.text for document in documents])
"""


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    with hub({"org/set": folder}, gated="org/gated") as (endpoint, _):
        yield endpoint


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[str]]:
    """In a process of its own, since the libraries read their settings when they are imported."""

    def run(endpoint: str, *datasets: Any, **environment: str) -> list[str]:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", _READ, json.dumps(datasets)],
            env={**inherited, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout.splitlines()

    return run


def test_a_data_set_of_the_hub(run: Callable[..., list[str]], served: str) -> None:
    streamed = {"id": "org/set", "split": "test", "streaming": True}
    asked = [
        "org/set",
        streamed,
        {"id": "org/set", "revision": COMMIT},
        "org/none",
        "org/gated",
        {"id": "org/set", "revision": "v9"},
    ]
    *read, none, gated, revision = run(served, *asked)
    assert read == [str(SAID), str(SAID[1:]), str(SAID)]
    assert none.startswith(
        "data.hub: org/none, split train cannot be loaded (Dataset 'org/none' doesn't exist"
    )
    assert "'org/gated' is a gated dataset" in gated
    assert revision.startswith(
        "data.hub: org/set@v9, split train cannot be loaded (Revision 'v9' doesn't exist"
    )
    # What is in the cache needs no Hub.
    cached, other = run(served, "org/set", "org/other", HF_HUB_OFFLINE="1")
    assert cached == str(SAID)
    assert other.startswith("data.hub: org/other, split train cannot be loaded (Couldn't reach 'org/other'")
