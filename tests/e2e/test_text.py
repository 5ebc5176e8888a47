"""The main path on real text: train, serve, chat."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    """configs/text.yaml, with a quarter of its steps on a quarter of its text."""
    directory = tmp_path_factory.mktemp("text")
    settings = {
        "work_dir": directory,
        "ensemble_dir": directory / "ensemble",
        "training.max_steps": 100,
        "data.builtin_max_bytes": 500_000,
    }
    command = [sys.executable, "-m", "decar.training", "run", "configs/text.yaml"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return Reference.load(directory / "ensemble")


@pytest.fixture(scope="module")
def text_server(trained: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--dtype", "float32", "--max-model-len", "512")  # compiled, as users run it
    with running(trained, tmp_path_factory.mktemp("logs") / "text.log", flags) as server:
        yield server


def test_the_posterior_knows_code_from_prose_and_the_answer_is_the_mixtures(
    trained: Reference, text_server: Server
) -> None:
    prompts = [trained.encode(text) for text in (CODE, PROSE)]
    expected = mixture_decode(trained, prompts, max_tokens=24)
    for prompt, answer, expert in zip(prompts, expected, ("code", "prose"), strict=True):
        extra = {**COMPLETION_EXTRAS, "decar": {"trace": True}}
        response = text_server.openai().completions.create(
            model="text", prompt=prompt, max_tokens=24, temperature=0, logprobs=1, extra_body=extra
        )
        got = answer_of(response.choices[0])
        assert got.tokens == answer.tokens
        assert got.logprobs == pytest.approx(answer.logprobs, abs=1e-3)
        for weights, reference in zip(got.weights, answer.weights, strict=True):
            assert weights == pytest.approx(reference, abs=1e-4)
        assert got.weights[0][trained.experts.index(expert)] > 0.9


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_of_several_tokens_is_said_as_one_expert_says_it(
    trained: Reference, text_server: Server, stream: bool
) -> None:
    """'' until it is whole, then it: the tokens of an echoed prompt are the prompt."""
    text = "A naïve 😀 ≠ é is"
    assert len(trained.encode("😀")) > 2
    found = []
    with text_server.openai() as client:
        for model in ("text", "text/prose"):
            asked: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": 3, "temperature": 0}
            answer = client.completions.create(**asked, echo=True, logprobs=2, stream=stream)
            choices = [part.choices[0] for part in (answer if stream else [answer])]
            tokens = [token for choice in choices for token in choice.logprobs.tokens]
            offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
            found.append((tokens[:-3], offsets[:-2]))
    assert found[0] == found[1]
    assert "".join(found[0][0]).removeprefix("<|bos|>") == text
    assert "" in found[0][0]


def test_a_chats_prompt_log_probabilities_spell_it_as_one_expert_does(text_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "naïve 😀"}], "prompt_logprobs": 0, "max_tokens": 1}
    found = []
    for model in ("text", "text/prose"):
        response = text_server.http.post("/v1/chat/completions", json={"model": model, **body})
        entries = response.json()["prompt_logprobs"][1:]
        found.append([(token, said["decoded_token"]) for entry in entries for token, said in entry.items()])
    assert found[0] == found[1]
    assert "naïve 😀" in "".join(text for _, text in found[0])


def test_decar_chat_streams_an_answer_and_says_who_spoke(text_server: Server) -> None:
    command = [sys.executable, "-m", "decar.server", "chat", CODE, "--base-url", f"{text_server.url}/v1"]
    done = subprocess.run(
        [*command, "--max-tokens", "8"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "text (code, prose)" in done.stdout
    assert "mean weights: code" in done.stdout
    fixed = [*command, "--max-tokens", "8", "--weights", json.dumps({"code": 1, "prose": 3})]
    done = subprocess.run(fixed, capture_output=True, text=True, timeout=120, check=False)
    assert "mean weights: code 25.0%, prose 75.0%" in done.stdout
    wrong = [*command, "--weights", json.dumps({"cod": 1})]
    done = subprocess.run(wrong, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "did you mean 'code'" in done.stderr
