"""The list of vLLM's names, against the installed vLLM, and against copies of it in which one thing is different."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from decar.server.vllm_adapter import seams, versions
from decar.server.vllm_adapter.seams import SEAMS, Seam, check, version_of
from decar.server.vllm_adapter.source_tree import Function, Signature, SourceTree

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "seams.py"
RUNNER = Path("vllm/v1/worker/gpu_model_runner.py")


def installed() -> tuple[Path, str]:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parents[1]
    version = version_of(root)
    assert version is not None
    return root, version


def edited(copy: Path, path: Path, old: str, new: str) -> Path:
    """A copy of the installed vLLM in which one file is different; all others are links."""
    root, _ = installed()
    for folder, here in zip(path.parents, path.parts[::-1], strict=False):  # upwards
        if folder != Path():
            (copy / folder).mkdir(parents=True, exist_ok=True)
            for entry in (root / folder).iterdir():
                if entry.name != here:
                    (copy / folder / entry.name).symlink_to(entry)
    text = (root / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new))
    return copy


# ------------------------------------------------------------------------------------------- vLLM's source


def test_the_installed_vllm_has_every_name() -> None:
    root, version = installed()
    assert versions.numbers_of(version) == versions.numbers_of(versions.installed_version() or "")
    assert check(root, version) == []


def test_a_renamed_private_method_is_named(tmp_path: Path) -> None:
    copy = edited(tmp_path, RUNNER, "def _sample(", "def _sample_tokens(")
    problems = check(copy, installed()[1])
    assert any(problem.startswith(f"{RUNNER}: GPUModelRunner._sample: not found") for problem in problems)
    assert all("_sample" in problem for problem in problems)


def test_a_renamed_parameter_is_named(tmp_path: Path) -> None:
    path = Path("vllm/v1/engine/output_processor.py")
    copy = edited(tmp_path, path, "def put(self, output:", "def put(self, item:")
    [problem] = check(copy, installed()[1])
    assert problem.startswith(f"{path}: RequestOutputCollector.put: its first parameters are others")
    assert "decar calls (output), found (item)" in problem


def test_a_method_that_nobody_calls_any_more_is_named(tmp_path: Path) -> None:
    copy = edited(tmp_path, RUNNER, "self._sample(logits", "self._other(logits")
    problems = check(copy, installed()[1])
    assert len(problems) == 1
    assert "GPUModelRunner._sample: nothing in" in problems[0]


def test_an_attribute_that_is_gone_is_named(tmp_path: Path) -> None:
    copy = edited(tmp_path, RUNNER, "self.discard_request_mask", "self.dropped_request_mask")
    problems = check(copy, installed()[1])
    assert problems
    assert all("discard_request_mask: not found" in problem for problem in problems)


def test_the_command_fails_and_names_it(tmp_path: Path) -> None:
    copy = edited(tmp_path, RUNNER, "def _sample(", "def _sample_tokens(")
    done = subprocess.run(
        [sys.executable, TOOL, "--source", copy], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"{RUNNER}: GPUModelRunner._sample: not found" in done.stdout
    assert "names are not as decar takes them to be" in done.stderr


ADAPTER = ROOT / "server/decar/server/vllm_adapter"


def test_every_name_that_the_server_imports_from_vllm_is_listed() -> None:
    listed = {(seam.module, seam.name.partition(".")[0]) for seam in SEAMS}
    modules = {module for module, _ in listed}
    for path in sorted((ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    known = (node.module, alias.name) in listed or f"{node.module}.{alias.name}" in modules
                    assert known, f"{path} imports {node.module}.{alias.name}, which is not in SEAMS"


def test_every_seam_says_which_file_relies_on_it() -> None:
    files = {path.stem for path in ADAPTER.glob("*.py")} | {"gateway"}
    assert {seam.used_by.partition(":")[0] for seam in SEAMS} <= files


def test_every_private_attribute_of_others_that_the_adapter_touches_is_listed() -> None:
    nodes = [node for path in ADAPTER.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {
        node.attr
        for node in attributes
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    private = {node.attr for node in attributes if node.attr.startswith("_") and node.attr[:2] != "__"}
    named_tuples = {"_replace"}
    assert private - own - named_tuples <= {part for seam in SEAMS for part in seam.name.split(".")}


def test_a_version_is_downloaded_once_and_only_its_source_is_kept(tmp_path: Path) -> None:
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "vllm-0.99.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("vllm/_version.py", "__version__ = version = '0.99.0'\n")
        wheel.writestr("vllm/_C.so", "large")
        wheel.writestr(
            "vllm-0.99.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n"
        )
        wheel.writestr("vllm-0.99.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("vllm-0.99.0.dist-info/RECORD", "")
    environment = {
        **os.environ,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [sys.executable, TOOL, "--version", "0.99.0", "--cache", cache]
    for downloads in (True, False):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert ("downloading" in done.stdout) == downloads
        assert f"{RUNNER}: GPUModelRunner._sample: there is no such module" in done.stdout
    assert sorted(path.name for path in cache.rglob("*")) == ["0.99.0", "_version.py", "vllm"]


# ------------------------------------------------------------------------------------------- the list itself


def test_a_seam_is_of_the_versions_that_it_says() -> None:
    seam = Seam("vllm", "f", "reads", since="0.29", before="0.33")
    told = {
        version: seam.is_of(version) for version in ("0.26.0", "0.28.1", "0.29.0", "0.32.0+cpu", "0.33.0")
    }
    assert told == {"0.26.0": False, "0.28.1": False, "0.29.0": True, "0.32.0+cpu": True, "0.33.0": False}


@pytest.mark.parametrize("name", versions.MOVED)
@pytest.mark.parametrize("version", ["0.26.0", "0.28.0", "0.29.0", "0.32.0", "0.33.0"])
def test_what_moves_is_looked_for_where_it_is_imported_from(name: str, version: str) -> None:
    homes = {seam.module for seam in SEAMS if seam.name.partition(".")[0] == name and seam.is_of(version)}
    assert homes == {versions.home_of(name, version)}


def test_every_seam_says_what_relies_on_it() -> None:
    for seam in SEAMS:
        assert seam.used_by, seam
        assert seam.kind in ("implements", "reads") or Signature.parse(seam.parameters)


# ------------------------------------------------------------------------------------------- reading source

PACKAGE = {
    "vllm/__init__.py": "",
    "vllm/base.py": """
