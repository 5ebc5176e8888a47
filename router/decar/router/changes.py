"""What a new reading of an ensemble directory changes, and what of it a running server cannot follow.

Knows files, never engines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decar.router.errors import EnsembleError
from decar.router.files import router_folder
from decar.router.manifest import Ensemble, ExpertCheckpoint, image_tokens

Files = frozenset[tuple[str, int, int, int]]
"""Of a folder: each file's name in it, size in bytes, time of its last change in ns, and inode."""

_SPOKEN_BY = (
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "add_bos_token",
    "add_eos_token",
    "chat_template",
)
"""What of ``tokenizer_config.json`` is the server's: it turns prompts into tokens for all experts."""
_NOTES = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class Reading:
    """An ensemble as it was read, and what its files were like then.

    Attributes:
        experts: the files of each expert, in manifest order.
        router: those of the trained routers.
        fixed: by what it is, whatever has to stay while the ensemble is served.
    """

    ensemble: Ensemble
    experts: tuple[Files, ...]
    router: Files
    fixed: dict[str, Any]

    @classmethod
    def of(cls, directory: Path) -> Reading:
        """
        Raises:
            EnsembleError: ``directory`` cannot be served; the first problem found.
        """
        ensemble = Ensemble.load(directory)
        return cls(
            ensemble,
            tuple(files_in(expert.path) for expert in ensemble.experts),
            files_in(router_folder(directory)),
            _fixed(ensemble),
        )

    def of_experts(self, chosen: Sequence[tuple[Reading, int]]) -> Reading:
        """This one, with the experts that other readings of its directory have at these indices."""
        return replace(
            self,
            ensemble=self.ensemble.of_experts([(reading.ensemble, index) for reading, index in chosen]),
            experts=tuple(reading.experts[index] for reading, index in chosen),
        )


@dataclass(frozen=True)
class Changes:
    """What is other in a new reading.

    Attributes:
        places: of each expert now, the index of the one before that it is, or takes the place of; None: of none.
        experts: indices of those whose files, or engine's options, are others than those of their place before, or
            which are added.
        removed: indices, before, of those whose place nobody has.
        rest: what else, in words.
    """

    places: tuple[int | None, ...]
    experts: tuple[int, ...]
    removed: tuple[int, ...]
    rest: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.experts or self.removed or self.rest)


def changes(served: Reading, read: Reading) -> Changes:
    """What has changed since ``served`` in ``read``. An expert of a new name takes the place of one that is gone.

    Raises:
        EnsembleError: it cannot change while the ensemble is served.
    """
    old, new = served.ensemble, read.ensemble
    for what, value in read.fixed.items():
        if value != served.fixed[what]:
            raise EnsembleError(f"{what} cannot change while the ensemble is served: start the server anew")
    places, removed = _places(old.expert_names, new.expert_names)
    experts, rest = [], []
    for k, (after, files, place) in enumerate(zip(new.experts, read.experts, places, strict=True)):
        if place is None:
            experts.append(k)
            continue
        before = old.experts[place]
        if files != served.experts[place] or before.options != after.options:
            experts.append(k)
        if before.prior != after.prior:
            rest.append(f"the prior of {after.name!r}")
        if k not in experts:
            if before.name != after.name:
                rest.append(f"the name of {before.name!r}, now {after.name!r}")
            if before.path != after.path:
                rest.append(f"the path of {after.name!r}")
    kept = [place for place in places if place is not None]
    if kept != sorted(kept):
        rest.append("the order of experts")
    rest += [f"router.{name}" for name in _differing(old.manifest.router, new.manifest.router)]
    if old.manifest.flow is not None and new.manifest.flow is not None:
        rest += [f"flow.{name}" for name in _differing(old.manifest.flow, new.manifest.flow)]
    rest += [f"mixing.{name}" for name in _differing(old.manifest.mixing, new.manifest.mixing)]
    if served.router != read.router:
        rest.append("the trained routers")
    return Changes(tuple(places), tuple(experts), tuple(removed), tuple(rest))


def _places(served: list[str], read: list[str]) -> tuple[list[int | None], list[int]]:
    """(`Changes.places`, `Changes.removed`) by the experts' names."""
    gone = [k for k, name in enumerate(served) if name not in read]
    places: list[int | None] = []
    for name in read:
        places.append(served.index(name) if name in served else gone.pop(0) if gone else None)
    return places, gone


def files_in(folder: Path) -> Files:
    """What there is in ``folder`` and below; nothing where there is no such folder."""
    found = []
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            try:
                status = path.stat()
            except FileNotFoundError:  # a link to nothing, or gone meanwhile
                continue
            found.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns, status.st_ino))
    return frozenset(found)


def _differing(one: Any, other: Any) -> list[str]:
    return [name for name in type(one).model_fields if getattr(one, name) != getattr(other, name)]


def _fixed(ensemble: Ensemble) -> dict[str, Any]:
    """The plane has the vocabulary's shape, and the gateway turns prompts into tokens with the first expert's files."""
    first, flow = ensemble.experts[0], ensemble.manifest.flow
    return {
        "the ensemble's name": ensemble.name,
        "the ensemble's kind, or its mask token": (ensemble.manifest.kind, flow and flow.mask_token_id),
        "the number of token ids that all experts have": ensemble.vocab_size,
        "the tokenizer": first.tokenizer_fingerprint,
        "the special tokens or the chat template": _spoken_by(first.path),
        "what ends an answer, or how tokens are sampled (generation_config.json)": _generation(first),
        "how images become tokens": image_tokens(first),
    }


def _spoken_by(folder: Path) -> list[Any]:
    config = _json(folder / "tokenizer_config.json")
    template = folder / "chat_template.jinja"
    return [
        {name: config.get(name) for name in _SPOKEN_BY},
        _json(folder / "special_tokens_map.json"),
        template.read_text() if template.is_file() else None,
    ]


def _generation(expert: ExpertCheckpoint) -> list[Any]:
    said = _json(expert.path / "generation_config.json")
    return [expert.config.get("eos_token_id"), {name: said[name] for name in said if name not in _NOTES}]


def _json(file: Path) -> dict[str, Any]:
    """
    Raises:
        EnsembleError: there is such a file, and it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise EnsembleError(f"{file} cannot be read ({error})") from None
    return found
