"""Experts that learn masked tokens: the loss, what is masked, documents kept apart, resuming, export, refusals."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForMaskedLM, BertConfig, BertForPreTraining, PreTrainedTokenizerFast

from decar.router import Ensemble
from decar.router.errors import TrainingError
from decar.router.flow import rate
from decar.router.manifest import Schedule
from decar.training.config import TrainConfig, load_config
from decar.training.data.blocks import IGNORED, Blocks, encode, mean_loss, pack
from decar.training.data.masked_blocks import HELD_OUT_LEVELS, HeldOutBlocks, MaskedBlocks, denoised
from decar.training.data.sources import Chat
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import build_model, check_model, keeps_masked_apart
from decar.training.expert.stage import expert_stage, make_trainer, read_blocks, train_expert
from decar.training.export.stage import export, export_average, export_stage
from decar.training.router.stage import router_stage, train_router
from tests.training.conftest import WriteConfig
from tests.training.test_apart import assert_equal, in_two_processes, made, weights
from tests.training.test_expert import StopAt
from tests.training.tokenizers_of_kinds import KINDS

BERT = {
    "objective": "masked-diffusion",
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
MODERN = {**BERT, "model_type": "modernbert", "local_attention": 8}
# Beside those whose attention looks at all of a row, those with layers that look at a window.
MODELS = {"bert": BERT, "modernbert": MODERN}
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine")
MASK, VOCABULARY, LENGTH = 5, 5, 4
"""Of a model so small that everything it could say can be counted."""


def flow_config(write_config: WriteConfig, kind: str = "bert", **changes: Any) -> Path:
    """A tiny configuration, of a model that is described by nothing else."""
    path = write_config(**changes)
    data = yaml.safe_load(path.read_text()) | {"model": MODELS[kind]}
    path.write_text(yaml.safe_dump(data))
    return path


class Table(torch.nn.Module):
    """A denoiser whose rows are drawn for every z of `LENGTH` tokens; the mask token's logits are large."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(
            (*[VOCABULARY + 1] * LENGTH, LENGTH, VOCABULARY + 1), generator=generator, dtype=torch.float64
        )
        self.config, self.device = SimpleNamespace(), torch.device("cpu")

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.rows[tuple(input_ids.T)].clone())

    def log_prob(self, tokens: list[int], order: tuple[int, ...]) -> float:
        """Of ``tokens``, revealed one by one in that order."""
        z, total = [MASK] * LENGTH, 0.0
        for place in order:
            row = self.rows[(*z, place)][:VOCABULARY].log_softmax(0)
            total += float(row[tokens[place]])
            z[place] = tokens[place]
        return total


def table_blocks(tokens: list[int], schedule: Schedule) -> MaskedBlocks:
    ids = torch.tensor([tokens])
    positions = torch.arange(LENGTH)[None]
    return MaskedBlocks(ids, ids.clone(), positions, LENGTH, Counter(), [], MASK, schedule, seed=3)


def batch_of(blocks: MaskedBlocks, rows: int, **noise: Tensor) -> dict[str, Tensor]:
    row = Blocks.__getitem__(blocks, 0)
    return {name: value.expand(rows, -1) for name, value in row.items()} | noise


