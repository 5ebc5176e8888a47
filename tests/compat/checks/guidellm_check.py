"""guidellm: a benchmark of chats and one of completions, every request answered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import KEY, MODEL, SERVER, TOKENIZER, WORK, remark, seen

REQUESTS, TOKENS = 6, 8
for kind in ("chat_completions", "text_completions"):
    report = WORK / f"{kind}.json"
    command = [str(Path(sys.executable).with_name("guidellm")), "benchmark", "run", "--target", SERVER]
    command += ["--model", MODEL, "--processor", TOKENIZER, "--request-type", kind, "--profile", "concurrent"]
    command += ["--rate", "2", "--max-requests", str(REQUESTS), "--output-path", str(report)]
    command += ["--data", f"prompt_tokens=32,output_tokens={TOKENS}"]
    command += ["--backend-kwargs", json.dumps({"api_key": KEY})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3_000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS, totals
    assert totals["errored"] == 0, totals
    seen(kind)
remark(f"{REQUESTS} requests each, all answered")
