"""Image-text experts: what they are trained on, that they learn it apart and through kills, and what is exported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import is_torchvision_available
from vllm.model_executor.models.llava import LlavaForConditionalGeneration

from decar.router import Ensemble, EnsembleError, load_trained, load_trained_images
from decar.router.errors import TrainingError
from decar.router.images import decode_image
from decar.training import dry_run
from decar.training.config import IMAGE_TEMPLATE, TrainConfig, load_config
from decar.training.data import corpus
from decar.training.data.blocks import IGNORED, mean_loss
from decar.training.data.corpus import DocumentWriter
from decar.training.data.digits import write_digits
from decar.training.data.image_blocks import CUT_OFF, IMAGE_CHATS, ImageBlocks, ShardImages, image_sizes
from decar.training.data.shards import read_examples
from decar.training.data.sources import Chat, Document
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.evaluate.held_out import read_texts, scored, scores_of
from decar.training.expert.model import build_model, check_model, load_model
from decar.training.expert.stage import (
    complete_checkpoints,
    expert_processor,
    expert_stage,
    read_blocks,
    train_expert,
)
from decar.training.export.stage import export, export_average, export_stage
from decar.training.partition.stage import make_partition, partition_stage
from decar.training.router.stage import router_stage, train_router
from tests.training.conftest import PROSE, config_writer
from tests.training.test_apart import COMMAND, DEADLINE_S, assert_equal, in_two_processes, weights
from tests.training.test_run import command

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
MODEL = {"model_type": "llava", "vision_feature_layer": -1, "vision_config": VISION, "text_config": TEXT}
IMAGE_TOKENS = (16 // 8) ** 2


def settings(root: Path) -> dict[str, Any]:
    return {
        "data": {"files": [str(root / "digits/train.jsonl"), str(root / "prose.jsonl")]},
        "partition": {"held_out": 0.2, "name_by": {}, "method": "kmeans"},
        "tokenizer": {"vocab_size": 330},
        "experts": ["code", "prose"],
        "training": {"max_steps": 6, "batch_size": 4, "sequence_length": 64, "save_steps": 2, "log_steps": 1},
    }


def write(root: Path, **changes: Any) -> Path:
    """A configuration of LLaVA experts on digits and a few texts. The image's size is not the model's."""
    writer = config_writer(root)
    if not (root / "digits").exists():
        write_digits(root / "digits", limit=40)
    data = settings(root)
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(data.get(key), dict) else value
    path = writer(**data)
    # The writer lays a model over its own, which is a plain language model.
    import yaml

    whole = yaml.safe_load(path.read_text()) | {"model": changes.get("model", MODEL)}
    path.write_text(yaml.safe_dump(whole))
    return path


def prepared(path: Path) -> TrainConfig:
    config = load_config(path)
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    return config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return prepared(write(tmp_path))


def blocks_of(config: TrainConfig, name: str = "code", split: str = "train") -> ImageBlocks:
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    recipe = config.recipe(name)
    blocks = read_blocks(recipe, [name], split, tokenizer, expert_processor(recipe, tokenizer))
    assert isinstance(blocks, ImageBlocks)
    return blocks


def encoded(config: TrainConfig, name: str = "code", split: str = "train") -> list[list[bytes]]:
    import pyarrow.parquet as parquet

    return list(parquet.read_table(config.run.shard(name, split)).column("images").to_pylist())


# ---------------------------------------------------------------------------------------------- rows


def test_rows_are_what_the_processor_makes_of_the_chat(config: TrainConfig) -> None:
    blocks = blocks_of(config)
    train_expert(config, "code", expert_stage(config, "code"))
    # As whoever serves the expert would load it.
    processor = AutoProcessor.from_pretrained(
        config.work_dir / "experts/code", local_files_only=True, backend="pil"
    )
    chats = [
        (chat, images)
        for chat, images in zip(
            read_examples(config.run.shard("code", "train")), encoded(config), strict=True
        )
        if images
    ]
    assert len(blocks.chats) == len(chats)
    assert {len(images) for _, images in chats} == {1, 2}
    batch = blocks.collate([blocks[len(blocks.texts) + i] for i in range(len(chats))])
    assert batch.keys() == {"input_ids", "labels", "pixel_values"}
    done = 0
    for (chat, images), ids, labels in zip(chats, batch["input_ids"], batch["labels"], strict=True):
        assert isinstance(chat, Chat)
        messages = chat.messages
        question = messages[0]["content"].replace("<image>\n", "")
        parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": parts}]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert prompt == "<|bos|>" + "<image>\n" * len(images) + question
        pictures = [Image.open(BytesIO(image)) for image in images]
        wanted = processor(text=prompt, images=pictures, add_special_tokens=False, return_tensors="pt")
        length = wanted["input_ids"].shape[1]
        assert torch.equal(ids[:length], wanted["input_ids"][0])
        assert int((ids == processor.image_token_id).sum()) == IMAGE_TOKENS * len(images)
        answer = processor.tokenizer(messages[1]["content"], add_special_tokens=False)["input_ids"]
        answer.append(processor.tokenizer.eos_token_id)
        assert ids[length : length + len(answer)].tolist() == answer
        assert labels[:length].tolist() == [IGNORED] * length
        assert labels[length : length + len(answer)].tolist() == answer
        assert (labels[length + len(answer) :] == IGNORED).all()
        assert torch.equal(batch["pixel_values"][done : done + len(images)], wanted["pixel_values"])
        done += len(images)
    assert done == len(batch["pixel_values"])


def test_texts_are_packed_beside_chats_about_images(config: TrainConfig) -> None:
    blocks = blocks_of(config)
    texts = [e for e in read_examples(config.run.shard("code", "train")) if isinstance(e, str)]
    assert texts
    assert len(blocks) == len(blocks.texts) + len(blocks.chats)
    decoded = blocks.processor.tokenizer.decode(blocks.texts.input_ids.flatten().tolist())
    assert all(text in decoded for text in texts)
    mixed = blocks.collate([blocks[0], blocks[len(blocks.texts)]])
    assert mixed["input_ids"].shape == (2, 64)
    # A row's loss does not depend on the company it keeps.
    model = build_model(config.recipe("code"), blocks.processor.tokenizer).eval()
    alone = blocks.collate([blocks[len(blocks.texts)]])
    length = alone["input_ids"].shape[1]
    with torch.inference_mode():
        together, by_itself = (
            model(input_ids=b["input_ids"], pixel_values=b["pixel_values"]).logits for b in (mixed, alone)
        )
    # float32 sums of 32 terms in another order
    torch.testing.assert_close(together[1, :length], by_itself[0], atol=1e-5, rtol=1e-5)
    assert blocks.num_targets == sum(
        int((row["labels"][1:] != IGNORED).sum()) for row in (blocks[i] for i in range(len(blocks)))
    )


def test_a_long_chat_is_cut_but_no_image(tmp_path: Path) -> None:
    config = prepared(write(tmp_path, data={"files": [str(tmp_path / "digits/train.jsonl")]}))
    whole = blocks_of(config)

    def at(length: int) -> TrainConfig:
        return config.model_copy(
            update={"training": config.training.model_copy(update={"sequence_length": length})}
        )

    longest = max(len(chat.input_ids) for chat in whole.chats)
    cut = blocks_of(at(longest - 1))
    assert max(len(chat.input_ids) for chat in cut.chats) == longest - 1
    with pytest.raises(
        TrainingError, match=r"begins with .* reach beyond 5 tokens; raise training.sequence_l"
    ):
        blocks_of(at(5))


def test_what_is_cut_of_chats_about_images_is_counted_in_tokens_and_answers(tmp_path: Path) -> None:
    config = prepared(write(tmp_path))
    whole = blocks_of(config)
    lengths = [len(chat.input_ids) for chat in whole.chats]
    learned = [int((chat.labels[1:] != IGNORED).sum()) for chat in whole.chats]
    for length in (max(lengths) - 1, max(lengths) - 3, 2 * IMAGE_TOKENS + 4):
        training = config.training.model_copy(update={"sequence_length": length})
        blocks = blocks_of(config.model_copy(update={"training": training}))
        chats = [document for document in blocks.documents if document.kind == IMAGE_CHATS]
        assert [document.tokens for document in chats] == lengths
        assert [document.targets for document in chats] == learned
        assert [document.cut_off for document in chats] == [max(size - length, 0) for size in lengths]
        assert sum(document.cut_off for document in chats) == blocks.dropped[CUT_OFF] > 0
        assert sum(document.unlearned for document in chats) > 0
        assert sum(each.targets - each.unlearned for each in blocks.documents) == blocks.num_targets
        # A chat of whose answers nothing is left is no row.
        assert sum(each.targets > each.unlearned for each in chats) == len(blocks.chats)
    uncut = [document for document in whole.documents if document.kind == IMAGE_CHATS]
    assert all(document.cut_off == document.unlearned == 0 for document in uncut)


def test_the_dry_run_shows_images_and_what_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    config = prepared(path := write(tmp_path))
    longest = max(len(chat.input_ids) for name in ("code", "prose") for chat in blocks_of(config, name).chats)
    training = config.training.model_copy(update={"sequence_length": longest - 1})
    cut = blocks_of(config.model_copy(update={"training": training}))
    setting = f"training.sequence_length={longest - 1}"
    assert command(monkeypatch, "run", path, "--dry-run", "--set", setting) == 0
    out = capsys.readouterr().out
    number = sum(document.cut_off > 0 for document in cut.documents)
    assert re.search(rf"code +{len(cut.chats)} image chats +– +{number}, by {number} tokens ", out)
    advised = (
        r"an image chat is cut .*; training.sequence_length: (\d+) keeps all of code's image chats whole"
    )
    (length,) = re.findall(advised, out)
    assert int(length) == max(document.tokens for document in cut.documents if document.kind == IMAGE_CHATS)
    assert re.search(
        r"─ LLaVA \(\d+ documents\): train.jsonl, text \d+ of \d+ ─+╮\n│ <\|bos\|><image> × 4 .*\n│ .*\?⟦.*<\|eos\|>⟧",
        out,
    )
    assert re.search(r"─ text \(\d+ documents\): prose.jsonl, text \d+ of \d+ ─", out)


def test_the_dry_run_of_a_sample_reads_its_own_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "BATCH_DOCUMENTS", 8)
    config = prepared(write(tmp_path))
    seen: list[bytes] = []
    read = ShardImages.__getitem__

    def look(self: ShardImages, row: int) -> list[bytes]:
        seen.extend(images := read(self, row))
        return images

    monkeypatch.setattr(ShardImages, "__getitem__", look)
    monkeypatch.setattr(dry_run, "SAMPLE", 30)
    sampled = dry_run.estimate(config, "code", config, {})
    assert 0 < sampled.sampled <= 40 < sampled.documents
    assert seen
    shard = [
        image
        for batch in corpus.read_batches(config.run.shard("code", "train"))
        for d in batch
        for image in d.images
    ]
    assert set(seen) <= set(shard)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"model_type": "llama", "hidden_size": 32}},
            r"hold images, which no model of text reads; set model.model_type",
        ),
        (
            {"tokenizer": {"chat_template": "{{ messages[0]['content'] }}"}},
            r"has to render a message of parts, .*but of one each it renders",
        ),
        (
            {"tokenizer": {"chat_template": "{{ messages[0]['content'] + 1 }}"}},
            r"has to render a message of parts, .*but of one each can only concatenate",
        ),
        (
            {"data": {"files": ["prose.jsonl"]}},
            r"the tokenizer has no token '<image>' \(tokenizer.image_token\)",
        ),
    ],
)
def test_what_does_not_fit_images_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = prepared(write(tmp_path, **changes))
    with pytest.raises(TrainingError, match=message) as caught:
        train_expert(config, "code", expert_stage(config, "code"))
    assert "\n" not in str(caught.value)


def test_a_text_cannot_hold_the_image_token(tmp_path: Path) -> None:
    path = write(tmp_path)
    rows = [{"text": f"an <image> tag {' '.join(PROSE)} {i}"} for i in range(15)]
    (tmp_path / "prose.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = prepared(path)
    with pytest.raises(
        TrainingError, match=r"begins with 'an <image> tag .* has the token <image>, but no image"
    ):
        blocks_of(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"vision_config": {"hiden_size": 1}},
            r"model\.vision_config\.hiden_size: unknown field of clip_vision_model; did you mean 'hidden_size'",
        ),
        (
            {"text_config": {"model_type": "lama"}},
            r"model\.text_config\.model_type: transformers has no 'lama'; did you mean 'llama'",
        ),
        ({"text_config": 3}, r"model\.text_config: describe it by fields"),
        ({"vision_layer": -1}, r"model\.vision_layer: unknown field of llava"),
    ],
)
def test_fields_are_checked_within_parts(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    config = load_config(write(tmp_path, model={**MODEL, **model}))
    with pytest.raises(TrainingError, match=message):
        check_model(config.recipe("code"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_decoded_images(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    with BytesIO() as buffer:
        Image.new("RGB", (20, 10)).save(buffer, kind, exif=exif)
        image = buffer.getvalue()
    with DocumentWriter(tmp_path / "a.parquet", ("source", "images")) as writer:
        writer.add(Document("", "a", 0, images=(image,)))
        writer.add(Document("", "a", 1))
    decoded = (10, 20) if orientation >= 5 else (20, 10)
    assert decode_image(image).size == decoded
    assert list(image_sizes(tmp_path / "a.parquet")) == [[decoded], []]
    assert ShardImages(tmp_path / "a.parquet")[0] == [image]


def test_chats_without_any_image_are_rendered_as_parts(tmp_path: Path) -> None:
    config = prepared(write(tmp_path))
    base = tmp_path / "base"
    train_expert(config, "code", expert_stage(config, "code"))
    shutil.copytree(config.work_dir / "experts/code", base)
    template = (
        "{% for m in messages %}{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>"
        "{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}"
        "{% endfor %}{% endfor %}"
    )
    path = write(
        tmp_path,
        work_dir=str(tmp_path / "again"),
        model={"checkpoint": str(base)},
        tokenizer={"path": str(base), "chat_template": template},
        data={"files": [str(tmp_path / "code.jsonl")]},
    )
    chat = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "return"}]
    rows = [{"messages": [*chat, {"role": "user", "content": str(i)}]} for i in range(20)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    blocks = blocks_of(prepared(path))
    assert blocks.chats == []
    assert "def freturn" in blocks.processor.tokenizer.decode(blocks.texts.input_ids[0].tolist())


# ---------------------------------------------------------------------------------------------- training


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    config = prepared(write(tmp_path, training={"max_steps": 4, "batch_size": 4, "save_steps": 4}))
    stage = expert_stage(config, "code")
    train_expert(config, "code", stage)
    alone = weights(config.work_dir, "code")
    shutil.rmtree(stage.directory)
    # Another process sees the shard and the tokenizer alone.
    shutil.rmtree(tmp_path / "digits")
    in_two_processes(tmp_path / "config.yaml")
    together = weights(config.work_dir, "code")
    moved = 4 * config.training.learning_rate
    for name, value in alone.items():
        # As in test_apart: sums in another order, which Adam makes much of where gradients are all but zero.
        assert (value - together[name]).abs().max() < moved, name
        assert (value - together[name]).abs().mean() < 1e-2 * moved, name


def test_a_killed_expert_ends_with_the_same_weights(tmp_path: Path) -> None:
    training = {"max_steps": 24, "save_steps": 3, "save_total_limit": 1}
    path = write(tmp_path, training=training)
    config = prepared(path)
    stage = expert_stage(config, "code")
    with subprocess.Popen([*COMMAND, "expert", "code", path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            step = re.search(r"step (\d+)/24", line)
            if step and int(step[1]) >= 8:
                os.kill(child.pid, signal.SIGKILL)
                break
        assert child.wait(DEADLINE_S) == -signal.SIGKILL
    assert not stage.is_done
    assert complete_checkpoints(config.run.checkpoints(stage))
    train_expert(config, "code", stage)
    resumed = weights(config.work_dir, "code")
    shutil.rmtree(stage.directory)
    train_expert(config, "code", stage)
    assert_equal(weights(config.work_dir, "code"), resumed)


def test_frozen_modules_stay_and_the_rest_learns(tmp_path: Path) -> None:
    config = prepared(write(tmp_path, training={"freeze": ["vision_tower"]}))
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    before = build_model(config.recipe("code"), tokenizer)
    held_out = blocks_of(config, split="held_out")
    report = train_expert(config, "code", expert_stage(config, "code"))
    assert report.held_out_loss < mean_loss(before, held_out, 4)
    after = AutoModelForImageTextToText.from_pretrained(config.work_dir / "experts/code")
    for name, value in after.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]) == ("vision_tower" in name), name
    wrong = config.model_copy(
        update={"training": config.training.model_copy(update={"freeze": ["vision_towel"]})}
    )
    with pytest.raises(TrainingError, match="has no module 'vision_towel'; did you mean 'vision_tower'"):
        build_model(wrong.recipe("code"), tokenizer)


# ---------------------------------------------------------------------------------------------- export


@pytest.fixture
def exported(config: TrainConfig) -> TrainConfig:
    for name in config.expert_names:
        train_expert(config, name, expert_stage(config, name))
    train_router(config.run, config.router, config.seed, router_stage(config))
    export(config, export_stage(config))
    return config


def test_an_ensemble_of_image_experts(exported: TrainConfig) -> None:
    ensemble = Ensemble.load(exported.run.ensemble)
    assert [expert.architecture for expert in ensemble.experts] == ["LlavaForConditionalGeneration"] * 2
    assert ensemble.max_positions == 128
    assert all(expert.reads_images for expert in ensemble.experts)
    assert "pipeline_tag: image-text-to-text" in (exported.run.ensemble / "README.md").read_text()

    # transformers reads back what was trained, and nothing is left over.
    path = ensemble.experts[0].path
    model, loading = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.config.image_token_id == AutoProcessor.from_pretrained(path).image_token_id
    saved = load_file(path / "model.safetensors")
    state = model.state_dict()
    assert len(saved) == len(state)
    for name, value in saved.items():
        plain = name.replace("vision_tower.vision_model.", "vision_tower.")
        plain = plain.replace("language_model.lm_head", "lm_head")
        plain = plain.replace("language_model.model.", "language_model.")
        found = [key for key in state if key.removeprefix("model.") == plain]
        assert len(found) == 1, name
        assert torch.equal(state[found[0]], value)

    # vLLM finds each of them a place.
    mapped = [name for name, _ in LlavaForConditionalGeneration.hf_to_vllm_mapper.apply(saved.items())]
    places = ("language_model.model.", "language_model.lm_head.", "multi_modal_projector.linear_")
    assert all(name.startswith((*places, "vision_tower.vision_model.")) for name in mapped)
    assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in mapped

    routers = load_trained_images(ensemble)
    pictures = [[Image.open(BytesIO(i)) for i in images] for images in encoded(exported) if images]
    others = [[Image.open(BytesIO(i)) for i in images] for images in encoded(exported, "prose") if images]
    right = (routers["classifier"].log_weights(pictures).argmax(axis=1) == 0).sum()
    right += (routers["classifier"].log_weights(others).argmax(axis=1) == 1).sum()
    # Clusters of what the router looks at are told apart nearly always.
    assert right > 0.9 * (len(pictures) + len(others))
    assert load_trained(ensemble)["classifier"].log_weights(["the whale"]).shape == (1, 2)


def test_held_out_answers_are_scored_after_their_images(exported: TrainConfig) -> None:
    """In padded batches with other texts' images, as alone; and an answer is right where greedy decoding gives it."""
    tokenizer = load_tokenizer(exported.work_dir / "tokenizer")
    processor = expert_processor(exported.recipe("code"), tokenizer)
    held_out = read_texts(exported.run, exported.evaluate, exported.seed, tokenizer, 64, processor)
    assert {len(text.places) for text in held_out.texts} == {0, 1, 2}
    model = load_model(Ensemble.load(exported.run.ensemble).experts[0].path)
    for text, rows in scored([model], held_out.texts, 4, len(tokenizer), processor):
        ids, images = torch.tensor([text.ids]), text.images()
        inputs = {}
        if images:
            inputs["pixel_values"] = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            alone = model(input_ids=ids, **inputs).logits[0, :-1].log_softmax(dim=-1)
            written = model.generate(
                input_ids=ids[:, : text.prompt_tokens],
                **inputs,
                do_sample=False,
                max_new_tokens=len(text.ids) - text.prompt_tokens,
            )
        # float32 sums over 32 features in another order, of logits below 10
        torch.testing.assert_close(rows[:, 0], alone, atol=1e-4, rtol=0)
        places = (ids[0] == processor.image_token_id).nonzero().flatten().tolist()
        assert places == [i for place in text.places for i in place]
        assert len(places) == IMAGE_TOKENS * len(images)
        scores = scores_of(text, rows, {})
        said = [float(alone[i - 1, text.ids[i]]) for i in range(1, text.prompt_tokens) if i not in places]
        assert scores.prompt[0] == pytest.approx(sum(said), abs=1e-3)
        if text.is_answer:
            assert bool(scores.right[:, 0].all()) == (written[0].tolist() == text.ids)