# ------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_is_a_bound_whose_mean_is_that_over_all_orders(schedule: Schedule) -> None:
    """In expectation over noise it is the mean over orders of -log p, whatever the schedule; no order-blind
    likelihood is larger."""
    from scipy.integrate import quad

    model, tokens = Table(), [3, 0, 4, 1]
    blocks = table_blocks(tokens, schedule)
    by_order = [model.log_prob(tokens, order) for order in itertools.permutations(range(LENGTH))]
    wanted = -float(np.mean(by_order))
    exact = -math.log(np.mean(np.exp(by_order)))

    # All 16 masks at once: a draw of 0 is masked and one of 1 is not, where half of all are to be.
    draws = torch.tensor(list(itertools.product([0.0, 1.0], repeat=LENGTH)))
    ones = torch.ones(len(draws))
    nats, targets = blocks.row_losses(
        model, batch_of(blocks, len(draws), draws=draws, masked_share=ones / 2, weight=ones)
    )
    assert targets.tolist() == [LENGTH] * len(draws)
    masked = (draws == 0).sum(dim=1)

    def integrand(t: float) -> float:
        share = 1 - t if schedule == "linear" else math.cos(math.pi / 2 * t)
        likely = share**masked * (1 - share) ** (LENGTH - masked)
        return float(rate(schedule, t)) * float(likely.double() @ nats)

    assert quad(integrand, 0, 1)[0] == pytest.approx(wanted, abs=1e-6)
    assert wanted >= exact + 1e-3

    # And as it is drawn; the stratified times leave out the last thousandth.
    drawn = [
        blocks.row_losses(model, batch_of(blocks, 1000, **blocks.noise([key], 1000)))[0] for key in range(20)
    ]
    means = torch.stack(drawn).mean(dim=1)
    assert float(means.mean()) == pytest.approx(wanted, abs=4 * float(means.std()) / math.sqrt(20) + 2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_the_weighted_cross_entropy_of_masked_tokens(
    write_config: WriteConfig, kind: str, schedule: Schedule
) -> None:
    """Against every document by itself, masked and weighed by hand."""
    config = made(flow_config(write_config, kind), f"flow.schedule={schedule}", "training.sequence_length=64")
    tokenizer = load_tokenizer(config.run.tokenizer)
    mask = tokenizer.mask_token_id
    torch.manual_seed(1)
    model = build_model(config.recipe("code"), tokenizer).eval()
    texts = ["def f(x): return", "while self", "the captain of the whale"]
    blocks = MaskedBlocks.of(pack(texts, tokenizer, 64, causal=False), mask, schedule, seed=7)
    assert len(blocks) == 1
    noise = blocks.noise([5], 3)
    nats, targets = blocks.row_losses(model, batch_of(blocks, 3, **noise))

    documents = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    assert targets.tolist() == [sum(len(ids) for ids in documents)] * 3
    for row in range(3):
        share, start, total = float(noise["masked_share"][row]), 0, 0.0
        # Both schedules by the share that they mask at t.
        weight = 1 / share if schedule == "linear" else math.pi / 2 * math.sqrt(1 - share**2) / share
        assert float(noise["weight"][row]) == pytest.approx(weight, rel=1e-3)  # a share near 1 loses digits
        for ids in documents:
            draws = noise["draws"][row, start : start + len(ids)].tolist()
            hidden = [i for i in range(len(ids)) if draws[i] < share]
            z = [mask if i in hidden else token for i, token in enumerate(ids)]
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([z])).logits[0]
            others = torch.arange(logits.shape[1]) != mask
            for i in hidden:
                total -= float(logits[i, ids[i]] - logits[i, others].logsumexp(0))
            start += len(ids)
        assert nats[row].item() == pytest.approx(noise["weight"][row].item() * total, rel=1e-4)


def test_noise_is_stratified_and_a_function_of_seed_and_key() -> None:
    blocks = table_blocks([0, 1, 2, 3], "linear")
    noise = blocks.noise([4, 0], 8)
    times = 1 - noise["masked_share"]
    assert (times * 8 / (1 - 1e-3)).floor().tolist() == list(range(8))
    assert all(torch.equal(values, blocks.noise([4, 0], 8)[name]) for name, values in noise.items())
    for other in (blocks.noise([4, 1], 8), blocks.noise([5, 0], 8)):
        assert not any(torch.equal(values, other[name]) for name, values in noise.items())


def test_held_out_rows_have_the_same_noise_every_time() -> None:
    model = Table()
    blocks = HeldOutBlocks.of_masked(table_blocks([0, 1, 2, 3], "linear"))
    assert len(blocks) == HELD_OUT_LEVELS
    loss = mean_loss(model, blocks, 3)
    assert loss == mean_loss(model, blocks, 3)
    nats, targets = blocks.row_losses(model, batch_of(blocks, 8, **blocks.noise([0], 8)))
    assert loss == pytest.approx(float(nats.sum() / targets.sum()))


