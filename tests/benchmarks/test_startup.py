"""`decar bench startup` times what it says."""

import pytest

from decar.benchmarks import startup


def test_each_repeat_is_timed_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(startup.subprocess, "run", lambda command, **_: ran.append(command))
    assert len(startup.measure(["--help"], repeats=3)) == 3
    assert len(ran) == 4
    assert all(command[1:] == ["-m", "decar", "--help"] for command in ran)