def test_image_experts_can_be_averaged(exported: TrainConfig) -> None:
    target = export_average(exported)
    processor = AutoProcessor.from_pretrained(target, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(target)
    inputs = processor(text="<image>\nWhich", images=[Image.new("RGB", (20, 30))], return_tensors="pt")
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def edit(file: Path, **changes: Any) -> None:
    data = json.loads(file.read_text())
    for key, value in changes.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(data))


def test_experts_that_see_images_differently_are_named(exported: TrainConfig) -> None:
    second = exported.run.ensemble / "experts/prose"
    processor = (second / "processor_config.json").read_text()
    config = (second / "config.json").read_text()
    edit(second / "processor_config.json", patch_size=4)
    with pytest.raises(
        EnsembleError, match=r"'code' and 'prose' turn images .*processor\.patch_size \(8 and 4\)"
    ):
        Ensemble.load(exported.run.ensemble)
    edit(
        second / "processor_config.json",
        patch_size=8,
        image_processor={"crop_size": {"height": 8, "width": 8}},
    )
    with pytest.raises(EnsembleError, match=r"'code' and 'prose' .*image_processor\.crop_size"):
        Ensemble.load(exported.run.ensemble)
    (second / "processor_config.json").write_text(processor)
    edit(second / "config.json", vision_config={"image_size": 32}, image_token_index=9)
    with pytest.raises(
        EnsembleError, match=r"image_token_index \(\d+ and 9\), vision_config\.image_size \(16 and 32\)"
    ):
        Ensemble.load(exported.run.ensemble)
    data = json.loads(config)
    del data["vision_config"]
    (second / "config.json").write_text(json.dumps(data))
    with pytest.raises(EnsembleError, match=r"expert 'code' reads images and 'prose' does not"):
        Ensemble.load(exported.run.ensemble)
    (second / "config.json").write_text(config)
    (second / "processor_config.json").unlink()
    with pytest.raises(
        EnsembleError, match=r"expert 'prose' reads images, but .*processor_config.json is missing"
    ):
        Ensemble.load(exported.run.ensemble)


