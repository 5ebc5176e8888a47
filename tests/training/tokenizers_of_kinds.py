"""Small tokenizers of the kinds that models come with, trained on a few words, with chat templates in their styles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = (
    "What is two plus three? Five. Why? Because the whale said so.\nYou are kind. def add(a, b):\n    return a + b\n"
    "Name the capital of France, please. The capital is Paris. 語 🐳 {'a': 1} user assistant system model INST\n"
)

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
    "{% for message in rest %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BLENDERBOT = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def _wrapped(tokenizer: Tokenizer, template: str, **tokens: str) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **tokens
    )


def _sentencepiece(prefix: str, special: list[str]) -> Tokenizer:
    """BPE with ▁ for spaces and bytes for what it does not know; ``prefix``: how a ▁ comes to be in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "normalizer":  # legacy: after every special token as well
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif prefix == "none":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix != "none" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    alphabet = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=alphabet, show_progress=False)
    tokenizer.train_from_iterator([line for line in WORDS.splitlines() if line] * 3, trainer)
    # Bytes are no special tokens: rebuilt with those alone.
    fresh = Tokenizer.from_str(tokenizer.to_str())
    model = models.BPE(
        vocab=fresh.get_vocab(),
        merges=_merges(fresh),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    plain = Tokenizer(model)
    if tokenizer.normalizer is not None:
        plain.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        plain.pre_tokenizer = tokenizer.pre_tokenizer
    plain.decoder = tokenizer.decoder
    plain.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return plain


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _byte_level(special: list[str], trim_offsets: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.add_special_tokens(special)
    return tokenizer


def _with_bos(tokenizer: Tokenizer, bos: str, eos: str | None = None) -> Tokenizer:
    ends = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos or ''}".strip(), special_tokens=ends
    )
    return tokenizer


_PIECES = ["<unk>", "<s>", "</s>"]
_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT = "<|endoftext|>"

KINDS: dict[str, Callable[[], Any]] = {
    "llama-2": lambda: _wrapped(_with_bos(_sentencepiece("normalizer", _PIECES), "<s>"), LLAMA_2, **_ENDS),
    "llama-2, first": lambda: _wrapped(_with_bos(_sentencepiece("first", _PIECES), "<s>"), LLAMA_2, **_ENDS),
    "mistral": lambda: _wrapped(_with_bos(_sentencepiece("always", _PIECES), "<s>"), MISTRAL, **_ENDS),
    "zephyr": lambda: _wrapped(_with_bos(_sentencepiece("normalizer", _PIECES), "<s>"), ZEPHYR, **_ENDS),
    "ends itself": lambda: _wrapped(
        _with_bos(_sentencepiece("first", _PIECES), "<s>", "</s>"), ZEPHYR, **_ENDS
    ),
    "qwen": lambda: _wrapped(
        _byte_level([_GPT, "<|im_start|>", "<|im_end|>"], False),
        CHATML,
        eos_token="<|im_end|>",
        pad_token=_GPT,
    ),
    "gpt-2": lambda: _wrapped(
        _byte_level([_GPT], True), BLENDERBOT, bos_token=_GPT, eos_token=_GPT, unk_token=_GPT
    ),
    "gemma": lambda: _wrapped(
        _with_bos(
            _sentencepiece("none", ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]),
            "<bos>",
        ),
        GEMMA,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<pad>",
    ),
}
