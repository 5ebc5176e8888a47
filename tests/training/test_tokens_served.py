"""Experts learn the tokens that a server makes of the same texts and chats, for every kind of tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from decar.training.data.blocks import IGNORED, pack, render_chat
from decar.training.data.sources import Chat, Piece
from tests.training.tokenizers_of_kinds import KINDS, WORDS

TEXTS = [
    "What is two?",
    " the whale",
    "\n\ndef add(a, b):\n    return",
    "語 🐳",
    "Five",
    "a\u0301 ü  two  spaces ",
]
SAID = ["What is two plus three?", "Five.", "Why? 語 🐳", "Because the whale\n said so."]
CHATS = {
    "one answer": [("user", SAID[0]), ("assistant", SAID[1])],
    "two answers": [("user", SAID[0]), ("assistant", SAID[1]), ("user", SAID[2]), ("assistant", SAID[3])],
    "no answer at the end": [("user", SAID[0]), ("assistant", SAID[1]), ("user", SAID[2])],
}
WITH_SYSTEM = {"a system message": [("system", "You are kind."), *CHATS["two answers"]]}
SYSTEMS = ("llama-2", "llama-2, first", "zephyr", "qwen")
CASES = [(kind, name) for kind in KINDS for name in CHATS] + [(kind, *WITH_SYSTEM) for kind in SYSTEMS]


@cache
def tokenizer_of(kind: str) -> Any:
    return KINDS[kind]()


def messages_of(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": said} for role, said in (CHATS | WITH_SYSTEM)[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_as_the_server_tokenizes_them(kind: str) -> None:
    """`/tokenize` adds what the tokenizer adds. Behind it stands one eos, and nothing else."""
    tokenizer = tokenizer_of(kind)
    for text in [*TEXTS, WORDS]:
        blocks = pack([text], tokenizer, 512)
        served = tokenizer(text)["input_ids"]
        eos = [tokenizer.eos_token_id] * (served[-1] != tokenizer.eos_token_id)
        ids = blocks.input_ids[0, : blocks.num_tokens].tolist()
        assert ids == served + eos
        assert blocks.labels[0, : blocks.num_tokens].tolist() == [IGNORED, *ids[1:]]
        assert ids.count(tokenizer.eos_token_id) == 1
        bos = tokenizer.bos_token_id
        assert (ids[0] == bos) == (kind not in ("qwen", "gpt-2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_pieces_is_the_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    parts = ["What is two", " plus three? Five", ".\n\nYou are", "\tkind. 語", " 🐳 three"]
    pieces = [Piece(text, 0, i, i == len(parts) - 1) for i, text in enumerate(parts)]
    whole, joined = pack(["".join(parts)], tokenizer, 128), pack(pieces, tokenizer, 128)
    assert joined.input_ids.equal(whole.input_ids)
    # Apart, no piece gets a space that the text has not.
    for piece in pieces[1:]:
        blocks = pack([piece], tokenizer, 128)
        ids = blocks.input_ids[0, : blocks.num_tokens].tolist()
        anchor = tokenizer("two", add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token if piece.is_last else ""
        assert tokenizer.decode([*anchor, *ids]) == f"two{piece.text}{end}"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_chats_are_as_the_server_renders_them(kind: str, name: str) -> None:
    tokenizer, messages = tokenizer_of(kind), messages_of(name)
    ids, labels = render_chat(messages, tokenizer)
    served = tokenizer.apply_chat_template(messages)["input_ids"]
    is_answered = messages[-1]["role"] == "assistant"
    # Of these templates, Gemma's alone ends no answer with eos.
    assert ids == served + [tokenizer.eos_token_id] * (is_answered and kind == "gemma")
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)["input_ids"]
        after = tokenizer.apply_chat_template(messages[: i + 1])["input_ids"]
        assert ids[: len(after)] == after
        assert after[: len(prompt)] == prompt
        answer = after[len(prompt) :]
        is_last = i == len(messages) - 1
        marker = (
            tokenizer.convert_tokens_to_ids("<end_of_turn>") if kind == "gemma" else tokenizer.eos_token_id
        )
        end = len(prompt) + answer.index(marker) + 1
        if kind == "gemma" and is_last:
            end = len(ids)
        assert labels[len(prompt) : end] == ids[len(prompt) : end]
        assert answer.count(marker) == 1
        following = next((j for j in range(i + 1, len(messages)) if messages[j]["role"] == "assistant"), None)
        stop = len(ids)
        if following is not None:
            to_next = tokenizer.apply_chat_template(messages[:following], add_generation_prompt=True)
            stop = len(to_next["input_ids"])
        assert labels[end:stop] == [IGNORED] * (stop - end)
        # What is learned begins with what the template writes there: no stray space.
        content, text = message["content"], tokenizer.decode([*prompt, *answer])
        assert text[len(tokenizer.decode(prompt)) :].removeprefix(" ").startswith(content)
    first = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert labels[0] == IGNORED
    assert len(first) < len(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_token_reaches_across_the_start_of_an_answer_it_is_cut_there(kind: str) -> None:
    """As in generation, where the prompt is tokenized alone, and without a space that nobody wrote."""
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "What is the wha"}, {"role": "assistant", "content": "le? Five"}]
    ids, labels = render_chat(messages, tokenizer)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.apply_chat_template(messages)["input_ids"])
    assert ids[-1] == tokenizer.eos_token_id
    assert labels.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_packed_chats_are_the_same_tokens(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    chats = [Chat(messages_of(name)) for name in CHATS]
    blocks = pack(chats, tokenizer, 256)
    wanted = [token for chat in chats for token in render_chat(chat.messages, tokenizer)[0]]
    assert blocks.input_ids.flatten()[: blocks.num_tokens].tolist() == wanted