def test_the_trainers_loss_is_the_mean_over_a_steps_tokens(write_config: WriteConfig) -> None:
    config = made(flow_config(write_config, training={"gradient_accumulation": 2, "batch_size": 1}))
    tokenizer = load_tokenizer(config.run.tokenizer)
    model = build_model(config.recipe("code"), tokenizer).eval()
    blocks = read_blocks(config.recipe("code"), ["code"], "train", tokenizer)
    assert isinstance(blocks, MaskedBlocks)
    trainer = make_trainer(config.recipe("code"), model, blocks, config.work_dir / "checkpoints")
    batches = [blocks.collate([blocks[i]]) for i in (0, 1)]
    num_tokens = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert num_tokens == sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    with torch.inference_mode():
        found = [
            float(trainer.compute_loss(model, batch, num_items_in_batch=num_tokens)) for batch in batches
        ]
        wanted = [
            float(blocks.row_losses(model, batch | blocks.noise([0, i], 1))[0].sum() / num_tokens)
            for i, batch in enumerate(batches)
        ]
    assert found == pytest.approx(wanted)
    assert found[0] != found[1]


# ------------------------------------------------------------------------------------------------- what is masked


def test_texts_are_masked_as_a_whole_and_chats_in_their_answers() -> None:
    """Not in padding, and not where the documents themselves name the mask, which has no part in the loss."""
    tokenizer = KINDS["qwen"]()
    question = {"role": "user", "content": "What is two plus three?"}
    chat = Chat([question, {"role": "assistant", "content": "Five."}])
    text = "a text that is kind and long, longer than a row, so that it goes on in the next one"
    packed = pack([text, chat], tokenizer, 32, causal=False)
    mask = int(packed.input_ids[0, 3])
    blocks = MaskedBlocks.of(packed, mask, "linear", seed=0)
    seen: list[Tensor] = []

    def model(input_ids: Tensor, **_: Any) -> Any:
        seen.append(input_ids)
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 512))

    model.config = SimpleNamespace()  # type: ignore[attr-defined]
    batch = blocks.collate([blocks[i] for i in range(len(blocks))])
    everything = {
        "draws": torch.zeros(batch["labels"].shape),
        "masked_share": torch.ones(len(blocks)),
        "weight": torch.ones(len(blocks)),
    }
    nats, targets = blocks.row_losses(model, batch | everything)
    ids, wanted = encode(chat, tokenizer, causal=False)
    size = blocks.documents[0].tokens
    learned = [True] * size + [False] * (packed.input_ids.numel() - size)
    places = packed.input_ids.flatten().tolist()
    start = next(i for i in range(size, len(places)) if places[i : i + len(ids)] == ids)
    learned[start : start + len(ids)] = [label != IGNORED for label in wanted]
    assert any(learned[start:])
    assert not learned[start]
    is_mask = packed.input_ids.flatten() == mask
    assert torch.equal(seen[0].flatten() == mask, torch.tensor(learned) | is_mask)
    assert int(targets.sum()) == blocks.num_targets == int((torch.tensor(learned) & ~is_mask).sum())
    assert nats.sum().item() == pytest.approx(blocks.num_targets * math.log(511), rel=1e-6)
    # Nothing of them is left out where a row begins, as a causal model leaves it out.
    assert [document.unlearned for document in packed.documents] == [0, 0]
    assert packed.documents[0].rows > 1


def test_rows_of_nothing_but_masks_are_dropped_and_counted() -> None:
    ids = torch.tensor([[MASK, MASK, MASK], [0, 1, MASK]])
    positions = torch.arange(3).expand(2, -1)
    packed = Blocks(ids, ids.clone(), positions, 6, Counter(), [])
    blocks = MaskedBlocks.of(packed, MASK, "linear", seed=0)
    assert blocks.labels.tolist() == [[0, 1, IGNORED]]
    assert dict(blocks.dropped) == {"rows without a token to learn": 1}


