"""Keep a report where a document refers to it: the same content, one line for each record.

python tools/keep_report.py runs/text/evaluate/report.json docs/evaluation/text/report.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from decar.benchmarks.report import lines_of


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    target.write_text(lines_of(json.loads(source.read_text())))


if __name__ == "__main__":
    main()
