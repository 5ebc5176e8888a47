"""Weights that are copied to hosts that lack them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from decar.router.errors import StartError
from decar.server.cluster import host as of_hosts
from decar.server.cluster import shipping
from decar.server.cluster.host import Host, Stamp
from decar.server.cluster.shipping import files_of, ship

CLUSTER: Any = SimpleNamespace(put=lambda part: part)


class Elsewhere(Host):
    """A host whose disk is a folder."""

    def __init__(self, disk: Path):
        super().__init__()
        self.disk = disk
        self.received: list[tuple[str, int]] = []

    def absent(self, directory: str, files: Mapping[str, Stamp]) -> list[str]:
        return super().absent(f"{self.disk}{directory}", files)

    def wrong(self, directory: str, files: Mapping[str, Stamp]) -> str | None:
        return super().wrong(f"{self.disk}{directory}", files)

    def receive(self, path: str, attempt: str, offset: int, part: bytes, stamp: Stamp | None) -> None:
        self.received.append((Path(path).name, len(part)))
        super().receive(f"{self.disk}{path}", attempt, offset, part, stamp)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Elsewhere]:
    host = Elsewhere(tmp_path / "disk")
    yield host
    host.close()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    made = tmp_path / "experts" / "code"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(25))
    (made / "empty").touch()
    return made


def shipped(host: Elsewhere, checkpoint: Path) -> list[str]:
    told: list[str] = []
    ship(CLUSTER, host, "grace", checkpoint, told.append)
    return told


def test_what_is_missing_is_copied_in_parts_and_once(
    elsewhere: Elsewhere, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "PART_BYTES", 10)
    told = shipped(elsewhere, checkpoint)
    there = Path(f"{elsewhere.disk}{checkpoint}")
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert {path.name: path.read_bytes() for path in there.iterdir() if path.name[0] != "."} == files
    assert [size for name, size in elsewhere.received if name == "model.safetensors"] == [10, 10, 5]
    assert told[-1] == "copying weights to grace: 0.00 GiB of 0.00 GiB"
    assert elsewhere.wrong(str(checkpoint), files_of(checkpoint)) is None
    assert shipped(elsewhere, checkpoint) == [], "it is there"


def test_what_is_there_already_is_left_as_it_is(elsewhere: Elsewhere, checkpoint: Path) -> None:
    there = Path(f"{elsewhere.disk}{checkpoint}")
    there.mkdir(parents=True)
    (there / "config.json").write_text("another")
    shipped(elsewhere, checkpoint)
    assert (there / "config.json").read_text() == "another"
    wrong = elsewhere.wrong(str(checkpoint), files_of(checkpoint))
    assert wrong == f"{there}/config.json has 7 bytes, and 2 at the gateway"


def test_what_was_copied_and_is_another_by_now_is_copied_again(
    elsewhere: Elsewhere, checkpoint: Path
) -> None:
    """Weights that were trained again have the size that they had."""
    shipped(elsewhere, checkpoint)
    (checkpoint / "model.safetensors").write_bytes(bytes(25))
    assert "where there is another by now" in str(elsewhere.wrong(str(checkpoint), files_of(checkpoint)))
    shipped(elsewhere, checkpoint)
    assert Path(f"{elsewhere.disk}{checkpoint}/model.safetensors").read_bytes() == bytes(25)
    assert elsewhere.wrong(str(checkpoint), files_of(checkpoint)) is None


def test_an_attempt_that_was_given_up_does_no_harm_to_the_next(
    elsewhere: Elsewhere, checkpoint: Path
) -> None:
    path, stamp = f"{checkpoint}/model.safetensors", files_of(checkpoint)["model.safetensors"]
    whole = (checkpoint / "model.safetensors").read_bytes()
    elsewhere.receive(path, "1", 0, whole[:10], None)
    elsewhere.receive(path, "2", 0, whole[:10], None)
    elsewhere.receive(path, "1", 10, whole[10:], stamp)  # late
    elsewhere.receive(path, "2", 10, whole[10:], stamp)
    assert Path(f"{elsewhere.disk}{path}").read_bytes() == whole


def test_what_hosts_that_are_gone_had_of_a_file_is_removed(elsewhere: Elsewhere, checkpoint: Path) -> None:
    there = Path(f"{elsewhere.disk}{checkpoint}")
    there.mkdir(parents=True)
    (there / ".model.safetensors.decar-1-2-3-4.5").touch()
    shipped(elsewhere, checkpoint)
    assert not list(there.glob(".model*"))
    assert ".decar-shipped.json" not in files_of(there)


def test_a_file_that_becomes_shorter_is_told(
    elsewhere: Elsewhere, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = {name: (size + 5, changed) for name, (size, changed) in files_of(checkpoint).items()}
    monkeypatch.setattr(shipping, "files_of", lambda _: longer)
    with pytest.raises(StartError, match=r"config\.json has become shorter while it was copied"):
        shipped(elsewhere, checkpoint)


def test_no_file_is_there_by_half(
    elsewhere: Elsewhere, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway ends between two parts, and then a part cannot be written."""
    there = Path(f"{elsewhere.disk}{checkpoint}")
    elsewhere.receive(f"{checkpoint}/model.safetensors", "1", 0, b"12345", None)
    assert len(list(there.iterdir())) == 1
    assert not (there / "model.safetensors").exists()
    elsewhere.close()
    assert list(there.iterdir()) == []
    monkeypatch.setattr(Path, "replace", _full)
    with pytest.raises(StartError, match=r"config\.json cannot be written: No space left on device"):
        shipped(elsewhere, checkpoint)
    assert list(there.iterdir()) == []


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_too_little_room_is_told_before_anything_is_copied(
    elsewhere: Elsewhere, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_hosts.shutil, "disk_usage", lambda _: SimpleNamespace(free=20))
    with pytest.raises(StartError, match=r"has 0.0 GiB free, and .*/experts/code needs 0.0 GiB"):
        shipped(elsewhere, checkpoint)
    assert elsewhere.received == []
