"""`decar new`: an ensemble that can be served, of checkpoints that exist; or one line with the fix, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from decar.router import Ensemble
from decar.training.new import write
from tests.helpers import wait_until
from tests.reference import PADDING_ROWS, VOCAB_SIZE, Reference, make_tokenizer
from tests.training.new_command import Said, edit_json, run_new

Break = Callable[[Path], Any]


@pytest.fixture
def here(trio: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with checkpoints a (Llama), b (Qwen2) and c (Llama with padding rows) of one tokenizer."""
    for name, expert in {"a": "code", "b": "prose", "c": "maths"}.items():
        shutil.copytree(trio.directory / "experts" / expert, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = {path.name for path in tmp_path.iterdir()}
    yield tmp_path
    hidden = {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    assert hidden <= before, "something half written is left"


def only_error(said: Said, *words: str) -> str:
    """The one line of a run that refused; it wrote nothing."""
    assert said.error is not None, said.out
    assert "\n" not in said.error
    for word in words:
        assert word in said.error, said.error
    assert "is written" not in said.out
    return said.error


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
    header = json.dumps({"x": {"dtype": "U8", "shape": [1 << 36], "data_offsets": [0, 1 << 36]}}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(weights, 8 + len(header) + (1 << 36))  # sparse: reading it takes long enough to be killed at
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


# ---------------------------------------------------------------------------------------------- wrong checkpoints


def _only(keep: str, **files: str) -> Break:
    """Leave ``keep`` (a pattern) of the checkpoint, and write other files."""

    def edit(folder: Path) -> None:
        for file in set(folder.iterdir()) - set(folder.glob(keep)):
            file.unlink()
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)

    return edit


def _config(**values: Any) -> Break:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


WRONG_CHECKPOINTS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "an empty folder": (_only("nothing"), ("a is no checkpoint", "config.json", "save_pretrained")),
    "a trainer's folder": (
        lambda folder: (
            _only("nothing")(folder),
            shutil.copytree(folder.with_name("b"), folder / "checkpoint-5"),
        ),
        ("did you mean code=a/checkpoint-5?",),
    ),
    "an ensemble": (
        lambda folder: (
            run_new("made", "x=b"),
            shutil.rmtree(folder),
            folder.with_name("made").rename(folder),
        ),
        ("a is an ensemble", "code=a/experts/x"),
    ),
    "a LoRA adapter": (
        _only(
            "nothing",
            adapter_config__json='{"base_model_name_or_path": "org/base"}',
            adapter_model__safetensors="",
        ),
        ("LoRA adapter of org/base", "merge_and_unload", "'a-merged'"),
    ),
    "an adapter beside a configuration": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        ("LoRA adapter", "merge_and_unload"),
    ),
    "pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        ("pickle (pytorch_model.bin)", "save_pretrained('a-safetensors')"),
    ),
    "GGUF": (_only("nothing", model__gguf=""), ("GGUF", "quantized", "made from")),
    "GGUF beside a configuration": (_only("*.json", model__gguf=""), ("GGUF", "quantized", "made from")),
    "quantized": (
        _config(quantization_config={"quant_method": "awq", "bits": 4}),
        ("is quantized (awq)", "made from"),
    ),
    "no weights": (_only("*.json"), ("holds no weights", "*.safetensors")),
    "a shard without its index": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "copy"),
    ),
    "an index of other folders": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"x": "../b/y"}}'
        ),
        ("model.safetensors.index.json", "leaves the expert's folder"),
    ),
    "an index of nothing": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        ("model.safetensors.index.json names no weights",),
    ),
    "truncated weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 10_000),
        ("truncated", "10,000 bytes", "copy"),
    ),
    "a classifier": (
        _config(architectures=["LlamaForSequenceClassification"]),
        ("predicts no next token", "CausalLM"),
    ),
    "an encoder-decoder": (
        _config(is_encoder_decoder=True, architectures=["T5ForConditionalGeneration"]),
        ("T5ForConditionalGeneration", "an encoder with a decoder"),
    ),
    "no vocabulary": (_config(vocab_size=None), ("names no vocab_size",)),
    "a configuration that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        ("config.json cannot be read",),
    ),
    "a configuration that is no object": (
        lambda folder: (folder / "config.json").write_text("[]"),
        ("config.json is no JSON object",),
    ),
    "no fast tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ("tokenizer.json is missing", "fast"),
    ),
    "more tokens than rows": (_config(vocab_size=VOCAB_SIZE - 1), ("599", "only 599 rows", "resize")),
    "images on one side": (
        lambda folder: (
            _config(vision_config={})(folder),
            (folder / "processor_config.json").write_text("{}"),
        ),
        ("'code' reads images and 'prose' does not",),
    ),
    "images without a processor": (
        _config(vision_config={}),
        ("'code' reads images", "processor_config.json"),
    ),
}


