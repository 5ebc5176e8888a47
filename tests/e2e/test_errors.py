"""What is wrong is said once, clearly, in the place where the user looks: the response, or one line on stderr."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers import Server, assert_error, run_serve, wait_until
from tests.reference import ExpertSpec, Reference, make_ensemble, make_tokenizer

pytestmark = pytest.mark.timeout(300)


# ---------------------------------------------------------------------------------------------- requests


@pytest.fixture
def http(duo_server: Server) -> httpx.Client:
    return duo_server.http


def post(http: httpx.Client, path: str, **fields: Any) -> httpx.Response:
    body = {"model": "duo", "max_tokens": 2, **fields}
    if path == "/v1/chat/completions":
        body.setdefault("messages", [{"role": "user", "content": "hi"}])
    else:
        body.setdefault("prompt", "hi")
    # Not httpx's own JSON, which refuses to write NaN.
    return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


WRONG_DECAR: dict[str, tuple[Any, tuple[str, ...]]] = {
    "near-miss": ({"weights": {"coda": 1}}, ("'coda'", "'code'")),
    "stranger": ({"weights": {"code": 1, "xyz": 1}}, ("'xyz'", "'code'", "'prose'")),
    "negative": ({"weights": {"code": 1, "prose": -0.5}}, ("prose", "-0.5")),
    "nan": ({"weights": {"code": float("nan")}}, ("code", "nan")),
    "nan-as-text": ({"weights": {"code": "NaN"}}, ("code",)),
    "infinite": ({"weights": {"code": float("inf")}}, ("code", "inf")),
    "all-zero": ({"weights": {"code": 0, "prose": 0.0}}, ("zero",)),
    "no-weights": ({"weights": {}}, ("weights",)),
    "unknown-field": ({"wieghts": {"code": 1}}, ("wieghts", "'weights'")),
    "unknown-route": ({"route": "classifer"}, ("route", "'posterior'", "'prior'")),
    "unknown-rule": ({"rule": "average"}, ("rule", "'velocity'", "'logit'")),
    "decar-is-text": ("posterior", ("decar", "object")),
    "decar-is-a-list": ([], ("decar", "object")),
    "decar-is-a-number": (1, ("decar", "object")),
    "weights-is-a-list": ({"weights": [0.5, 0.5]}, ("weights",)),
    "weight-is-null": ({"weights": {"code": None}}, ("weights.code",)),
    "weight-is-text": ({"weights": {"code": "much"}}, ("weights.code", "much")),
    "weight-is-an-object": ({"weights": {"code": {}}}, ("weights.code",)),
    "route-is-a-number": ({"route": 5}, ("route",)),
    "trace-is-text": ({"trace": "maybe"}, ("trace", "maybe")),
}


@pytest.mark.engines
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(("decar", "words"), WRONG_DECAR.values(), ids=WRONG_DECAR)
def test_wrong_decar_fields(http: httpx.Client, path: str, decar: Any, words: tuple[str, ...]) -> None:
    error = assert_error(post(http, path, decar=decar), 400, *words)
    assert error["code"] == 400
    assert error["param"].split(".")[0] == "decar"


@pytest.mark.engines
def test_wrong_decar_fields_are_refused_before_a_stream_starts(http: httpx.Client) -> None:
    response = post(http, "/v1/completions", decar={"weights": {"code": -1}}, stream=True)
    assert_error(response, 400, "code")
    assert response.headers["content-type"].startswith("application/json")


@pytest.mark.engines
@pytest.mark.parametrize(
    "model", ["duo/stranger", "duo/", "duo/code/prose", "stranger", "stranger/code", "code"]
)
@pytest.mark.parametrize("decar", [None, {"weights": {"code": 1}}], ids=["plain", "weights"])
def test_unknown_models(http: httpx.Client, model: str, decar: Any) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        error = assert_error(post(http, path, model=model, decar=decar), 404, model)
        assert error["code"] == 404


@pytest.mark.engines
@pytest.mark.parametrize(
    "decar",
    [{"weights": {"code": 1}}, {"route": "prior"}, {"rule": "logit"}],
    ids=["weights", "route", "rule"],
)
def test_one_expert_alone_takes_no_mixing_options(http: httpx.Client, decar: Any) -> None:
    assert_error(post(http, "/v1/completions", model="duo/code", decar=decar), 400, "duo/code", "duo")


@pytest.mark.engines
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [5] * 600}, ("512",)),
        ({"prompt": [600]}, ("600",)),
        ({"prompt": [-1]}, ()),
        ({"prompt": []}, ()),
        ({"prompt": None}, ()),
        ({"max_tokens": -1}, ("max_tokens",)),
        ({"temperature": -1}, ("temperature",)),
        ({"temperature": "hot"}, ("temperature",)),
        ({"n": 0}, ("n",)),
        ({"logit_bias": {"600": 1}}, ("600",)),
        ({"logit_bias": {"-1": 1}}, ("logit_bias",)),
        ({"allowed_token_ids": [5, 600]}, ("allowed_token_ids", "600")),
        ({"stop_token_ids": [600]}, ("stop_token_ids", "600")),
        ({"logprob_token_ids": [-1], "logprobs": 1}, ("logprob_token_ids",)),
        ({"prompt": [[5], [600]]}, ("prompt", "600")),
        ({"logprobs": 1000}, ("logprobs",)),
        ({"vllm_xargs": {"decar": "x"}}, ("decar",)),
        ({"vllm_xargs": {"decar": [1, 2]}, "model": "duo/code"}, ("decar",)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "y"}},
                }
            },
            (),
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_invalid_requests(http: httpx.Client, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_error(post(http, "/v1/completions", **fields), 400, *words)


WRONG_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "unfinished": b"{",
    "no-value": b'{"model": "duo", "prompt": "x", "decar": }',
    "list": b"[]",
    "null": b"null",
    "text": b'"text"',
    "not-utf-8": b'{"model": "\xff"}',
    "too-deep": b"[" * 100_000,
}


@pytest.mark.engines
@pytest.mark.parametrize("body", WRONG_BODIES.values(), ids=WRONG_BODIES)
def test_bodies_that_are_no_json_object(http: httpx.Client, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert_error(http.post(path, content=body, headers={"content-type": "application/json"}), 400)


@pytest.mark.engines
def test_unknown_routes_and_methods(http: httpx.Client) -> None:
    assert_error(http.get("/v1/models/duo/stranger"), 404, "duo/stranger")
    assert_error(http.get("/v1/no-such-route"), 404)
    assert_error(http.get("/v1/completions"), 405)


@pytest.mark.engines
def test_no_error_above_has_cost_an_engine(duo_server: Server, http: httpx.Client) -> None:
    """Runs last of the requests: everything above was refused, and nothing broke."""
    assert post(http, "/v1/completions").status_code == 200
    assert duo_server.health() == 200
    wait_until(duo_server.is_idle, 10, "refused requests hold nothing")


# ---------------------------------------------------------------------------------------------- starting


@pytest.fixture
def broken(duo: Reference, tmp_path: Path) -> Path:
    """A copy of a good ensemble, for a test to break."""
    return Path(shutil.copytree(duo.directory, tmp_path / "duo"))


def assert_refused(directory: Path, *words: str, flags: tuple[str, ...] = ()) -> list[str]:
    """`decar serve` ends with one line that names the thing, before any engine starts. Returns stderr's lines."""
    done = run_serve(directory, *flags)
    assert done.returncode not in (0, None)
    assert done.returncode > 0, "killed by a signal"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines, "nothing on stderr"
    assert lines[-1].startswith("decar: error: "), done.stderr
    for word in words:
        assert word in lines[-1]
    assert "Traceback" not in done.stdout + done.stderr
    assert "EngineCore" not in done.stdout + done.stderr
    return lines


