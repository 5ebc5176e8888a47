"""schemathesis on /openapi.json: no server error, and answers as they are described."""

from __future__ import annotations

import re
import subprocess
import sys

from common import KEY, SERVER, WORK, remark

CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance,ignored_auth"
command = [sys.executable, "-m", "schemathesis.cli", "run", f"{SERVER}/openapi.json", "--checks", CHECKS]
command += [
    "--phases",
    "examples,fuzzing",
    "--max-examples",
    "5",
    "--max-time",
    "150",
    "--seed",
    "17",
]
command += ["--workers", "1", "--request-timeout", "120", "--no-shrink", "--suppress-health-check", "all"]
command += [
    "--warnings",
    "off",
    "--no-color",
    "--continue-on-failure",
    "--header",
    f"Authorization: Bearer {KEY}",
]
done = subprocess.run(command, cwd=WORK, capture_output=True, text=True, check=False)
print(done.stdout[-20_000:])
assert done.returncode == 0, done.stdout[-4_000:] + done.stderr[-2_000:]
cases = re.search(r"(\d[\d,]*) generated", done.stdout)
remark(*CHECKS.split(","), f"{cases[1]} cases" if cases else "")
