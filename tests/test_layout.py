"""What documents and the layout promise about the source, read from the source."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from decar.benchmarks.report import lines_of
from decar.kernels import rows
from decar.router import manifest
from decar.training import config

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

ARROWS = {
    "server": {"server", "router", "kernels"},
    "training": {"training", "router"},
    "router": {"router"},
    "kernels": {"kernels"},
    "clients": {"clients"},
    "benchmarks": {"benchmarks", "clients", "kernels", "server"},
}
"""Which part may import which."""


SERVER = ROOT / "server/decar/server"
ROOMS = {
    "protocol": {"protocol"},
    "gateway": {"gateway", "metrics", "protocol"},
    "vllm_adapter": {"protocol", "vllm_adapter"},
    "metrics": {"protocol"},
    "placement": set(),
    "mps": {"protocol"},
    "hosts": {"cluster", "protocol"},
    "kinds": {"gateway", "hosts", "metrics", "placement", "protocol", "vllm_adapter"},
    "cluster": {"cluster", "placement", "protocol", "vllm_adapter"},
    "serve": {
        "cluster",
        "gateway",
        "hosts",
        "kinds",
        "metrics",
        "mps",
        "placement",
        "port",
        "protocol",
        "terminal",
        "vllm_adapter",
    },
    "port": set(),
    "terminal": set(),
    "ps": {"protocol"},
    "inspection": {"cluster", "placement", "vllm_adapter"},
    "commands": {"vllm_adapter"},
    "cli": {"commands", "inspection", "ps", "serve"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""Which room or file of the server may import which: `serve` alone puts together what knows nothing of each other."""

TRAINING = ROOT / "training/decar/training"
ALL_KNOW = {"checkpoint_files", "config", "fingerprints", "plots", "run", "stages"}
FOLDERS = {
    "checkpoint_files": set(),
    "config": {"run"},
    "plots": set(),
    "run": {"stages"},
    "stages": {"run"},
    "fingerprints": {"config", "stages"},
    "data": {"data", *ALL_KNOW},
    "partition": {"partition", "data", *ALL_KNOW},
    "expert": {"expert", "data", *ALL_KNOW},
    "router": {"router", "data", *ALL_KNOW},
    "export": {"export", "data", "expert", *ALL_KNOW},
    "evaluate": {"evaluate", "data", "partition", "expert", "router", "export", *ALL_KNOW},
    "new": {"new", "data", "expert", "router", "evaluate", *ALL_KNOW},
    "dry_run": {"data", "partition", "expert", *ALL_KNOW},
    "dry_run_tables": {"dry_run", "data", "partition", *ALL_KNOW},
    "cli": {
        "dry_run",
        "dry_run_tables",
        "data",
        "partition",
        "expert",
        "router",
        "export",
        "evaluate",
        *ALL_KNOW,
    },
    "__main__": {"cli"},
    "__init__": set(),
}
"""Which folder or file of training may import which: no stage knows one that comes after it."""

WHOLE_CONFIGURATION = {
    "fingerprints.py": {
        "partition_fingerprint",
        "router_fingerprint",
        "export_fingerprint",
        "scores_fingerprint",
        "evaluate_fingerprint",
    },
    "partition/stage.py": {"partition_stage", "make_partition"},
    "expert/stage.py": {"expert_stage", "train_expert"},
    "router/stage.py": {"router_stage"},
    "export/stage.py": {"export_stage", "export", "export_average", "origin_of"},
    "export/moe.py": {"moe_stage", "export_moe"},
    "evaluate/centralized.py": {"centralized_stage"},
    "evaluate/curve.py": {
        "settings",
        "split_config",
        "models",
        "point_stage",
        "make_point",
        "curve_stage",
        "_point_stages",
        "make_curve",
    },
    "evaluate/random_split.py": {"why_no_random_split", "random_config"},
    "evaluate/scores.py": {"scores_stage", "make_scores", "rivals_of"},
    "evaluate/stage.py": {"evaluate_stage", "make_evaluation"},
}
"""Who takes the whole `TrainConfig`, beside commands and their dry run: what puts its sections together."""