def edit_manifest(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = directory / "ensemble.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def _rename_second(manifest: dict[str, Any]) -> None:
    manifest["experts"][1]["name"] = "code"


WRONG_MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "unknown-key": (lambda m: m.update(nmae="x"), ("nmae", "'name'")),
    "two-of-a-name": (_rename_second, ("'code'",)),
    "path-outside": (lambda m: m["experts"][0].update(path="../code"), ("'code'", "../code")),
    "zero-prior": (lambda m: m["experts"][0].update(prior=0), ("prior",)),
    "unknown-rule": (lambda m: m.update(mixing={"rule": "average"}), ("rule", "average")),
    "no-experts": (lambda m: m.update(experts=[]), ("experts",)),
}


@pytest.mark.parametrize(("edit", "words"), WRONG_MANIFESTS.values(), ids=WRONG_MANIFESTS)
def test_a_bad_manifest(broken: Path, edit: Callable[[dict[str, Any]], Any], words: tuple[str, ...]) -> None:
    edit_manifest(broken, edit)
    assert len(assert_refused(broken, *words)) == 1


def test_no_ensemble_at_all(tmp_path: Path) -> None:
    assert len(assert_refused(tmp_path / "nowhere", "nowhere")) == 1
    assert len(assert_refused(tmp_path, "ensemble.json")) == 1
    (tmp_path / "ensemble.json").write_text("{")
    assert len(assert_refused(tmp_path, "ensemble.json", "JSON")) == 1


