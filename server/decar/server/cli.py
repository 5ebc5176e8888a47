"""The `decar` command. Knows its arguments; imports what a command needs when it runs: help has to be there at once."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import decar
from decar.server.commands import Commands, InspectCommand, ServeCommand

app = typer.Typer(
    cls=Commands,
    help="Serve independently trained experts as one language model.",
    no_args_is_help=True,
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


@app.command(cls=ServeCommand, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    directory: Directory,
    context: typer.Context,
    placement: Annotated[
        str | None,
        typer.Option(
            help="Which GPU each expert runs on: code=0,prose=1; on several: code=0+1,prose=2. With --ray, which node: "
            "code=node:ada,prose=node:grace; and which of its GPUs: code=gpu:0@ada,prose=gpu:0+1@grace."
        ),
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
            min=0,
            help="How many requests may wait before more get 503.",
            show_default="4 * --max-num-seqs",
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
    simulated_hosts: Annotated[
        int,
        typer.Option(
            min=1,
            help="Have experts on so many parts of this machine that share no memory, to try what hosts would do.",
        ),
    ] = 1,
    wire_rows: Annotated[
        int,
        typer.Option(
            min=0,
            help="Have only the best logits of a row go to another host, so many; 0: all. Answers bound the change.",
        ),
    ] = 0,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Have the engines on the nodes of the Ray cluster at this address; auto: the one that this machine "
            "is part of."
        ),
    ] = None,
    ship_weights: Annotated[
        bool,
        typer.Option(
            "--ship-weights", help="With --ray: copy weights to nodes that lack them, to the same path."
        ),
    ] = False,
    log_file: Annotated[
        Path | None,
        typer.Option(
            help="Add vLLM's log to this file.",
            show_default="NAME-PORT.log in ~/.local/state/decar, anew at every start",
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", envvar="DECAR_VERBOSE", show_envvar=True, help="Show vLLM's log here, in no file."
        ),
    ] = False,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Offer no page (the playground) at /.")] = False,
    no_mps: Annotated[
        bool,
        typer.Option(
            "--no-mps",
            envvar="DECAR_NO_MPS",
            show_envvar=True,
            help="Start no MPS daemon where engines share a GPU: they take turns on it.",
        ),
    ] = False,
) -> None:
    """Serve an ensemble over the OpenAI API.

    Every further flag is vLLM's own: --host, --port, --api-key, --max-model-len, ... --help=all lists them.

    An engine flag goes to every expert's engine.
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
        simulated_hosts=simulated_hosts,
        wire_rows=wire_rows,
        ray=ray,
        ship_weights=ship_weights,
        log_file=log_file,
        verbose=verbose,
        own_flags=[name for option in context.command.params for name in option.opts],
        ui=not no_ui,
        use_mps=not no_mps,
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

    from decar.router.errors import StartError

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


@app.command(cls=InspectCommand)
def inspect(
    directory: Directory,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Show where the engines would run in the Ray cluster at this address, and what is missing there."
        ),
    ] = None,
    placement: Annotated[
        str | None, typer.Option(help="With --ray: on which node and GPU, as for `decar serve`.")
    ] = None,
) -> None:
    """Show an ensemble's experts, sizes, priors, router and tokenizer, and every problem found."""
    from rich.console import Console

    from decar.server.inspection import inspect

    if inspect(directory, Console(highlight=False), ray, placement):
        raise typer.Exit(1)


@app.command()
def ps(
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=["VLLM_API_KEY", "OPENAI_API_KEY"], show_envvar=True, help="Of servers that have one."
        ),
    ] = None,
) -> None:
    """List the decar servers of this machine: address, process, experts up, slots in use, for how long."""
    from rich.console import Console

    from decar.server.ps import show

    show(Console(highlight=False), api_key)


def main() -> None:
    """Run the command; a `DecarError` is one line on stderr and exit code 1."""
    logger, handler = logging.getLogger("decar"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("decar: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # what others log is not decar's
    try:
        app(prog_name="decar")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from decar.router.errors import DecarError

        if not isinstance(error, DecarError):
            raise
        print(f"decar: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
