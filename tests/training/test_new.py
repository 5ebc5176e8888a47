"""`decar new`: an ensemble of checkpoints that exist, or one line with the fix and nothing written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from decar.router import Ensemble
from decar.training.new import write
from tests.helpers import wait_until
from tests.images import Kind, make_image_ensemble
from tests.training.new_command import only_error, run_new

# ---------------------------------------------------------------------------------------------- an ensemble


def test_an_ensemble_of_two_checkpoints(here: Path) -> None:
    said = run_new("demo", "code=./a", "prose=b", "--prior", "code=0.6,prose=0.4")
    assert (said.error, said.err) == (None, "")
    ensemble = Ensemble.load("demo")
    assert (ensemble.name, ensemble.expert_names) == ("demo", ["code", "prose"])
    assert [expert.prior for expert in ensemble.experts] == [0.6, 0.4]
    assert (ensemble.manifest.router.kind, ensemble.manifest.mixing.rule) == ("posterior", "velocity")
    for expert, source in zip(ensemble.experts, ("a", "b"), strict=True):
        for file in expert.path.iterdir():
            assert file.read_bytes() == (here / source / file.name).read_bytes()
            assert not file.is_symlink()
            assert file.stat().st_ino != (here / source / file.name).stat().st_ino
        assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= {
            f.name for f in expert.path.iterdir()
        }
    assert "priors: code 0.600, prose 0.400\n" in said.out
    assert said.out.endswith("Next:\n  decar inspect demo\n  decar serve demo --port 8000\n")


def test_equal_priors_are_noted(here: Path) -> None:
    said = run_new("demo", "code=a", "prose=b")
    assert (
        "priors: code 0.500, prose 0.500 (equal, as neither --prior nor --sample says otherwise)" in said.out
    )
    assert [expert.prior for expert in Ensemble.load("demo").experts] == [0.5, 0.5]


def test_a_path_says_where(here: Path) -> None:
    assert run_new(here / "far/away/demo", f"code={here / 'a'}").error is None
    assert Ensemble.load("far/away/demo").name == "demo"


def test_options_by_expert_may_be_repeated_or_joined(here: Path) -> None:
    assert run_new("demo", "a=a", "b=b", "--prior", "b=0.25", "--prior", "a=0.75").error is None
    assert [expert.prior for expert in Ensemble.load("demo").experts] == [0.75, 0.25]


def test_only_what_an_expert_needs_is_kept(here: Path) -> None:
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        "modeling_own.py",
        "model.gguf",
        "onnx/model.onnx",
        ".git/x",
    ):
        (here / "a" / name).parent.mkdir(exist_ok=True)
        (here / "a" / name).write_text("{}")
    (here / "a/LICENSE").write_text("Apache-2.0")
    save_file({}, here / "a/consolidated.safetensors")  # the same weights again, in another tool's format
    assert run_new("demo", "code=a").error is None
    kept = {path.name for path in (here / "demo/experts/code").rglob("*")}
    given = {path.name for path in (here / "b").iterdir()}
    assert kept == given | {"LICENSE"}


def test_sharded_weights(here: Path) -> None:
    weights = load_file(here / "a/model.safetensors")
    (here / "a/model.safetensors").unlink()
    shards = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in set(shards.values()):
        save_file({name: weights[name] for name in shards if shards[name] == file}, here / "a" / file)
    (here / "a/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert run_new("demo", "code=a").error is None
    assert Ensemble.load("demo").experts[0].num_parameters == sum(w.numel() for w in weights.values())
    (here / "a/part-1.safetensors").unlink()
    only_error(run_new("other", "code=a"), "'code'", "part-1.safetensors are missing")


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_experts_that_read_images(here: Path, kind: Kind) -> None:
    experts = make_image_ensemble(here / "made", (0.4, 0.6), kind) / "experts"
    (here / "sample.jsonl").write_text('{"text": "zero one two three"}')
    said = run_new("demo", f"a={experts}/expert0", f"b={experts}/expert1", "--sample", "sample.jsonl")
    assert (said.error, said.warnings) == (None, [])
    assert all(expert.reads_images for expert in Ensemble.load("demo").experts)


def test_hard_links_share_files(here: Path) -> None:
    said = run_new("demo", "code=a", "--hard-links")
    assert said.error is None
    assert "share the checkpoints' files" in said.out
    Ensemble.load("demo")  # nothing leads out of it
    for file in (here / "demo/experts/code").iterdir():
        assert file.stat().st_ino == (here / "a" / file.name).stat().st_ino


def test_hard_links_to_another_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, link: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(write.os, "link", refuse)
    only_error(run_new("demo", "code=a", "--hard-links"), "on another disk", "leave out --hard-links")
    assert not (here / "demo").exists()


def test_links_in_a_checkpoint_are_followed(here: Path) -> None:
    """As the Hub's cache has them."""
    (here / "blobs").mkdir()
    for file in (here / "a").iterdir():
        file.rename(here / "blobs" / file.name)
        file.symlink_to(here / "blobs" / file.name)
    for flags in ((), ("--hard-links",)):
        assert run_new("demo", "code=a", "--force", *flags).error is None
        Ensemble.load("demo")


