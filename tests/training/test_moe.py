"""Experts merged into a mixture of experts: logits against dense models and one built by hand, gates, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    set_seed,
)

from decar.router.errors import TrainingError
from decar.router.manifest import ExpertCheckpoint
from decar.training.config import TrainConfig, load_config
from decar.training.data.shards import read_texts
from decar.training.expert.report import read_expert_report
from decar.training.export.moe import export_moe, gate_weights, merge, moe_stage, train_moe
from decar.training.stages import Stage
from tests.training.conftest import WriteConfig, config_writer
from tests.training.test_export import MERGED_FILES, trained
from tests.training.test_run import command, modified

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ARCHITECTURES = {
    "llama": LlamaConfig(**SHAPE, rms_norm_eps=1e-3),
    "tied, with a head size of its own": LlamaConfig(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "scaled positions": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral, with a window that the texts leave": MistralConfig(**SHAPE, sliding_window=8),
}
IDS = torch.arange(60).reshape(2, 30) % 50


def checkpoint(config: Any, seed: int, directory: Path) -> ExpertCheckpoint:
    """An expert of random weights, norms included, that spread enough for its logits to differ by nats."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    model.save_pretrained(directory)
    described = json.loads((directory / "config.json").read_text())
    return ExpertCheckpoint(f"expert-{seed}", directory, 1.0, described)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_equal_experts_make_the_model_that_each_of_them_is(config: Any, tmp_path: Path) -> None:
    """Whatever the gates say, since the weights of the two that are chosen add up to one."""
    expert = checkpoint(config, 0, tmp_path)
    merged = merge([replace(expert, name=name) for name in "abc"])
    for layer in merged.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight)
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32))
    assert dense.std() > 0.5
    # fp32: sums in another order, over some hundred terms of which the logits are made
    torch.testing.assert_close(logits(merged), dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_a_mixture_built_by_hand_says_the_same(config: Any, tmp_path: Path) -> None:
    experts = [checkpoint(config, seed, tmp_path / str(seed)) for seed in range(3)]
    gates = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    merged = merge(experts)
    for layer, gate in zip(merged.model.layers, gates, strict=True):
        layer.mlp.gate.weight.data = gate
    merged.save_pretrained(tmp_path / "merged")

    models = [AutoModelForCausalLM.from_pretrained(e.path, dtype=torch.float32) for e in experts]
    fields = {name: getattr(config, name, None) for name in (*SHAPE, "rms_norm_eps", "head_dim")}
    fields |= {name: getattr(config, name, None) for name in ("tie_word_embeddings", "rope_parameters")}
    by_hand = MixtralForCausalLM(
        MixtralConfig(
            **fields,
            sliding_window=getattr(config, "sliding_window", None),
            num_local_experts=3,
            num_experts_per_tok=2,
        )
    )
    states = [model.state_dict() for model in models]
    own = by_hand.state_dict()
    common = {name: sum(state[name] for state in states) / 3 for name in states[0] if name in own}
    assert not by_hand.load_state_dict(common, strict=False).unexpected_keys
    for i, layer in enumerate(by_hand.model.layers):
        layer.mlp.gate.weight.data = gates[i]
        for k, model in enumerate(models):
            block = model.model.layers[i].mlp
            both = torch.cat([block.gate_proj.weight, block.up_proj.weight])
            layer.mlp.experts.gate_up_proj.data[k] = both.data
            layer.mlp.experts.down_proj.data[k] = block.down_proj.weight.data
    torch.testing.assert_close(logits(merged), logits(by_hand), rtol=0, atol=1e-5)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert isinstance(reloaded, MixtralForCausalLM)
    torch.testing.assert_close(logits(reloaded), logits(merged), rtol=0, atol=0)


def test_tensors_have_mixtrals_names(tmp_path: Path) -> None:
    """Those that vLLM's loader, and every other tool, knows."""
    experts = [checkpoint(LlamaConfig(**SHAPE), seed, tmp_path / str(seed)) for seed in range(2)]
    merge(experts).save_pretrained(tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for k, expert in enumerate(experts):
        of_expert = load_file(expert.path / "model.safetensors")
        for i in range(2):
            block = f"model.layers.{i}.block_sparse_moe"
            assert not found[f"{block}.gate.weight"].any()
            for name, dense in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
                weight = found[f"{block}.experts.{k}.{name}.weight"]
                assert torch.equal(weight, of_expert[f"model.layers.{i}.mlp.{dense}.weight"])
    assert len(found) == len(of_expert) + 2 * (3 + 1)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "has attention_bias, which Mixtral has not"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "has mlp_bias, which Mixtral has not"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "has hidden_act gelu, where Mixtral has silu"),
        (Qwen2Config(**SHAPE), "is a qwen2 model"),
        (GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=4), "is a gpt2 model"),
    ],
    ids=["attention bias", "mlp bias", "activation", "qwen2", "gpt2"],
)
def test_what_mixtral_has_no_place_for_is_refused(config: Any, why: str, tmp_path: Path) -> None:
    expert = checkpoint(config, 0, tmp_path)
    with pytest.raises(TrainingError) as caught:
        merge([expert, replace(expert, name="other")])
    assert str(caught.value).startswith(f"expert 'expert-0' {why}; only llama and mistral models")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_the_architectures_are_refused(tmp_path: Path) -> None:
    expert = checkpoint(LlamaConfig(**SHAPE), 0, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"num_hidden_layers": 3}))
    with pytest.raises(
        TrainingError, match=r"'expert-0' cannot be merged: .* \(model\.layers\.2\.\S+ is missing, left over"
    ):
        merge([expert, replace(expert, name="other")])


