"""Peak memory of a partition, in a process of its own: `python -m tests.training.measure_partition CONFIG.yaml`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from decar.training.config import load_config
from decar.training.partition.stage import make_partition, partition_stage

# What stays loaded whatever the corpus.
import matplotlib.pyplot  # noqa: F401 isort: skip
import pyarrow.parquet  # noqa: F401 isort: skip
import sklearn.cluster  # noqa: F401 isort: skip


def main() -> None:
    config = load_config(Path(sys.argv[1]), sys.argv[2:])
    report = make_partition(config, partition_stage(config))
    # Not getrusage: its peak is that of the parent too, until the new program starts.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(report.documents, int(peak[1]) * 1024)


if __name__ == "__main__":
    main()
