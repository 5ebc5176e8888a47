"""The main path, as the demo walks it: train on real text, serve, chat. Fewer steps than the demo, all else alike."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import running
from tests.helpers import COMPLETION_EXTRAS, Server, answer_of
from tests.reference import Reference, mixture_decode

pytestmark = pytest.mark.engines

REPOSITORY = Path(__file__).parents[2]
CODE = "import os\nimport sys\n\ndef main(args):\n    for name in args:\n"
PROSE = "The value of the expression is the object to which the name is bound."


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The demo's configuration, with a quarter of its steps on a quarter of its text."""
    directory = tmp_path_factory.mktemp("demo")
    settings = {
        "work_dir": directory,
        "ensemble_dir": directory / "ensemble",
        "training.max_steps": 100,
        "data.builtin_max_bytes": 500_000,
    }
    command = [sys.executable, "-m", "decar.training", "run", "configs/demo.yaml"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Reference.load(directory / "ensemble")


@pytest.fixture(scope="module")
def demo_server(trained: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--max-model-len", "512")  # compiled, as users run it
    with running(trained, tmp_path_factory.mktemp("logs") / "demo.log", flags) as server:
        yield server


def test_the_posterior_knows_code_from_prose_and_the_answer_is_the_mixtures(
    trained: Reference, demo_server: Server
) -> None:
    prompts = [trained.encode(text) for text in (CODE, PROSE)]
    expected = mixture_decode(trained, prompts, max_tokens=24)
    for prompt, answer, expert in zip(prompts, expected, ("code", "prose"), strict=True):
        extra = {**COMPLETION_EXTRAS, "decar": {"trace": True}}
        response = demo_server.openai().completions.create(
            model="demo", prompt=prompt, max_tokens=24, temperature=0, logprobs=1, extra_body=extra
        )
        got = answer_of(response.choices[0])
        assert got.tokens == answer.tokens
        assert got.logprobs == pytest.approx(answer.logprobs, abs=1e-3)
        for weights, reference in zip(got.weights, answer.weights, strict=True):
            assert weights == pytest.approx(reference, abs=1e-4)
        assert got.weights[0][trained.experts.index(expert)] > 0.9


def test_decar_chat_streams_an_answer_and_says_who_spoke(demo_server: Server) -> None:
    command = [sys.executable, "-m", "decar.server", "chat", CODE, "--base-url", f"{demo_server.url}/v1"]
    done = subprocess.run(
        [*command, "--max-tokens", "8"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "demo (code, prose)" in done.stdout
    assert "mean weights: code" in done.stdout
    fixed = [*command, "--max-tokens", "8", "--weights", json.dumps({"code": 1, "prose": 3})]
    done = subprocess.run(fixed, capture_output=True, text=True, timeout=120, check=False)
    assert "mean weights: code 25.0%, prose 75.0%" in done.stdout
    wrong = [*command, "--weights", json.dumps({"cod": 1})]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "did you mean 'code'" in done.stdout
