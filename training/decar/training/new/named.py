"""What `decar new` is given as ``NAME=VALUE``: checkpoints, priors, files. Knows words, never what they name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from decar.router.errors import EnsembleError, did_you_mean
from decar.router.manifest import MAX_EXPERTS, NAME_PATTERN

_EXAMPLE = "decar new demo code=./a prose=org/model"
_LONGEST_NAME = 64
_NAME_RULE = (
    f"a model id has letters, digits, '.', '_' and '-', begins with a letter or digit, "
    f"and is at most {_LONGEST_NAME} long"
)
# Commas separate values where a name follows, so that a path may have some.
_BETWEEN = re.compile(r",(?=[^,=/]*=)")
_ROUNDING = 0.005
"""By how much shares that were rounded may miss 1."""


def target_of(name: str) -> Path:
    """The directory that the ensemble ``name`` is to be in. Its last part is the model id; others say where.

    Raises:
        EnsembleError: that cannot be a model id.
    """
    if "=" in name:
        raise EnsembleError(f"{name!r} stands where the ensemble's name belongs; write {_EXAMPLE}")
    target = Path(name).expanduser()
    if target.name in ("", ".."):
        raise EnsembleError(f"{name!r} names no ensemble; {_NAME_RULE}: {_EXAMPLE}")
    _check_name(target.name, "the ensemble")
    return target


def checkpoints_of(
    words: Sequence[str], options: Mapping[str, Sequence[str]] | None = None
) -> dict[str, str]:
    """Where each expert comes from, in the order given.

    Args:
        options: what else is given by expert, as it was given: a word may have been meant for one of them.

    Raises:
        EnsembleError: a word that is no ``NAME=CHECKPOINT``, a name that cannot be a model id, one that comes twice,
            no expert or too many.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            hint = f"{Path(word).name or 'code'}={word}"
            raise EnsembleError(f"{word!r} has no name; write NAME=CHECKPOINT, e.g. {hint}")
        _check_name(name, f"the expert in {word!r}")
        if not value:
            raise EnsembleError(
                f"{word!r} names no checkpoint; write {name}=FOLDER or {name}=ORG/MODEL of the Hub"
            )
        if name in found:
            joined = next(
                (f"{option} {','.join(said)}" for option, said in (options or {}).items() if said), ""
            )
            hint = f"; values of an option are joined by commas: {joined},{word}" if joined else ""
            raise EnsembleError(
                f"two experts are named {name!r} ({found[name]} and {value}); give each its own name{hint}"
            )
        found[name] = value
    if not found:
        raise EnsembleError(f"there are no experts; write NAME=CHECKPOINT for each: {_EXAMPLE}")
    if len(found) > MAX_EXPERTS:
        raise EnsembleError(f"{len(found)} experts are too many; an ensemble has at most {MAX_EXPERTS}")
    return found


def priors_of(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The share of each expert, in the order of ``names``; they add up to 1, but for rounding.

    Raises:
        EnsembleError: a share that is no number above zero, of no expert, or missing; or they do not add up to 1.
    """
    priors: dict[str, float] = {}
    for name, value in _by_expert("--prior", given, names).items():
        try:
            priors[name] = float(value)
        except ValueError:
            raise EnsembleError(f"--prior {name}={value}: {value!r} is no number; write {name}=0.5") from None
        if not (math.isfinite(priors[name]) and priors[name] > 0):
            raise EnsembleError(
                f"--prior {name}={value}: a share is above 0; leave out an expert that is to have none"
            )
    total = math.fsum(priors.values())
    if abs(total - 1) > _ROUNDING:
        shares = ",".join(f"{name}={prior / total:.4g}" for name, prior in priors.items())
        raise EnsembleError(
            f"the priors add up to {total:g} and have to add up to 1; in the same proportions: --prior {shares}"
        )
    return priors


def data_of(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """The file of each expert's texts, in the order of ``names``.

    Raises:
        EnsembleError: a file of no expert, or an expert without one.
    """
    return {name: Path(value).expanduser() for name, value in _by_expert("--data", given, names).items()}


def _by_expert(option: str, given: Sequence[str], names: Sequence[str]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for word in (word for joined in given for word in _BETWEEN.split(joined)):
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise EnsembleError(f"{option} {word}: write NAME=VALUE for each expert, joined by commas")
        if name not in names:
            raise EnsembleError(
                f"{option} {word}: there is no expert {name!r}; there are {', '.join(names)}"
                + did_you_mean(name, names)
            )
        if name in found:
            raise EnsembleError(f"{option} has {name!r} twice ({found[name]} and {value}); leave one out")
        found[name] = value
    missing = [name for name in names if name not in found]
    if missing:
        raise EnsembleError(f"{option} leaves out {', '.join(missing)}; add {missing[0]}=VALUE")
    return {name: found[name] for name in names}


def _check_name(name: str, whose: str) -> None:
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > _LONGEST_NAME:
        raise EnsembleError(f"{whose} cannot be called {name!r}: {_NAME_RULE}")
