"""`make demo`: train two experts of a skill each, apart, serve them as one model, and ask what neither knows alone.
Runs the public commands only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from decar.clients.api import connected, ensemble_of, streamed
from decar.clients.child import ServerDidNotStart, end_on_sigterm, serving
from decar.clients.exam import asked, asked_of_checkpoint, read_questions, shares_right
from decar.clients.picture import legend, spoken

if TYPE_CHECKING:
    import openai

CONFIG = Path("configs/demo.yaml")
DATA = Path("data/demo")
WORK_DIR = Path("runs/demo")
EXPERTS = ("roman", "words")
QUESTIONS = ("1987 in Roman numerals?", "1987 in words?", "2026 in Roman numerals?", "640 in words?")


def main() -> None:
    """Run the demo; with a terminal, keep serving until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0, help="of data and training")
    options = parser.parse_args()
    end_on_sigterm()
    console = Console(highlight=False)
    if _answers(options.port):
        raise SystemExit(
            f"something already listens on port {options.port}: stop it, or use `make demo PORT=...`"
        )
    train(console, options.seed)
    ensemble = WORK_DIR / "ensemble"
    with demo_server(ensemble, options.port, WORK_DIR / "server.log", console) as base_url:
        client = connected(base_url, "none")
        name = ensemble_of(client)["name"]
        for question in QUESTIONS:
            show_answer(console, client, name, question)
        show_exam(console, client, name)
        console.print(f"\nThe server listens on {base_url} (model {name!r}).")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Try `decar chat` in another terminal. Ctrl-C stops the server.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    console.print(f"Stopped. Start it again with: decar serve {ensemble}")


def train(console: Console, seed: int) -> None:
    """Two experts at once, which hear nothing of each other; then the ensemble, and what it is held against."""
    settings = ["--set", f"seed={seed}"] if seed else []
    decar_train = [sys.executable, "-m", "decar.training"]
    skills = [sys.executable, "-m", "decar.training.skills", str(DATA), "--seed", str(seed)]
    _run(console, f"python -m decar.training.skills {DATA}", [skills])
    _run(console, f"decar-train partition {CONFIG}", [[*decar_train, "partition", str(CONFIG), *settings]])
    at_once = [[*decar_train, "expert", name, str(CONFIG), *settings] for name in EXPERTS]
    _run(console, " & ".join(f"decar-train expert {name} {CONFIG}" for name in EXPERTS), at_once)
    for command in ("run", "centralized"):
        _run(console, f"decar-train {command} {CONFIG}", [[*decar_train, command, str(CONFIG), *settings]])


def show_answer(console: Console, client: openai.OpenAI, ensemble: str, question: str) -> None:
    """Stream an answer, each token in its experts' colour."""
    console.print(f"\n[bold]you:[/bold] {question}")
    console.print(f"[bold]{ensemble}:[/bold] ", end="")
    messages = [{"role": "user", "content": question}]
    for piece in streamed(client, messages, ensemble, 48, 0.0, {"trace": True}):
        console.print(spoken(piece), end="", soft_wrap=True)
    console.print()
    console.print(legend(EXPERTS))


def show_exam(console: Console, client: openai.OpenAI, ensemble: str) -> None:
    """Ask what nobody has been taught: each expert, the ensemble, and one model that was taught everything."""
    questions = read_questions(DATA / "questions.jsonl")
    table = Table("who", *EXPERTS, "all", box=box.SIMPLE_HEAD, pad_edge=False)
    with console.status("asking"):
        answers = {f"{name} alone": asked(client, f"{ensemble}/{name}", questions) for name in EXPERTS}
        answers["the ensemble"] = asked(client, ensemble, questions)
        answers["one model, taught everything"] = asked_of_checkpoint(WORK_DIR / "centralized", questions)
    for who, said in answers.items():
        shares = shares_right(questions, said)
        whole = sum(shares.values()) / len(shares)
        table.add_row(who, *(f"{shares[name]:.0%}" for name in EXPERTS), f"{whole:.0%}")
    console.print(f"\n{len(questions)} questions about numbers that nobody was taught, answered right:")
    console.print(table)
    console.print(
        "Nothing of the ensemble has seen both skills; the last model has, in as many steps as both experts together."
    )


@contextlib.contextmanager
def demo_server(directory: Path, port: int, log: Path, console: Console) -> Iterator[str]:
    """Serve ``directory`` until the block ends; give the /v1 address once the server is ready."""
    console.print(f"\n$ decar serve {directory} --port {port}   (log: {log})")
    command = [sys.executable, "-m", "decar.server", "serve", str(directory), "--log-file", str(log)]
    with contextlib.ExitStack() as stack:
        with console.status("starting the experts' engines"):
            try:
                base = stack.enter_context(serving(command, port, log)).base_url
            except ServerDidNotStart as error:
                raise SystemExit(str(error)) from None
        yield f"{base}/v1"


def _run(console: Console, shown: str, commands: Sequence[Sequence[str]]) -> None:
    """Run commands at once, each in one thread, as such small models have nothing for two; several print by lines."""
    console.print(f"\n$ {shown}")
    alone = len(commands) == 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as stack:
        output = None if alone else subprocess.PIPE
        running = [
            stack.enter_context(subprocess.Popen(command, env=environment, stdout=output, text=not alone))
            for command in commands
        ]
        readers = [
            Thread(target=_print_lines, args=(console, child.stdout)) for child in running if child.stdout
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        for command, child in zip(commands, running, strict=True):
            if child.wait():
                for other in running:
                    other.terminate()
                raise SystemExit(f"this failed: {' '.join(command)}")


def _print_lines(console: Console, lines: IO[str]) -> None:
    for line in lines:
        console.print(line.rstrip(), markup=False, soft_wrap=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    main()