@pytest.mark.parametrize(("edit", "wanted"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS)
def test_wrong_checkpoints(here: Path, edit: Break, wanted: tuple[str, ...]) -> None:
    edit(here / "a")
    only_error(run_new("demo", "code=a", "prose=b"), "'code'", *wanted)
    assert not (here / "demo").exists()


def test_paths_that_lead_nowhere(here: Path) -> None:
    only_error(run_new("demo", "code=./aa"), "'code': ./aa does not exist", "did you mean 'a'?")
    only_error(
        run_new("demo", "code=a/below"), "a/below does not exist", "config.json"
    )  # a is here, so no Hub id
    only_error(run_new("demo", "code=/no/such/place"), "/no/such/place does not exist")
    only_error(run_new("demo", "code=a b"), "a b does not exist")
    only_error(run_new("demo", "code=a/config.json"), "is a file", "give the folder")
    (here / "model-q4.gguf").touch()
    only_error(run_new("demo", "code=model-q4.gguf"), "GGUF file", "quantized")


def test_all_wrong_checkpoints_are_named(here: Path) -> None:
    (here / "a/config.json").unlink()
    (here / "b/model.safetensors").rename(here / "b/pytorch_model.bin")
    said = run_new("demo", "code=a", "maths=nowhere/at/all", "prose=c")
    assert said.error == "2 problems, above; nothing is written"
    assert len(said.problems) == 2
    assert "'code'" in said.problems[0]
    assert "nowhere/at/all does not exist" in said.problems[1]


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "chat_template.json",
    ],
)
@pytest.mark.parametrize("value", [None, 3, "x", [], [1, "x", None], {"a": None}], ids=repr)
def test_settings_of_any_type_end_in_a_line_or_an_ensemble(here: Path, file: str, value: Any) -> None:
    original = (
        json.loads((here / "a" / file).read_text()) if (here / "a" / file).exists() else {"chat_template": 1}
    )
    for key in original:
        (here / "a" / file).write_text(json.dumps({**original, key: value}))
        said = run_new("demo", "code=a", "prose=b", "--force")
        assert said.error is None or "\n" not in said.error


# ---------------------------------------------------------------------------------------------- tokenizers


def test_other_tokenizers(here: Path) -> None:
    make_tokenizer(here / "b", vocab_size=590)
    error = only_error(run_new("demo", "code=a", "prose=b"), "'code' and 'prose' have different tokenizers")
    assert "only 'code' knows 10 tokens" in error
    assert "one base model" in error
    assert "copy the tokenizer files of 'code'" in error
    assert not (here / "demo").exists()


def _swap(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "two ids swapped": (_swap, "2 tokens have other ids"),
    "merges in another order": (lambda t: t["model"]["merges"].reverse(), "in other places (merges"),
    "a normaliser": (lambda t: t.update(normalizer={"type": "Lowercase"}), "in other places (normalizer"),
    "another pre-tokenizer": (
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        "in other places (pre_tokenizer",
    ),
    "an added token more": (
        lambda t: t["added_tokens"].append({**t["added_tokens"][0], "id": 600, "content": "<tool>"}),
        "only 'prose' knows 1 tokens, e.g. '<tool>'",
    ),
    "other ids by a setting of the model": (
        lambda t: t["model"].update(unk_token="<pad>"),
        "the same tokens, but",
    ),
}


