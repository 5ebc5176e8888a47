"""Documents that share a row do not see each other: each has the logits that it has alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from decar.training.config import load_config
from decar.training.data.blocks import IGNORED, mean_loss, pack
from decar.training.data.sources import Chat
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert.model import build_model, keeps_apart
from decar.training.expert.report import read_expert_report
from decar.training.expert.stage import expert_stage, make_trainer, read_blocks, train_expert
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import WriteConfig
from tests.training.tokenizers_of_kinds import KINDS

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
APART = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": {},
}
# Positions are their own affair (OPT), or they have none (BLOOM, Mamba).
NOT_APART = ["opt", "bloom", "mamba"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def model_of(kind: str, attention: str | None = None, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **fields, vocab_size=512)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def chat(question: str, answer: str) -> Chat:
    return Chat([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


FIRST = chat("What is two plus three?", "Five.")
CHANGED = chat("Name the whale, do!", "Paris.")
SECOND = chat("Why is the whale so kind?", "Because you said so, and five is three.")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", APART)
def test_a_chat_beside_another_is_as_it_is_alone(kind: str, attention: str, device: str) -> None:
    tokenizer = KINDS["qwen"]()
    model = model_of(kind, attention, **APART[kind]).to(device)
    assert keeps_apart(model)

    @torch.inference_mode()
    def logits(*chats: Chat | str) -> torch.Tensor:
        """[T, V] of the last one."""
        blocks = pack(chats, tokenizer, 128)
        assert len(blocks) == 1
        batch = {name: tensor.to(device) for name, tensor in blocks.collate([blocks[0]]).items()}
        del batch["labels"]
        size = pack(chats[-1:], tokenizer, 128).num_tokens
        found: torch.Tensor = model(**batch, use_cache=False).logits[0, : blocks.num_tokens]
        return found[-size:]

    alone = logits(SECOND)
    for others in ([FIRST], [CHANGED], [FIRST, CHANGED], ["a text", FIRST]):
        torch.testing.assert_close(logits(*others, SECOND), alone, atol=1e-5, rtol=0)


def test_the_trainers_loss_is_that_of_documents_alone(write_config: WriteConfig) -> None:
    """Through the Trainer, as experts are trained: its loss is the mean over each document's own."""
    config = load_config(write_config(training={"sequence_length": 128, "batch_size": 1}))
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.run.tokenizer)
    model = build_model(config.recipe("code"), tokenizer)
    model.config.use_cache = True
    texts = ["def f(x): return", "while self", "the captain of the whale"]
    packed = pack(texts, tokenizer, 128)
    assert len(packed) == 1
    losses = [
        (mean_loss(model, blocks := pack([text], tokenizer, 128), 1), blocks.num_targets) for text in texts
    ]
    wanted = sum(loss * count for loss, count in losses) / packed.num_targets
    trainer = make_trainer(config.recipe("code"), model, packed, config.work_dir / "checkpoints")
    model.eval()
    with torch.inference_mode():
        loss = trainer.compute_loss(model, packed.collate([packed[0]]))
    assert float(loss) == pytest.approx(wanted, abs=1e-5)
    assert mean_loss(model, packed, 1) == pytest.approx(wanted, abs=1e-5)


def test_image_text_models_keep_packed_texts_apart() -> None:
    tokenizer = KINDS["qwen"]()
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    config = LlavaConfig(
        text_config={"model_type": "llama", **SHAPE, "vocab_size": 512},
        vision_config={"model_type": "clip_vision_model", "intermediate_size": 32, **vision},
        image_token_index=511,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    assert keeps_apart(model)
    packed, alone = (pack(chats, tokenizer, 128) for chats in ([FIRST, SECOND], [SECOND]))
    with torch.inference_mode():
        beside = model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False).logits
        single = model(input_ids=alone.input_ids, use_cache=False).logits
    ends = packed.num_tokens
    torch.testing.assert_close(
        beside[0, ends - alone.num_tokens : ends], single[0, : alone.num_tokens], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("kind", NOT_APART)
def test_models_that_cannot_keep_documents_apart_get_each_in_rows_of_its_own(kind: str) -> None:
    fields = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "bloom": {"n_head": 2}}.get(kind, {})
    torch.manual_seed(0)
    shape = {name: SHAPE[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = AutoConfig.for_model(kind, **shape, vocab_size=512, **fields)
    assert not keeps_apart(AutoModelForCausalLM.from_config(config))
    tokenizer = KINDS["qwen"]()
    long = "the whale said so. " * 10
    blocks = pack(["Five.", FIRST, long, SECOND], tokenizer, 48, keeps_apart=False)
    assert blocks.position_ids is None
    assert blocks[0].keys() == {"input_ids", "labels"}
    sizes = [pack([one], tokenizer, 48, keeps_apart=False) for one in ("Five.", FIRST, long, SECOND)]
    assert blocks.input_ids.equal(torch.cat([each.input_ids for each in sizes]))
    assert blocks.num_tokens == sum(each.num_tokens for each in sizes)


def test_an_expert_of_such_a_model_is_trained(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config()
    model = {
        "model_type": "opt",
        "hidden_size": 32,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    model |= {"word_embed_proj_dim": 32, "max_position_embeddings": 128}
    config = load_config(path, [f"model={json.dumps(model)}"])
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    report = train_expert(config, "code", expert_stage(config, "code"))
    assert report.steps == 6
    assert read_expert_report(config.run.expert("code")) == report


def test_positions_start_anew_with_documents_and_rows() -> None:
    tokenizer = KINDS["qwen"]()
    blocks = pack(["What is two plus three?" * 3, FIRST, "Five."], tokenizer, 32)
    positions = blocks.position_ids
    assert positions is not None
    assert (positions[:, 0] == 0).all()
    steps = positions[:, 1:] - positions[:, :-1]
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    starts = positions.flatten()[: blocks.num_tokens] == 0
    first = pack(["What is two plus three?" * 3], tokenizer, 32).num_tokens
    assert starts[first]
    # Nothing of a document predicts its first token.
    assert (blocks.labels[:, 1:][positions[:, 1:] == 0] == IGNORED).all()


def test_read_blocks_follows_the_model(write_config: WriteConfig) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.run.tokenizer)
    packed, single = (
        read_blocks(config.recipe("code"), ["code"], "train", tokenizer, None, apart)
        for apart in (True, False)
    )
    assert len(single) >= len(packed)
    assert "position_ids" in packed[0]
    assert "position_ids" not in single[0]
    assert single.num_tokens == packed.num_tokens
