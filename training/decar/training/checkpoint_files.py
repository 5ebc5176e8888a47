"""Whether the files of a checkpoint are whole. Knows safetensors' header and git-lfs' pointers, nothing of models."""

from __future__ import annotations

from pathlib import Path

from decar.router.errors import TrainingError

INDEX_NAME = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"
_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt")


def check_files(directory: Path, setting: str) -> None:
    """Refuse a checkpoint, model or tokenizer in ``directory`` that was downloaded or copied in part.

    Args:
        setting: what names the directory, for errors.

    Raises:
        TrainingError: a file is a git-lfs pointer, or a safetensors file is truncated or damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted({file for pattern in _PATTERNS for file in directory.glob(pattern) if file.is_file()}):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise TrainingError(
                    f"{setting}: {file} is a git-lfs pointer, not the file itself; run `git lfs pull` in {directory}"
                )
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt"):
                    pass
            except SafetensorError as error:
                raise TrainingError(
                    f"{setting}: {file} is truncated or damaged ({error}); copy or download it again"
                ) from None
