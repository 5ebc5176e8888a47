"""Real servers over tiny ensembles. Each is started once, and has to leave nothing behind."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.async_api import Browser

from decar.server.vllm_adapter.versions import installed_version, numbers_of
from tests.browser import chromium
from tests.e2e.collector import Collector, running_collector
from tests.helpers import EXACT, SHARED_MEMORY, Server
from tests.reference import Reference
from tests.training.new_command import run_new

CHUNK_TOKENS = 256
MAX_NUM_SEQS = 32
NUM_BLOCKS = 28  # of 32 tokens: three or four requests of the load test fit, where 32 run at once

LOADED = (
    *EXACT,
    *("--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", str(CHUNK_TOKENS)),
    *("--block-size", "32"),  # the only size, with its multiples, that vLLM's CPU attention has
    *("--num-gpu-blocks-override", str(NUM_BLOCKS)),
    # A random model would fill its answer with the blanks that a JSON grammar otherwise allows everywhere.
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``-k trio`` chooses the tests that ask that server, whatever they are called."""
    for item in items:
        item.extra_keyword_matches.update(getattr(item, "fixturenames", ()))


@contextmanager
def running(
    reference: Reference,
    log: Path,
    flags: tuple[str, ...] = EXACT,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server for as long as the context lasts; it has to end cleanly."""
    server = Server.start(reference.directory, log, flags, environment)
    try:
        yield server
        assert server.stop() == 0, server.log_tail()
    finally:
        server.kill()


@contextmanager
def leaving_nothing(reference: Reference, log: Path, flags: tuple[str, ...]) -> Iterator[Server]:
    """As `running`; and nothing is left in shared memory, whoever has made it: no other server may start meanwhile."""
    left = {path.name for path in SHARED_MEMORY.iterdir()}
    with running(reference, log, flags) as server:
        yield server
    assert {path.name for path in SHARED_MEMORY.iterdir()} <= left


@pytest.fixture(scope="session")
def duo_server(duo: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """K=2, with a KV cache that is too small for many requests at once."""
    with running(duo, tmp_path_factory.mktemp("logs") / "duo.log", LOADED) as server:
        yield server


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def new_trio(trio: Reference, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The same ensemble, put together by `decar new` from the experts' checkpoints."""
    directory = tmp_path_factory.mktemp("new") / trio.name
    experts = [f"{name}={trio.directory / 'experts' / name}" for name in trio.experts]
    priors = ",".join(f"{name}={prior}" for name, prior in zip(trio.experts, trio.prior, strict=True))
    said = run_new(directory, *experts, "--prior", priors)
    assert said.error is None
    return replace(trio, directory=directory)


@pytest.fixture(scope="session")
def trio_server(
    new_trio: Reference, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """K=3: one of another architecture, one with a padded vocabulary. vLLM chooses what compiles a grammar, and spans
    of all that is asked go to the ``collector``."""
    aborts = (
        ("--enable-scale-out",) if numbers_of(installed_version() or "") >= (0, 32) else ()
    )  # 0.26 has no route that aborts
    flags = (*EXACT, *aborts, "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    flags = (*flags, "--otlp-traces-endpoint", collector.endpoint)
    soon = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # ms until spans are sent
    with running(new_trio, tmp_path_factory.mktemp("logs") / "trio.log", flags, soon) as server:
        yield server


@pytest.fixture(scope="module")
def twins_server(twins: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """K=2 with equal weights."""
    with running(twins, tmp_path_factory.mktemp("logs") / "twins.log") as server:
        yield server


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started
