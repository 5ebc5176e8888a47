"""What a start is refused for before anything starts, and how it is said why an engine failed."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from decar.router.errors import StartError
from decar.server.protocol.machine import check_memory_order
from decar.server.serve import serve
from decar.server.vllm_adapter.failures import Failures, Progress, _report_errors, _report_progress, reason_of


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "riscv64", "ppc64le", ""])
def test_other_processors_than_x86_64_are_refused(
    monkeypatch: pytest.MonkeyPatch, machine: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(StartError, match="x86-64") as error:
        serve(tmp_path, [])
    assert (machine or "unknown") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("machine", ["x86_64", "AMD64"])
def test_x86_64_is_not(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    check_memory_order()


@pytest.fixture
def failures() -> Iterator[Failures]:
    failures = Failures()
    before = logging.getLogRecordFactory()
    yield failures
    logging.setLogRecordFactory(before)
    failures.close()


def test_the_first_error_of_each_engine_is_told(failures: Failures) -> None:
    names = ["code", "prose"]
    assert failures.told(names) is None
    logger = logging.getLogger("vllm.of.this.test")
    _report_errors(1, failures.address)
    logger.error("nothing was raised")
    logger.warning("it goes on", exc_info=ValueError("not an error"))
    assert failures.told(names) is None
    try:
        try:
            raise KeyError("layers.2")
        except KeyError as error:
            raise RuntimeError("an engine failed") from error
    except RuntimeError:
        logger.exception("it failed")
    logger.error("and then", exc_info=OSError("what follows"))
    assert failures.told(names) == "expert 'prose': KeyError: 'layers.2'"
    assert failures.told(names) == "expert 'prose': KeyError: 'layers.2'"


def test_what_engines_log_is_heard_while_they_start(failures: Failures) -> None:
    progress = Progress()
    _report_progress(1, progress.address)
    logger = logging.getLogger("vllm.of.this.test")
    logger.warning("Loading %s\n took %d s", "weights", 3)
    assert list(progress.heard()) == [(1, "Loading weights took 3 s")]
    assert list(progress.heard()) == []
    progress.close()
    logger.warning("nobody listens")
    assert list(progress.heard()) == []


def test_failed_engines_are_named(failures: Failures) -> None:
    _report_errors(1, failures.address)
    logging.getLogger("vllm.of.this.test").error("it failed", exc_info=OSError("why"))
    assert failures.of(["code", "prose"]) == ["prose"]


def test_nobody_need_listen_any_more(failures: Failures) -> None:
    _report_errors(0, failures.address)
    failures.close()
    logging.getLogger("vllm.of.this.test").error("it failed", exc_info=OSError("late"))


def test_a_reason_is_one_line() -> None:
    assert reason_of(ValueError("one\n  two")) == "ValueError: one two"
    assert reason_of(AssertionError()) == "AssertionError"
    assert len(reason_of(ValueError("x" * 10_000))) < 500
