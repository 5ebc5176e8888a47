"""What `decar serve` shows to who has started it; what vLLM and other libraries print goes to a file. Knows streams,
logging and lines; no engines."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from decar.router.errors import StartError

TAIL_LINES = 12
"""Of an engine's log, shown when it has not started."""
SAID_COLUMNS = 72


def default_log(name: str, port: int | str) -> Path:
    """Where the log of a server is, by its ensemble's name and its port; XDG_STATE_HOME or ~/.local/state has it."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return state / "decar" / f"{name}-{port}.log"


class Terminal:
    """The streams that were standard output and error when the server was started.

    Attributes:
        log: the file that has all other output; None: it comes here as well.
    """

    def __init__(self, out: TextIO, err: TextIO, log: Path | None):
        self._out, self.log = out, log
        self.console = Console(file=err, highlight=False, soft_wrap=True)

    def say(self, text: str, style: str | None = None) -> None:
        """A line of decar's own, on standard error."""
        self.console.print(f"decar: {text}", markup=False, style=style, soft_wrap=True)

    def announce(self, text: str) -> None:
        """The same on standard output: what was started is there."""
        print(f"decar: {text}", file=self._out, flush=True)

    def show_end_of_log(self, names: Iterable[str]) -> None:
        """The last lines of the engines of these experts, or of all where they have none."""
        if self.log is None:
            return
        for name in names:
            lines: deque[str] = deque(maxlen=TAIL_LINES)
            others: deque[str] = deque(maxlen=TAIL_LINES)
            with self.log.open(errors="replace") as log:
                for line in log:
                    (lines if line.startswith(f"({name} pid=") else others).append(line.rstrip())
            self.say(f"the end of {name}'s log:")
            for line in lines or others:
                self.console.print(f"  {line}", style="dim", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def starting(self, names: Sequence[str]) -> Iterator[Start]:
        """Show a start, of the engines of these experts, until it is done or the block ends."""
        start = Start(self, names)
        try:
            # With the log here as well, there are lines, and no picture that others would write into.
            if self.console.is_terminal and self.log is not None:
                start.show()
            yield start
        finally:
            start.done()


class Start:
    """How far a server has come that starts.

    Attributes:
        heard: what engines have said since it was called last: (index, text).
    """

    def __init__(self, terminal: Terminal, names: Sequence[str]):
        self.heard: Callable[[], Iterable[tuple[int, str]]] = lambda: ()
        self._terminal, self._names = terminal, names
        self._began = time.monotonic()
        self._phase = ""
        self._said = [""] * len(names)
        self._ready = [False] * len(names)
        self._spinner = Spinner("dots")
        self._engines = False
        self._live: Live | None = None

    def show(self) -> None:
        """Draw it, ever anew, below the lines that are said meanwhile."""
        self._live = Live(
            get_renderable=self.picture,
            console=self._terminal.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def done(self) -> None:
        """Draw nothing any more. Safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str, engines: bool = False) -> None:
        """What goes on from now on; ``engines``: each of them goes its own way."""
        self._phase, self._engines = text, engines
        if self._live is None:
            self._terminal.say(text)

    def ready(self, expert: int) -> None:
        self._ready[expert] = True
        self._terminal.say(f"expert {self._names[expert]}: its engine is ready after {self._seconds:.0f} s")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._began

    def picture(self) -> Table:
        """What goes on, and for each engine that is not there yet what it has said last."""
        for expert, text in self.heard():
            self._said[expert] = text
        table = Table.grid(padding=(0, 1))
        clock = f"{int(self._seconds) // 60}:{int(self._seconds) % 60:02}"
        table.add_row(self._spinner, Text(clock), Text(self._phase))
        if self._engines:
            for k, name in enumerate(self._names):
                said = Text("ready", "green") if self._ready[k] else Text(self._said[k], "dim")
                said.truncate(min(SAID_COLUMNS, self._terminal.console.width - 20), overflow="ellipsis")
                table.add_row("", Text(name), said)
        return table


@contextlib.contextmanager
def terminal_of(log: Path | None, append: bool = False) -> Iterator[Terminal]:
    """Until the block ends, what this process and its children print goes to ``log``, and decar's messages go to the
    terminal, and are in the log as well; None: everything goes to the terminal.

    Args:
        append: keep what the file has; otherwise it is renamed to NAME.1.

    Raises:
        StartError: the file cannot be written.
    """
    if log is None:
        terminal = Terminal(sys.stdout, sys.stderr, None)
        with _messages_to(_ToTerminal(terminal)):
            yield terminal
        return
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if not append and log.exists():
            log.replace(log.with_name(f"{log.name}.1"))
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise StartError(
            f"cannot write vLLM's log to {log} ({error.strerror}); choose another --log-file"
        ) from None
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]  # which children do not inherit
    try:
        with (
            os.fdopen(saved[0], "w", closefd=False) as out,
            os.fdopen(saved[1], "w", closefd=False) as err,
        ):
            terminal = Terminal(out, err, log)
            os.dup2(file, 1)
            os.dup2(file, 2)
            with _messages_to(_ToTerminal(terminal), _to_log()):
                yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, number in zip(saved, (1, 2), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        os.close(file)


class _ToTerminal(logging.Handler):
    """Messages of decar's, above what is shown live."""

    def __init__(self, terminal: Terminal):
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._terminal.say(self.format(record))
        except Exception:  # a terminal may be closed, a logging call must not fail
            self.handleError(record)


def _to_log() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    form = "(decar pid=%(process)d) %(levelname)s %(asctime)s %(message)s"
    handler.setFormatter(logging.Formatter(form, datefmt="%m-%d %H:%M:%S"))
    return handler


@contextlib.contextmanager
def _messages_to(*handlers: logging.Handler) -> Iterator[None]:
    logger = logging.getLogger("decar")
    before, logger.handlers = logger.handlers, list(handlers)
    try:
        yield
    finally:
        logger.handlers = before
