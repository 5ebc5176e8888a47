"""`decar explain` on a running server: what it draws is the answer, and who gave it."""

import re
import subprocess
import sys

import pytest

from decar.clients.picture import harmless
from tests.helpers import Server
from tests.reference import Reference, mixture_decode, prompt_texts

pytestmark = pytest.mark.engines

TOKENS = 24


def explain(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "decar.server", "explain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_runs_of_the_answer_are_their_speakers(duo_server: Server, duo: Reference) -> None:
    texts = prompt_texts(12)
    answers = mixture_decode(duo, [duo.encode(text) for text in texts], TOKENS)
    # One in which both experts speak, and no greedy choice or speaker is near enough to go either way.
    prompt, answer = next(
        (text, answer)
        for text, answer in zip(texts, answers, strict=True)
        if answer.margin > 2e-3
        and len({w[0] > 0.5 for w in answer.weights}) == 2
        and all(abs(w[0] - 0.5) > 1e-3 for w in answer.weights)
        and duo.tokenizer.eos_token_id not in answer.tokens
    )
    flags = ("--max-tokens", str(TOKENS), "--temperature", "0", "--base-url", f"{duo_server.url}/v1")
    done = explain(prompt, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"prompt +\| (.*)", lines[0]), lines[0]
    runs = [re.fullmatch(r"(code|prose) +(\d+)% \| (.*)", line) for line in lines[1 : lines.index("")]]
    speakers = [run[1] for run in runs if run is not None]
    expected = [duo.experts[w.index(max(w))] for w in answer.weights]
    assert speakers == [name for i, name in enumerate(expected) if i == 0 or name != expected[i - 1]]
    text = "".join(run[3] for run in runs if run is not None)
    said = text.replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")
    assert said == harmless(duo.decode(answer.tokens))
    means = [sum(column) / TOKENS for column in zip(*answer.weights, strict=True)]
    summary = f"{TOKENS} tokens; mean weights: code {means[0]:.1%}, prose {means[1]:.1%}"
    assert f"{summary}; active experts a token: 2.00" in done.stdout
    assert re.search("^leader: (code|prose)", done.stdout, re.MULTILINE)


def test_what_is_wrong_is_one_line(duo_server: Server) -> None:
    done = explain("text", "--base-url", f"{duo_server.url}/v1", "--route", "classifier")
    assert done.returncode == 1
    assert "decar.route 'classifier' is not trained" in done.stderr
    done = explain("text", "--base-url", "http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert "no server answers at http://127.0.0.1:9/v1" in done.stderr
