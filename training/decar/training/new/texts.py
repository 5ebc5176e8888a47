"""Texts from the files that `decar new` is given. Knows kinds of files, never experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from decar.router.errors import EnsembleError, TrainingError
from decar.training.config import DataConfig, DocumentConfig
from decar.training.data.files import KINDS, is_text, one_line
from decar.training.data.sources import BadLines, NoDocuments, read_documents

# Of decar-train's configuration, which nobody has here: in brackets, as another way out, or as the way out.
_SETTING = re.compile(
    r" \((?:data|partition)\.[^)]*\)"
    r"|(?:, or|;) (?:(?!, or )[^;])*\bdata\.(?:columns|text_field|image_field|image_dir)\b[^;]*"
)


class _BadLines(BadLines):
    def found(self, source: Path | str, where: str, problem: str, name: str | None = None) -> None:
        raise EnsembleError(f"{source}, {where}: {_SETTING.sub('', one_line(problem))}; mend it")


def sample_texts(option: str, file: Path, size: int, piece_chars: int, cut_rows: bool) -> list[str]:
    """At most ``size`` texts of ``file``, drawn evenly, in the order of the file. The same call draws the same.

    Args:
        option: that names the file, for errors.
        piece_chars: what files that are one text are cut to, at line ends where possible.
        cut_rows: whether rows of tables that are texts are cut as well.

    Raises:
        EnsembleError: the file is missing, cannot be read, or holds no text; naming the line where there is one.
    """
    if not file.is_file():
        raise EnsembleError(f"{option}: {file} is no file; give one of {KINDS}")
    max_chars = piece_chars if cut_rows or is_text(file) else None
    try:
        return _drawn(_texts(file, max_chars), size)
    except NoDocuments:
        raise EnsembleError(f"{option}: {file} holds no text; give one that does") from None
    except TrainingError as error:
        raise EnsembleError(f"{option}: {_SETTING.sub('', str(error))}") from None


def _texts(file: Path, max_chars: int | None) -> Iterator[str]:
    data = DataConfig(files=[str(file)])
    cutting = DocumentConfig(max_chars=max_chars, min_chars=1)
    for document in read_documents(data, cutting, seed=0, bad=_BadLines(skip=False)):
        yield document.text


def _drawn(texts: Iterator[str], size: int) -> list[str]:
    """Vitter's algorithm R ("Random sampling with a reservoir", 1985): memory holds the sample alone."""
    rng = np.random.default_rng(0)
    sample: dict[int, tuple[int, str]] = {}
    for number, text in enumerate(texts):
        place = number if number < size else int(rng.integers(number + 1))
        if place < size:
            sample[place] = number, text
    return [text for _, text in sorted(sample.values())]
