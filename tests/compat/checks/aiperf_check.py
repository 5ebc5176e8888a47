"""aiperf: a profile of chats, one of completions and one of responses, every request answered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from common import EXPERT, KEY, MODEL, SERVER, TOKENIZER, WORK, remark, seen

REQUESTS = 6
# Offline it looks for a tokenizer in the hub's cache alone, and never in a folder.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
for kind, model in (("chat", MODEL), ("completions", EXPERT)):
    folder = WORK / kind
    command = [str(Path(sys.executable).with_name("aiperf")), "profile", "--model", model, "--url", SERVER]
    command += ["--endpoint-type", kind, "--streaming", "--tokenizer", TOKENIZER, "--api-key", KEY]
    command += ["--request-count", str(REQUESTS), "--concurrency", "2", "--ui", "none"]
    command += ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", "8"]
    command += ["--output-artifact-dir", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3_000:]
    [report] = folder.rglob("profile_export_aiperf.json")
    profile = json.loads(report.read_text())
    assert profile["request_count"]["avg"] == REQUESTS, profile["request_count"]
    assert not (profile.get("error_request_count") or {}).get("avg"), profile
    seen(kind)
remark(f"{REQUESTS} requests each, all answered")
