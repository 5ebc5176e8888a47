"""`StepV2` on vLLM's own request states, in a process of its own: its kernels run in Triton's interpreter there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKS = ROOT / "tests/server/checks_of_runner_v2.py"


def test_runner_v2() -> None:
    path = os.pathsep.join(filter(None, (str(ROOT / "tests/v2_on_cpu"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