# ---------------------------------------------------------------------------------------------- the target


def test_nothing_is_replaced_unasked(here: Path) -> None:
    assert run_new("demo", "code=a").error is None
    only_error(run_new("demo", "prose=b"), "demo exists", "--force")
    assert Ensemble.load("demo").expert_names == ["code"]
    assert run_new("demo", "prose=b", "--force").error is None
    assert Ensemble.load("demo").expert_names == ["prose"]
    # from itself: copied before it goes
    assert run_new("demo", "new=demo/experts/prose", "--force").error is None
    assert Ensemble.load("demo").expert_names == ["new"]


def test_what_is_no_ensemble_is_never_replaced(here: Path) -> None:
    only_error(run_new("a", "code=b", "--force"), "a exists and is no ensemble")
    (here / "file").touch()
    only_error(run_new("file", "code=b", "--force"), "file exists and is no directory")
    (here / "link").symlink_to(here / "nowhere")
    only_error(run_new("link", "code=b", "--force"), "link exists and is no directory")
    (here / "empty").mkdir()
    assert run_new("empty", "code=b").error is None


def test_a_failure_leaves_what_was_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_new("demo", "code=a").error is None

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "demo/ensemble.json")

    monkeypatch.setattr(write, "write_manifest", fail)
    only_error(
        run_new("demo", "prose=b", "--force"), "demo/ensemble.json: Input/output error", "nothing is written"
    )
    assert Ensemble.load("demo").expert_names == ["code"]


def test_a_full_disk(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(here)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(write.shutil, "disk_usage", lambda _: usage)
        only_error(run_new("demo", "code=a"), "demo would take", "0.0 GiB are free", "--hard-links")
        assert run_new("linked", "code=a", "--hard-links").error is None

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write, "write_manifest", fail)
    only_error(run_new("demo", "code=a"), "no space is left for demo", "path on another disk")


