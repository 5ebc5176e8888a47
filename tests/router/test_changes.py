"""What a new reading of an ensemble directory changes, and what a running server cannot follow."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decar.router import EnsembleError, Reading, changes
from tests.reference import Reference, make_tokenizer

from .test_manifest import directory, edit_json

__all__ = ["directory"]  # the fixture

Edit = Callable[[Path], object]


def manifest(edit: Callable[[dict[str, Any]], object]) -> Edit:
    return lambda directory: edit_json(directory / "ensemble.json", edit)


def found_after(directory: Path, edit: Edit) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(experts, rest) of the changes that ``edit`` makes."""
    before = Reading.of(directory)
    edit(directory)
    found = changes(before, Reading.of(directory))
    return found.experts, found.rest


def moved(directory: Path, old: str, new: str) -> None:
    (directory / "experts" / old).rename(directory / "experts" / new)


def copied(directory: Path) -> None:
    """A version with a folder of its own, to which the manifest leads."""
    shutil.copytree(directory / "experts/code", directory / "experts/code-2")
    edit_json(directory / "ensemble.json", lambda data: data["experts"][1].update(path="experts/code-2"))


def renamed(directory: Path) -> None:
    edit_json(directory / "ensemble.json", lambda data: data["experts"][1].update(name="programs"))


def rewritten(directory: Path) -> None:
    """Other weights of the same size, at the same time of a coarse clock."""
    file = directory / "experts/prose/model.safetensors"
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.unlink()
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


@pytest.mark.parametrize(
    ("edit", "experts", "rest"),
    [
        (lambda directory: None, (), ()),
        (rewritten, (2,), ()),
        (copied, (1,), ()),
        (renamed, (), ("the name of 'code', now 'programs'",)),
        (manifest(lambda data: data["experts"][0].update(prior=0.9)), (), ("the prior of 'maths'",)),
        (
            manifest(lambda data: data["experts"][1].update(options={"tensor_parallel_size": 2})),
            (1,),
            (),
        ),
        (manifest(lambda data: data["router"].update(kind="prior")), (), ("router.kind",)),
        (
            manifest(lambda data: data["mixing"].update(rule="logit", prune=0.1)),
            (),
            ("mixing.rule", "mixing.prune"),
        ),
        (
            lambda directory: edit_json(
                directory / "experts/maths/config.json", lambda data: data.update(rope_theta=7.0)
            ),
            (0,),
            (),
        ),
    ],
    ids=["nothing", "weights", "folder", "name", "prior", "ranks", "router", "mixing", "config"],
)
def test_what_is_a_change(
    directory: Path, edit: Edit, experts: tuple[int, ...], rest: tuple[str, ...]
) -> None:
    assert found_after(directory, edit) == (experts, rest)


def test_a_folder_that_was_moved_has_the_same_weights(directory: Path) -> None:
    def edit(directory: Path) -> None:
        moved(directory, "code", "programs")
        edit_json(
            directory / "ensemble.json", lambda data: data["experts"][1].update(path="experts/programs")
        )

    assert found_after(directory, edit) == ((), ("the path of 'code'",))


def test_files_of_a_trained_router(directory: Path) -> None:
    before = Reading.of(directory)
    (directory / "router").mkdir()
    (directory / "router/notes.txt").write_text("trained")
    assert changes(before, Reading.of(directory)).rest == ("the trained routers",)


@pytest.mark.parametrize(
    ("names", "places", "experts", "removed"),
    [
        (["code", "prose", "maths"], (1, 2, 0), (), ()),
        (["maths", "prose"], (0, 2), (), (1,)),
        (["maths", "code", "prose", "more"], (0, 1, 2, None), (3,), ()),
        (["more", "maths", "prose"], (1, 0, 2), (0,), ()),
        (["more", "prose"], (0, 2), (0,), (1,)),
    ],
    ids=["order", "fewer", "more", "another", "another-of-two"],
)
def test_who_has_which_place(
    directory: Path,
    names: list[str],
    places: tuple[int | None, ...],
    experts: tuple[int, ...],
    removed: tuple[int, ...],
) -> None:
    shutil.copytree(directory / "experts/code", directory / "experts/more")
    before = Reading.of(directory)
    entries = [{"name": name, "path": f"experts/{name}", "prior": 1} for name in names]
    edit_json(directory / "ensemble.json", lambda data: data.update(experts=entries))
    found = changes(before, Reading.of(directory))
    assert (found.places, found.experts, found.removed) == (places, experts, removed)
    assert ("the order of experts" in found.rest) == (places in ((1, 2, 0), (1, 0, 2)))


def other_tokenizer(directory: Path) -> None:
    for name in ("maths", "code", "prose"):
        make_tokenizer(directory / "experts" / name, vocab_size=500)


def edited(file: str, **fields: Any) -> Edit:
    return lambda directory: edit_json(directory / "experts/maths" / file, lambda data: data.update(fields))


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (manifest(lambda data: data.update(name="duo")), "the ensemble's name"),
        (other_tokenizer, "the tokenizer"),
        (edited("tokenizer_config.json", eos_token="<s>"), "the special tokens"),
        (edited("generation_config.json", eos_token_id=5), "what ends an answer"),
        (edited("config.json", eos_token_id=5), "what ends an answer"),
    ],
    ids=["name", "tokenizer", "special-tokens", "generation", "eos"],
)
def test_what_cannot_change_while_it_is_served(directory: Path, edit: Edit, said: str) -> None:
    (directory / "experts/maths/generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    before = Reading.of(directory)
    edit(directory)
    with pytest.raises(EnsembleError, match=said) as error:
        changes(before, Reading.of(directory))
    assert "start the server anew" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_note_of_who_wrote_a_file_is_no_change(directory: Path) -> None:
    """Beside the first expert's files, which have changed."""
    assert found_after(directory, edited("generation_config.json", transformers_version="7")) == ((0,), ())


def test_an_expert_alone_is_brought_up_to_date(directory: Path) -> None:
    before = Reading.of(directory)
    edit_json(directory / "ensemble.json", lambda data: data["mixing"].update(rule="logit"))
    for edit in (copied, rewritten):
        edit(directory)
    after = Reading.of(directory)
    between = before.of_experts([(before, 0), (after, 1), (before, 2)])
    assert [expert.path.name for expert in between.ensemble.experts] == ["maths", "code-2", "prose"]
    assert between.ensemble.manifest.mixing.rule == "velocity"
    assert changes(between, after).experts == (2,)
    assert changes(between, after).rest == ("mixing.rule",)


def test_what_cannot_be_served_is_refused_as_by_serve(directory: Path, trio: Reference) -> None:
    (directory / "ensemble.json").write_text("{")
    with pytest.raises(EnsembleError, match="not valid JSON"):
        Reading.of(directory)
