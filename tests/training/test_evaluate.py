"""The report over seeds: the page against the json, a second run against the first, chats, and what is not defined."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from decar.router import Ensemble
from decar.router.errors import TrainingError
from decar.training.config import TrainConfig, load_config, load_seeds
from decar.training.data.shards import read_examples
from decar.training.data.sources import Chat
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.evaluate.held_out import read_texts
from decar.training.evaluate.scores import AVERAGE, CENTRALIZED, MOE, RANDOM
from decar.training.evaluate.stage import EvaluationReport
from decar.training.evaluate.systems import DENSE
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig, config_writer
from tests.training.test_chat import CHATML, chat
from tests.training.test_scores import SETTINGS, run

SEEDS = [0, 1]


def report_in(work_dir: Path) -> dict[str, Any]:
    return dict(json.loads((work_dir / "evaluate" / "report.json").read_text()))


def without(value: Any, *keys: str) -> Any:
    """``value`` but for what its mappings hold under ``keys``."""
    if isinstance(value, dict):
        return {key: without(item, *keys) for key, item in value.items() if key not in keys}
    return [without(item, *keys) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a finished evaluation over two seeds, and few budgets."""
    write = config_writer(tmp_path_factory.mktemp("two_seeds"))
    settings = {**SETTINGS, "seeds": SEEDS, "prune": [0.1], "prune_grid": [0.3, 0.01]}
    path = write(evaluate=settings, training={"learning_rate": 1e-2})
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, path) == 0
    return path


def test_the_page_holds_every_number_of_the_main_table(two_seeds: Path) -> None:
    config = load_config(two_seeds)
    report = EvaluationReport.model_validate(report_in(config.work_dir))
    page = (config.work_dir / "evaluate" / "report.html").read_text()
    for name in (CENTRALIZED, "code alone", "prose alone", AVERAGE, MOE, RANDOM, DENSE, "centroid, top-1"):
        assert name in {row.system for row in report.rows}
    table = page[page.index("<h2>All systems</h2>") :]
    for row in report.rows:
        if row.prune in (0.0, 0.1):
            cells = re.search(rf"<td>{re.escape(row.system)}</td>(.*?)</tr>", table, re.DOTALL)
            assert cells is not None
            for text in (
                f"{row.perplexity:.1f} ± {row.spread['perplexity']:.1f}",
                f"{row.nll:.3f} ± {row.spread['nll']:.3f}",
                f"{row.above_dense:+.3f} ± {row.spread['above_dense']:.3f}",
                f"{row.accuracy:.2%} ± {row.spread['accuracy']:.2%}",
                f"{row.active_experts:.2f}",
            ):
                assert text in cells[1], row.system
    for comparison in report.comparisons:
        assert f"{comparison.difference.mean:+.3f} ± {comparison.difference.sd:.3f}" in page
    for command in [report.environment["command"], *report.commands]:
        assert html.unescape(page).count(command) >= 2
    # Self-contained: nothing is fetched, nothing runs.
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 4
    assert "<script" not in page
    assert "http" not in page


def test_means_are_over_seeds(two_seeds: Path) -> None:
    config = load_config(two_seeds)
    report = EvaluationReport.model_validate(report_in(config.work_dir))
    assert [seed.seed for seed in report.seeds] == SEEDS
    for row in report.rows:
        each = [next(r for r in seed.rows if r.system == row.system) for seed in report.seeds]
        assert row.nll == pytest.approx(np.mean([r.nll for r in each]))
        assert row.spread["nll"] == pytest.approx(abs(each[0].nll - each[1].nll) / 2**0.5)
        assert row.perplexity == pytest.approx(np.exp(row.nll))
        assert row.nll_by_domain["code"] == pytest.approx(np.mean([r.nll_by_domain["code"] for r in each]))
    assert report.seeds[0].rows != report.seeds[1].rows
    assert not any("One seed" in sentence for sentence in report.verdict)


