"""Whether checkpoints fit together: what would make a mixture of them wrong, and what only makes it narrower.

Knows settings and tokenizers, never weights. The server reads prompts and ends answers by the first expert's files, so
the others are compared with the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from decar.router.errors import EnsembleError
from decar.router.manifest import ExpertCheckpoint, image_problems, tokenizer_fingerprint
from decar.training.new.checkpoints import Checkpoint

PROBES = (
    "def main(args):\n    return {key: value[0] for key, value in args.items()}\n\n\n",
    "It was the best of times, it was the worst of times; 1,859 pages, and 3.14159!",
    "\tTabs,  two spaces   and three.\r\nNaïve café, Łódź, Ελλάδα, 東京, 한국어, עברית, 🙂🙃\u200d",
    "https://example.org/a_b-c?d=e&f=%20 <|endoftext|> </s> [INST] don't I'LL",
)
"""Texts on which tokenizers tend to differ."""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_NO_SAMPLING = (
    *("_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"),
    "use_cache",
)


@dataclass(frozen=True)
class Fit:
    """What differs, a line for each: ``errors``, with which the mixture would be wrong; and ``warnings``."""

    errors: list[str]
    warnings: list[str]


def compare(checkpoints: Sequence[Checkpoint]) -> Fit:
    """
    Raises:
        EnsembleError: a file that says how checkpoints fit cannot be read.
    """
    experts = [ExpertCheckpoint(c.name, c.folder, 1.0, c.config) for c in checkpoints]
    errors = _tokenizer_errors(checkpoints) or image_problems(experts)
    warnings = [
        line
        for found in (
            _same_twice(checkpoints),
            _positions(experts),
            _rows(experts),
            _chat_templates(checkpoints),
            _special_tokens(checkpoints),
            _beginnings(checkpoints),
            _ends(checkpoints),
            _sampling(checkpoints),
            _number_formats(checkpoints),
            _own_code(checkpoints),
        )
        for line in found
    ]
    return Fit(errors, warnings)


# ---------------------------------------------------------------------------------------------- tokenizers


def _tokenizer_errors(checkpoints: Sequence[Checkpoint]) -> list[str]:
    errors, readable = [], []
    for checkpoint in checkpoints:
        try:
            readable.append((checkpoint, tokenizer_fingerprint(checkpoint.folder)))
        except EnsembleError as error:
            errors.append(f"expert {checkpoint.name!r}: {error}")
    if errors:
        return errors
    (first, wanted), *others = readable
    for other, fingerprint in others:
        differs = _token_differences(first, other) if fingerprint != wanted else _other_ids(first, other)
        if differs:
            errors.append(
                f"experts {first.name!r} and {other.name!r} have different tokenizers: {differs}; an ensemble mixes "
                "probabilities of tokens, so give models that were tuned from one base model"
            )
    return errors


def _token_differences(first: Checkpoint, other: Checkpoint) -> str:
    """In words, the worst difference of two tokenizers, and an example."""
    one, two = first.read_json("tokenizer.json"), other.read_json("tokenizer.json")
    ids, other_ids = _ids(one), _ids(two)
    moved = [token for token in ids if token in other_ids and ids[token] != other_ids[token]]
    if moved:
        token = moved[0]
        return (
            f"{len(moved):,} tokens have other ids, e.g. {token!r} is {ids[token]} in {first.name!r} and "
            f"{other_ids[token]} in {other.name!r}"
        )
    merges_differ = one["model"].get("merges") != two["model"].get("merges")
    for mine, theirs, data, whose, blind in (
        (ids, other_ids, one, first, other),
        (other_ids, ids, two, other, first),
    ):
        extra = [token for token in mine if token not in theirs]
        if extra:
            added = {token["content"] for token in data.get("added_tokens") or []}
            # With other merges, the rest of a text has other ids as well, and no file that is copied mends that.
            mendable = not merges_differ and added.issuperset(extra)
            hint = f" (if {blind.name!r} has rows for them, copy the tokenizer files of {whose.name!r} to it)"
            return f"{whose.name!r} alone knows {len(extra):,} tokens, e.g. {extra[0]!r}{hint if mendable else ''}"
    settings = [key for key in ("normalizer", "pre_tokenizer") if one.get(key) != two.get(key)]
    if merges_differ:
        settings.append("merges")
    return f"they cut texts in other places ({', '.join(settings) or 'added tokens'} of tokenizer.json)"


def _other_ids(first: Checkpoint, other: Checkpoint) -> str:
    """In words, a text that two tokenizers of the same tokens give other ids to."""
    one, two = _encoder(first), _encoder(other)
    for text in PROBES:
        if one(text) != two(text):
            where = next((i for i, (a, b) in enumerate(zip(one(text), two(text), strict=False)) if a != b), 0)
            return f"the same tokens, but {text[:24]!r}… gives other ids from token {where + 1} on"
    return ""


def _encoder(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    file = checkpoint.folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise EnsembleError(
            f"expert {checkpoint.name!r}: {file} cannot be read ({error}); copy or save the tokenizer again"
        ) from None
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = tokenizer["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    return dict(pairs) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


# ---------------------------------------------------------------------------------------------- narrower


def _same_twice(checkpoints: Sequence[Checkpoint]) -> list[str]:
    found: dict[str, str] = {}
    lines = []
    for checkpoint in checkpoints:
        before = found.setdefault(str(checkpoint.folder.resolve()), checkpoint.name)
        if before != checkpoint.name:
            lines.append(
                f"{before!r} and {checkpoint.name!r} are the same checkpoint, which costs twice what one costs and "
                "adds nothing; leave one out"
            )
    return lines


def _positions(experts: Sequence[ExpertCheckpoint]) -> list[str]:
    known = {expert.name: expert.max_positions for expert in experts if expert.max_positions}
    shortest = min(known, key=lambda name: known[name] or 0, default=None)
    longer = [f"{name} {n:,}" for name, n in known.items() if n and n > (known[shortest or name] or 0)]
    if not longer:
        return []
    return [
        f"texts have at most {known[shortest or '']:,} tokens, as {shortest!r} has no more positions (max_position_"
        f"embeddings; {', '.join(longer)}); for longer ones, give a {shortest!r} of longer context"
    ]


def _rows(experts: Sequence[ExpertCheckpoint]) -> list[str]:
    rows = {expert.name: expert.vocab_size for expert in experts}
    if len(set(rows.values())) == 1:
        return []
    listed = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    return [
        f"output layers have different sizes ({listed}): token ids from {min(rows.values()):,} on, which not all have, "
        "are never said; where they are padding, nothing is to be done"
    ]


def _chat_templates(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first = checkpoints[0]
    templates = {checkpoint.name: _chat_template(checkpoint) for checkpoint in checkpoints}
    owners = [name for name, template in templates.items() if template]
    if not owners:
        return [
            "no expert has a chat template, so only completions are served; for chats, give `decar serve` "
            "--chat-template FILE"
        ]
    if not templates[first.name]:
        return [
            f"{first.name!r}, whose chat template serves all, has none; for chats, name {owners[0]!r} first, or give "
            "`decar serve` --chat-template FILE"
        ]
    lines = []
    bare = [name for name, template in templates.items() if not template]
    if bare:
        lines.append(
            f"{_listed(bare)} without a chat template will read chats in that of {first.name!r}, which they may not "
            "have learned; prefer experts tuned on chats, or ask for completions"
        )
    others = [name for name, text in templates.items() if text and text != templates[first.name]]
    if others:
        lines.append(
            f"chats are written with the template of {first.name!r}, and {_listed(others)} learned another; name first "
            "whose format is to be used, or give `decar serve` --chat-template FILE"
        )
    return lines


def _special_tokens(checkpoints: Sequence[Checkpoint]) -> list[str]:
    lines = []
    for kind in _SPECIAL_TOKENS[:2]:
        tokens = {checkpoint.name: _special_token(checkpoint, kind) for checkpoint in checkpoints}
        others = _unlike_the_first(tokens)
        if others:
            first = checkpoints[0].name
            listed = ", ".join(f"{name} {tokens[name]!r}" for name in others)
            lines.append(
                f"the {kind} of {first!r} is {tokens[first]!r} and serves all ({listed}); name first whose tokenizer "
                "settings are to be used"
            )
    return lines


def _beginnings(checkpoints: Sequence[Checkpoint]) -> list[str]:
    settings = {}
    for checkpoint in checkpoints:
        config, tokenizer = (
            checkpoint.read_json("tokenizer_config.json"),
            checkpoint.read_json("tokenizer.json"),
        )
        flags = [config.get(flag) for flag in ("add_bos_token", "add_eos_token")]
        settings[checkpoint.name] = json.dumps([tokenizer.get("post_processor"), *flags], sort_keys=True)
    others = _unlike_the_first(settings)
    if not others:
        return []
    return [
        f"what is put around a text (bos, eos) is as {checkpoints[0].name!r} has it, and {_listed(others)} learned it "
        "otherwise (post_processor, add_bos_token, add_eos_token); name first whose way is to be used"
    ]


def _ends(checkpoints: Sequence[Checkpoint]) -> list[str]:
    ends = {checkpoint.name: _end_ids(checkpoint) for checkpoint in checkpoints}
    first = checkpoints[0].name
    others = _unlike_the_first(ends)
    if not others:
        return []
    union = sorted({token for ids in ends.values() for token in ids})
    listed = ", ".join(f"{name} with {ends[name]}" for name in others)
    return [
        f"answers end with token ids {ends[first]}, those of {first!r}, and {listed}; so that each can end them, write "
        f'"eos_token_id": {union} to generation_config.json of {first!r}'
    ]


def _sampling(checkpoints: Sequence[Checkpoint]) -> list[str]:
    defaults = {}
    for checkpoint in checkpoints:
        said = checkpoint.read_json("generation_config.json")
        defaults[checkpoint.name] = {key: said[key] for key in sorted(said) if key not in _NO_SAMPLING}
    others = _unlike_the_first(defaults)
    if not others:
        return []
    first = checkpoints[0].name
    return [
        f"requests that set no temperature, top_p, … get those of {first!r} ({json.dumps(defaults[first])}), and "
        f"{_listed(others)} would have others (generation_config.json); edit that of {first!r}, or set them in requests"
    ]


def _number_formats(checkpoints: Sequence[Checkpoint]) -> list[str]:
    formats = {
        checkpoint.name: checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        for checkpoint in checkpoints
    }
    if len({str(value) for value in formats.values() if value}) < 2:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in formats.items())
    return [
        f"weights have different number formats ({listed}), so probabilities are exchanged as float32 on a GPU, twice "
        "the bytes; `decar serve --dtype bfloat16` gives all the same"
    ]


def _own_code(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [
        f"{checkpoint.name!r} names Python code of its own (auto_map), which is not copied and never run; it is served "
        "if vLLM knows the architecture by itself"
        for checkpoint in checkpoints
        if checkpoint.config.get("auto_map")
    ]


# ---------------------------------------------------------------------------------------------- reading


def _chat_template(checkpoint: Checkpoint) -> Any:
    file = checkpoint.folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return checkpoint.read_json("tokenizer_config.json").get("chat_template") or checkpoint.read_json(
        "chat_template.json"
    ).get("chat_template")


def _special_token(checkpoint: Checkpoint, kind: str) -> str | None:
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        token = checkpoint.read_json(file).get(kind)
        if token:
            return str(token.get("content") if isinstance(token, dict) else token)
    return None


def _end_ids(checkpoint: Checkpoint) -> list[int]:
    text = checkpoint.config.get("text_config")
    for settings in (checkpoint.read_json("generation_config.json"), checkpoint.config, text):
        ids = settings.get("eos_token_id") if isinstance(settings, dict) else None
        found = [token for token in (ids if isinstance(ids, list) else [ids]) if isinstance(token, int)]
        if found:
            return sorted(found)
    return []


def _unlike_the_first(values: dict[str, Any]) -> list[str]:
    first, *_ = values.values()
    return [name for name, value in values.items() if value != first]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