PUBLIC = {"vllm.engine.protocol", "vllm.exceptions", "vllm.logprobs", "vllm.outputs", "vllm.sampling_params"}
"""What vLLM offers to others; everything else of it may change without notice, and is for `vllm_adapter` alone."""


def sources(part: str) -> list[Path]:
    return sorted((ROOT / part / "decar" / part).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all modules that the file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module
            # `from decar import router` names a part as well
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def external(part: str) -> set[str]:
    """Top-level names of all modules outside decar that ``part`` imports."""
    return {name.split(".")[0] for path in sources(part) for name in imported(path)} - {"decar"}


@pytest.mark.parametrize("part", ARROWS)
def test_parts_import_only_what_the_arrows_allow(part: str) -> None:
    for path in sources(part):
        parts = {name.split(".")[1] for name in imported(path) if name.startswith("decar.")}
        assert parts <= ARROWS[part], f"{path} imports decar.{parts - ARROWS[part]}"


def test_every_part_has_sources_and_is_typed() -> None:
    for part in ARROWS:
        assert sources(part), part
        assert (ROOT / part / "decar" / part / "py.typed").exists()
        assert not (ROOT / part / "__init__.py").exists()  # `kernels` would shadow what transformers imports


def test_one_outer_init_only_extends_the_path_and_names_the_version() -> None:
    """A second one would hide the first or be hidden by it; any more in it, each part would pay for."""
    (outer,) = ROOT.glob("*/decar/__init__.py")
    assert outer.with_name("py.typed").exists()
    assert {name.split(".")[0] for name in imported(outer)} == {"importlib", "pkgutil"}
    statements = [node for node in ast.walk(ast.parse(outer.read_text())) if isinstance(node, ast.stmt)]
    assert not [node for node in statements if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    names = {name for node in statements if isinstance(node, ast.Assign) for name in _names_of(node)}
    assert names == {"__path__", "__version__"}


def test_the_router_knows_neither_http_nor_vllm() -> None:
    assert not external("router") & {"fastapi", "starlette", "uvicorn", "vllm"}


def test_the_kernels_know_only_numpy_torch_and_triton() -> None:
    libraries = external("kernels") - set(sys.stdlib_module_names)
    assert libraries
    assert libraries <= {"numpy", "torch", "triton"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_server_import_only_what_the_arrows_allow(room: str) -> None:
    for path in in_room(room):
        used = {name.split(".")[2] for name in imported(path) if name.startswith("decar.server.")}
        assert used <= ROOMS[room], f"{path} imports decar.server.{used - ROOMS[room]}"


def in_room(room: str, part: Path = SERVER) -> list[Path]:
    return sorted((part / room).rglob("*.py")) or [part / f"{room}.py"]


def test_every_file_of_server_and_training_is_in_a_room() -> None:
    assert {path for room in ROOMS for path in in_room(room)} == set(sources("server"))
    assert {path for folder in FOLDERS for path in in_room(folder, TRAINING)} == set(sources("training"))


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_of_training_import_only_what_the_arrows_allow(folder: str) -> None:
    for path in in_room(folder, TRAINING):
        used = {name.split(".")[2] for name in imported(path) if name.startswith("decar.training.")}
        assert used <= FOLDERS[folder], f"{path} imports decar.training.{used - FOLDERS[folder]}"


def test_the_whole_configuration_goes_no_further_than_where_its_sections_are_put_together() -> None:
    """Else a signature does not say what a function depends on."""
    found = {
        str(path.relative_to(TRAINING)): {
            function.name
            for function in ast.walk(ast.parse(path.read_text()))
            if isinstance(function, ast.FunctionDef) and "TrainConfig" in ast.unparse(function.args)
        }
        for path in sources("training")
        if path.parent != TRAINING or path.stem not in ("cli", "dry_run", "dry_run_tables")
    }
    assert {path: functions for path, functions in found.items() if functions} == WHOLE_CONFIGURATION


@pytest.mark.parametrize("part", ARROWS)
def test_no_checkpoint_brings_code_along(part: str) -> None:
    """transformers' classes that choose one by a checkpoint's files ask on stdin, where they are not told."""
    for path in sources(part):
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if isinstance(called, ast.Attribute) and called.attr in ("from_pretrained", "from_config"):
                assert isinstance(node, ast.Call)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}: {ast.unparse(node)}"


def outside_the_adapter() -> list[Path]:
    parts = [path for part in ARROWS for path in sources(part)]
    return [path for path in parts if not path.is_relative_to(SERVER / "vllm_adapter")]


def test_private_vllm_is_named_in_the_adapter_only() -> None:
    assert any(name in PUBLIC for path in in_room("gateway") for name in imported(path))
    for path in outside_the_adapter():
        if not path.is_relative_to(SERVER):
            continue  # what benchmarks may know: below
        modules = {name for name in imported(path) if name.split(".")[0] == "vllm"}
        private = {
            name for name in modules if not any(f"{name}.".startswith(f"{public}.") for public in PUBLIC)
        }
        assert not private, f"{path} imports {private}"
        named = re.findall(r"\bvllm(?:\.\w+)+", path.read_text())
        assert all(f"{name}.".startswith(tuple(f"{public}." for public in PUBLIC)) for name in named), path


def test_the_gateway_touches_no_private_members() -> None:
    """Of an engine, they would be vLLM's."""
    for path in in_room("gateway"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                assert isinstance(node.value, ast.Name), f"{path}: {ast.unparse(node)}"
                assert node.value.id in ("self", "cls"), f"{path}: {ast.unparse(node)}"


def test_nothing_of_vllm_is_patched_outside_the_adapter() -> None:
    for path in outside_the_adapter():
        assert not list(patched(ast.parse(path.read_text()))), path


def patched(tree: ast.Module) -> Iterator[str]:
    """Attributes of what is imported from vLLM that a file sets or deletes, by statement, setattr or delattr."""
    names = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] == "vllm"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and _root(node) in names:
            yield ast.unparse(node)
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in ("setattr", "delattr"):
            assert isinstance(node, ast.Call)
            if _root(node.args[0]) in names:
                yield ast.unparse(node)


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize(
    "source",
    [
        "import vllm\nvllm.envs.X = 1",
        "from vllm.v1.engine import async_llm\nasync_llm.AsyncLLM.generate = None",
        "from vllm.v1.engine.async_llm import AsyncLLM as Engine\nsetattr(Engine, 'generate', None)",
        "from vllm import envs\ndel envs.X",
        "from vllm.outputs import RequestOutput\nRequestOutput.add += 1",
    ],
)
def test_a_patch_would_be_found(source: str) -> None:
    assert list(patched(ast.parse(source)))


def test_clients_and_benchmarks_reach_a_server_only_over_http() -> None:
    assert "vllm" not in external("clients")
    names = {name for path in sources("benchmarks") for name in imported(path) if name.startswith("vllm")}
    client = ("vllm.benchmarks", "vllm.utils.argparse_utils")  # what `vllm bench serve` is made of
    assert all(name.startswith(client) for name in names)


def test_benchmarks_know_the_servers_protocol_and_nothing_else_of_it() -> None:
    names = {name for path in sources("benchmarks") for name in imported(path)}
    assert all(name.startswith("decar.server.protocol.") for name in names if name.startswith("decar.server"))


def test_only_tests_know_the_reference() -> None:
    for path in (ROOT / "tests/reference.py", ROOT / "tests/helpers.py"):
        assert not any(name.split(".")[0] == "decar" for name in imported(path))


def test_what_two_parts_have_to_define_is_the_same() -> None:
    """The kernels are used without the router, so each of them names the rules and the most experts."""
    assert get_args(rows.Rule) == get_args(manifest.Rule)
    assert rows.MAX_EXPERTS == manifest.MAX_EXPERTS


def test_training_takes_what_the_manifest_takes() -> None:
    assert config.NAME_PATTERN == manifest.NAME_PATTERN
    experts = config.TrainConfig.model_fields["experts"].metadata
    assert [limit.max_length for limit in experts if hasattr(limit, "max_length")] == [manifest.MAX_EXPERTS]


# ---------------------------------------------------------------------------------------------- documents

PATH = re.compile(r"`([\w./-]+/[\w./-]*\.(?:py|md|toml|yaml|json|sh))`")
NAMED_IN = re.compile(r"((?:`[A-Za-z_][\w.]*`(?:,| and|, and)? )+)in `([\w./-]+\.py)`")
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
RESULTS = [ROOT / folder for folder in ("benchmarks/results", "docs/evaluation", "docs/routing")]
"""Folders of nothing but what programs wrote."""
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
RESULT = re.compile(r"`([^`\s]+/[^`\s]+)`")


def source_named(path: str) -> Path:
    """The file that a document means: from the root, from `server/decar/server/` or from `training/decar/training/`."""
    found = (folder / path for folder in (ROOT, SERVER, TRAINING) if (folder / path).exists())
    return next(found, SERVER / path)


def text_of(document: Path) -> str:
    """The document on one line, so that a phrase is found wherever it is wrapped."""
    return " ".join(document.read_text().split())


def named_in_documents() -> list[tuple[str, str]]:
    """(name, path) wherever a document says "`name` in `path`"."""
    return [
        (name, path)
        for document in DOCUMENTS
        for names, path in NAMED_IN.findall(text_of(document))
        for name in re.findall(r"`([\w.]+)`", names)
    ]


def defined(path: Path) -> set[str]:
    """Functions, classes and `Class.member` that a file defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names |= _names_of(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for member in node.body for name in _names_of(member)}
    return names


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def test_documents_name_much_of_the_source() -> None:
    """Else the patterns above have stopped matching, and the next test says nothing."""
    assert len(named_in_documents()) >= 15
    named = {(name, source_named(path)) for name, path in named_in_documents()}
    assert ("EnsembleClient.generate", SERVER / "gateway/ensemble.py") in named
    assert ("train_model", TRAINING / "expert/stage.py") in named


@pytest.mark.parametrize(("name", "path"), named_in_documents(), ids=str)
def test_what_documents_name_exists(name: str, path: str) -> None:
    assert source_named(path).is_file()
    assert name in defined(source_named(path)), f"{path} defines no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_and_links_in_documents_exist(document: Path) -> None:
    text = document.read_text()
    begins_here = [path for path in PATH.findall(text) if source_named(path.split("/")[0]).exists()]
    missing = [path for path in begins_here if not source_named(path).exists()]
    missing += [link for link in LINK.findall(text) if not (document.parent / link).exists()]
    assert not missing


def test_tests_that_documents_name_exist() -> None:
    named = [found for document in DOCUMENTS for found in TEST.findall(document.read_text())]
    assert named
    for path, name in named:
        assert name in defined(ROOT / path), f"{path} defines no {name}"


def results_named() -> set[Path]:
    """Files of `RESULTS` that a document gives by a path from its own folder or the repository's."""
    named = set()
    for document in (ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").glob("*.md")):
        text = document.read_text()
        for reference in {*RESULT.findall(text), *LINK.findall(text)}:
            paths = [(folder / reference).resolve() for folder in (document.parent, ROOT)]
            named |= {path for path in paths if not {*RESULTS}.isdisjoint(path.parents)}
    return named


def test_a_result_is_kept_where_and_only_where_a_document_names_it() -> None:
    kept = {path for folder in RESULTS for path in folder.rglob("*") if path.is_file()}
    assert kept
    missing = [str(path.relative_to(ROOT)) for path in results_named() - kept]
    assert not missing, "named and not kept"
    idle = [str(path.relative_to(ROOT)) for path in kept - results_named()]
    assert not idle, "kept and not named: name them beside the claim that they are behind, or delete them"


def test_results_have_a_line_for_each_record() -> None:
    for folder in RESULTS:
        for path in folder.rglob("*.json"):
            text = path.read_text()
            assert text == lines_of(json.loads(text)), f"run python tools/keep_report.py {path} {path}"