# ---------------------------------------------------------------------------------------------- other models


def save_internvl(directory: Path, videos: Any) -> None:
    """A tiny InternVL checkpoint, whose images become as many tokens as their shape asks for."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|end|>", "<|pad|>", "<img>", "</img>", "<ctx>", "<video>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([], trainer)
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=dict(zip(names, special[2:], strict=True)),
    )
    fast.chat_template = IMAGE_TEMPLATE.replace("IMAGE_TOKEN", "<ctx>").replace("{{ bos_token }}", "")
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, min_patches=1, max_patches=4)
    processor = InternVLProcessor(images, fast, videos, 4, chat_template=fast.chat_template)
    processor.save_pretrained(directory)
    vision = {**VISION, "image_size": 28, "patch_size": 7}
    config = AutoConfig.for_model(
        "internvl",
        vision_config=vision,
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(fast)},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(directory)


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' InternVL processor needs torchvision"
)
def test_a_checkpoint_of_another_kind_is_trained(tmp_path: Path) -> None:
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    save_internvl(tmp_path / "base", InternVLVideoProcessor())
    path = write(
        tmp_path,
        model={"checkpoint": str(tmp_path / "base")},
        tokenizer={"path": str(tmp_path / "base")},
    )
    image = next(iter((tmp_path / "digits/images").iterdir()))
    with Image.open(image) as picture:
        picture.resize((90, 30)).save(image)
    config = prepared(path)
    blocks = blocks_of(config)
    before = build_model(config.recipe("code"), blocks.processor.tokenizer)
    counts = {int((chat.input_ids == blocks.processor.image_token_id).sum()) for chat in blocks.chats}
    counts |= {
        int((c.input_ids == blocks.processor.image_token_id).sum()) for c in blocks_of(config, "prose").chats
    }
    # A patch of 4 tokens for a square image; three and a thumbnail for one of 90 × 30 pixels.
    assert {4, 8, 16} <= counts
    train_expert(config, "code", expert_stage(config, "code"))
    after, loading = AutoModelForImageTextToText.from_pretrained(
        config.work_dir / "experts/code", output_loading_info=True
    )
    assert not any(loading.values()), loading
    assert after.state_dict().keys() == before.state_dict().keys()
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
    names = load_file(config.work_dir / "experts/code/model.safetensors").keys()
    assert "vision_tower.embeddings.cls_token" in names


INTERNVL = {
    "model_type": "internvl",
    "vision_config": {**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
    "text_config": {"model_type": "qwen2"}
    | {name: value for name, value in TEXT.items() if name != "head_dim"},
}
MARKS = {"image_token": "<IMG_CONTEXT>", "chat_tokens": ["<img>", "</img>", "<video>"]}


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' InternVL processor needs torchvision"
)
def test_a_fresh_internvl_is_trained(tmp_path: Path) -> None:
    config = prepared(write(tmp_path, model=INTERNVL, tokenizer=MARKS))
    blocks = blocks_of(config)
    for chat in blocks.chats:
        places = int((chat.input_ids == blocks.processor.image_token_id).sum())
        assert places == 4 * len(chat.images()), "4 × 4 patches, of which each four are one"
    train_expert(config, "code", expert_stage(config, "code"))
    # As whoever serves the expert loads it.
    directory = config.work_dir / "experts/code"
    processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(directory)
    assert model.config.image_token_id == processor.image_token_id
    image = blocks.chats[0].images()[0]
    inputs = processor(images=[image], text="<IMG_CONTEXT>?", return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 4
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers' InternVL processor needs torchvision"
)
def test_an_internvl_without_its_marks_is_told_which(tmp_path: Path) -> None:
    config = prepared(write(tmp_path, model=INTERNVL, tokenizer={"image_token": "<IMG_CONTEXT>"}))
    with pytest.raises(
        TrainingError, match=r"the tokenizer has no '<img>': add them to tokenizer\.chat_tokens"
    ):
        blocks_of(config)


def test_adapters_are_merged(tmp_path: Path) -> None:
    config = prepared(write(tmp_path))
    base = tmp_path / "base"
    train_expert(config, "code", expert_stage(config, "code"))
    shutil.copytree(config.work_dir / "experts/code", base)
    again = prepared(
        write(
            tmp_path,
            work_dir=str(tmp_path / "adapted"),
            model={"checkpoint": str(base)},
            tokenizer={"path": str(base)},
            training={"lora": {"rank": 4}, "freeze": ["vision_tower"]},
        )
    )
    report = train_expert(again, "prose", expert_stage(again, "prose"))
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (base, again.work_dir / "experts/prose")
    )
    assert report.num_parameters == sum(value.numel() for value in before.values())
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in moved
    assert not any("vision_tower" in name for name in moved)
