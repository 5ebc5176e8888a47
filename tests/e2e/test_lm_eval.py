"""lm-evaluation-harness, unmodified, scores the ensemble as one model: its numbers are the transformers mixture's."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tests.helpers import Server
from tests.reference import Reference, prompt_scores, stdlib_text

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

QUESTIONS, CHOICES = 24, 4
MAX_LENGTH = 160  # below that of the texts, so that they are scored in several windows
TOLERANCE = 1e-3  # of one continuation's log-likelihood, and relative of a perplexity


def questions() -> list[dict[str, Any]]:
    """Which line follows two lines of source text? The others are from elsewhere in it."""
    lines = [line for line in stdlib_text("heapq", "shelve").splitlines() if len(line.strip()) > 20]
    made = []
    for i in range(QUESTIONS):
        start, gold = 5 * i, i % CHOICES
        choices = [lines[start + 17 + 7 * j] for j in range(CHOICES)]
        choices[gold] = lines[start + 2]
        made.append({"context": "\n".join(lines[start : start + 2]), "choices": choices, "gold": gold})
    return made


def texts() -> list[dict[str, str]]:
    return [{"text": stdlib_text(module)[:1500]} for module in ("string", "calendar", "textwrap")]


def write_task(folder: Path, name: str, documents: Sequence[dict[str, Any]], task: dict[str, Any]) -> None:
    """A task of lm-eval as users write their own: a YAML file, and its documents as jsonl."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))


def log_likelihood(reference: Reference, context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context) by the posterior mixture; the first token of all is given, as for the server."""
    ids = context + continuation
    scores, _ = prompt_scores(reference, ids, rule="velocity", posterior=True)
    said = scores[torch.arange(len(ids) - 1), ids[1:]]
    return float(said[len(context) - 1 :].sum())


@pytest.fixture(scope="module")
def evaluated(duo: Reference, duo_server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `lm_eval` reports: results, and the samples of each task."""
    folder = tmp_path_factory.mktemp("lm-eval")
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    }
    write_task(folder, "next_line", questions(), choice)
    write_task(folder, "source_text", texts(), rolling)
    model = {
        "model": duo.name,
        "base_url": f"{duo_server.url}/v1/completions",
        "tokenizer": duo.directory / "experts/code",
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        "num_concurrent": 4,
        "max_length": MAX_LENGTH,
    }
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    command += ["--include_path", str(folder), "--tasks", "next_line,source_text"]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (folder / "out").rglob("results_*.json")
    found: dict[str, Any] = json.loads(results.read_text())["results"]
    for task in ("next_line", "source_text"):
        (samples,) = (folder / "out").rglob(f"samples_{task}_*.jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        found[f"{task} samples"] = sorted(lines, key=lambda sample: sample["doc_id"])
    return found


def test_multiple_choice_is_scored_and_answered_as_by_the_mixture(
    duo: Reference, evaluated: dict[str, Any]
) -> None:
    right = 0
    for question, sample in zip(questions(), evaluated["next_line samples"], strict=True):
        context = duo.encode(question["context"])
        expected = []
        for choice in question["choices"]:
            whole = duo.encode(f"{question['context']}\n{choice}")
            expected.append(log_likelihood(duo, whole[: len(context)], whole[len(context) :]))
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=TOLERANCE)
        best = sorted(expected)
        assert best[-1] - best[-2] > 2 * TOLERANCE, "this question is decided by rounding: take another"
        right += expected.index(best[-1]) == question["gold"]
    assert 0 < right < QUESTIONS
    assert evaluated["next_line"]["acc,none"] == right / QUESTIONS


def test_perplexity_is_the_mixtures_over_the_same_windows(duo: Reference, evaluated: dict[str, Any]) -> None:
    total = 0.0
    for document in texts():
        windows = [
            make_disjoint_window(window)
            for window in get_rolling_token_windows(
                duo.encode(document["text"]),
                prefix_token=duo.tokenizer.bos_token_id,
                max_seq_len=MAX_LENGTH
                - 2,  # one token is left for the one that is generated, one for context
                context_len=1,
            )
        ]
        assert len(windows) > 1
        total += sum(log_likelihood(duo, context, continuation) for context, continuation in windows)
    size_bytes = sum(len(document["text"].encode()) for document in texts())
    words = sum(len(re.split(r"\s+", document["text"])) for document in texts())
    found = evaluated["source_text"]
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / size_bytes), rel=TOLERANCE)
    assert found["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=TOLERANCE)
