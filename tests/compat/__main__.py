"""Others' clients, unmodified, against a running ensemble: `make test-clients`.

    python -m tests.compat                    all of them
    python -m tests.compat llm outlines       those whose names have one of these in them

Each client's check runs in a process and an environment of its own, and has a time in which to end. The table in
docs/clients.md has what each came to when it was last run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from decar.server.vllm_adapter.versions import installed_version
from tests.helpers import Server

from . import ensemble
from .clients import CLIENTS, ENVIRONMENTS, Client
from .environments import NotInstalled, installed, version_of
from .table import Row, kept, table_of, write

ROOT = Path(__file__).parents[2]
CHECKS = Path(__file__).parent / "checks"
KEY = "the-clients-own"
FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(ensemble.POSITIONS), "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(256 << 20), "--max-num-seqs", "32", "--api-key", KEY),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # Else a grammar says that arguments are JSON, and leaves it to the model of which form, unless a tool is `strict`.
    *("--tool-strict-level", "parameter"),
    # Clients ask as their users do, who say neither: what they get is the same every time, and ends.
    *("--override-generation-config", '{"temperature": 0, "max_new_tokens": 128}'),
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)


def checked(client: Client, folder: Path, server: Server, directory: Path, log: Path) -> Row:
    """Install a client in ``folder``, and run its check against ``server``."""
    environment = ENVIRONMENTS[client.environment]
    try:
        program = installed(folder, environment)
    except NotInstalled as error:
        return Row(client.name, "", "not installed", str(error))
    version = version_of(client, environment, folder, program)
    check = CHECKS / client.check
    command = [str(program), str(check)]
    if client.check == "langchain_check.py":
        command = [
            str(program),
            "-m",
            "pytest",
            "-rxXf",
            "-oasyncio_mode=auto",
            "-oasyncio_default_fixture_loop_scope=session",  # langchain-openai keeps its connections
            "-oasyncio_default_test_loop_scope=session",
            "-q",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(CHECKS),
        ]
        command += ["--confcutdir", str(CHECKS), "-c", os.devnull, str(check)]
    with tempfile.TemporaryDirectory() as work:
        variables = {
            **{
                name: value
                for name, value in os.environ.items()
                if name not in ("OPENAI_API_KEY", "PYTHONPATH")
            },
            **{"DECAR_URL": server.url, "DECAR_KEY": KEY, "DECAR_MODEL": ensemble.NAME, "DECAR_WORK": work},
            **{"DECAR_TOKENIZER": str(directory / "experts" / ensemble.EXPERTS[0]), "HF_HUB_OFFLINE": "1"},
            "PYTHONPATH": os.pathsep.join([str(CHECKS), *([str(ROOT)] if environment.kind == "own" else [])]),
        }
        if environment.kind == "npm":  # modules are looked for where the script lies
            check = folder / client.check
            check.write_text((CHECKS / client.check).read_text())
            command = [str(program), str(check)]
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                env=variables,
                cwd=work,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(client.timeout_s)
            except subprocess.TimeoutExpired:
                return Row(client.name, version, "timed out", f"after {client.timeout_s:.0f} s")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # and what it may have started
                process.wait()
    return row_of(client, version, code, log.read_text(errors="replace"))


def row_of(client: Client, version: str, code: int, output: str) -> Row:
    """What a check that has printed ``output`` and ended with ``code`` came to."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    remarks = [line.removeprefix("remark: ") for line in lines if line.startswith("remark: ")]
    notes: tuple[str, ...] = ()
    if client.check == "langchain_check.py":
        remarks = [re.sub(r"=+| in [\d.]+s.*|, \d+ warnings?", "", lines[-1]).strip()] if lines else []
        notes = tuple(
            re.sub(r"^(XFAIL|XPASS|FAILED) \S*::", "", line)
            for line in lines
            if re.match("XFAIL|XPASS|FAILED", line)
        )
    if code:
        return Row(client.name, version, "fails", (remarks or lines[-1:] or [f"exit code {code}"])[-1], notes)
    return Row(client.name, version, "works", (remarks or ["nothing"])[-1], notes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of clients' names; none: all")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-clients")
    parser.add_argument("--logs", type=Path, default=ROOT / "runs" / "clients")
    options = parser.parse_args()
    chosen = [
        client
        for client in CLIENTS
        if not options.names or any(name in client.name for name in options.names)
    ]
    if not chosen:
        parser.error(f"no client is called so: {', '.join(client.name for client in CLIENTS)}")
    options.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and on the way out the server is ended
    versions = f"decar {importlib.metadata.version('decar')}, vLLM {installed_version()}"
    served = f"{versions}, Python {sys.version.split()[0]}"
    failed = False
    with tempfile.TemporaryDirectory() as temporary:
        directory = ensemble.make(Path(temporary) / "ensemble")
        server = Server.start(directory, options.logs / "server.log", FLAGS)
        try:
            for client in chosen:
                log = options.logs / f"{client.check.partition('.')[0]}.log"
                row = checked(client, options.environments / client.environment, server, directory, log)
                print(f"{row.client} {row.version}: {row.result} ({row.remark})", flush=True)
                for note in row.notes:
                    print(f"  {note}")
                newest = kept(options.logs / "rows.json", [row], [client.name for client in CLIENTS])
                write(ROOT / "docs" / "clients.md", table_of(newest, served))
                failed = failed or row.result in ("fails", "timed out")
            ended = server.stop()
        finally:
            server.kill()
    if ended:
        print(f"the server ended with {ended}: see {server.log}")
    return int(failed or ended != 0)


if __name__ == "__main__":
    sys.exit(main())
