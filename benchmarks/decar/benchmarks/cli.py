"""Measure what serving an ensemble costs."""

import os
import sys

import typer

from decar.benchmarks.failures import failures
from decar.benchmarks.kernel import kernel
from decar.benchmarks.protocol import protocol
from decar.benchmarks.serve import serve
from decar.benchmarks.startup import startup
from decar.benchmarks.ttft import ttft


def _leave(*_: object, **__: object) -> None:
    """All is written; native libraries would only report their leaks from here on."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


bench = typer.Typer(
    help="Measure what serving an ensemble costs.", no_args_is_help=True, result_callback=_leave
)
bench.command()(serve)
bench.command()(ttft)
bench.command()(kernel)
bench.command()(protocol)
bench.command()(startup)
bench.command()(failures)