def test_gates_tell_centroids_apart_and_nothing_else() -> None:
    """Hidden states share a large mean, as those of language models do, and differ by a little of their spread."""
    generator = torch.Generator().manual_seed(0)
    width, num_experts = 256, 4
    common = 3 * torch.randn(width, generator=generator, dtype=torch.float64)
    lengths = torch.linspace(1, 1.2, num_experts, dtype=torch.float64)[:, None]
    own = 0.3 * torch.randn(num_experts, width, generator=generator, dtype=torch.float64)
    centroids = lengths * common + own
    tokens = centroids[:, None] + torch.randn(
        num_experts, 500, width, generator=generator, dtype=torch.float64
    )
    rms = tokens.square().mean().sqrt()
    gates = gate_weights(centroids, rms)
    torch.testing.assert_close(
        gates @ centroids.mean(dim=0), torch.zeros(num_experts, dtype=torch.float64), rtol=0, atol=1e-9
    )
    chosen = (tokens @ gates.T).argmax(dim=-1)
    of_expert = torch.arange(num_experts)[:, None]
    assert (chosen == of_expert).double().mean() > 0.9
    with_centroids = (tokens @ centroids.T).argmax(dim=-1)
    assert (with_centroids == of_expert).double().mean() < 0.5
    noise = rms * torch.randn(10_000, width, generator=generator, dtype=torch.float64)
    assert (noise @ gates.T).std() == pytest.approx(1, abs=0.05)  # of a unit normal, 40,000 draws
    torch.testing.assert_close(gate_weights(10 * centroids, 10 * rms) @ (10 * common), gates @ common)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of trained experts."""
    path = config_writer(tmp_path_factory.mktemp("experts"))()
    trained(load_config(path))
    return path


@pytest.fixture
def config(experts: Path) -> TrainConfig:
    """Trained experts, not merged."""
    config = load_config(experts)
    for directory in (config.run.moe, config.run.ensemble_moe):
        shutil.rmtree(directory, ignore_errors=True)
    return config


def made(config: TrainConfig, **moe: Any) -> TrainConfig:
    changed = config.model_copy(update={"moe": config.moe.model_copy(update=moe)})
    train_moe(changed.recipes, changed.moe, moe_stage(changed))
    return changed


def test_gates_start_from_what_experts_have_read(config: TrainConfig) -> None:
    made(config, steps=0)
    tokenizer = AutoTokenizer.from_pretrained(config.run.moe)
    model = AutoModelForCausalLM.from_pretrained(config.run.moe)
    model.config.output_router_logits = True
    shares = []
    for k, name in enumerate(config.expert_names):
        texts = list(read_texts(config.run.shard(name, "held_out")))
        said = [model(tokenizer(text, return_tensors="pt")["input_ids"]).router_logits[0] for text in texts]
        shares.append(float((torch.cat(said).argmax(dim=-1) == k).double().mean()))
    assert min(shares) > 0.6, (
        shares
    )  # by single tokens, mostly letters, of which both kinds of text have many


def test_what_is_trained(config: TrainConfig) -> None:
    weights = {}
    for which, moe in (
        ("none", {"steps": 0}),
        ("gates", {"steps": 3, "train": "gates"}),
        ("all", {"steps": 3}),
    ):
        changed = made(config, **moe)
        weights[which] = load_file(config.run.moe / "model.safetensors")
        report = read_expert_report(config.run.moe)
        assert report.steps == moe["steps"]
        assert moe_stage(changed).is_done
        assert not moe_stage(config).is_done  # which would take 50 steps
    experts = [load_file(config.run.expert(name) / "model.safetensors") for name in config.expert_names]
    for name, weight in weights["none"].items():
        is_gate = name.endswith("gate.weight")
        assert torch.equal(weights["gates"][name], weight) is not is_gate, name
        assert not torch.equal(weights["all"][name], weight), name
        if name in experts[0]:
            assert torch.equal(weight, (experts[0][name] + experts[1][name]) / 2)
    described = json.loads((config.run.moe / "config.json").read_text())
    assert (described["num_local_experts"], described["num_experts_per_tok"]) == (2, 2)
    assert described["use_cache"]
    assert not described["output_router_logits"]


def test_weights_are_saved_as_the_experts_are(config: TrainConfig) -> None:
    """In bf16 where those are, though they are merged and trained in fp32."""
    for name in config.expert_names:
        shutil.copytree(config.run.expert(name), config.run.expert(name).with_name(f"{name}-fp32"))
        model = AutoModelForCausalLM.from_pretrained(config.run.expert(name), dtype=torch.bfloat16)
        model.save_pretrained(config.run.expert(name))
    try:
        made(config, steps=1)
    finally:
        for name in config.expert_names:
            shutil.rmtree(config.run.expert(name))
            config.run.expert(name).with_name(f"{name}-fp32").rename(config.run.expert(name))
    weights = load_file(config.run.moe / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert json.loads((config.run.moe / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_export(
    config: TrainConfig, experts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("export", experts, "--merge", "moe", "--set", "moe.steps=2")
    assert command(monkeypatch, *arguments) == 0
    target = config.run.ensemble.with_name("ensemble-moe")
    out = "".join(capsys.readouterr().out.split("\n"))
    assert str(target) in out
    assert "mixture of experts: step 2/2" in out
    assert {file.name for file in target.iterdir()} == MERGED_FILES
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target)
    ids = tokenizer("def f", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    card = (target / "README.md").read_text()
    merged = read_expert_report(config.run.moe)
    for said in (
        "arXiv 2403.07816",
        f"of {merged.num_parameters:,} parameters",
        "all weights were trained for 2 steps of 64 tokens",
        f"{merged.held_out_loss:.4f}",
        "vllm serve .",
        "\n  balance: 0.01",
    ):
        assert said in card
    # Made once, and exported as often as wanted.
    before = modified(config.run.moe)
    assert command(monkeypatch, *arguments) == 0
    assert "mixture of experts: done before" in capsys.readouterr().out
    assert modified(config.run.moe) == before


def trained_again(config: TrainConfig, stage: Stage) -> None:
    train_moe(config.recipes, config.moe, stage)


@pytest.mark.parametrize(
    ("broken", "work"), [("moe_card", export_moe), ("start_gates", trained_again)], ids=["export", "training"]
)
def test_what_fails_leaves_what_was_there(
    broken: str, work: Callable[..., object], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_moe(config, moe_stage(made(config, steps=0)))
    before = modified(config.run.ensemble_moe), modified(config.run.moe)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"decar.training.export.moe.{broken}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        work(config, moe_stage(config))
    assert (modified(config.run.ensemble_moe), modified(config.run.moe)) == before
    assert not list(config.work_dir.glob(".*"))


def test_a_training_that_diverges_keeps_nothing(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decar.training.export.moe.mean_loss", lambda *_: float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan after 1 steps; lower moe\.learning_rate"):
        made(config, steps=1)
    assert not config.run.moe.exists()


def test_the_export_spares_what_is_no_model(config: TrainConfig) -> None:
    mine = config.run.ensemble_moe
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(TrainingError, match="ensemble-moe exists and is not a model; move it away"):
        export_moe(config, moe_stage(config))
    assert (mine / "thesis.tex").read_text() == "x"


def test_experts_that_are_not_trained_are_not_merged(write_config: WriteConfig) -> None:
    with pytest.raises(
        TrainingError, match="expert 'code' is not trained; run `decar-train expert code` first"
    ):
        moe_stage(load_config(write_config()))