def test_a_killed_run_leaves_no_ensemble(here: Path) -> None:
    """What it leaves beside its place, the next run removes."""
    weights = here / "a/model.safetensors"
    os.truncate(weights, 8)
    header = json.dumps({"x": {"dtype": "U8", "shape": [1 << 33], "data_offsets": [0, 1 << 33]}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + (1 << 33))  # sparse: reading it takes long enough to be killed at
    script = "from tests.training.new_command import run_new; run_new('demo', 'code=a', 'other=b')"
    copy = here / ".demo.tmp/experts/code/model.safetensors"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    patch = "import shutil; shutil.disk_usage = lambda _: type('', (), {'free': 1 << 40}); "
    process = subprocess.Popen([sys.executable, "-c", patch + script], env=environment)
    try:
        wait_until(lambda: copy.exists() or process.poll() is not None, 120, "it copies")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not (here / "demo").exists()
    shutil.copy(here / "c/model.safetensors", weights)
    shutil.copy(here / "c/config.json", here / "a/config.json")
    assert run_new("demo", "code=a").error is None
    assert not (here / ".demo.tmp").exists()


# ---------------------------------------------------------------------------------------------- wrong words

WRONG_WORDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "no experts": (["demo"], ("no experts", "decar new demo code=./a prose=org/model")),
    "no name": (["code=a", "prose=b"], ("'code=a' stands where the ensemble's name belongs",)),
    "a name with a space": (["my demo", "code=a"], ("the ensemble", "'my demo'", "a model id has")),
    "a name of dots": (["..", "code=a"], ("'..' names no ensemble",)),
    "a name that is too long": (["d" * 65, "code=a"], ("at most 64",)),
    "no =": (["demo", "./a"], ("'./a' has no name", "a=./a")),
    "no checkpoint": (["demo", "code="], ("'code=' names no checkpoint", "code=FOLDER")),
    "an expert with a slash": (["demo", "co/de=a"], ("'co/de'", "a model id has")),
    "an expert of no name": (["demo", "=a"], ("''", "a model id has")),
    "the same name twice": (
        ["demo", "code=a", "code=b"],
        ("two experts are named 'code' (a and b)", "own name"),
    ),
    "an option's values apart": (
        ["demo", "code=a", "prose=b", "--prior", "code=0.6", "prose=0.4"],
        ("two experts are named 'prose'", "joined by commas: --prior code=0.6,prose=0.4"),
    ),
    "too many": (["demo", *(f"e{i}=a" for i in range(17))], ("17 experts", "at most 16")),
    "more than one": (
        ["demo", "code=a", "prose=b", "--prior", "code=0.5,prose=0.6"],
        ("add up to 1.1", "--prior code=0.4545,prose=0.5455"),
    ),
    "counts": (["demo", "a=a", "b=b", "--prior", "a=300,b=100"], ("add up to 400", "--prior a=0.75,b=0.25")),
    "a prior of nobody": (
        ["demo", "code=a", "prose=b", "--prior", "code=0.5,pros=0.5"],
        ("no expert 'pros'", "code, prose", "did you mean 'prose'?"),
    ),
    "a prior left out": (["demo", "a=a", "b=b", "--prior", "a=1"], ("leaves out b", "add b=VALUE")),
    "a prior twice": (["demo", "a=a", "--prior", "a=1,a=2"], ("has 'a' twice",)),
    "a prior that is no number": (["demo", "a=a", "--prior", "a=half"], ("'half' is no number",)),
    "a prior of zero": (["demo", "a=a", "b=b", "--prior", "a=0,b=1"], ("a=0", "above 0", "leave out")),
    "a negative prior": (["demo", "a=a", "b=b", "--prior", "a=-1,b=2"], ("a=-1", "above 0")),
    "a prior that is not a number": (["demo", "a=a", "--prior", "a=nan"], ("a=nan", "above 0")),
    "a prior without a name": (["demo", "a=a", "--prior", "0.5"], ("--prior 0.5", "NAME=VALUE")),
    "priors said twice": (
        ["demo", "a=a", "--prior", "a=1", "--sample", "x.txt"],
        ("--prior and --sample", "leave one out"),
    ),
    "an unknown router": (
        ["demo", "a=a", "--router", "clasifier"],
        ("clasifier", "did you mean 'classifier'?"),
    ),
    "a router without data": (
        ["demo", "a=a", "b=b", "--router", "classifier"],
        ("--router classifier", "add --data a=a.jsonl,b=b.jsonl"),
    ),
    "data of one": (["demo", "a=a", "b=b", "--data", "a=x.jsonl"], ("--data leaves out b",)),
    "data that is missing": (["demo", "a=a", "--data", "a=x.jsonl"], ("--data a: x.jsonl is no file",)),
    "a sample that is missing": (
        ["demo", "a=a", "--sample", "x.txt"],
        ("--sample: x.txt is no file", ".jsonl"),
    ),
}


@pytest.mark.parametrize(("words", "wanted"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_wrong_words(here: Path, words: list[str], wanted: tuple[str, ...]) -> None:
    only_error(run_new(*words), *wanted)
    assert not (here / "demo").exists()


def test_the_command_is_offered() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'new = "decar.training.new.cli:new"' in project
