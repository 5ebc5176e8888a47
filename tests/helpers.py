"""A real server as a child process, and what tests ask of it over HTTP. Knows no internals of the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_DEADLINE_S = 300  # engines take about 20 s each on an idle core; other tests may keep the cores busy
STOP_DEADLINE_S = 60
REQUEST_DEADLINE_S = 180
ADMIN_KEY = "the-tests-own"
SHARED_MEMORY = Path("/dev/shm")

EXACT = (
    *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--tensor-parallel-size", os.environ.get("DECAR_RANKS", "1")),
    *("--simulated-hosts", os.environ.get("DECAR_HOSTS", "1")),
)
"""fp32, so that answers compare with the reference; eager, since compiling tiny models saves nothing; a KV cache that
leaves room for the next server on a GPU. With DECAR_RANKS=2 in the environment, all that is tested of servers is tested
of experts that have two ranks each, and with DECAR_HOSTS=2 of experts on two hosts."""


class NeverHappened(AssertionError):
    """A condition did not come true in time."""


def wait_until(
    condition: Callable[[], Any], deadline_s: float, what: str | Callable[[], str], poll_s: float = 0.05
) -> Any:
    """Poll ``condition`` until it is truthy, and return what it gave; ``what`` says what did not happen."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise NeverHappened(f"not within {deadline_s} s: {what if isinstance(what, str) else what()}")
        time.sleep(poll_s)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def serve_command(directory: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "decar.server", "serve", str(directory), *flags]


def serve_environment() -> dict[str, str]:
    exact = {"TRITON_F32_DEFAULT": "ieee"}  # on a GPU, vLLM's attention takes the shorter tf32 otherwise
    return {
        **os.environ,
        **exact,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DECAR_ADMIN_KEY": ADMIN_KEY,
    }


