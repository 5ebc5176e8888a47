"""The version: one, from the distribution, wherever it is asked for."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import decar

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout


def test_it_is_the_distribution_s() -> None:
    assert decar.__version__ == importlib.metadata.version("decar")


@pytest.mark.parametrize(("module", "command"), [("server", "decar"), ("training", "decar-train")])
def test_the_commands_print_it(module: str, command: str) -> None:
    assert run("-m", f"decar.{module}", "--version") == f"{command} {decar.__version__}\n"


def test_a_checkout_on_the_path_has_all_parts_and_no_version() -> None:
    """As on a machine that has the libraries, and decar only as files. -S: without this one's site-packages."""
    parts = [
        str(ROOT / part) for part in ("server", "kernels", "router", "training", "clients", "benchmarks")
    ]
    code = f"import sys; sys.path += {parts}; import decar; print(decar.__version__, len(decar.__path__))"
    assert run("-ISc", code) == "not installed 6\n"


def test_importing_it_imports_no_library() -> None:
    code = "import sys; before = set(sys.modules); import decar; print(*sys.modules.keys() - before)"
    new = {name.split(".")[0] for name in run("-c", code).split()}
    assert "decar" in new
    assert new <= {"decar", *sys.stdlib_module_names}
