"""Chats: read from files, carried by shards, rendered with the chat template, learned in the answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from decar.router.errors import TrainingError
from decar.training.config import CONTINUATION_TEMPLATE, DataConfig, DocumentConfig, load_config
from decar.training.data.blocks import IGNORED, mean_loss, pack, render_chat
from decar.training.data.shards import read_examples, read_texts
from decar.training.data.sources import Chat, read_documents
from decar.training.data.tokenizer import load_tokenizer, make_tokenizer, tokenizer_stage
from decar.training.expert import stage as expert
from decar.training.expert.model import build_model
from decar.training.expert.stage import expert_stage, read_blocks, train_expert
from decar.training.partition.stage import make_partition, partition_stage
from tests.training.conftest import CODE, WriteConfig

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Forgets earlier answers, as templates of reasoning models forget what was thought.
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message['role'] != 'assistant' %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}"
    "{% endif %}{{ message['content'] }}{% endfor %}"
)


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def chats(words: list[str], seed: int) -> list[list[dict[str, str]]]:
    half = len(words) // 2
    return [chat(" ".join(words[:half]), f"{' '.join(words[half:])} {i + seed}") for i in range(10)]


@pytest.fixture
def config_with_chats(write_config: WriteConfig, tmp_path: Path) -> Any:
    def make(template: str, **tokenizer: str) -> Any:
        path = write_config()
        rows = [{"messages": c} for c in chats(CODE, 0)] + [{"text": "def return self None import"}] * 3
        (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = load_config(path, ["partition.held_out=0.3"])
        config = config.model_copy(
            update={"tokenizer": config.tokenizer.model_copy(update={"chat_template": template, **tokenizer})}
        )
        make_partition(config, partition_stage(config))
        make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
        return config

    return make


def learned(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """Runs of labelled tokens, decoded."""
    runs: list[list[int]] = []
    for previous, (token, label) in zip([IGNORED, *labels], zip(ids, labels, strict=True), strict=False):
        assert label in (token, IGNORED)
        if label != IGNORED:
            if previous == IGNORED:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
@pytest.mark.parametrize("eos", ["<|end|>", "<|eos|>"])
def test_answers_and_their_ends_are_learned_and_nothing_else(
    config_with_chats: Any, template: str, eos: str
) -> None:
    config = config_with_chats(template, eos_token=eos)
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    conversation = [
        {"role": "system", "content": "be"},
        *chat("def f", "return", "class whale", "import of the"),
    ]
    ids, labels = render_chat(conversation, tokenizer)
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    if eos == "<|end|>":
        assert tokenizer.decode(ids) == text
        assert learned(ids, labels, tokenizer) == ["return<|end|>", "import of the<|end|>"]
    else:
        assert tokenizer.decode(ids) == f"{text}<|eos|>"
        end = "" if template == MARKED else "<|end|>"
        first, *rest = learned(ids, labels, tokenizer)
        assert first == f"return{end}"
        assert "".join(rest) == f"import of the{end}<|eos|>"


def test_the_default_template_learns_answers_as_they_will_be_generated(config_with_chats: Any) -> None:
    config = config_with_chats(CONTINUATION_TEMPLATE)
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    # Glued to its question, "rt" would be tokenized with it.
    conversation = chat("impo", "rt self", "wha", "le")
    ids, labels = render_chat(conversation, tokenizer)
    assert tokenizer.decode(ids) == "<|bos|>import self\n\nwhale<|eos|>"
    assert learned(ids, labels, tokenizer) == ["rt self", "le<|eos|>"]
    prompt = tokenizer.apply_chat_template(conversation[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)] == prompt


def test_chats_keep_together_and_rows_that_teach_nothing_are_left_out(config_with_chats: Any) -> None:
    config = config_with_chats(CHATML, eos_token="<|end|>")
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    short = chat("of", "the")
    size = len(render_chat(short, tokenizer)[0])
    length = 2 * size + 3
    blocks = pack([Chat(short)] * 5, tokenizer, length)
    assert blocks.input_ids.shape == (3, length)
    assert blocks.num_tokens == 5 * size
    for row, count in zip(blocks.input_ids.tolist(), (2, 2, 1), strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == "ofthe" * count
        assert row[count * size :] == [tokenizer.pad_token_id] * (length - count * size)
    # The question alone fills two rows and more.
    long = chat("captain " * length, "wind")
    whole = pack([Chat(long)], tokenizer, length)
    assert len(whole) == 1
    assert learned(whole.input_ids[0].tolist(), whole.labels[0].tolist(), tokenizer) == ["wind<|end|>"]
    # The second row would hold one token, which nothing predicts: alone in a batch, its loss would be 0 / 0.
    size = pack(["sailor"], tokenizer, length).num_tokens
    assert len(pack(["sailor"], tokenizer, size - 1)) == 1


def test_shards_carry_chats_and_experts_learn_their_answers(config_with_chats: Any) -> None:
    config = config_with_chats(CHATML, eos_token="<|end|>")
    examples = [e for split in ("train", "held_out") for e in read_examples(config.run.shard("code", split))]
    assert sum(isinstance(e, Chat) for e in examples) == 10
    assert {str(e.messages) for e in examples if isinstance(e, Chat)} == {str(c) for c in chats(CODE, 0)}
    assert all(isinstance(text, str) for text in read_texts(config.run.shard("code", "train")))
    assert all(isinstance(e, str) for e in read_examples(config.run.shard("prose", "train")))

    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    held_out = read_blocks(config.recipe("code"), ["code"], "held_out", tokenizer)
    report = train_expert(config, "code", expert_stage(config, "code"))
    assert report.held_out_loss < mean_loss(build_model(config.recipe("code"), tokenizer), held_out, 2)


def test_the_loss_is_that_of_the_answers(config_with_chats: Any) -> None:
    config = config_with_chats(CHATML, eos_token="<|end|>")
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    blocks = pack([Chat(chat("def f", "return self"))], tokenizer, 64)
    model = build_model(config.recipe("code"), tokenizer).eval()
    row = blocks.input_ids[0]
    prompt = len(tokenizer("<|user|>def f<|end|><|assistant|>", add_special_tokens=False)["input_ids"])
    answer = len(tokenizer("return self<|end|>", add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        log_probs = model(input_ids=row[None]).logits[0].float().log_softmax(-1)
    wanted = -sum(log_probs[t - 1, row[t]] for t in range(prompt, prompt + answer)) / answer
    assert blocks.num_targets == answer
    assert mean_loss(model, blocks, 1) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (FORGETFUL, chat("a", "b", "c", "d"), r"begins with 'a' .*message 2 differently.*{% generation %}"),
        (
            STRICT,
            [{"role": "system", "content": "s"}, *chat("a", "b")],
            r"begins with 's' \(no system messages\)",
        ),
    ],
    ids=["forgetful", "strict"],
)
def test_templates_that_cannot_be_used_are_named(
    config_with_chats: Any, template: str, conversation: list[dict[str, str]], message: str
) -> None:
    tokenizer = load_tokenizer(config_with_chats(CHATML).work_dir / "tokenizer")
    tokenizer.chat_template = template
    with pytest.raises(TrainingError, match=message) as caught:
        pack([Chat(conversation)], tokenizer, 64)
    assert "\n" not in str(caught.value)


def test_chats_are_read_from_jsonl_and_parquet(tmp_path: Path) -> None:
    conversation = chat("of the whale", "captain")
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": conversation})
        + "\n"
        + json.dumps({"text": "plain", "messages": conversation})
        + "\n"
    )
    columns = {"turns": [[{**conversation[0], "name": None}, {**conversation[1], "name": "me"}]]}
    Dataset.from_dict(columns).to_parquet(str(tmp_path / "b.parquet"))

    def read(file: str, text_field: str) -> list[Any]:
        data = DataConfig(files=[str(tmp_path / file)], text_field=text_field)
        return [
            (document.text, document.messages)
            for document in read_documents(data, DocumentConfig(min_chars=1, max_chars=5), 0)
        ]

    said = "of the whale\n\ncaptain"
    # `text` wins where a row has both; naming `messages` as the field takes the chats.
    assert read("a.jsonl", "text") == [(said, conversation), ("plain", None)]
    assert read("a.jsonl", "messages") == [(said, conversation)] * 2
    assert read("b.parquet", "turns") == [(said, [conversation[0], {**conversation[1], "name": "me"}])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "a chat needs an assistant's message after another's; its roles are"),
        ({"messages": [{"role": "user", "content": "a"}]}, "a chat needs an assistant's message"),
        ({"messages": [*chat("a", "b")[::-1]]}, r"its roles are \['assistant', 'user'\]"),
        ({"messages": [{"role": "user"}]}, "line 1: field 'messages': message 1 needs a role and a content"),
        ({"messages": ["a"]}, "message 1 needs a role and a content, both strings"),
        ({"messages": {"role": "user"}}, "field 'messages' is not a string"),
        ({"massages": []}, "no field 'text'"),
    ],
)
def test_rows_that_are_no_chat_are_named(tmp_path: Path, row: Any, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=message):
        list(read_documents(DataConfig(files=[str(file)]), DocumentConfig(), 0))


def test_a_shard_that_teaches_nothing_is_refused(
    config_with_chats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_chats(CHATML)
    tokenizer = load_tokenizer(config.work_dir / "tokenizer")
    monkeypatch.setattr(expert, "read_examples", lambda *_: [Chat([{"role": "user", "content": "a"}])])
    with pytest.raises(TrainingError, match="the held_out documents of code hold no token to predict"):
        read_blocks(config.recipe("code"), ["code"], "held_out", tokenizer)


def test_chats_need_a_template_before_anything_is_trained(config_with_chats: Any, tmp_path: Path) -> None:
    config = config_with_chats(CHATML)
    tokenizer = load_tokenizer(config.run.tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    bare = config.tokenizer.model_copy(update={"path": tmp_path / "base", "chat_template": None})
    with pytest.raises(
        TrainingError, match=r"chats, and .*base has no chat template .*; set tokenizer\.chat_template$"
    ):
        make_tokenizer(config.run, bare, tokenizer_stage(config.run, bare))
    given = bare.model_copy(update={"chat_template": CHATML})
    make_tokenizer(config.run, given, tokenizer_stage(config.run, given))
    assert load_tokenizer(config.run.tokenizer).chat_template == CHATML


def test_texts_need_no_template(write_config: WriteConfig, tmp_path: Path) -> None:
    config = load_config(write_config())
    make_partition(config, partition_stage(config))
    make_tokenizer(config.run, config.tokenizer, tokenizer_stage(config.run, config.tokenizer))
    tokenizer = load_tokenizer(config.run.tokenizer)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    bare = config.tokenizer.model_copy(update={"path": tmp_path / "base"})
    make_tokenizer(config.run, bare, tokenizer_stage(config.run, bare))
    assert load_tokenizer(config.run.tokenizer).chat_template is None