def test_missing_weights(broken: Path) -> None:
    (broken / "experts/prose/model.safetensors").unlink()
    assert len(assert_refused(broken, "'prose'", "safetensors")) == 1


def test_truncated_weights(broken: Path) -> None:
    weights = broken / "experts/prose/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert len(assert_refused(broken, "'prose'", "model.safetensors", "truncated")) == 1


def test_different_tokenizers(broken: Path) -> None:
    make_tokenizer(broken / "experts/prose", vocab_size=590)
    assert len(assert_refused(broken, "'code'", "'prose'", "tokenizer")) == 1


def test_port_taken(duo: Reference) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(duo.directory, port, "--port", flags=("--port", port))


def test_a_flag_that_nobody_has(duo: Reference) -> None:
    assert_refused(duo.directory, "--prot", "did you mean '--port'", flags=("--prot", "8410"))
    assert_refused(duo.directory, "--dtype", "float33", "float32", flags=("--dtype", "float33"))


def test_a_configuration_file_that_is_not_there(duo: Reference, tmp_path: Path) -> None:
    assert_refused(duo.directory, "nowhere.yaml", flags=("--config", str(tmp_path / "nowhere.yaml")))


def test_not_enough_memory(duo: Reference) -> None:
    flags = ("--port", "0", "--kv-cache-memory-bytes", str(10**15))
    assert_refused(duo.directory, "memory", "--kv-cache-memory-bytes", flags=flags)


def test_flags_that_decar_sets_itself(duo: Reference) -> None:
    assert_refused(duo.directory, "--worker-cls", flags=("--worker-cls", "x.Y"))


def test_flags_that_change_answers_behind_the_lockstep(duo: Reference) -> None:
    flags = ("--watermark-config", '{"scheme": "kgw"}')
    assert_refused(duo.directory, "--watermark-config", "leave it out", flags=flags)


@pytest.mark.parametrize("expert", ["code", "prose"])
def test_a_head_size_that_cpu_attention_lacks(broken: Path, expert: str) -> None:
    """vLLM would find out in the first forward pass, with 200 lines of traceback."""
    config_path = broken / "experts" / expert / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "head_dim": 24}))
    flags = ("--port", "0", "--dtype", "float32", "--max-model-len", "512")
    assert_refused(broken, f"'{expert}'", "LlamaForCausalLM", "24", "32, 64", "GPU", flags=flags)


def test_a_configuration_with_fewer_tokens_than_the_experts(broken: Path) -> None:
    flags = ("--port", "0", "--hf-overrides", '{"vocab_size": 300}')
    assert_refused(broken, "'code'", "300", "--hf-overrides", flags=flags)


@pytest.mark.engines
def test_an_engine_that_cannot_start_takes_the_others_along(tmp_path: Path) -> None:
    """Its weights lack a layer that its configuration names, which only the engine finds out."""
    specs = (ExpertSpec("code", "llama", 1, 0.5), ExpertSpec("prose", "llama", 2, 0.5))
    directory = make_ensemble(tmp_path / "duo", specs, name="duo")
    config_path = directory / "experts/prose/config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    before = set(Path("/dev/shm").glob("decar-*"))
    done = run_serve(directory, "--port", "0", "--enforce-eager", "--max-model-len", "512", deadline_s=240)
    assert done.returncode > 0
    [error] = [line for line in done.stderr.splitlines() if line.startswith("decar: error: ")]
    assert "expert 'prose': " in error
    assert "'code'" not in error
    assert "layers.2" in error, "the root cause"
    assert "decar: the end of prose's log:" in done.stderr
    assert re.search(r"^  \(prose pid=\d+\) ERROR .*ValueError", done.stderr, re.MULTILINE), "its last lines"
    assert "writes its log to" in done.stderr
    assert "INFO" not in done.stdout, "vLLM's log is in its file"
    assert set(Path("/dev/shm").glob("decar-*")) <= before
