"""`decar new` with models of the Hugging Face Hub: huggingface_hub's own client, asking a hub on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from decar.router import Ensemble
from tests.reference import Reference, make_tokenizer
from tests.training.fake_hub import COMMIT, hub

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
_COMMAND = """
import sys
from decar.router.errors import DecarError
from tests.training.new_command import app
try:
    app()
except DecarError as error:
    sys.exit(f"decar: error: {error}")
"""


@pytest.fixture(scope="module")
def repositories(trio: Reference, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    experts = trio.directory / "experts"
    found = {
        f"org/{name}": Path(shutil.copytree(experts / expert, root / name))
        for name, expert in {"code": "code", "prose": "prose", "pickle": "code", "other": "code"}.items()
    }
    (found["org/code"] / "pytorch_model.bin").write_text("the same weights, as pickle")
    (found["org/pickle"] / "model.safetensors").rename(found["org/pickle"] / "pytorch_model.bin")
    make_tokenizer(found["org/other"], vocab_size=590)
    return found


@pytest.fixture
def served(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    with hub(repositories, gated="org/gated") as found:
        yield found


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`decar new` in a process of its own, since huggingface_hub reads its settings when it is imported."""

    def run(endpoint: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return subprocess.run(
            [sys.executable, "-c", _COMMAND, *words],
            env={**inherited, **settings, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_models_of_the_hub(run: Run, served: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, fetched = served
    done = run(endpoint, "demo", "code=org/code", f"prose=org/prose@{COMMIT}")
    assert done.returncode == 0, done.stderr
    ensemble = Ensemble.load(tmp_path / "demo")
    assert [expert.architecture for expert in ensemble.experts] == ["LlamaForCausalLM", "Qwen2ForCausalLM"]
    assert "pytorch_model.bin" not in fetched
    # What is in the cache needs no Hub.
    done = run(endpoint, "again", "code=org/code", "--hard-links", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    Ensemble.load(tmp_path / "again")


def test_models_that_do_not_fit_are_not_downloaded(run: Run, served: tuple[str, list[str]]) -> None:
    endpoint, fetched = served
    done = run(endpoint, "demo", "code=org/code", "prose=org/other")
    assert "different tokenizers" in done.stderr
    assert "tokenizer.json" in fetched
    assert "model.safetensors" not in fetched


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            "org/nothing",
            ("there is no folder org/nothing, and no model org/nothing on the Hub", "hf auth login"),
        ),
        ("org/gated", ("org/gated is for those who have asked for it", "hf auth login")),
        ("org/code@v9", ("org/code has no revision 'v9'",)),
        ("org/pickle", ("org/pickle has no safetensors on the Hub", "save_pretrained")),
    ],
)
def test_what_the_hub_has_not(
    run: Run, served: tuple[str, list[str]], tmp_path: Path, given: str, words: tuple[str, ...]
) -> None:
    done = run(served[0], "demo", f"code={given}")
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("decar: error: expert 'code': ")
    for word in words:
        assert word in line
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["no network", "offline"])
def test_no_hub(run: Run, environment: dict[str, str]) -> None:
    done = run("http://127.0.0.1:9", "demo", "code=org/code", **environment)  # nothing listens there
    line = done.stderr.splitlines()[-1]
    assert "there is no folder org/code, and the Hub cannot be asked" in line
    assert "hf download org/code" in line
