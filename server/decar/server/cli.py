"""The `decar` command. Knows its arguments; imports vLLM only when a server starts."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

import decar
from decar.router import Ensemble
from decar.router.errors import DecarError, StartError
from decar.server.placement import gib, place, visible_gpus

app = typer.Typer(
    help="Serve independently trained experts as one language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Directory = Annotated[Path, typer.Argument(help="An ensemble directory, as `decar-train export` writes it.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"decar {decar.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Nothing to do: typer wants a function to hang the options on that come before a command."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    directory: Directory,
    context: typer.Context,
    placement: Annotated[
        str | None, typer.Option(help="Which GPU each expert runs on: code=0,prose=1.")
    ] = None,
    allow_untested_vllm: Annotated[
        bool, typer.Option("--allow-untested-vllm", help="Try a vLLM that decar is not tested with.")
    ] = False,
    min_experts: Annotated[
        int, typer.Option(min=1, help="How many experts have to live for /health to answer 200.")
    ] = 1,
    engine_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds without a step after which an engine is ended and started again."
        ),
    ] = 30.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(
            min=0.0, help="Seconds that running requests have left when the server is told to stop."
        ),
    ] = 30.0,
    max_num_queued_reqs: Annotated[
        int | None,
        typer.Option(
            min=0, help="How many requests may wait before more get 503.  [default: 4 * --max-num-seqs]"
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="DECAR_ADMIN_KEY",
            show_envvar=True,
            help="Who gives it as API key sees paths and process ids, and may reload; without one, nobody does.",
        ),
    ] = None,
    reload_timeout: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds that answers may still take when their expert is exchanged."),
    ] = 30.0,
    max_experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many experts there is room for when a reload adds some.",
            show_default="those there are",
        ),
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Offer no page (the playground) at /.")] = False,
) -> None:
    """Serve an ensemble over the OpenAI API.

    Every further flag is vLLM's own: --host, --port, --api-key, --max-model-len, --dtype, ... An engine flag
    goes to every expert's engine.
    """
    from decar.server.serve import raise_on_sigterm, serve

    raise_on_sigterm()
    serve(
        directory,
        context.args,
        placement,
        allow_untested_vllm,
        min_experts=min_experts,
        engine_timeout_s=engine_timeout,
        shutdown_timeout_s=shutdown_timeout,
        max_queued=max_num_queued_reqs,
        admin_key=admin_key,
        reload_timeout_s=reload_timeout,
        max_experts=max_experts,
        ui=not no_ui,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is stopped; native libraries would only report their leaks from here on


@app.command()
def reload(
    url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:8000",
    admin_key: Annotated[
        str | None, typer.Option(envvar="DECAR_ADMIN_KEY", show_envvar=True, help="The server's --admin-key.")
    ] = None,
) -> None:
    """Have a running server read its directory again and exchange what has changed, one expert at a time.

    Prints what has been exchanged, or why nothing is; returns when that is done. A server without --admin-key is told
    by SIGHUP, and its log has the outcome.
    """
    import httpx

    headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        answer = httpx.post(f"{url.rstrip('/')}/v1/ensemble/reload", headers=headers, timeout=None)
        said = answer.json()
        message = said["message"] if answer.is_success else said["error"]["message"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise StartError(f"{url} does not answer as a decar server does: {error!r}") from None
    if not answer.is_success:
        raise StartError(message)
    print(message)


@app.command()
def inspect(directory: Directory) -> None:
    """Show an ensemble's experts, sizes, priors, router and tokenizer, and every problem found."""
    console = Console(highlight=False)
    ensemble, problems = Ensemble.inspect(directory)
    if ensemble is not None:
        _describe(ensemble, console)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        raise typer.Exit(1)
    console.print("no problems found", style="green")


def _describe(ensemble: Ensemble, console: Console) -> None:
    manifest = ensemble.manifest
    console.print(f"[bold]{ensemble.name}[/bold]: router {manifest.router.kind}, rule {manifest.mixing.rule}")
    columns = ("expert", "architecture", "parameters", "size", "prior", "vocab", "positions")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    total = sum(expert.prior for expert in manifest.experts)
    fingerprints: dict[str, list[str]] = {}
    for expert in ensemble.experts:
        try:
            parameters, fingerprint = f"{expert.num_parameters / 1e6:,.1f} M", expert.tokenizer_fingerprint
            size = f"{expert.weight_bytes / 2**20:,.1f} MiB"
        except (DecarError, OSError, ValueError):
            parameters = fingerprint = size = "unreadable"
        fingerprints.setdefault(fingerprint, []).append(expert.name)
        table.add_row(
            expert.name,
            expert.architecture,
            parameters,
            size,
            f"{expert.prior / total:.3f}",
            f"{expert.vocab_size:,}",
            f"{expert.max_positions:,}" if expert.max_positions else "?",
        )
    console.print(table)
    _describe_places(ensemble, console)
    for fingerprint, names in fingerprints.items():
        console.print(f"tokenizer {fingerprint}: {', '.join(names)}")


def _describe_places(ensemble: Ensemble, console: Console) -> None:
    """Where `decar serve` would put the engines on this machine, with its defaults."""
    try:
        gpus = visible_gpus()
        places = place(ensemble, gpus)
    except (DecarError, OSError) as error:
        console.print(f"no place for its engines on this machine: {error}", style="yellow")
        return
    table = Table("expert", "runs on", "weights", "KV cache", "besides", "in all", box=box.SIMPLE_HEAD)
    for placed in places:
        table.add_row(
            placed.expert,
            "CPU" if placed.gpu is None else f"GPU {placed.gpu} ({gpus[placed.gpu].name})",
            gib(placed.weight_bytes, 2),
            "what is left" if placed.kv_bytes is None else gib(placed.kv_bytes, 2),
            f"about {gib(placed.overhead_bytes, 2)}",
            f"at least {gib(placed.needed_bytes, 2)}"
            if placed.kv_bytes is None
            else f"about {gib(placed.needed_bytes, 2)}",
        )
    console.print(table)


def main() -> None:
    """Run the command; a `DecarError` is one line on stderr and exit code 1."""
    logging.basicConfig(format="decar: %(message)s")
    logging.getLogger("decar").setLevel(logging.INFO)
    for command in importlib.metadata.entry_points(group="decar.commands"):
        if sys.argv[1:2] not in ([], ["--help"], [command.name]):
            continue  # what is not asked for may take seconds to import
        loaded = command.load()
        if isinstance(loaded, typer.Typer):
            app.add_typer(loaded, name=command.name)
        else:
            app.command(name=command.name)(loaded)
    try:
        app()
    except DecarError as error:
        print(f"decar: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
