"""`vllm bench serve`: completions and chats, every request answered with every token."""

from __future__ import annotations

import json
import os
import subprocess

from common import EXPERT, KEY, MODEL, SERVER, TOKENIZER, WORK, remark, seen

from tests.e2e.test_clients import bench_serve

REQUESTS, TOKENS = 16, 16
for backend, path in (("openai", "completions"), ("openai-chat", "chat/completions")):
    for model in (MODEL, EXPERT):
        command = bench_serve(backend, path, SERVER, model, TOKENIZER, REQUESTS, TOKENS, WORK)
        environment = {**os.environ, "OPENAI_API_KEY": KEY}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2_000:]
        result = json.loads((WORK / "result.json").read_text())
        assert (result["completed"], result["failed"]) == (REQUESTS, 0)
        assert result["total_output_tokens"] == REQUESTS * TOKENS
    seen(backend)
remark(f"{REQUESTS} requests each, all answered")
