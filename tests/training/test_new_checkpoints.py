"""Checkpoints that `decar new` refuses, and what it says of those that differ."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from decar.router import Ensemble
from decar.router.errors import DecarError
from decar.training.new.checkpoints import find
from decar.training.new.fits import compare
from tests.reference import PADDING_ROWS, VOCAB_SIZE, make_tokenizer
from tests.training.new_command import edit_json, only_error, run_new

Break = Callable[[Path], Any]


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
def test_settings_of_any_type_end_in_a_line_or_fit(here: Path, file: str, value: Any) -> None:
    original = (
        json.loads((here / "a" / file).read_text()) if (here / "a" / file).exists() else {"chat_template": 1}
    )
    for key in original:
        (here / "a" / file).write_text(json.dumps({**original, key: value}))
        said = ""
        try:
            compare([find("code", "a"), find("prose", "b")])
        except DecarError as error:
            said = str(error)
        assert "\n" not in said


# ---------------------------------------------------------------------------------------------- tokenizers


def test_other_tokenizers(here: Path) -> None:
    make_tokenizer(here / "b", vocab_size=590)
    error = only_error(run_new("demo", "code=a", "prose=b"), "'code' and 'prose' have different tokenizers")
    assert "'code' alone knows 10 tokens" in error
    assert "one base model" in error
    assert "copy the tokenizer" not in error  # which would hide that texts were learned in other pieces
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
        "'prose' alone knows 1 tokens, e.g. '<tool>' (if 'code' has rows for them, copy the tokenizer files of 'prose'",
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