def test_every_number_comes_back(two_seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command again, and the one that is printed for a seed alone, from the scores on."""
    config = load_config(two_seeds)
    before = report_in(config.work_dir)
    for one in load_seeds(two_seeds):
        shutil.rmtree(one.work_dir / "scores")
    shutil.rmtree(config.work_dir / "evaluate")
    assert run(monkeypatch, two_seeds) == 0
    assert without(report_in(config.work_dir), "date") == without(before, "date")

    work_dir = config.work_dir / "seed-1"
    shutil.rmtree(work_dir / "scores")
    program, command, path, *overrides = shlex.split(before["commands"][1])
    assert (program, command, path) == ("decar-train", "evaluate", str(two_seeds))
    assert run(monkeypatch, two_seeds, *overrides[1::2]) == 0
    alone = report_in(work_dir)
    assert without(alone["seeds"], "environment") == without(before["seeds"][1:], "environment")
    assert alone["rows"] == before["seeds"][1]["rows"]


def test_another_seed_is_another_run(two_seeds: Path) -> None:
    own, other = load_seeds(two_seeds)
    assert own == load_config(two_seeds)
    assert (other.seed, other.work_dir) == (1, own.work_dir / "seed-1")
    held_out = [
        {example for name in one.expert_names for example in read_examples(one.run.shard(name, "held_out"))}
        for one in (own, other)
    ]
    assert held_out[0] != held_out[1]


def test_a_seed_that_is_listed_twice(two_seeds: Path) -> None:
    with pytest.raises(TrainingError, match=r"evaluate\.seeds.*listed twice"):
        load_seeds(two_seeds, ["evaluate.seeds=[1, 1]"])


def test_the_seed_in_paths(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(work_dir=str(tmp_path / "run-{seed}"), tokenizer={"path": "base/{seed}"})
    config = load_config(path, ["seed=3"])
    assert (config.work_dir, config.tokenizer.path) == (tmp_path / "run-3", Path("base/3"))
    other = load_seeds(path, ["evaluate.seeds=[0, 5]"])[1]
    assert (other.work_dir, other.tokenizer.path) == (tmp_path / "run-0" / "seed-5", Path("base/5"))


def test_every_seeds_checkpoint_is_looked_for_before_anything_is_trained(
    write_config: WriteConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "base-0").mkdir()
    (tmp_path / "base-0" / "config.json").write_text("{}")
    base = str(tmp_path / "base-{seed}")
    path = write_config(tokenizer={"path": base}, evaluate={"seeds": SEEDS})
    written = yaml.safe_load(path.read_text()) | {"model": {"checkpoint": base}}
    path.write_text(yaml.safe_dump(written))
    assert run(monkeypatch, path) == 1
    assert "base-1, holds no config.json" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_what_is_not_defined_is_said(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts of two architectures, dealt out by chance: no twin, no merged model, no control, and still a report."""
    path = write_config(
        evaluate={**SETTINGS, "prune": [0.1], "prune_grid": [0.1]},
        experts=["code", {"name": "prose", "model": {"hidden_size": 64}}],
        partition={"method": "random", "name_by": {}},
    )
    assert run(monkeypatch, path) == 0
    report = EvaluationReport.model_validate(report_in(load_config(path).work_dir))
    assert set(report.undefined) == {CENTRALIZED, AVERAGE, MOE, RANDOM}
    assert "hidden_size (32 and 64)" in report.undefined[AVERAGE]
    assert not {row.system for row in report.rows} & set(report.undefined)
    assert report.gaps == []
    out = capsys.readouterr().out
    for merged in ("parameter average", MOE):
        assert f"No {merged}: experts 'code' and 'prose' cannot be averaged" in out
    page = (load_config(path).work_dir / "evaluate" / "report.html").read_text()
    assert "have different models" in page


# --------------------------------------------------------------------------------------------------------------- chats


def chats_config(root: Path, **evaluate: Any) -> Path:
    """Questions of two kinds, each with its own kind of answer, in one or two turns."""
    write = config_writer(root)
    for name, ask, answers in (
        ("code", "def return self", ["import None", "yield class"]),
        ("prose", "whale of the ocean", ["the captain", "quiet wind"]),
    ):
        rows = [
            chat(f"{ask} {i}", answers[i % 2], *([f"{ask} again", answers[0]] if i % 3 == 0 else []))
            for i in range(15)
        ]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return write(
        tokenizer={"vocab_size": 300, "eos_token": "<|end|>", "chat_template": CHATML},
        training={"learning_rate": 1e-2, "max_steps": 30, "sequence_length": 64},
        evaluate={"max_tokens": 120, "batch_size": 3, "prune": [0.1], "prune_grid": [0.1], **evaluate},
    )


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, EvaluationReport]:
    path = chats_config(tmp_path_factory.mktemp("chats"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, path) == 0
    config = load_config(path)
    return config, EvaluationReport.model_validate(report_in(config.work_dir))


@torch.inference_mode()
def test_answers_are_right_where_greedy_decoding_gives_them(
    chats: tuple[TrainConfig, EvaluationReport],
) -> None:
    config, report = chats
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    ensemble = Ensemble.load(config.run.ensemble)
    rows = {row.system: row for row in report.rows}
    for k, path in enumerate(
        [*(expert.path for expert in ensemble.experts), config.work_dir / "centralized"]
    ):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        by_domain = []
        for name in config.expert_names:
            hits = []
            for example in read_examples(config.run.shard(name, "held_out")):
                assert isinstance(example, Chat)
                messages = example.messages
                for i, message in enumerate(messages):
                    if message["role"] != "assistant":
                        continue
                    prompt = tokenizer.apply_chat_template(
                        messages[:i], add_generation_prompt=True, return_tensors="pt", return_dict=True
                    )
                    written = model.generate(**prompt, do_sample=False, max_new_tokens=60)
                    answer = tokenizer.decode(written[0, prompt["input_ids"].shape[1] :])
                    hits.append(answer == message["content"] + "<|end|>")
            assert len(hits) == report.seeds[0].answers[name]
            by_domain.append(np.mean(hits))
        system = CENTRALIZED if k == len(ensemble.experts) else f"{config.expert_names[k]} alone"
        expected = np.dot([expert.prior for expert in ensemble.experts], by_domain)
        assert rows[system].exact == pytest.approx(expected), system
    exact = [row.exact for row in report.rows if row.exact is not None]
    assert len(exact) == len(report.rows)
    assert max(exact) > 0
    assert min(exact) < 1


def test_chats_are_scored_in_their_answers_alone(chats: tuple[TrainConfig, EvaluationReport]) -> None:
    config, report = chats
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    held_out = read_texts(config.run, config.evaluate, config.seed, tokenizer, 120)
    said = [tokenizer.decode(text.ids[text.prompt_tokens :]) for text in held_out.texts]
    wanted = [
        f"{message['content']}<|end|>"
        for name in config.expert_names
        for example in read_examples(config.run.shard(name, "held_out"))
        if isinstance(example, Chat)
        for message in example.messages
        if message["role"] == "assistant"
    ]
    assert sorted(said) == sorted(wanted)
    assert sum(report.tokens.values()) == sum(len(tokenizer.encode(text)) for text in wanted) - len(wanted)
    assert report.sampled == []
    page = (config.work_dir / "evaluate" / "report.html").read_text()
    assert "answers right" in page


def test_answers_that_end_too_late_are_counted(tmp_path: Path) -> None:
    config = load_config(chats_config(tmp_path))
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    everything = read_texts(config.run, config.evaluate, config.seed, tokenizer, 120)
    longest = len(everything.texts[-1].ids)
    fewer = read_texts(config.run, config.evaluate, config.seed, tokenizer, longest - 1)
    assert fewer.too_long == sum(len(text.ids) == longest for text in everything.texts)
    assert len(fewer.texts) + fewer.too_long == len(everything.texts)
    with pytest.raises(
        TrainingError, match=r"no answer in its held-out chats ends within evaluate\.max_tokens, 3"
    ):
        read_texts(config.run, config.evaluate, config.seed, tokenizer, 3)
