"""lm-evaluation-harness: tasks of one's own, by log-likelihood and by generation, over completions and chats."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from common import EXPERT, KEY, MODEL, TOKENIZER, URL, WORK, remark, seen

questions = [
    {"question": f"{a} + {b} =", "choices": [str(a + b), "x"], "gold": 0} for a in range(4) for b in range(2)
]
data = WORK / "sums.jsonl"
data.write_text("".join(json.dumps(question) + "\n" for question in questions))
common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
common |= {"doc_to_text": "{{question}}", "num_fewshot": 0}
choice = {
    "task": "sums",
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
}
choice |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
said = {"task": "said", "output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
said |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
said |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
for task in (choice, said):
    (WORK / f"{task['task']}.yaml").write_text(json.dumps(common | task))  # JSON is YAML


def evaluate(kind: str, path: str, tasks: str, model: str, *more: str) -> dict[str, dict[str, float]]:
    arguments = f"model={model},base_url={URL}/{path},tokenizer={TOKENIZER},num_concurrent=4,max_retries=1"
    output = WORK / f"{kind}-{model.replace('/', '-')}"
    command = [sys.executable, "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", tasks]
    command += ["--include_path", str(WORK), "--output_path", str(output), *more]
    done = subprocess.run(
        command, env={**os.environ, "OPENAI_API_KEY": KEY}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    [report] = output.rglob("results_*.json")
    results: dict[str, dict[str, float]] = json.loads(report.read_text())["results"]
    return results


for model in (MODEL, EXPERT):
    scores = evaluate("local-completions", "completions", "sums,said", model)
    assert 0 <= scores["sums"]["acc,none"] <= 1
    assert 0 <= scores["said"]["exact_match,none"] <= 1
seen("local-completions: choices and texts")
chats = evaluate("local-chat-completions", "chat/completions", "said", MODEL, "--apply_chat_template")
assert 0 <= chats["said"]["exact_match,none"] <= 1
seen("local-chat-completions: texts")
remark()
