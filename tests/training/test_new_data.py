"""What `decar new` learns from texts: priors that make a sample likely, routers that know whose a text is."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from decar.router import Ensemble, load_router
from decar.router.errors import EnsembleError
from decar.training.data.files import KINDS
from decar.training.new.cli import new
from decar.training.new.priors import MAX_TEXTS, PIECE_CHARS, likeliest_shares
from decar.training.new.texts import sample_texts
from tests.reference import Reference, load_model, log_likelihood, make_expert, make_tokenizer
from tests.training.conftest import CODE, PROSE, config_writer
from tests.training.new_command import Said, only_error, run_new


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two checkpoints, a and b, that differ by nats a token."""
    root = tmp_path_factory.mktemp("strangers")
    tokenizer = make_tokenizer(root / "tokenizer")
    for seed, name in enumerate("ab", start=1):
        make_expert("llama", seed, root / name, tokenizer, own_share=0.9)
    return root


@torch.inference_mode()
def written_by(folder: Path, count: int, seed: int) -> list[str]:
    """Texts of 24 tokens that the model in ``folder`` wrote."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(seed)
    start = torch.randint(10, 600, (count, 1))
    ids = load_model(folder).generate(
        start, max_new_tokens=24, do_sample=True, top_k=0, suppress_tokens=[0, 1, 2]
    )
    return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def write_jsonl(file: Path, texts: Sequence[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


# ---------------------------------------------------------------------------------------------- shares


def test_texts_that_one_expert_explains_are_counted() -> None:
    said = np.array([[-10.0, -500.0]] * 3 + [[-400.0, -20.0]])
    assert likeliest_shares(said) == pytest.approx([3.5 / 5, 1.5 / 5])  # and one more text, divided


def test_an_expert_that_explains_nothing_keeps_a_little() -> None:
    shares = likeliest_shares(np.array([[-10.0, -500.0, -500.0]] * 8))
    assert shares == pytest.approx([(8 + 1 / 3) / 9, 1 / 27, 1 / 27])


def test_texts_that_all_explain_alike_say_nothing() -> None:
    assert likeliest_shares(np.full((50, 4), -30.0)) == pytest.approx([0.25] * 4)


def test_no_other_shares_make_the_texts_likelier() -> None:
    """Against every share in steps of a thousandth, where texts are explained by both."""
    said = np.random.default_rng(0).normal(size=(40, 2))
    grid = np.linspace(0.001, 0.999, 999)
    shares = np.stack([grid, 1 - grid], axis=1)
    fits = np.log(np.exp(said) @ shares.T).sum(axis=0) + np.log(shares).mean(axis=1)  # the text more, divided
    assert likeliest_shares(said)[0] == pytest.approx(grid[fits.argmax()], abs=1e-3)


# ---------------------------------------------------------------------------------------------- a sample


def test_priors_are_the_shares_of_who_wrote_the_sample(
    strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = written_by(strangers / "a", 30, seed=0) + written_by(strangers / "b", 10, seed=1)
    write_jsonl(tmp_path / "sample.jsonl", texts)
    said = run_new("demo", f"a={strangers / 'a'}", f"b={strangers / 'b'}", "--sample", "sample.jsonl")
    assert said.error is None
    assert "estimated from 40 texts of sample.jsonl" in said.out
    priors = [expert.prior for expert in Ensemble.load("demo").experts]
    reference = Reference.load(tmp_path / "demo")
    ids = [reference.encode(text) for text in texts]
    scores = [log_likelihood(model, ids, reference.vocab_size).numpy() for model in reference.models]
    assert priors == pytest.approx(likeliest_shares(np.stack(scores, axis=1)), abs=1e-4)
    # 30 of 40, but for a text or two: what was written as some tokens is read as others.
    assert priors[0] == pytest.approx(0.75, abs=0.06)


def test_a_text_file_is_cut_and_a_row_is_one_text(tmp_path: Path) -> None:
    line = "a line of the text\n"
    (tmp_path / "x.txt").write_text(line * 200)
    pieces = sample_texts("--sample", tmp_path / "x.txt", MAX_TEXTS, PIECE_CHARS, cut_rows=False)
    assert "".join(pieces) == line * 200
    assert max(map(len, pieces)) <= PIECE_CHARS
    write_jsonl(tmp_path / "x.jsonl", [line * 200, "", "short"])
    assert sample_texts("--sample", tmp_path / "x.jsonl", MAX_TEXTS, PIECE_CHARS, cut_rows=False) == [
        line * 200,
        "short",
    ]


def test_a_large_file_is_sampled_evenly(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [str(n) for n in range(5_000)])
    sample = [int(text) for text in sample_texts("--sample", file, 200, PIECE_CHARS, cut_rows=False)]
    assert len(set(sample)) == 200
    assert sample == sorted(sample)
    assert abs(np.mean(sample) - 2_500) < 5 * 5_000 / np.sqrt(12 * 200)  # five standard errors
    assert sample == [int(text) for text in sample_texts("--sample", file, 200, PIECE_CHARS, cut_rows=False)]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x[1]*.jsonl", ["one"])
    assert sample_texts("--sample", file, 10, PIECE_CHARS, cut_rows=False) == ["one"]


WRONG_FILES = {
    "a line that is no JSON": (
        "x.jsonl",
        '{"text": "fine"}\n{',
        ("x.jsonl, line 2: not valid JSON", "mend it"),
    ),
    "no field text": ("x.jsonl", '{"txt": "a"}', ("line 1: no field 'text'; did you mean 'txt'?",)),
    "a chat of nobody": (
        "x.jsonl",
        '{"messages": [{"role": "user", "content": "x"}]}',
        ("needs an assistant",),
    ),
    "empty": ("x.txt", "\n \n", ("x.txt holds no text",)),
    "no UTF-8": ("x.txt", "\udcff", ("is not UTF-8 text",)),
    "another kind of file": (
        "x.bin",
        "\0",
        ("unknown kind of file, and no text", "use .txt, .md, .jsonl, .json,"),
    ),
    "texts of a token": ("x.jsonl", '{"text": "a"}', ("two tokens",)),
}


@pytest.mark.parametrize(("name", "content", "words"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_samples_that_cannot_be_used(here: Path, name: str, content: str, words: tuple[str, ...]) -> None:
    (here / name).write_text(content, errors="surrogateescape")
    error = only_error(run_new("demo", "code=a", "prose=b", "--sample", name), *words)
    assert "data." not in error  # a field of decar-train's configuration, which nobody has here
    assert not (here / "demo").exists()


CHAT = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}]
ADVICE: dict[str, tuple[dict[str, object], str]] = {
    "two questions": (
        {"prompt": "a", "question": "b", "answer": "c"},
        "fields 'prompt' and 'question' could both be the question; mend it",
    ),
    "preferences": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "preference data (fields 'chosen' and 'rejected') is not what experts learn from; mend it",
    ),
    "a text with an image": (
        {"text": "a", "image": "a.png"},
        "field 'image': an image needs a chat to stand in, but 'text' is a text; give it messages; mend it",
    ),
    "an image that is not there": (
        {"messages": CHAT, "image": "a.png"},
        "cannot be read (No such file or directory); paths are relative to the file's folder; mend it",
    ),
    "no field": ({"a": 1, "b; data.x": 2}, "no field 'text'; it has a, b; data.x; mend it"),
}


@pytest.mark.parametrize("name", list(ADVICE))
def test_what_is_said_of_a_row_names_no_settings(tmp_path: Path, name: str) -> None:
    row, message = ADVICE[name]
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(EnsembleError) as caught:
        sample_texts("--sample", tmp_path / "x.jsonl", 10, PIECE_CHARS, cut_rows=False)
    assert str(caught.value).endswith(message)


def test_the_help_names_all_kinds_of_files() -> None:
    (sample,) = get_type_hints(new, include_extras=True)["sample"].__metadata__
    assert KINDS in sample.help


# ---------------------------------------------------------------------------------------------- routers


def _with_data(here: Path, *more: str) -> Said:
    config_writer(here)  # writes code.jsonl and prose.jsonl
    return run_new("demo", "code=a", "prose=b", "--data", "code=code.jsonl,prose=prose.jsonl", *more)


@pytest.mark.parametrize("kind", ["classifier", "centroid"])
def test_a_router_knows_whose_a_text_is(here: Path, kind: str) -> None:
    said = _with_data(here, "--router", kind)
    assert said.error is None
    assert f"{kind}: right for " in said.out
    ensemble = Ensemble.load("demo")
    assert ensemble.manifest.router.kind == kind
    router = load_router(ensemble, kind)  # type: ignore[arg-type]
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=30)) for words in (CODE, PROSE)]
    weights = np.exp(router.log_weights(texts))
    assert weights[0, 0] > 0.8
    assert weights[1, 1] > 0.8


def test_data_alone_make_routers_that_requests_may_ask_for(here: Path) -> None:
    assert _with_data(here).error is None
    ensemble = Ensemble.load("demo")
    assert ensemble.manifest.router.kind == "posterior"
    assert ensemble.has_router


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"text": "one text"}', ("--data prose", "holds one text", "a hundred or more")),
        ('{"text": "one"}\n{"text"', ("line 2: not valid JSON",)),
        ("", ("--data prose: prose.jsonl holds no text",)),
    ],
)
def test_data_that_cannot_be_used(here: Path, content: str, words: tuple[str, ...]) -> None:
    config_writer(here)
    (here / "prose.jsonl").write_text(content)
    data = "code=code.jsonl,prose=prose.jsonl"
    only_error(run_new("demo", "code=a", "prose=b", "--router", "classifier", "--data", data), *words)
    assert not (here / "demo").exists()


def test_data_without_words(here: Path) -> None:
    for name in ("code", "prose"):
        write_jsonl(here / f"{name}.jsonl", ["a", "b", "c"])
    data = "code=code.jsonl,prose=prose.jsonl"
    only_error(run_new("demo", "code=a", "prose=b", "--data", data), "no words", "give texts with words")


# ---------------------------------------------------------------------------------------------- the document


def test_what_the_document_shows_is_what_happens(here: Path) -> None:
    document = (Path(__file__).parents[2] / "docs/bring-your-own.md").read_text()
    config_writer(here)
    write_jsonl(here / "requests.jsonl", ["def main(args):", "It was the best of times"])
    (here / "a").rename(here / "code")
    (here / "b").rename(here / "prose")
    shutil.copytree(here / "prose", here / "org/model")  # a folder comes before a model of the Hub
    commands = [line.split() for block in _blocks(document, "bash") for line in block.splitlines()]
    made = [run_new(*words) for _, command, *words in commands if command == "new"]
    assert [said.error for said in made] == [None] * 4
    assert _blocks(document, "text") == [made[0].out]
    assert Ensemble.load("demo").manifest.router.kind == "classifier"
    others = {" ".join(words) for words in commands if words[1] != "new"}
    assert all(f"  {command}\n" in made[0].out for command in others)


def _blocks(document: str, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", document, re.DOTALL)
