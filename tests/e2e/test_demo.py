"""`make demo` as a newcomer runs it, once its environment is there: experts of a skill each answer as one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from decar.clients.child import free_port

pytestmark = [pytest.mark.engines, pytest.mark.soak, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
ROW = re.compile(
    r"^ ?(\w+ alone|the ensemble|one model, taught everything) +(\d+)% +(\d+)% +(\d+)%", re.MULTILINE
)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_ensemble_knows_what_none_of_its_experts_knows(tmp_path: Path, seed: int) -> None:
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    command = [sys.executable, "-m", "decar.clients.demo", "--port", str(free_port()), "--seed", str(seed)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1100, check=False)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stderr[-3000:]
    right = {who: int(whole) for who, _, _, whole in ROW.findall(done.stdout)}
    assert right.pop("the ensemble") >= 85
    assert right.pop("one model, taught everything") > 0
    assert right.keys() == {"roman alone", "words alone"}
    assert max(right.values()) <= 60