@pytest.mark.parametrize("kind", MODELS)
def test_documents_of_a_row_do_not_see_each_other(write_config: WriteConfig, kind: str) -> None:
    config = made(flow_config(write_config, kind))
    tokenizer = load_tokenizer(config.run.tokenizer)
    torch.manual_seed(1)
    model = build_model(config.recipe("code"), tokenizer).eval()
    assert keeps_masked_apart(model)
    first, changed, second = "def f(x): return", "whale ocean of wind", "self = None; import yield for class"

    @torch.inference_mode()
    def logits(*texts: str) -> Tensor:
        """[T, V] of the last one."""
        packed = pack(texts, tokenizer, 96)
        assert packed.position_ids is not None
        size = pack(texts[-1:], tokenizer, 96).num_tokens
        found = denoised(model, packed.input_ids, packed.position_ids, tokenizer.mask_token_id)
        return found[0, : packed.num_tokens][-size:]

    with torch.inference_mode():
        ids = torch.tensor([[*tokenizer(second)["input_ids"], tokenizer.eos_token_id]])
        alone = model(input_ids=ids).logits[0]
        alone[:, tokenizer.mask_token_id] = -torch.inf
    for others in ([], [first], [changed], [first, changed]):
        torch.testing.assert_close(logits(*others, second), alone, atol=1e-5, rtol=0)
    # Within a document, both sides are seen.
    ends, goes_on = logits(second)[1, :5], logits(f"{second} whale")[1, :5]
    assert (ends - goes_on).abs().max() > 2e-5


# --------------------------------------------------------------------------------------------- training and export


@pytest.mark.parametrize("stop", [3, 5])
def test_an_interrupted_expert_ends_with_the_same_weights(write_config: WriteConfig, stop: int) -> None:
    """BERT has dropout, so the state of the random numbers matters beside that of the noise."""
    config = made(flow_config(write_config, training={"gradient_accumulation": 2, "batch_size": 1}))
    stage = expert_stage(config, "code")
    train_expert(config, "code", stage)
    whole = weights(config.work_dir, "code")
    shutil.rmtree(stage.directory)
    with pytest.raises(KeyboardInterrupt):
        train_expert(config, "code", stage, [StopAt(stop)])
    train_expert(config, "code", stage)
    assert_equal(whole, weights(config.work_dir, "code"))


def test_two_processes_train_what_one_trains(write_config: WriteConfig) -> None:
    path = flow_config(write_config, training={"max_steps": 8, "batch_size": 4, "eval_steps": 4})
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": BERT | dropout}))
    config = made(path)
    stage = expert_stage(config, "code")
    train_expert(config, "code", stage)
    alone = weights(config.work_dir, "code")
    shutil.rmtree(stage.directory)
    in_two_processes(path)
    together = weights(config.work_dir, "code")
    moved = 8 * config.training.learning_rate
    for name, value in alone.items():  # as in test_apart.py
        assert (value - together[name]).abs().max() < moved, name
        assert (value - together[name]).abs().mean() < 1e-3 * moved, name


def test_training_lowers_the_held_out_bound(write_config: WriteConfig) -> None:
    config = made(flow_config(write_config), "training.learning_rate=1e-2", "training.max_steps=30")
    tokenizer = load_tokenizer(config.run.tokenizer)
    held_out = read_blocks(config.recipe("prose"), ["prose"], "held_out", tokenizer)
    untrained = mean_loss(build_model(config.recipe("prose"), tokenizer), held_out, 2)
    report = train_expert(config, "prose", expert_stage(config, "prose"))
    assert untrained == pytest.approx(math.log(len(tokenizer) - 1), rel=0.1)
    assert report.held_out_loss < untrained - 0.5


