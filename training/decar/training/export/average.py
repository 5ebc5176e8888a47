"""Experts of one architecture averaged into one checkpoint: Branch-Train-Merge's parameter average.

Source: Li et al. 2022, arXiv 2208.03306, section 4. Knows safetensors files, never a model's code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from decar.router.errors import TrainingError
from decar.router.manifest import ExpertCheckpoint
from decar.training.checkpoint_files import INDEX_NAME

# What may differ in the configurations of models that compute the same function of their weights.
_NOT_ARCHITECTURE = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}


def average(experts: Sequence[ExpertCheckpoint], directory: Path) -> None:
    """Write weights and configuration of the mean of ``experts``, each with the same share, to ``directory``.

    Tensors are averaged in fp32 one by one, and kept in the first expert's files and number formats.

    Raises:
        TrainingError: the experts' configurations, or the names or shapes of their tensors, differ.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    check_configurations(experts)
    with open_weights(experts) as weights:
        for file in experts[0].weight_files:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
            means = {name: mean(name, weights) for name in names}
            save_file(means, directory / file.name, metadata={"format": "pt"})
    for name in ("config.json", INDEX_NAME):
        if (experts[0].path / name).exists():
            shutil.copyfile(experts[0].path / name, directory / name)


@contextmanager
def open_weights(experts: Sequence[ExpertCheckpoint]) -> Iterator[list[dict[str, Any]]]:
    """Of each expert, every tensor's name with the safetensors file that holds it, open to read it from.

    Raises:
        TrainingError: the names or shapes of the experts' tensors differ.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        tensors: dict[str, dict[str, Any]] = {}
        for expert in experts:
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in expert.weight_files]
            tensors[expert.name] = {name: file for file in files for name in list(file.keys())}
        _check_tensors(tensors)
        yield list(tensors.values())


def mean(name: str, weights: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The mean of the experts' tensors ``name``, computed in fp32; ``weights`` are as `open_weights` gives them.

    Raises:
        TrainingError: they are integers, and differ.
    """
    first, *others = (file_of[name].get_tensor(name) for file_of in weights)
    if not first.is_floating_point():
        if not all(torch.equal(first, other) for other in others):
            raise TrainingError(f"the experts cannot be averaged: the integers {name} differ")
        return first
    total = first.float()
    for other in others:
        total = total + other.float()
    return (total / len(weights)).to(first.dtype)


def check_configurations(experts: Sequence[ExpertCheckpoint]) -> None:
    """Refuse experts of different architectures.

    Raises:
        TrainingError: the first two that differ, and in what.
    """
    first, *others = experts
    for other in others:
        keys = sorted((first.config.keys() | other.config.keys()) - _NOT_ARCHITECTURE)
        differing = [
            f"{key} ({json.dumps(first.config.get(key))} and {json.dumps(other.config.get(key))})"
            for key in keys
            if first.config.get(key) != other.config.get(key)
        ]
        if differing:
            raise TrainingError(
                f"experts {first.name!r} and {other.name!r} cannot be averaged, they differ in "
                f"{', '.join(differing)}; an ensemble can mix them: export without --merge"
            )


def _check_tensors(tensors: dict[str, dict[str, Any]]) -> None:
    (first, wanted), *others = tensors.items()
    for other, found in others:
        alone = sorted(wanted.keys() ^ found.keys())
        if alone:
            holder = first if alone[0] in wanted else other
            raise TrainingError(
                f"experts {first!r} and {other!r} cannot be averaged: only {holder!r} has the weights {alone[0]}"
            )
        for name, file in wanted.items():
            shapes = [f.get_slice(name).get_shape() for f in (file, found[name])]
            if shapes[0] != shapes[1]:
                raise TrainingError(
                    f"experts {first!r} and {other!r} cannot be averaged: the weights {name} have the shapes "
                    f"{shapes[0]} and {shapes[1]}"
                )
