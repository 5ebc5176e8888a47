"""litellm's proxy in front of decar: chats, streams, messages, errors, by plain HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from common import CHAT, EXPERT, KEY, MODEL, TRACE, URL, WORK, remark, seen

MASTER = "sk-of-the-proxy"
config = {
    "model_list": [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": URL, "api_key": KEY}}
        for name in (MODEL, EXPERT)
    ],
    "litellm_settings": {"num_retries": 0},
    "general_settings": {"master_key": MASTER},
}
(WORK / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [str(Path(sys.executable).with_name("litellm")), "--config", str(WORK / "config.yaml")]
command += ["--host", "127.0.0.1", "--port", str(port)]
proxy = subprocess.Popen(command, env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"})
try:
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {MASTER}"}, timeout=120
    )
    end = time.monotonic() + 240
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health/liveliness").status_code == 200:
                break
        assert proxy.poll() is None, "the proxy has ended"
        assert time.monotonic() < end, "the proxy does not start"
        time.sleep(1)

    for name in (MODEL, EXPERT):
        body = {"model": name, "messages": CHAT, "max_tokens": 8}
        whole = client.post("/v1/chat/completions", json={**body, **TRACE})
        assert whole.status_code == 200, whole.text
        assert whole.json()["model"].endswith(name), whole.text
        assert whole.json()["decar"]["leader"], whole.text
        lines = [
            line
            for line in client.post("/v1/chat/completions", json={**body, "stream": True}).iter_lines()
            if line
        ]
        assert lines[-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        said = "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )
        assert said == whole.json()["choices"][0]["message"]["content"]
        message = client.post("/v1/messages", json=body).json()
        assert message["content"][0]["text"].startswith(said), message  # it asks for 16 tokens at least
    seen("chats, streams, the decar object, messages")
    wrong = client.post("/v1/chat/completions", json={**body, "decar": {"rule": "x"}})
    assert wrong.status_code == 400, wrong.text
    assert "decar.rule" in wrong.text
    seen("errors")
finally:
    proxy.terminate()
    proxy.wait(30)
remark()
