"""--dry-run: numbers that hold, a batch that is the first one, and nothing written."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, TrainerCallback

from decar.training import dry_run
from decar.training.config import TrainConfig, load_config
from decar.training.data.blocks import IGNORED, Blocks, encode, pack
from decar.training.data.corpus import read_document
from decar.training.data.shards import read_examples, read_texts
from decar.training.data.sources import Chat, Example
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.dry_run import estimate, shown
from decar.training.dry_run_tables import shortened
from decar.training.expert.model import build_model
from decar.training.expert.stage import expert_stage, train_expert
from decar.training.partition.stage import make_partition, partition_stage, read_partition_report
from decar.training.run import report_file
from tests.training.conftest import CODE, PROSE, WriteConfig
from tests.training.test_expert import StopAt
from tests.training.test_run import command, modified
from tests.training.tokenizers_of_kinds import KINDS


def test_run_says_what_it_would_do_and_writes_nothing(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(training={"gradient_accumulation": 3})
    before = modified(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "run", path, "--dry-run", "--set", "seed=5") == 0
    assert modified(tmp_path) == before
    assert not (tmp_path / "work").exists()
    out = capsys.readouterr().out
    config = yaml.safe_load(out[: out.index("\n\n")])
    assert config["seed"] == 5
    assert config["training"]["warmup"] == 0.05  # a default, resolved
    assert re.search(r"code +to train +29,536 .* 6 × 192 ", out)
    assert re.search(r"prose +to train +29,536 .* 6 × 192 ", out)
    assert "the first batch of code:\n[0] " in out
    assert out.endswith("dry run: nothing was trained, nothing was written\n")


def test_an_expert_needs_its_shard(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "expert", "code", write_config(), "--dry-run") == 1
    assert "run `decar-train partition` first" in capsys.readouterr().err


def test_states_steps_and_sizes(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_config(training={"max_steps": None, "epochs": 2.0, "batch_size": 4})
    config = load_config(path)
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    report = train_expert(config, "code", expert_stage(config, "code"))
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "prose", expert_stage(config, "prose"), [StopAt(5)])
    before = modified(tmp_path)
    code, prose = (estimate(config, name, config, {}) for name in config.expert_names)
    assert (code.is_done, code.steps, code.train_tokens) == (True, report.steps, report.train_tokens)
    assert (prose.is_done, prose.steps_done) == (False, 4)
    assert code.tokens_per_step == 4 * 32
    assert code.time_s == 0
    (lengths,) = code.lengths
    assert (lengths.p50, lengths.p99) == (report.document_tokens_p50, report.document_tokens_p99)
    assert lengths.number == report.train_documents
    assert prose.time_s == pytest.approx((prose.steps - 4) * prose.cost.step_time_s)
    model = build_model(config.recipe("code"), load_tokenizer(config.work_dir / "tokenizer"))
    assert code.cost.num_parameters == code.cost.num_trained == model.num_parameters()
    # Weights, gradients and two moments are 16 bytes a parameter. On top come activations: for 128 tokens at least
    # the logits and their logarithms, at most some hundred numbers for each of the width's 32.
    states = 16 * model.num_parameters()
    tokens = 4 * 32
    if not torch.cuda.is_available():
        assert (
            states + 2 * 4 * tokens * 300
            < code.cost.memory_bytes
            < states + 4 * tokens * (4 * 300 + 100 * 32)
        )
    assert command(monkeypatch, "expert", "prose", path, "--dry-run") == 0
    assert "continues at 4" in capsys.readouterr().out
    assert modified(tmp_path) == before


def test_the_batch_shown_is_the_first_one_trained_on(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    predicted = estimate(config, "code", config, {}).batch

    fetched: list[dict[str, Any]] = []
    get = Blocks.__getitem__
    monkeypatch.setattr(Blocks, "__getitem__", lambda self, i: fetched.append(get(self, i)) or fetched[-1])
    train_expert(config, "code", expert_stage(config, "code"), [TrainerCallback()])
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    assert predicted == [shown(r["input_ids"].tolist(), r["labels"].tolist(), tokenizer) for r in fetched[:2]]


def test_what_is_learned_is_marked(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    question, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("def f", "return")
    )
    pads = [tokenizer.pad_token_id] * 3
    none = [-100] * len(question)
    assert shown(question + answer + pads, [*none, *answer, -100, -100, -100], tokenizer) == (
        "def f⟦return⟧ (padding × 3)"
    )
    assert shown(question, question, tokenizer) == "def f"
    # A document by itself has no padding, whatever it ends with.
    assert shown(answer + question, [*answer, *none], tokenizer, padded=False) == "⟦return⟧def f"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("ask" * 100 + "⟦answer⟧", "ask" * 100 + "⟦answer⟧"),
        ("⟦" + "a" * 700 + "⟧", "⟦" + "a" * 599 + " … (702 characters)"),
        ("s" * 700, "s" * 600 + " … (700 characters)"),
        ("tool " * 200 + "⟦answer⟧ more", "tool " * 60 + " … ⟦answer⟧ more … (1,013 characters)"),
        ("u" * 500 + "⟦" + "a" * 400 + "⟧", "u" * 300 + " … ⟦" + "a" * 299 + " … (902 characters)"),
    ],
)
def test_of_a_long_document_what_is_learned_is_shown(text: str, kept: str) -> None:
    assert shortened(text) == kept


def test_all_that_is_missing_is_named_beside_what_is_known(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tmp_path / "base"
    LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ).save_pretrained(base)
    path = write_config(
        data={"files": [str(tmp_path / "none.jsonl")]},
        tokenizer={"path": "nowhere"},
        router={"image_embedding": "nowhere"},
        experts=[
            {"name": "code", "model": {"checkpoint": str(base)}},
            {"name": "prose", "model": {"hiden_size": 1}},
        ],
    )
    assert command(monkeypatch, "run", path, "--dry-run") == 1
    out, err = capsys.readouterr()
    assert yaml.safe_load(out[: out.index("\n\n")])["experts"][0]["name"] == "code"
    problems = [line.removeprefix("problem: ") for line in out.splitlines() if line.startswith("problem: ")]
    assert problems == [
        f"data.files: '{tmp_path}/none.jsonl' matches no file",
        "tokenizer.path: nowhere holds no tokenizer.json; save a fast tokenizer there",
        "router.image_embedding: nowhere holds no config.json with *.safetensors; save a model there",
        "model.hiden_size: unknown field of llama; did you mean 'hidden_size'?",
        f"the checkpoint of 'code', {base}, holds no weights (*.safetensors)",
    ]
    # Embeddings and output 2 · 10 · 8, attention 4 · 8 · 8, MLP 3 · 8 · 8, three norms of 8.
    assert "code: 632 parameters" in out
    assert err.startswith("error: this cannot be run (5 problems); the first: data.files")


# ------------------------------------------------------------------------------------------------- the data


def prepared(path: Path) -> TrainConfig:
    config = load_config(path)
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


def chat(*said: str) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": content} for i, content in enumerate(said)]


def words(rng: random.Random, number: int) -> str:
    return " ".join(rng.choices([*CODE, *PROSE], k=number))


@pytest.mark.parametrize("keeps_apart", [True, False])
@pytest.mark.parametrize("length", [7, 32, 200])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_documents_adds_up_to_the_rows(seed: int, length: int, keeps_apart: bool) -> None:
    """Every target of every document is predicted in some row, or counted as never learned."""
    rng = random.Random(seed)
    tokenizer = KINDS["qwen"]()
    sizes = [rng.choice([1, 5, 40]) for _ in range(30)]
    examples: list[Example] = [
        words(rng, size)
        if rng.random() < 0.5
        else Chat(chat(words(rng, size), words(rng, size), "so", "Why?"))
        for size in sizes
    ]
    blocks = pack(examples, tokenizer, length, keeps_apart)
    documents = blocks.documents
    assert len(documents) == len(examples)
    for document, example in zip(documents, examples, strict=True):
        ids, labels = encode(example, tokenizer)
        assert document.tokens == len(ids)
        assert document.targets == sum(label != IGNORED for label in labels)
        assert (document.kind == "chats") == isinstance(example, Chat)
        if document.kind == "chats" or not keeps_apart:
            assert (document.rows > 1) == (document.tokens > length)
        alone = pack([example], tokenizer, length, keeps_apart)
        (by_itself,) = alone.documents
        # In rows of its own, what is learned in the later ones stands in those.
        whole = pack([example], tokenizer, len(ids), keeps_apart)
        first = int((whole.labels[0, 1:length] != IGNORED).sum())
        assert by_itself.detached == alone.num_targets - first
    assert sum(document.tokens for document in documents) == blocks.num_tokens
    assert sum(document.targets - document.unlearned for document in documents) == blocks.num_targets
    assert length < 200 or all(document.rows <= 2 for document in documents)


def write_chats(file: Path) -> list[dict[str, Any]]:
    """40 short chats, 8 that are longer than a row of 64 tokens, 12 texts, some of them twice."""
    rng = random.Random(0)
    rows: list[dict[str, Any]] = [{"text": f"{i} {words(rng, 20)}"} for i in range(12)]
    rows += [{"messages": chat(f"{i} of {words(rng, 3)}?", words(rng, 4))} for i in range(40)]
    rows += [{"messages": chat(*(f"{i} {words(rng, 12)}" for _ in range(6)))} for i in range(8)]
    rows += rows[20:23] + rows[20:22] + rows[:1]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def chats(write_config: WriteConfig, tmp_path: Path) -> Path:
    write_chats(tmp_path / "chats.jsonl")
    return write_config(
        data={"files": [str(tmp_path / "chats.jsonl")]},
        partition={"name_by": {}, "held_out": 0.1},
        model={"max_position_embeddings": 512},
        training={"sequence_length": 64},
        experts=["all"],
    )


def test_what_the_dry_run_says_of_truncation_is_so(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command(monkeypatch, "run", chats, "--dry-run") == 0
    out = capsys.readouterr().out
    config = prepared(chats)
    tokenizer = load_tokenizer(config.run.tokenizer)
    examples = read_examples(config.run.shard("all", "train"))
    tokens = sorted(len(encode(each, tokenizer)[0]) for each in examples if isinstance(each, Chat))
    p50, p99 = tokens[(len(tokens) + 1) // 2 - 1], tokens[-1]
    longer = sum(size > 64 for size in tokens)
    mean = f"{sum(tokens) / len(tokens):,.0f}"
    assert len(tokens) < 100  # or p99 would not be the longest
    row = rf"all +{len(tokens)} chats +{mean} +{p50} +{p99} +{max(tokens)} +{longer} \({longer / len(tokens):.1%}\)"
    assert re.search(row, out)
    assert re.search(rf"all +{len(tokens)} chats +{longer} \(.*%\) +– ", out)
    detached, longest = re.findall(
        r"all learns (\d+) tokens of answers in a later row .*; training.sequence_length: (\d+) keeps all",
        out,
    )[0]
    assert int(longest) == max(tokens)
    blocks = pack([each for each in examples if isinstance(each, Chat)], tokenizer, 64)
    assert int(detached) == sum(document.detached for document in blocks.documents) > 0
    # And what it advises helps: nothing but texts goes on in the next row.
    assert (
        command(monkeypatch, "run", chats, "--dry-run", "--set", f"training.sequence_length={longest}") == 0
    )
    out = capsys.readouterr().out
    assert re.search(rf"all +{len(tokens)} chats +– +– +", out)
    assert "tokens of answers in a later row" not in out


def test_no_advice_that_the_model_has_no_positions_for(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert command(monkeypatch, "run", chats, "--dry-run", "--set", "model.max_position_embeddings=64") == 0
    out = capsys.readouterr().out
    assert re.search(r"the longest has \d+ tokens and the model 64 positions, so .* cannot keep all", out)
    assert "a larger training.sequence_length" not in out


def test_duplicates_are_counted_shown_and_kept(
    chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = prepared(chats)
    report = read_partition_report(partition_stage(config))
    trained = [str(example) for example in read_examples(config.run.shard("all", "train"))]
    assert report.duplicates == len(trained) - len(set(trained)) > 0
    assert report.shards[0].train_documents == len(trained)
    assert report.most_repeated is not None
    assert report.most_repeated.times == max(trained.count(each) for each in trained)
    most = [each for each in trained if trained.count(each) == report.most_repeated.times]
    assert any(report.most_repeated.begins[:8] in each for each in most)
    assert command(monkeypatch, "run", chats, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(rf"training documents, kept +{report.duplicates}\b", out)
    assert report.held_out_duplicates > 0
    removed = rf"held-out documents that are trained on too, removed +{report.held_out_duplicates}\b"
    assert re.search(removed, out)
    assert f"the first one held out: '{report.held_out_duplicate}'" in out
    assert f"there {report.most_repeated.times} times: '{report.most_repeated.begins}'" in out
    assert command(monkeypatch, "partition", chats) == 0
    line = f"kept {report.duplicates} training documents that repeat another in the same words; the most frequent is "
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("what", ["remove", "keep"])
def test_duplicates_across_experts_count(write_config: WriteConfig, tmp_path: Path, what: str) -> None:
    rows = [{"kind": kind, "text": f"{kind} number {i}"} for kind in ("code", "prose") for i in range(20)]
    rows += [{"kind": kind, "text": "the same for all"} for kind in ("code", "prose") * 3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_config(
        data={"files": [str(tmp_path / "rows.jsonl")]},
        partition={
            "method": "by-field",
            "field": "kind",
            "name_by": {},
            "held_out": 0.2,
            "held_out_duplicates": what,
        },
    )
    config = load_config(path)
    report = make_partition(config, partition_stage(config))
    times = [
        list(read_texts(config.run.shard(name, "train"))).count("the same for all")
        for name in config.expert_names
    ]
    assert min(times) > 0
    assert report.most_repeated is not None
    assert report.most_repeated.model_dump() == {"times": sum(times), "begins": "the same for all"}
    # The first of them repeats none.
    assert report.duplicates == sum(times) - 1
    assert report.held_out_duplicates == 6 - sum(times) > 0
    assert report.held_out_duplicate == "the same for all"


def test_without_duplicates_it_says_so(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    assert "no training document repeats another" in capsys.readouterr().out
    assert command(monkeypatch, "partition", path) == 0
    assert "repeat" not in capsys.readouterr().out


def test_the_first_document_of_each_format_is_shown_as_learned(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    rng = random.Random(0)
    asked = [
        [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": words(rng, 9)}] for i in range(20)
    ]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"conversations": each}) + "\n" for each in asked))
    write_chats(tmp_path / "two.jsonl")
    path = write_config(
        data={"files": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]},
        partition={"name_by": {}, "method": "random"},
    )
    config = prepared(path)
    report = read_partition_report(partition_stage(config))
    tokenizer = load_tokenizer(config.run.tokenizer)
    formats = {(shard.expert, each.format): each for shard in report.shards for each in shard.formats}
    assert set(formats) == {(e, f) for e in ("code", "prose") for f in ("ShareGPT", "messages", "text")}
    for shard in report.shards:
        assert sum(each.documents for each in shard.formats) == shard.train_documents
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    out = capsys.readouterr().out
    for known_as, source in (("ShareGPT", "one.jsonl"), ("messages", "two.jsonl"), ("text", "two.jsonl")):
        code, prose = formats["code", known_as], formats["prose", known_as]
        expert, first = ("code", code) if code.text < prose.text else ("prose", prose)
        document = read_document(config.run.shard(expert, "train"), first.row)
        assert (document.source, first.source) == (source, source)
        assert (document.messages is None) == (known_as == "text")
        number = code.documents + prose.documents
        (panel,) = re.findall(
            rf"─ {known_as} \({number} documents\): {source}, text {first.text} of {report.texts} ─+╮\n(.*?)╰",
            out,
            re.S,
        )
        seen = " ".join(line.strip("│ ") for line in panel.splitlines())
        example = read_examples(config.run.shard(expert, "train"))[first.row]
        ids, labels = encode(example, tokenizer)
        assert seen == " ".join(shown(ids, labels, tokenizer, padded=False).split("\n"))
        assert "⟦" in seen


def test_reports_of_older_versions_and_of_other_machines(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    config = prepared(path)
    file = report_file(config.run.partition)
    report = json.loads(file.read_text())
    for field in ("duplicates", "most_repeated", "held_out_duplicate"):
        del report[field]
    for shard in report["shards"]:
        del shard["formats"]
    file.write_text(json.dumps(report))
    assert partition_stage(config).is_done
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    assert "not counted by the version that made the partition" in capsys.readouterr().out
    file.unlink()
    assert command(monkeypatch, "expert", "code", path, "--dry-run") == 0
    assert "the partition's report is not here" in capsys.readouterr().out


def test_of_many_documents_a_sample_is_tokenized_and_its_size_said(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(0)
    rows = [{"text": f"{i} {words(rng, rng.choice([5, 10, 30]))}"} for i in range(4_000)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_config(
        data={"files": [str(tmp_path / "many.jsonl")]},
        partition={"method": "random", "name_by": {}, "sample": 100},
        training={"max_steps": None, "batch_size": 4},
        experts=["all"],
    )
    config = prepared(path)
    known: dict[str, dry_run.Cost] = {}
    exact = estimate(config, "all", config, known)
    assert exact.sampled == exact.documents == 3_200
    monkeypatch.setattr(dry_run, "SAMPLE", 1_000)
    before = modified(tmp_path)
    sampled = estimate(config, "all", config, known)
    assert sampled.documents == 3_200
    assert 500 <= sampled.sampled <= 1_100
    assert sum(lengths.number for lengths in sampled.lengths) == sampled.sampled
    # Of 1,000 of these lengths the mean has a standard error of 2 %.
    for field in ("train_tokens", "num_targets", "steps"):
        assert getattr(sampled, field) == pytest.approx(getattr(exact, field), rel=0.08)
    assert [each.text for each in sampled.formats] == [each.text for each in exact.formats]
    monkeypatch.setenv("COLUMNS", "300")
    assert command(monkeypatch, "run", path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"only a sample was tokenized: all {sampled.sampled:,} of 3,200 documents; " in out
    assert re.search(rf"≈ {sampled.train_tokens:,} +≈ {sampled.steps:,} × 128 ", out)
    assert modified(tmp_path) == before