@pytest.mark.parametrize(("edit", "wanted"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_the_difference_of_tokenizers_is_named(
    here: Path, edit: Callable[[dict[str, Any]], Any], wanted: str
) -> None:
    edit_json(here / "b/tokenizer.json", edit)
    only_error(run_new("demo", "code=a", "prose=b"), "'code' and 'prose' have different tokenizers", wanted)


# ---------------------------------------------------------------------------------------------- differences


def _warnings(*words: str) -> list[str]:
    said = run_new("demo", *words)
    assert said.error is None, said.error
    Ensemble.load("demo")
    return said.warnings


def test_experts_that_fit_need_no_warning(here: Path) -> None:
    assert _warnings("code=a", "prose=b") == []


def test_padding_rows(here: Path) -> None:
    (warning,) = _warnings("maths=c", "code=a")
    assert f"maths {VOCAB_SIZE + PADDING_ROWS}, code {VOCAB_SIZE}" in warning
    assert f"token ids from {VOCAB_SIZE} on" in warning
    assert "nothing is to be done" in warning


def test_shorter_positions(here: Path) -> None:
    _config(max_position_embeddings=2048)(here / "a")
    (warning,) = _warnings("code=a", "prose=b")
    assert "at most 512 tokens" in warning
    assert "'prose'" in warning
    assert "code 2,048" in warning
    assert Ensemble.load("demo").max_positions == 512


def test_chat_templates(here: Path) -> None:
    (here / "b/chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (warning,) = _warnings("code=a", "prose=b")
    assert "template of 'code', and 'prose' learned another" in warning
    assert "name first" in warning
    (here / "b/chat_template.jinja").unlink()
    (warning,) = _warnings("code=a", "prose=b", "--force")
    assert warning.startswith("'prose' without a chat template")
    (warning,) = _warnings("prose=b", "code=a", "--force")
    assert "'prose', whose chat template serves all, has none; for chats, name 'code' first" in warning
    (here / "a/chat_template.jinja").unlink()
    (warning,) = _warnings("prose=b", "code=a", "--force")
    assert "no expert has a chat template" in warning
    assert "--chat-template" in warning


def test_a_template_is_found_wherever_it_is(here: Path) -> None:
    template = (here / "b/chat_template.jinja").read_text()
    (here / "b/chat_template.jinja").unlink()
    edit_json(here / "b/tokenizer_config.json", lambda config: config.update(chat_template=template))
    assert _warnings("code=a", "prose=b") == []


def test_special_tokens_and_what_is_put_around_a_text(here: Path) -> None:
    edit_json(here / "b/tokenizer_config.json", lambda config: config.update(eos_token={"content": "<pad>"}))
    (warning,) = _warnings("code=a", "prose=b")
    assert "the eos_token of 'code' is '</s>' and serves all (prose '<pad>')" in warning
    edit_json(
        here / "b/tokenizer_config.json", lambda config: config.update(eos_token="</s>", add_bos_token=True)
    )
    (warning,) = _warnings("code=a", "prose=b", "--force")
    assert "'prose' learned it otherwise" in warning
    assert "add_bos_token" in warning


def test_ends_and_defaults_of_answers(here: Path) -> None:
    edit_json(here / "b/generation_config.json", lambda config: config.update(eos_token_id=[2, 7]))
    (warning,) = _warnings("code=a", "prose=b")
    assert "write \"eos_token_id\": [2, 7] to generation_config.json of 'code'" in warning
    edit_json(
        here / "b/generation_config.json", lambda config: config.update(eos_token_id=2, temperature=0.6)
    )
    (warning,) = _warnings("code=a", "prose=b", "--force")
    assert "get those of 'code'" in warning
    assert "temperature" in warning


def test_number_formats_own_code_and_twins(here: Path) -> None:
    edit_json(here / "b/config.json", lambda config: config.update(dtype="bfloat16"))
    (warning,) = _warnings("code=a", "prose=b")
    assert "code float32, prose bfloat16" in warning
    assert "--dtype bfloat16" in warning
    _config(auto_map={"AutoModel": "modeling_own.Own"}, dtype="float32")(here / "b")
    (warning,) = _warnings("code=a", "prose=b", "--force")
    assert "'prose' names Python code of its own" in warning
    (warning,) = _warnings("code=a", "again=./a", "--force")
    assert "'code' and 'again' are the same checkpoint" in warning


def test_the_command_is_offered() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'new = "decar.training.new.cli:new"' in project
