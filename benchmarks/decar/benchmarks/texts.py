"""Prompts of a given length, cut from real text. Knows files and a tokenizer, no servers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import AutoTokenizer


class BadPrompts(Exception):
    """A file has no prompts, or too few; the message names it and the fix."""


class Texts:
    """Prompts from several files, as many from each.

    A document longer than a prompt gives several, one after another; what is shorter gives none. No prompt comes
    again before all of its file have been used.

    Args:
        files: .jsonl or .parquet whose rows have ``text`` (or ``prompt``); any other is one plain text.
        tokenizer: a directory that has one.
        length: tokens of a prompt. The text of so many tokens is sent; its server may cut the odd one differently.

    Raises:
        BadPrompts: a file cannot be read, or is shorter than one prompt.
    """

    def __init__(self, files: Sequence[Path], tokenizer: Path, length: int):
        self._files = files
        self._used = 0  # of each file
        encoder = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        self._prompts: list[list[str]] = []
        for file in files:
            found = []
            for text in _documents(file):
                ids = encoder(text, add_special_tokens=False, verbose=False)["input_ids"]
                cuts = range(0, len(ids) - length + 1, length)
                found += [encoder.decode(ids[start : start + length]) for start in cuts]
            if not found:
                raise BadPrompts(
                    f"{file} has no text of {length} tokens: give more text, or lower --input-len"
                )
            random.Random(0).shuffle(found)
            self._prompts.append(found)

    def check(self, count: int) -> None:
        """Whether ``count`` prompts in a row are all different.

        Raises:
            BadPrompts: names the file that has too few.
        """
        needed = -(-count // len(self._files))
        for file, prompts in zip(self._files, self._prompts, strict=True):
            if len(prompts) < needed:
                raise BadPrompts(
                    f"{file} has {len(prompts)} prompts of this length and {needed} are needed: give more text, "
                    "or lower --input-len or the number of requests"
                )

    def pick(self, count: int) -> list[str]:
        """The next ``count`` prompts, those of the files by turns."""
        turns = range(self._used, self._used - (-count // len(self._files)))
        self._used = turns.stop
        return [prompts[turn % len(prompts)] for turn in turns for prompts in self._prompts][:count]

    def write(self, path: Path, count: int) -> Path:
        """Write what `pick` gives as vLLM's `custom` dataset reads it; return ``path``."""
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in self.pick(count)))
        return path


def _documents(file: Path) -> Iterator[str]:
    try:
        if file.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(file).to_pylist()
        elif file.suffix == ".jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
        else:
            rows = [{"text": file.read_text()}]
        for row in rows:
            yield row["text"] if "text" in row else row["prompt"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadPrompts(
            f"cannot read prompts from {file} ({error!r}): give rows with a text field"
        ) from None
