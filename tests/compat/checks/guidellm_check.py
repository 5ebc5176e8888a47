"""guidellm: a benchmark of each API, every request answered with every token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import KEY, MODEL, SERVER, TOKENIZER, WORK, remark, seen

REQUESTS, TOKENS = 6, 8
for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
    report = WORK / f"{path.replace('/', '-')}.json"
    backend = {
        "kind": "openai_http",
        "target": SERVER,
        "model": MODEL,
        "request_format": path,
        "api_key": KEY,
    }
    data = {"kind": "synthetic_text", "prompt_tokens": 32, "output_tokens": TOKENS}
    options = {
        "backend": backend,
        "profile": {"kind": "concurrent", "streams": [2]},
        "constraint": {"kind": "max_requests", "count": REQUESTS},
        "tokenizer": {"kind": "hf_auto", "model": TOKENIZER},
        "data": data,
        "output": {"kind": "json", "path": str(report)},
    }
    command = [str(Path(sys.executable).with_name("guidellm")), "run", "--disable-console"]
    for name, value in options.items():
        command += [f"--{name}", json.dumps(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3_000:]
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == REQUESTS, totals
    assert totals["errored"] == 0, totals
    seen(path)
remark(f"{REQUESTS} requests each, all answered")
