"""vLLM's flags as they are known without vLLM: what is told at once, and that nothing is told wrongly."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from decar.router.errors import StartError
from decar.server.vllm_adapter import cache as cache_module
from decar.server.vllm_adapter.arguments import make_parser, offered_flags, refuse_reserved_early
from decar.server.vllm_adapter.flags import (
    SAMPLES,
    Flag,
    check_flags,
    described_flags,
    help_text,
    known_flags,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's own stays as it is."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def flags(cache: Path) -> tuple[Flag, ...]:
    assert known_flags() is None
    return described_flags()


def test_they_are_described_once(
    flags: tuple[Flag, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert described_flags() == known_flags() == flags
    assert len(list((cache / "decar").iterdir())) == 1


def test_another_vllm_has_another_description(
    flags: tuple[Flag, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "installed_version", lambda: "0.31.0")
    assert known_flags() is None


def test_a_changed_source_has_another_description(
    flags: tuple[Flag, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm/config").mkdir(parents=True)
    (tmp_path / "vllm/__init__.py").touch()
    source = tmp_path / "vllm/config/model.py"
    source.write_text("a = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    before = cache_module.cache_file("flags")
    source.write_text("a = 10")
    assert cache_module.cache_file("flags") != before


def test_what_cannot_be_read_is_described_anew(flags: tuple[Flag, ...], cache: Path) -> None:
    [file] = (cache / "decar").iterdir()
    whole = file.read_text()
    for broken in ("", "{}", "[1]", '[{"names": []}]'):
        file.write_text(broken)
        assert not known_flags()
    file.write_text(whole)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--prot", "8410"], "--prot is a flag of neither decar nor vLLM; did you mean '--port'?"),
        (["--port", "abc"], "--port: 'abc' is no integer"),
        (["--port"], "--port: expected one argument"),
        (["--dtype", "float33"], "'float33' is none of .*; did you mean 'float3"),
        (["--max-num-seqs=many"], "--max-num-seqs: 'many' is no integer"),
        (["--gpu-memory-utilization", "half"], "'half' is no integer or number"),
        (["--min-expert", "2"], "did you mean '--min-experts'"),
        (["--qwertyuiop"], "`decar serve --help=all` lists them"),
        (["some/model"], "ensemble directory"),
        (["--enable-lora"], "--enable-lora cannot be passed: .*leave it out"),
        (
            ["--pipeline-parallel-size", "2"],
            "--pipeline-parallel-size cannot be passed: a pipeline computes several",
        ),
        (["--pipeline_parallel_size=2"], "--pipeline-parallel-size cannot be passed"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told(flags: tuple[Flag, ...], given: list[str], says: str) -> None:
    with pytest.raises(StartError, match=says):
        refuse_reserved_early(check_flags(given, flags, ["--min-experts"]), flags)


@pytest.mark.parametrize(
    "given",
    [
        ["--max_model_len", "512", "--max-num-seqs=8", "-O3"],
        ["--max-model-len", "1k", "--kv-cache-memory-bytes", "2G"],
        ["--max-model-len", "auto", "--seed", "-1", "--dtype", "auto"],
        ["--compilation-config.mode", "3", "--hf-overrides.rope_theta=1e6", "-cc.mode=0"],
        ["--hf-overrides", '{"vocab_size": 300}', "--no-enable-prefix-caching"],
        ["--api-key", "a", "b", "--tensor-parallel-size", "2", "--enforce-eag"],
        ["--structured-outputs-config", '{"backend": "xgrammar"}'],
        [],
    ],
    ids=str,
)
def test_what_vllm_takes_passes(flags: tuple[Flag, ...], given: list[str]) -> None:
    refuse_reserved_early(check_flags(given, flags), flags)
    make_parser().parse_args(given)  # so it does


def test_no_value_is_refused_that_vllms_own_parser_takes(flags: tuple[Flag, ...]) -> None:
    """Each flag alone, with each choice that it has, and a value of every shape."""
    actions = {name: action for action in make_parser()._actions for name in action.option_strings}
    for flag in flags:
        action = actions[flag.names[0]]
        for text in (*flag.choices, *SAMPLES.values(), "-1", "0", "1e3", '"text"', "[1]", "null", "None"):
            if not callable(action.type):
                continue
            try:
                value = action.type(text)
            except (ValueError, TypeError, LookupError, AssertionError, argparse.ArgumentTypeError):
                continue
            if not action.choices or value in action.choices:
                assert flag.value(text) == text


def test_help_all_has_each_flag_that_an_ensemble_can_have(flags: tuple[Flag, ...]) -> None:
    said = help_text(offered_flags(), 100)
    words = said.replace(",", " ").split()
    assert {"--port", "--max-model-len", "--dtype"} <= set(words)
    assert "--pipeline-parallel-size" not in words
    assert "--tensor-parallel-size" in words
    assert max(map(len, said.splitlines())) <= 100
