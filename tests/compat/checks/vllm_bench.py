"""`vllm bench serve`: completions and chats, every request answered with every token."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from common import EXPERT, KEY, MODEL, SERVER, TOKENIZER, WORK, remark, seen

from tests.e2e.test_clients import VLLM

REQUESTS, TOKENS = 16, 16
for backend, path in (("openai", "completions"), ("openai-chat", "chat/completions")):
    for model in (MODEL, EXPERT):
        command = [
            sys.executable,
            "-c",
            VLLM,
            "bench",
            "serve",
            "--backend",
            backend,
            "--endpoint",
            f"/v1/{path}",
        ]
        command += ["--base-url", SERVER, "--model", model, "--tokenizer", TOKENIZER, "--ignore-eos"]
        command += [
            "--dataset-name",
            "random",
            "--random-input-len",
            "24",
            "--random-output-len",
            str(TOKENS),
        ]
        command += ["--num-prompts", str(REQUESTS), "--max-concurrency", "8", "--save-result"]
        command += ["--result-dir", str(WORK), "--result-filename", "result.json"]
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2_000:]
        result = json.loads((WORK / "result.json").read_text())
        assert (result["completed"], result["failed"]) == (REQUESTS, 0)
        assert result["total_output_tokens"] == REQUESTS * TOKENS
    seen(backend)
remark(f"{REQUESTS} requests each, all answered")