from abc import ABC, abstractmethod

class Base(ABC):
    kept: int = 0
    declared: int

    def __init__(self, size):
        self.size, (self.low, self.high) = size, size
        self.empty = None
        self.filled = None
        if size:
            self.large: bool = True
            self.filled = size

    @abstractmethod
    def run(self, step, *, quick=False): ...

    def stub(self):
        'What inherits this defines it.'
        raise NotImplementedError

    @staticmethod
    def parsed(text):
        return text
""",
    "vllm/part/__init__.py": "from .inner import Thing as Renamed\nfrom vllm.base import Base\nfrom os import path\n",
    "vllm/part/inner.py": """
import typing
from dataclasses import dataclass
from typing import NamedTuple
import vllm.base as base
from vllm import base as other
from missing import Absent

if typing.TYPE_CHECKING:
    from vllm.base import Base
try:
    import fast
except ImportError:
    fast = None

class State(NamedTuple):
    logits: int

@dataclass
class Fields:
    first: int | None = None

class MoreFields(Fields):
    second: int

class Thing(base.Base):
    def run(self, step, *, quick=False):
        self.ran = step
        return self._go(step)

    async def _go(self, step, more=None, *rest, last): ...

class Other(Absent, other.Base): ...

Alias = Other

def free(first, /, second, third=1, *, named, **others): ...
""",
}


@pytest.fixture
def tree(tmp_path: Path) -> SourceTree:
    for name, text in PACKAGE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return SourceTree(tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.part.inner", "Thing.run"),
        ("vllm.part.inner", "Thing.ran"),  # assigned outside of __init__
        ("vllm.part.inner", "Thing.kept"),  # inherited through a module's alias
        ("vllm.part.inner", "Thing.large"),  # inherited, assigned in a condition
        ("vllm.part.inner", "Thing.high"),  # inherited, assigned in a tuple
        ("vllm.part.inner", "Other.size"),  # beside a base from elsewhere
        ("vllm.part.inner", "Alias.parsed"),
        ("vllm.part.inner", "State.logits"),
        ("vllm.part.inner", "MoreFields.first"),  # a data class's field may be None
        ("vllm.part.inner", "Thing.filled"),  # inherited, None only at first
        ("vllm.base", "Base.stub"),  # its own
        ("vllm.base", "Base.declared"),
        ("vllm.part.inner", "Base"),  # imported for types only
        ("vllm.part.inner", "fast"),
        ("vllm.part", "Renamed._go"),  # exported by its package under another name
        ("vllm.part", "Base.run"),
        ("vllm.part", "path"),  # from outside the tree
        ("vllm.part", "inner"),  # a module of the package
    ],
)
def test_names_are_found(tree: SourceTree, module: str, name: str) -> None:
    assert tree.find(module, name) is not None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.part.inner", "Thing.gone"),
        ("vllm.part.inner", "Gone"),
        ("vllm.part.inner", "State.kept"),
        ("vllm.part.inner", "Thing.stub"),  # inherited: nobody has defined it
        ("vllm.part.inner", "Other.run"),
        ("vllm.part.inner", "Thing.declared"),
        ("vllm.part.inner", "Thing.empty"),
        ("vllm.part", "Thing"),  # exported under another name
        ("vllm.part.gone", "Thing"),
        ("vllm.part.inner", "free.first"),  # a function has no members
    ],
)
def test_names_that_are_not_there_are_not_found(tree: SourceTree, module: str, name: str) -> None:
    assert tree.find(module, name) is None


def signature(tree: SourceTree, name: str) -> Signature:
    found = tree.find("vllm.part.inner", name)
    assert found is not None
    assert isinstance(found.node, Function)
    return Signature.read(found.node, method="." in name)


def test_signatures_are_read(tree: SourceTree) -> None:
    assert str(signature(tree, "free")) == "(first, second, third=, *, named, **kwargs)"
    assert str(signature(tree, "Thing._go")) == "async (step, more=, *args, last)"
    assert str(signature(tree, "Thing.parsed")) == "(text)"
    for text in ("a, b=, *, c, d=, **kwargs", "async a, *args", ""):
        assert str(Signature.parse(text)).removeprefix("async ") == f"({text.removeprefix('async ')})"


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("a, b", "a, b, c=, *, d=", None),
        ("a, *, c", "a, b=, c=", None),
        ("a, *, c", "a, **kwargs", None),
        ("a, b", "a, *args", None),
        ("a, **kwargs", "a, b", None),  # what else it needs is passed on
        ("a, b", "b, a", "its first parameters are others"),
        ("a, b", "a", "its first parameters are others"),
        ("a, *, c", "a, b=", "it has no parameter 'c'"),
        ("a", "a, b", "it needs a parameter 'b'"),
        ("a", "a, *, b", "it needs a parameter 'b'"),
        ("a", "async a", "it has become async"),
        ("async a", "a", "it is no longer async"),
    ],
)
def test_a_call_fits_or_does_not(ours: str, theirs: str, reason: str | None) -> None:
    assert Signature.parse(ours).unlike_call_of(Signature.parse(theirs)) == reason


@pytest.mark.parametrize(
    ("ours", "theirs", "reason"),
    [
        ("a, b", "a, b", None),
        ("a, *args, **kwargs", "a, b, c=, *, d", None),
        ("a, **kwargs", "a, *, d=", None),
        ("*args, **kwargs", "", None),
        ("a", "a, b=", "it takes further parameters: b"),
        ("a", "a, *, b=", "it takes further parameters: b"),
        ("a", "a, *args", "it takes further parameters: *args"),
        ("a", "a, **kwargs", "it takes further parameters: **kwargs"),
        ("a, *args", "a, b=", "it takes further parameters: b"),  # it may be given by name
        ("a", "b", "its first parameters are others"),
        ("a, b", "a", "its first parameters are others"),
        ("a, *, c", "a", "it has no parameter 'c'"),
        ("a", "async a", "it has become async"),
    ],
)
def test_a_replacement_fits_or_does_not(ours: str, theirs: str, reason: str | None) -> None:
    assert Signature.parse(ours).unlike_replaced(Signature.parse(theirs)) == reason


def test_what_has_to_be_defined_is_complete(
    tree: SourceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for members, problems in (("run", 0), ("walk", 1)):
        seam = Seam("vllm.base", "Base", "implements", members, used_by="test")
        monkeypatch.setattr(seams, "SEAMS", (seam,))
        found = check(tmp_path, "0.32.0")
        assert len(found) == problems
        assert all("does not define: run [test]" in problem for problem in found)


def test_what_is_no_function_cannot_be_called(
    tree: SourceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "SEAMS", (Seam("vllm.base", "Base.kept", "calls", used_by="test"),))
    assert check(tmp_path, "0.32.0") == [
        "vllm/base.py: Base.kept: expected a function, found `kept: int = 0` [test]"
    ]


def test_one_problem_names_where_an_inherited_member_is(
    tree: SourceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        seams, "SEAMS", (Seam("vllm.part.inner", "Other.parsed", "calls", "job", used_by="test"),)
    )
    [problem] = check(tmp_path, "0.32.0")
    assert problem.startswith(
        "vllm/part/inner.py: Other.parsed (in vllm/base.py): its first parameters are others"
    )
