"""`make demo`: train two experts, serve them as one model, and stream an answer. Runs the public commands only."""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import openai
from rich.console import Console

from decar.clients.chat import describe_weights, ensemble_of, stream_chat
from decar.clients.child import ServerDidNotStart, end_on_sigterm, serving

CONFIG = Path("configs/demo.yaml")
ENSEMBLE = Path("runs/demo/ensemble")
QUESTIONS = (
    "import os\nimport sys\n\ndef main(args):\n    ",
    "The assignment statement is used to",
)


@contextlib.contextmanager
def demo_server(directory: Path, port: int, log: Path, console: Console) -> Iterator[str]:
    """Serve ``directory`` until the block ends; give the /v1 address once the server is ready."""
    if _answers(port):
        raise SystemExit(f"something already listens on port {port}: stop it, or use `make demo PORT=...`")
    console.print(f"$ decar serve {directory} --port {port}   (log: {log})")
    command = [sys.executable, "-m", "decar.server", "serve", str(directory), "--log-file", str(log)]
    with contextlib.ExitStack() as stack:
        with console.status("starting the experts' engines"):
            try:
                base = stack.enter_context(serving(command, port, log)).base_url
            except ServerDidNotStart as error:
                raise SystemExit(str(error)) from None
        yield f"{base}/v1"


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    """Run the demo; with a terminal, keep serving until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    end_on_sigterm()
    console = Console(highlight=False)
    console.print(f"$ decar-train run {CONFIG}")
    subprocess.run([sys.executable, "-m", "decar.training", "run", str(CONFIG)], check=True)
    with demo_server(ENSEMBLE, port, ENSEMBLE.parent / "server.log", console) as base_url:
        client = openai.OpenAI(base_url=base_url, api_key="none")
        ensemble = ensemble_of(client)
        names = [expert["name"] for expert in ensemble["experts"]]
        for question in QUESTIONS:
            console.print(f"\n[bold]you:[/bold] {question}")
            console.print(f"[bold]{ensemble['name']}:[/bold] ", end="")
            weights: list[list[float]] = []
            messages = [{"role": "user", "content": question}]
            for text, token_weights in stream_chat(
                client, messages, ensemble["name"], 64, 0.7, {"trace": True}
            ):
                console.print(text, end="", markup=False, soft_wrap=True)
                weights += token_weights
            console.print()
            console.print(describe_weights(names, weights), style="dim")
        console.print(f"\nThe server listens on {base_url} (model {ensemble['name']!r}).")
        if sys.stdin.isatty() and sys.stdout.isatty():
            console.print("Try `decar chat` in another terminal. Ctrl-C stops the server.")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(3600)
    console.print(f"Stopped. Start it again with: decar serve {ENSEMBLE}")


if __name__ == "__main__":
    main()
