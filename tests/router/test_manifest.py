"""Ensemble directories: what is read, and every problem that is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from decar.router import Ensemble, EnsembleError, ExpertEntry, Manifest, write_manifest
from decar.router.manifest import tokenizer_fingerprint
from tests.reference import PADDING_ROWS, VOCAB_SIZE, Reference, make_tokenizer

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def directory(trio: Reference, tmp_path: Path) -> Path:
    """A copy of a good ensemble, for a test to break."""
    return Path(shutil.copytree(trio.directory, tmp_path / "trio"))


def edit_json(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def only_problem(directory: Path) -> str:
    """The one problem that `inspect` finds; `load` raises the same."""
    _, problems = Ensemble.inspect(directory)
    assert len(problems) == 1, problems
    with pytest.raises(EnsembleError) as caught:
        Ensemble.load(directory)
    assert str(caught.value) == problems[0]
    assert "\n" not in problems[0]
    return problems[0]


# ---------------------------------------------------------------------------------------------- reading


def test_a_good_ensemble(trio: Reference) -> None:
    ensemble = Ensemble.load(trio.directory)
    assert ensemble.name == "trio"
    assert ensemble.expert_names == ["maths", "code", "prose"]
    assert [expert.prior for expert in ensemble.experts] == [0.2, 0.5, 0.3]
    assert ensemble.manifest.router.kind == "posterior"
    assert ensemble.manifest.mixing.rule == "velocity"
    assert [expert.vocab_size for expert in ensemble.experts] == [
        VOCAB_SIZE + PADDING_ROWS,
        VOCAB_SIZE,
        VOCAB_SIZE,
    ]
    assert ensemble.vocab_size == trio.vocab_size == VOCAB_SIZE
    assert ensemble.max_positions == 512
    assert [expert.architecture for expert in ensemble.experts] == [
        "LlamaForCausalLM",
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
    ]
    for expert, model in zip(ensemble.experts, trio.models, strict=True):
        assert expert.num_parameters == sum(parameter.numel() for parameter in model.parameters())
        assert expert.weight_bytes >= 4 * expert.num_parameters  # fp32, and a header
    assert len({expert.tokenizer_fingerprint for expert in ensemble.experts}) == 1


def test_defaults_of_a_manifest() -> None:
    manifest = Manifest(name="demo", experts=(ExpertEntry(name="a", path="experts/a", prior=1),))
    assert manifest.router.kind == "posterior"
    assert manifest.mixing.rule == "velocity"


def test_a_manifest_survives_writing_and_reading(directory: Path) -> None:
    before = Ensemble.load(directory).manifest
    write_manifest(directory, before)
    assert Ensemble.load(directory).manifest == before
    assert [path.name for path in directory.glob("ensemble*")] == [
        "ensemble.json"
    ]  # no temporary file is left


def test_a_flow_ensemble_says_how_it_reveals(directory: Path) -> None:
    def edit(**fields: Any) -> None:
        edit_json(directory / "ensemble.json", lambda manifest: manifest.update(fields))

    edit(kind="flow")
    assert "mask_token_id" in only_problem(directory)
    edit(flow={"mask_token_id": 3, "steps": 8})
    manifest = Ensemble.load(directory).manifest
    assert manifest.flow is not None
    assert (manifest.flow.order, manifest.flow.schedule, manifest.flow.block_length) == (
        "random",
        "linear",
        None,
    )
    write_manifest(directory, manifest)
    assert Ensemble.load(directory).manifest == manifest
    edit(flow={"mask_token_id": VOCAB_SIZE})
    assert f"the ids that expert 'code' knows end at {VOCAB_SIZE - 1}" in only_problem(directory)
    edit(kind="autoregressive")
    assert 'belongs to kind "flow" alone' in only_problem(directory)


def test_an_autoregressive_ensembles_file_is_as_it_was(directory: Path) -> None:
    write_manifest(directory, Ensemble.load(directory).manifest)
    assert not json.loads((directory / "ensemble.json").read_text()).keys() & {"kind", "flow"}


def test_sharded_weights(directory: Path) -> None:
    path = directory / "experts/code"
    (path / "model.safetensors").unlink()
    for shard in ("a", "b"):
        save_file({shard: torch.zeros(3, 5)}, path / f"{shard}.safetensors")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    expert = Ensemble.load(directory).experts[1]
    assert expert.num_parameters == 30
    (path / "b.safetensors").unlink()
    problem = only_problem(directory)
    assert "'code'" in problem
    assert "b.safetensors are missing" in problem


# ---------------------------------------------------------------------------------------------- manifests

WRONG_MANIFESTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "unknown key": (lambda m: m.update(nmae="x"), ("nmae", "unknown field", "'name'")),
    "unknown key of an expert": (lambda m: m["experts"][1].update(piror=1), ("experts.1.piror", "'prior'")),
    "missing name": (lambda m: m.pop("name"), ("name", "required")),
    "missing path": (lambda m: m["experts"][0].pop("path"), ("experts.0.path", "required")),
    "empty name": (lambda m: m.update(name=""), ("name",)),
    "slash in a name": (lambda m: m["experts"][0].update(name="a/b"), ("experts.0.name", "'a/b'")),
    "name with a space": (lambda m: m.update(name="my model"), ("name", "'my model'")),
    "two of a name": (lambda m: m["experts"][2].update(name="code"), ("'code'", "own name")),
    "no experts": (lambda m: m.update(experts=[]), ("experts",)),
    "too many experts": (lambda m: m.update(experts=m["experts"] * 6), ("experts",)),
    "prior of zero": (lambda m: m["experts"][0].update(prior=0), ("experts.0.prior", "0")),
    "negative prior": (lambda m: m["experts"][0].update(prior=-1), ("experts.0.prior", "-1")),
    "infinite prior": (lambda m: m["experts"][0].update(prior=float("inf")), ("experts.0.prior",)),
    "prior is not a number": (lambda m: m["experts"][0].update(prior=float("nan")), ("experts.0.prior",)),
    "prior is text": (lambda m: m["experts"][0].update(prior="much"), ("experts.0.prior", "'much'")),
    "unknown router": (lambda m: m.update(router={"kind": "oracle"}), ("router.kind", "'oracle'")),
    "unknown rule": (lambda m: m.update(mixing={"rule": "mean"}), ("mixing.rule", "'mean'")),
    "later version": (lambda m: m.update(format_version=2), ("format_version", "2")),
    "experts is an object": (lambda m: m.update(experts={}), ("experts",)),
    "path outside": (
        lambda m: m["experts"][1].update(path="../elsewhere"),
        ("'code'", "'../elsewhere'", "leaves"),
    ),
    "absolute path": (lambda m: m["experts"][1].update(path="/etc"), ("'code'", "'/etc'", "leaves")),
    "path to nowhere": (
        lambda m: m["experts"][1].update(path="experts/x"),
        ("'code'", "config.json", "missing"),
    ),
}


@pytest.mark.parametrize(("edit", "words"), WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_wrong_manifests(directory: Path, edit: Edit, words: tuple[str, ...]) -> None:
    edit_json(directory / "ensemble.json", edit)
    problem = only_problem(directory)
    for word in words:
        assert word in problem


@pytest.mark.parametrize("text", ["", "{", "\udcff", "[]", "3", "null"])
def test_manifests_that_are_no_json_object(directory: Path, text: str) -> None:
    (directory / "ensemble.json").write_text(text, errors="surrogateescape")
    assert "ensemble.json" in only_problem(directory)


def test_no_manifest_and_no_directory(tmp_path: Path) -> None:
    assert "ensemble.json is missing" in only_problem(tmp_path)
    assert "is not a directory" in only_problem(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.touch()
    assert "is not a directory" in only_problem(file)


def test_a_link_out_of_the_directory_leaves_it(directory: Path, trio: Reference) -> None:
    path = directory / "experts/code"
    shutil.rmtree(path)
    path.symlink_to(trio.directory / "experts/code")
    problem = only_problem(directory)
    assert f"{path} is a link" in problem
    assert "leaves the ensemble directory; copy" in problem


@pytest.mark.parametrize(
    "name",
    [
        "ensemble.json",
        "experts/code/config.json",
        "experts/code/model.safetensors",
        "experts/code/tokenizer.json",
        "experts/code/more.safetensors",
        "experts/code/below/anything",
        "router/router.json",
        "elsewhere",
    ],
)
@pytest.mark.parametrize("relative", [True, False])
def test_no_file_may_be_a_link_out_of_the_directory(directory: Path, name: str, relative: bool) -> None:
    """Whatever it is for: what is read of an ensemble is what was checked, and what a copy of it holds."""
    target = directory.parent / "outside"
    link = directory / name
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.rename(target)
    link.symlink_to(os.path.relpath(target, link.parent) if relative else target)
    problem = only_problem(directory)
    assert f"{link} is a link" in problem
    assert "leaves the ensemble directory; copy" in problem


def test_links_inside_the_directory_are_followed(directory: Path) -> None:
    weights = directory / "experts/code/model.safetensors"
    weights.rename(directory / "shared.safetensors")
    weights.symlink_to("../../shared.safetensors")
    (directory / "loop").symlink_to("loop")
    Ensemble.load(directory)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("../../../outside.safetensors", "leaves"),
        ("../prose/model.safetensors", "leaves"),
        ("below/../../x.safetensors", "leaves"),
        ("/etc/passwd", "leaves"),
        ("model.safetensors\0.txt", "no file name"),
        ("", "no file name"),
        (None, "no file name"),
        (3, "no file name"),
        (["model.safetensors"], "no file name"),
    ],
)
def test_a_weight_map_names_the_files_of_its_own_folder(directory: Path, name: Any, word: str) -> None:
    shutil.copy(directory / "experts/code/model.safetensors", directory.parent / "outside.safetensors")
    index = directory / "experts/code/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    problem = only_problem(directory)
    assert f"'code': {index}: in its weight_map, {name!r}" in problem
    assert word in problem
    assert problem.endswith(("copy the file inside", "export the expert again"))


@pytest.mark.parametrize("path", ["experts/code\0", "\0", "loop/code"])
def test_a_path_that_is_none(directory: Path, path: str) -> None:
    (directory / "loop").symlink_to("loop")
    edit_json(directory / "ensemble.json", lambda m: m["experts"][1].update(path=path))
    assert "'code'" in only_problem(directory)


# ---------------------------------------------------------------------------------------------- experts


def test_config_files(directory: Path) -> None:
    config = directory / "experts/prose/config.json"
    good = config.read_text()
    config.write_text("{")
    problem = only_problem(directory)
    assert "'prose'" in problem
    assert "not valid JSON" in problem
    for wrong in (None, 0, -5, "many", [1]):
        config.write_text(json.dumps({**json.loads(good), "vocab_size": wrong}))
        problem = only_problem(directory)
        assert "'prose'" in problem
        assert "vocab_size" in problem
    for wrong in ("many", [1], {"a": 1}):
        config.write_text(json.dumps({**json.loads(good), "max_position_embeddings": wrong}))
        problem = only_problem(directory)
        assert "'prose'" in problem
        assert "max_position_embeddings" in problem
    for no_object in ("[]", "3", "null"):
        config.write_text(no_object)
        assert "'prose'" in only_problem(directory)
    config.unlink()
    problem = only_problem(directory)
    assert "'prose'" in problem
    assert "config.json is missing" in problem


def test_missing_weights(directory: Path) -> None:
    (directory / "experts/prose/model.safetensors").unlink()
    problem = only_problem(directory)
    assert "'prose'" in problem
    assert "no *.safetensors" in problem


@pytest.mark.parametrize("lost_bytes", [1, 1000])
def test_truncated_weights(directory: Path, lost_bytes: int) -> None:
    weights = directory / "experts/maths/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-lost_bytes])
    problem = only_problem(directory)
    assert "'maths'" in problem
    assert "truncated" in problem


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 4, b"not safetensors at all", b"\x08" + b"\x00" * 7 + b"[1, 2]  "]
)
def test_weights_that_are_something_else(directory: Path, content: bytes) -> None:
    (directory / "experts/maths/model.safetensors").write_bytes(content)
    problem = only_problem(directory)
    assert "'maths'" in problem
    assert "not a safetensors file" in problem


def test_a_broken_weight_index(directory: Path) -> None:
    for content in ("{", "{}", "[]", '{"weight_map": 3}'):
        (directory / "experts/code/model.safetensors.index.json").write_text(content)
        problem = only_problem(directory)
        assert "'code'" in problem
        assert "model.safetensors.index.json" in problem


def test_every_broken_expert_is_named(directory: Path) -> None:
    (directory / "experts/code/config.json").unlink()
    (directory / "experts/maths/model.safetensors").unlink()
    ensemble, problems = Ensemble.inspect(directory)
    assert ensemble is not None
    assert len(problems) == 2
    assert any("'code'" in problem for problem in problems)
    assert any("'maths'" in problem for problem in problems)


# ---------------------------------------------------------------------------------------------- tokenizers


def test_different_tokenizers(directory: Path) -> None:
    make_tokenizer(directory / "experts/prose", vocab_size=590)
    problem = only_problem(directory)
    assert "'maths'" in problem
    assert "'prose'" in problem
    assert "different tokenizers" in problem


def _swap_two_ids(data: dict[str, Any]) -> None:
    vocab = data["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]


WRONG_TOKENIZERS: dict[str, Edit] = {
    "two ids swapped": _swap_two_ids,
    "merges in another order": lambda data: data["model"]["merges"].reverse(),
    "another special token": lambda data: data["added_tokens"][0].update(content="<nothing>"),
    "another pre-tokenizer": lambda data: data["pre_tokenizer"].update(add_prefix_space=True),
    "a normaliser": lambda data: data.update(normalizer={"type": "Lowercase"}),
}


@pytest.mark.parametrize("edit", WRONG_TOKENIZERS.values(), ids=WRONG_TOKENIZERS)
def test_tokenizers_that_give_other_ids_differ(directory: Path, edit: Edit) -> None:
    before = tokenizer_fingerprint(directory / "experts/prose")
    edit_json(directory / "experts/prose/tokenizer.json", edit)
    assert tokenizer_fingerprint(directory / "experts/prose") != before
    problem = only_problem(directory)
    assert "'maths'" in problem
    assert "'prose'" in problem


def test_what_does_not_change_ids_does_not_change_the_fingerprint(directory: Path) -> None:
    path = directory / "experts/prose"
    before = tokenizer_fingerprint(path)
    edit_json(path / "tokenizer.json", lambda data: data.update(truncation=None, version="1.1"))
    vocab_in_another_order: Edit = lambda data: data["model"].update(  # noqa: E731
        vocab=dict(reversed(data["model"]["vocab"].items()))
    )
    edit_json(path / "tokenizer.json", vocab_in_another_order)
    assert tokenizer_fingerprint(path) == before
    assert Ensemble.inspect(directory)[1] == []


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "[]", "{}", '{"model": {"vocab": 3}}'),
        *(
            '{"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}',
            '{"model": {"vocab": {}}, "added_tokens": [3]}',
        ),
        '{"model": {"vocab": {}}, "added_tokens": [{"id": "x", "content": "x"}]}',
    ],
)
def test_tokenizers_that_cannot_be_read(directory: Path, content: str | None) -> None:
    file = directory / "experts/prose/tokenizer.json"
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    problem = only_problem(directory)
    assert "'prose'" in problem
    assert "tokenizer.json" in problem


def test_more_tokens_than_rows(directory: Path) -> None:
    edit_json(directory / "experts/code/config.json", lambda config: config.update(vocab_size=599))
    problem = only_problem(directory)
    assert "'code'" in problem
    assert "599" in problem
