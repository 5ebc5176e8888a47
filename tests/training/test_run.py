"""The whole command: from a configuration to an ensemble that others can load, and errors in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from decar.router import Ensemble
from decar.training import stages
from decar.training.cli import main
from decar.training.config import load_config
from decar.training.expert.report import read_expert_report
from tests.training.conftest import WriteConfig


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["decar-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def modified(directory: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in directory.rglob("*") if file.is_file()}


def test_run_makes_a_servable_ensemble_once(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    assert command(monkeypatch, "run", path, "--set", "mixing.rule=logit") == 0
    config = load_config(path, ["mixing.rule=logit"])
    ensemble = Ensemble.load(config.run.ensemble)
    tokens = {name: read_expert_report(config.run.expert(name)).train_tokens for name in config.expert_names}
    assert (ensemble.name, ensemble.expert_names) == ("tiny", ["code", "prose"])
    assert ensemble.manifest.mixing.rule == "logit"
    for expert in ensemble.experts:
        assert expert.prior == pytest.approx(tokens[expert.name] / sum(tokens.values()))
        assert {file.name for file in expert.path.iterdir()} == {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
    router_files = {file.name for file in (config.run.ensemble / "router").iterdir()}
    assert router_files == {"router.json", "router.safetensors"}

    before = modified(config.work_dir)
    capsys.readouterr()
    assert command(monkeypatch, "run", path, "--set", "mixing.rule=logit") == 0
    assert modified(config.work_dir) == before
    assert capsys.readouterr().out.count("done before") == 6

    assert command(monkeypatch, "run", path) == 0
    after = modified(config.work_dir)
    assert {
        file: at for file, at in after.items() if "experts" in file.parts and "ensemble" not in file.parts
    } == {file: at for file, at in before.items() if "experts" in file.parts and "ensemble" not in file.parts}
    assert Ensemble.load(config.run.ensemble).manifest.mixing.rule == "velocity"


def test_transformers_loads_experts_and_their_chat_template(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_config()
    assert command(monkeypatch, "partition", path) == 0
    for name in ("code", "prose"):
        assert command(monkeypatch, "expert", name, path) == 0
    assert command(monkeypatch, "export", path) == 0
    for expert in Ensemble.load(load_config(path).run.ensemble).experts:
        tokenizer = AutoTokenizer.from_pretrained(expert.path)
        model = AutoModelForCausalLM.from_pretrained(expert.path)
        assert model.dtype == torch.float32
        assert model.config.use_cache
        assert GenerationConfig.from_pretrained(expert.path).eos_token_id == tokenizer.eos_token_id
        chat = [
            {"role": "system", "content": "the wind"},
            {"role": "user", "content": "def f"},
            {"role": "assistant", "content": "(x):"},
            {"role": "user", "content": "of the"},
        ]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == "<|bos|>the wind\n\ndef f(x):\n\nof the"
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"]
        assert ids[0].tolist() == tokenizer.encode(text, add_special_tokens=False)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "none.yaml"], "none.yaml does not exist"),
        (["expert", "cod", "CONFIG"], "no expert is named 'cod'; the configuration has code, prose"),
        (["expert", "code", "CONFIG"], "run `decar-train partition` first"),
        (["export", "CONFIG"], "expert 'code' is not trained; run `decar-train expert code` first"),
        (["run", "CONFIG", "--set", "training.max_step=2"], "did you mean 'max_steps'?"),
        (["run", "CONFIG", "--set", "model.hiden_size=2"], "did you mean 'hidden_size'?"),
        (["partition", "CONFIG", "--set", "data.files=[nothing.txt]"], "'nothing.txt' matches no file"),
        (["partition", "CONFIG", "--set", "tokenizer.path=/nowhere"], "/nowhere holds no tokenizer.json"),
    ],
)
def test_errors_end_in_one_line(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path = write_config()
    assert command(monkeypatch, *[path if word == "CONFIG" else word for word in arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_stale_expert_is_not_exported(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config()
    assert command(monkeypatch, "run", path) == 0
    assert command(monkeypatch, "export", path, "--set", "training.max_steps=9") == 1
    assert "trained with another configuration" in capsys.readouterr().err


def test_export_spares_what_is_not_an_ensemble(
    write_config: WriteConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    path = write_config(ensemble_dir=str(mine))
    assert command(monkeypatch, "run", path) == 1
    assert "is not an ensemble" in capsys.readouterr().err
    assert (mine / "thesis.tex").read_text() == "x"


def test_a_failed_stage_leaves_the_old_directory(tmp_path: Path) -> None:
    stage = stages.Stage(tmp_path / "stage", "a", "b")
    with stage.writing() as directory:
        (directory / "x").write_text("old")

    def fail() -> None:
        with stages.Stage(tmp_path / "stage", "c", "d").writing() as directory:
            (directory / "x").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (tmp_path / "stage" / "x").read_text() == "old"
    assert stage.is_done
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