def exported(path: Path, *overrides: str) -> tuple[TrainConfig, Ensemble]:
    config = made(path, *overrides)
    for name in config.expert_names:
        train_expert(config, name, expert_stage(config, name))
    train_router(config.run, config.router, config.seed, router_stage(config))
    return config, export(config, export_stage(config))


def test_the_ensemble_says_how_its_experts_reveal_tokens(write_config: WriteConfig) -> None:
    """And each is a checkpoint that transformers reads, with the names that vLLM's BertForMaskedLM maps."""
    config, ensemble = exported(
        flow_config(write_config), "flow.schedule=cosine", "flow.order=confident", "flow.steps=8"
    )
    tokenizer = load_tokenizer(ensemble.experts[0].path)
    assert ensemble.manifest.kind == "flow"
    assert ensemble.manifest.flow is not None
    assert ensemble.manifest.flow.model_dump(exclude_defaults=True) == {
        "mask_token_id": tokenizer.mask_token_id,
        "schedule": "cosine",
        "order": "confident",
        "steps": 8,
    }
    assert tokenizer.mask_token == "<|mask|>"
    for expert in ensemble.experts:
        assert expert.architecture == "BertForMaskedLM"
        model, loading = AutoModelForMaskedLM.from_pretrained(expert.path, output_loading_info=True)
        assert not any(loading.values())
        assert type(model).__name__ == "BertForMaskedLM"
        # The decoder is tied to the embeddings; its bias has the name that vLLM reads.
        with safe_open(expert.path / "model.safetensors", framework="pt") as file:
            names = set(file.keys())
        assert {"cls.predictions.bias", "bert.embeddings.word_embeddings.weight"} <= names
        assert not {name for name in names if "decoder" in name or "pooler" in name}
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    card = (ensemble.directory / "README.md").read_text()
    assert "objective: masked-diffusion" in card
    assert "vllm serve" not in card

    averaged = export_average(config)
    assert "AutoModelForMaskedLM" in (averaged / "README.md").read_text()
    assert type(AutoModelForMaskedLM.from_pretrained(averaged)).__name__ == "BertForMaskedLM"


def test_how_answers_are_revealed_does_not_train_anew(write_config: WriteConfig) -> None:
    path = flow_config(write_config)
    config = made(path)
    fingerprint = expert_stage(config, "code").config
    for change in ("flow.steps=4", "flow.order=confident", "flow.prompt_chunks=2"):
        assert expert_stage(load_config(path, [change]), "code").config == fingerprint
    assert expert_stage(load_config(path, ["flow.schedule=cosine"]), "code").config != fingerprint


def test_explicitly_causal_is_what_it_was(write_config: WriteConfig) -> None:
    path = write_config()
    said = load_config(path, ["model.objective=causal"])
    assert said.recipe("code") == load_config(path).recipe("code")
    assert said.tokenizer.mask_token is None


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def checkpoint(write_config: WriteConfig, tmp_path: Path) -> Path:
    """A BERT of both of its tasks, whose tokenizer has no eos but [SEP]."""
    config = made(flow_config(write_config))
    trained = load_tokenizer(config.run.tokenizer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        cls_token="<|bos|>",
        sep_token="<|eos|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
    )
    directory = tmp_path / "checkpoint"
    tokenizer.save_pretrained(directory)
    fields = {name: value for name, value in BERT.items() if name not in ("objective", "model_type")}
    BertForPreTraining(BertConfig(vocab_size=len(tokenizer), **fields)).save_pretrained(directory)
    return directory


def from_checkpoint(write_config: WriteConfig, checkpoint: Path) -> TrainConfig:
    path = write_config(tokenizer={"path": str(checkpoint)})
    data = yaml.safe_load(path.read_text())
    data["tokenizer"].pop("vocab_size")
    data["model"] = {"objective": "masked-diffusion", "checkpoint": str(checkpoint)}
    path.write_text(yaml.safe_dump(data))
    return load_config(path)


