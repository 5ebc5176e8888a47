"""llm, the command: models of a server that its configuration names, whole and streamed, schemas, a log."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from common import EXPERT, KEY, MODEL, URL, WORK, remark, seen

environment = {**os.environ, "LLM_USER_PATH": str(WORK)}
models = [
    {
        "model_id": f"our-{name.rpartition('/')[2]}",
        "model_name": name,
        "api_base": URL,
        "api_key_name": "decar",
        "supports_schema": True,
        "supports_tools": True,
    }
    for name in (MODEL, EXPERT)
]
(WORK / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
(WORK / "keys.json").write_text(json.dumps({"decar": KEY}))


def llm(*arguments: str) -> str:
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n")


for model in ("our-demo", "our-code"):
    streamed = llm("-m", model, "Hi", "-o", "max_tokens", "8")
    assert streamed
    assert llm("-m", model, "Hi", "-o", "max_tokens", "8", "--no-stream") == streamed
seen("prompts, whole and streamed")
assert json.loads(llm("-m", "our-demo", "Which city?", "--schema", "name, people int")) == {
    "name": "",
    "people": 3,
}
seen("schemas")
logged = [entry["response_json"]["model"] for entry in json.loads(llm("logs", "--json", "-n", "5"))]
assert {MODEL, EXPERT} == set(logged)
seen("its log names the model that was asked for")
remark()