def run_serve(directory: Path, *flags: str, deadline_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a `decar serve` that is expected to end by itself. Its log does not outlive it."""
    with tempfile.TemporaryDirectory() as state:
        return subprocess.run(
            serve_command(directory, *flags),
            env={**serve_environment(), "XDG_STATE_HOME": state},
            capture_output=True,
            text=True,
            timeout=deadline_s,
            check=False,
        )


@dataclass
class Server:
    """A running `decar serve`, in a session of its own: that is how all its processes are found again."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    host: str = "127.0.0.1"

    @classmethod
    def launch(
        cls,
        directory: Path,
        log: Path,
        flags: Sequence[str] = EXACT,
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> Server:
        """Start a server, and return at once. ``environment`` is added to this process's own, and ``log`` has what the
        server prints, and vLLM's log. ``inside`` is what a command begins with to run where ``host`` is its address."""
        port = free_port()
        listens = ("--host", host) if inside else ()
        log.unlink(missing_ok=True)
        with log.open("ab") as stream:  # at whose end others write as well
            process = subprocess.Popen(
                [
                    *inside,
                    *serve_command(directory, "--port", str(port), "--log-file", str(log), *flags, *listens),
                ],
                env={**serve_environment(), **(environment or {})},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(process, port, log, host)

    @classmethod
    def start(
        cls,
        directory: Path,
        log: Path,
        flags: Sequence[str] = EXACT,
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> Server:
        """Start a server and wait until it is healthy; see `launch`."""
        server = cls.launch(directory, log, flags, environment, inside, host)
        try:
            wait_until(
                server._is_up, START_DEADLINE_S, lambda: f"it serves:\n{server.log_tail()}", poll_s=0.5
            )
        except BaseException:
            server.kill()
            raise
        return server

    def _is_up(self) -> bool:
        assert self.process.poll() is None, f"the server ended by itself:\n{self.log_tail()}"
        return self.health() == 200

    # ---- processes

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def processes(self) -> list[psutil.Process]:
        """Every living process that the server started, itself included, whatever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    @property
    def shared_memory(self) -> set[Path]:
        """What this server has under /dev/shm."""
        return set(SHARED_MEMORY.glob(f"decar-*-{self.process.pid}-*"))

    def leftovers(self) -> list[str]:
        """What a stopped server has left behind."""
        return [str(process) for process in self.processes()] + [*map(str, sorted(self.shared_memory))]

    def stop(self, sent: signal.Signals = signal.SIGTERM) -> int:
        """End the server with ``sent``; return its exit code once nothing of it is left."""
        self.process.send_signal(sent)
        return self.ended(f"after {sent.name}")

    def ended(self, what: str) -> int:
        """The exit code of a server that ends, once nothing of it is left."""
        try:
            code = self.process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise NeverHappened(f"the server does not end {what}:\n{self.log_tail()}") from None
        wait_until(
            lambda: not self.leftovers(), STOP_DEADLINE_S, lambda: f"none is left of {self.leftovers()}"
        )
        return code

    def kill(self) -> None:
        """Make sure that nothing of the server outlives the tests, also when they fail."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait(STOP_DEADLINE_S)
        for path in self.shared_memory:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def has_logged(self, pattern: str, deadline_s: float = 60) -> bool:
        """Whether a line that matches is in the log, or comes in time."""

        def found() -> bool:
            return re.search(pattern, self.log.read_text(errors="replace")) is not None

        return bool(wait_until(found, deadline_s, f"{pattern} in the log", poll_s=0.5))

    # ---- HTTP

    @cached_property
    def http(self) -> httpx.Client:
        """A client that sees what the admin may see."""
        # Certificates are not needed here, and reading them is most of what a client costs.
        return httpx.Client(
            base_url=self.url,
            timeout=REQUEST_DEADLINE_S,
            verify=False,
            headers={"authorization": f"Bearer {ADMIN_KEY}"},
        )

    @contextmanager
    def standing_still(self) -> Iterator[Callable[[float], None]]:
        """Its engines compute nothing until the block ends, so that no answer in its midst is whole by then.

        What it gives lets them go on for some seconds.
        """
        pids = [expert["pid"] for expert in self.ensemble()["experts"]]

        def tell(what: signal.Signals) -> None:
            for pid in pids:
                with suppress(ProcessLookupError):  # it has been ended meanwhile
                    os.kill(pid, what)

        def move(seconds: float) -> None:
            tell(signal.SIGCONT)
            time.sleep(seconds)
            tell(signal.SIGSTOP)

        tell(signal.SIGSTOP)
        try:
            yield move
        finally:
            tell(signal.SIGCONT)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=REQUEST_DEADLINE_S
        )

    def async_openai(self) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_DEADLINE_S,
            http_client=httpx.AsyncClient(limits=limits, timeout=REQUEST_DEADLINE_S),
        )

    def health(self) -> int | None:
        """The status of /health; None while nothing listens."""
        try:
            return self.http.get("/health", timeout=10).status_code
        except httpx.TransportError:
            return None

    def ensemble(self) -> dict[str, Any]:
        response = self.http.get("/v1/ensemble")
        response.raise_for_status()
        body: dict[str, Any] = response.json()
        return body

    def metric(self, name: str) -> list[float]:
        """Values of all samples of metric ``name``, of all engines."""
        text = self.http.get("/metrics").text
        return [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        ]

    def metric_of(self, name: str, **labels: str) -> float:
        """The sum of the samples of metric ``name`` that have these labels."""
        text = self.http.get("/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def is_idle(self) -> bool:
        """No request runs or waits anywhere, no slot and no KV block is taken."""
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        values = [self.metric(name) for name in gauges]
        assert all(values), f"/metrics lacks one of {gauges}"
        return not any(map(any, values)) and self.ensemble()["slots"]["in_use"] == 0


# ---------------------------------------------------------------------------------------------- answers


@dataclass
class Answer:
    """One choice of a completion, without regard to how it was transported."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]
    weights: list[list[float]]
    active: list[str]
    finish_reason: str | None
    leaders: list[str] = field(default_factory=list)


COMPLETION_EXTRAS = {"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True}
"""vLLM's options that make an answer comparable token by token."""


def answer_of(choice: Any) -> Answer:
    """Read a completion choice that was asked for with `COMPLETION_EXTRAS`."""
    extra = choice.model_extra
    logprobs, trace = choice.logprobs, extra.get("decar") or {}
    return Answer(
        text=choice.text,
        tokens=extra["token_ids"],
        logprobs=list(logprobs.token_logprobs) if logprobs else [],
        top=[by_token_id(entries or {}) for entries in logprobs.top_logprobs] if logprobs else [],
        weights=trace.get("weights", []),
        active=trace.get("active", []),
        finish_reason=choice.finish_reason,
        leaders=trace.get("leaders", []),
    )


def by_token_id(entries: dict[str, float]) -> dict[int, float]:
    """Top logprobs keyed ``"token_id:N"``, as ``return_tokens_as_token_ids`` gives them."""
    return {int(key.removeprefix("token_id:")): value for key, value in entries.items()}


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def assert_error(response: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    """The response is an error of OpenAI's form whose message has all ``words``, and no traceback or path."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    for word in words:
        assert word in error["message"], error["message"]
    for leak in ("Traceback", 'File "', "/site-packages/"):
        assert leak not in response.text
    return error


def names(models: Iterable[Any]) -> set[str]:
    return {model.id for model in models}