def test_a_checkpoint_is_trained_on(write_config: WriteConfig, checkpoint: Path) -> None:
    config = from_checkpoint(write_config, checkpoint)
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.run.tokenizer)
    assert tokenizer.eos_token == "<|eos|>"
    model = build_model(config.recipe("code"), tokenizer)
    before = AutoModelForMaskedLM.from_pretrained(checkpoint).state_dict()
    assert_equal(dict(model.state_dict()), dict(before))
    report = train_expert(config, "code", expert_stage(config, "code"))
    assert report.steps == 6


def test_a_checkpoint_without_a_mask_token(write_config: WriteConfig, checkpoint: Path) -> None:
    config = from_checkpoint(write_config, checkpoint)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({**settings, "mask_token": None, "eos_token": "<|eos|>"})
    )
    with pytest.raises(
        TrainingError, match=r"the tokenizer at .*/checkpoint has no mask_token, which masked diffusion"
    ):
        make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))


def test_a_checkpoint_that_looks_one_way(write_config: WriteConfig, here: Path) -> None:
    config = from_checkpoint(write_config, here / "a")
    with pytest.raises(TrainingError, match="is a llama, which does not look at both sides of a token"):
        build_model(config.recipe("code"), load_tokenizer(here / "a"))


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.objective=diffusion", "'diffusion'; did you mean 'masked-diffusion'"),
        ("training.sample_prompts=[def]", "training.sample_prompts does not apply to model.objective"),
        ("mixing.prune=0.1", "mixing.prune does not apply to model.objective: masked-diffusion; drop it"),
        ("mixing.top_k=1", "mixing.top_k does not apply"),
        ("training.trainer.label_smoothing_factor=0.1", "label_smoothing_factor does not apply"),
        ("curve.steps=1200", "curve does not apply"),
        ("tokenizer.mask_token=null", "tokenizer.mask_token: masked diffusion needs one"),
        ("experts.0={name: code, model: {objective: causal}}", "one objective; take it out of 'code'"),
        ("flow.order=any", "flow.order"),
        ("flow.steps=100000", "flow.steps: Input should be less than or equal to 65536"),
        (
            "evaluate.noise_levels=100000",
            "evaluate.noise_levels: Input should be less than or equal to 65536",
        ),
        ("flow.shedule=cosine", "did you mean 'schedule'"),
    ],
)
def test_settings_that_do_not_apply_are_named(write_config: WriteConfig, change: str, message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        load_config(flow_config(write_config), [change])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", ["flow.steps=4", "tokenizer.mask_token='[MASK]'", "evaluate.noise_levels=4"]
)
def test_settings_of_masked_diffusion_need_it(write_config: WriteConfig, change: str) -> None:
    name = change.split("=")[0] if not change.startswith("flow") else "flow"
    with pytest.raises(TrainingError, match=f"{name} does not apply to model.objective: causal; drop it"):
        load_config(write_config(), [change])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_type": "llama"}, "is a llama, which does not look at both sides of a token"),
        ({"model_type": "bert", "is_decoder": True}, "model.is_decoder"),
        ({"model_type": "bert", "hiden_size": 8}, "model.hiden_size: unknown field of bert"),
    ],
)
def test_models_that_do_not_fit(write_config: WriteConfig, model: dict[str, Any], message: str) -> None:
    path = write_config()
    data = yaml.safe_load(path.read_text()) | {"model": {"objective": "masked-diffusion", **model}}
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(TrainingError, match=message):
        check_model(load_config(path).recipe("code"))


def test_a_model_whose_documents_would_see_each_other(write_config: WriteConfig) -> None:
    """RoBERTa counts positions from the padding token on, so documents cannot begin anew in a row."""
    config = made(flow_config(write_config))
    data = {**MODELS["bert"], "model_type": "roberta"}
    path = write_config()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"model": data}))
    with pytest.raises(TrainingError, match="a roberta, which cannot keep documents that share a row apart"):
        build_model(load_config(path).recipe("code"), load_tokenizer(config.run.tokenizer))
