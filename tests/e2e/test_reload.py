"""Experts exchanged while the server answers: what is said before, meanwhile and after, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_exact import check, complete_all, routed, weighted
from tests.e2e.test_loss import (
    BACK_WITHIN_S,
    TOKENS,
    all_kinds,
    assert_mixtures,
    assert_whole,
    is_up,
    lost_from,
    pid_of,
    wait_until_back,
)
from tests.helpers import ADMIN_KEY, EXACT, Server, names, serve_environment, wait_until
from tests.reference import Reference, make_expert, make_tokenizer, prompt_texts

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

PATIENCE_S = 1


@pytest.fixture(scope="module")
def directory(trio: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """K=3, to be changed again and again."""
    return Path(shutil.copytree(trio.directory, tmp_path_factory.mktemp("reload") / "trio"))


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("logs") / "reload.log"
    flags = (
        *EXACT,
        *("--reload-timeout", str(PATIENCE_S)),
        *("--max-experts", "4"),
        *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    )
    started = Server.start(directory, log, flags)
    try:
        yield started
        assert started.stop() == 0, started.log_tail()
    finally:
        started.kill()


@pytest.fixture
def manifest(directory: Path) -> Iterator[Path]:
    """To be changed, and put back."""
    file = directory / "ensemble.json"
    before = file.read_bytes()
    yield file
    file.write_bytes(before)


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def decar_reload(server: Server) -> subprocess.CompletedProcess[str]:
    """Run `decar reload`."""
    return subprocess.run(
        [sys.executable, "-m", "decar.server", "reload", "--url", server.url, "--admin-key", ADMIN_KEY],
        env=serve_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def pids(server: Server) -> dict[str, int]:
    return {expert["name"]: expert["pid"] for expert in server.ensemble()["experts"]}


async def test_an_expert_is_exchanged_under_running_streams(
    server: Server, trio: Reference, directory: Path
) -> None:
    """By SIGHUP, and it stands still: its answers take longer than they are waited for, and go on without it."""
    make_expert("llama", 33, directory / "experts/code-2", trio.tokenizer)
    edit(
        directory / "ensemble.json", lambda data: data["experts"][1].update(path="experts/code-2", prior=0.4)
    )
    before = pids(server)
    prompts = [trio.encode(text) for text in prompt_texts(2)]
    signals = [(before["code"], signal.SIGSTOP), (server.process.pid, signal.SIGHUP)]
    found = await all_kinds(server, trio, prompts, signals)
    ridden_over = 0
    for kind, prompt, heard in found:
        assert_whole(kind, heard)
        if kind.decode is not None:
            assert_mixtures(trio, "code", kind, prompt, heard)
            ridden_over += any("code" in said for _, said in heard.degraded)
    assert ridden_over, [lost_from(trio, "code", heard) for _, _, heard in found]
    wait_until(
        lambda: pid_of(server, "code") != before["code"] and is_up(server, "code"),
        BACK_WITHIN_S,
        lambda: f"code is exchanged:\n{server.log_tail()}",
    )
    after = pids(server)
    assert {name for name in after if after[name] != before[name]} == {"code"}
    [code] = [expert for expert in server.ensemble()["experts"] if expert["name"] == "code"]
    assert code["path"].endswith("code-2")
    assert code["prior"] == 0.4
    new = Reference.load(directory)
    for case in (routed("posterior"), weighted(code=2, prose=5, maths=3), weighted(code=1)):
        await check(server, new, case, "velocity", 4)
    wait_until(server.is_idle, 30, "nothing is left of those requests")


async def test_priors_and_mixing_change_without_an_engine(
    server: Server, directory: Path, manifest: Path
) -> None:
    before = pids(server)
    edit(manifest, lambda data: data["mixing"].update(rule="logit"))
    edit(manifest, lambda data: data["experts"][0].update(prior=3))
    done = decar_reload(server)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "changed the prior of 'maths', mixing.rule"
    assert pids(server) == before
    assert server.ensemble()["defaults"]["rule"] == "logit"
    await check(server, Reference.load(directory), routed("posterior"), "logit", 4)


def no_json(directory: Path) -> None:
    (directory / "ensemble.json").write_text('{"name": "trio"')


def no_folder(directory: Path) -> None:
    edit(directory / "ensemble.json", lambda data: data["experts"][0].update(path="experts/gone"))


def other_vocabulary(directory: Path) -> None:
    make_expert(
        "llama", 40, directory / "experts/other", make_tokenizer(directory / "experts/other", vocab_size=500)
    )
    edit(directory / "ensemble.json", lambda data: data["experts"][0].update(path="experts/other"))


def shorter(directory: Path) -> None:
    """A context that is shorter than what is served."""
    shutil.copytree(directory / "experts/maths", directory / "experts/shorter")
    edit(directory / "experts/shorter/config.json", lambda config: config.update(max_position_embeddings=256))
    edit(directory / "ensemble.json", lambda data: data["experts"][0].update(path="experts/shorter"))


def too_many(directory: Path) -> None:
    more = [{"name": f"more-{k}", "path": "experts/prose", "prior": 1} for k in range(2)]
    edit(directory / "ensemble.json", lambda data: data["experts"].extend(more))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_json, "not valid JSON"),
        (no_folder, "experts/gone"),
        (other_vocabulary, "different tokenizers"),
        (shorter, "512"),
        (too_many, "5 experts, and there is room for 4"),
    ],
)
def test_what_cannot_be_served_changes_nothing(
    server: Server, directory: Path, manifest: Path, damage: Callable[[Path], None], said: str
) -> None:
    assert decar_reload(server).returncode == 0, "whatever the test before has put back is served again"
    before, processes = server.ensemble()["defaults"], pids(server)
    damage(directory)
    done = decar_reload(server)
    assert done.returncode == 1
    assert done.stderr.startswith("decar: error: nothing is changed: ")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (server.ensemble()["defaults"], pids(server)) == (before, processes)
    assert all(is_up(server, name) for name in processes)


async def test_a_version_that_does_not_start_costs_no_expert(
    server: Server, directory: Path, manifest: Path
) -> None:
    assert decar_reload(server).returncode == 0
    before = Reference.load(directory)
    shutil.copytree(directory / "experts/maths", directory / "experts/maths-2")
    edit(
        directory / "experts/maths-2/config.json", lambda config: config.update(num_hidden_layers=3)
    )  # of which the weights have two
    edit(manifest, lambda data: data["experts"][0].update(path="experts/maths-2"))
    done = decar_reload(server)
    assert done.returncode == 1
    assert "expert 'maths' could not be exchanged" in done.stderr
    assert "'maths' as it was before answers on" in done.stderr
    assert is_up(server, "maths")
    await check(server, before, weighted(code=2, prose=5, maths=3), "velocity", 4)


async def test_another_engine_is_killed_while_one_is_exchanged(
    server: Server, trio: Reference, directory: Path
) -> None:
    """And the new expert has another name."""
    make_expert("qwen2", 44, directory / "experts/verse", trio.tokenizer)
    edit(
        directory / "ensemble.json",
        lambda data: data["experts"][2].update(name="verse", path="experts/verse"),
    )
    victim = pid_of(server, "maths")
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: not is_up(server, "prose"), 60, "it is being exchanged", 0.01)
    os.kill(victim, signal.SIGKILL)
    request = {"model": trio.name, "prompt": "x", "max_tokens": 4}
    answer = server.http.post("/v1/completions", json=request)
    assert answer.status_code == 200
    assert "prose" in answer.json()["decar"]["degraded"]
    wait_until(
        lambda: "verse" in pids(server), BACK_WITHIN_S, lambda: f"verse is there:\n{server.log_tail()}"
    )
    wait_until_back(server, "maths")
    assert pid_of(server, "maths") != victim
    ids = {trio.name, *(f"{trio.name}/{name}" for name in ("maths", "code", "verse"))}
    assert names(server.openai().models.list().data) == ids
    assert 'decar:expert_up{expert="verse"} 1.0' in server.http.get("/metrics").text
    assert (
        server.http.post("/v1/completions", json={**request, "model": f"{trio.name}/prose"}).status_code
        == 404
    )
    new = Reference.load(directory)
    for case in (routed("posterior"), weighted(code=2, verse=5, maths=3), weighted(verse=1)):
        await check(server, new, case, "velocity", 4)
    wait_until(server.is_idle, 30, "nothing is left of those requests")


async def test_experts_are_removed_and_added(server: Server, trio: Reference, directory: Path) -> None:
    """The running answers go on without the one that goes; those that come get what places there are."""
    old = Reference.load(directory)
    prompts = [old.encode(text) for text in prompt_texts(8)]
    answers = asyncio.create_task(
        complete_all(server, old.name, prompts, {"route": "posterior", "trace": True}, max_tokens=TOKENS)
    )
    await asyncio.to_thread(wait_until, lambda: server.ensemble()["slots"]["in_use"], 60, "they run", 0.01)
    gone = old.experts[1]
    edit(directory / "ensemble.json", lambda data: data["experts"].pop(1))
    done = await asyncio.to_thread(decar_reload, server)
    assert (done.returncode, done.stdout.strip()) == (0, f"removed {gone}")
    for answer, summary in await answers:
        assert len(answer.tokens) == len(answer.weights) == TOKENS
        assert summary["degraded"] in ([], [gone])
    assert list(pids(server)) == [name for name in old.experts if name != gone]
    await check(server, Reference.load(directory), routed("posterior"), "velocity", 4)

    for name, kind, seed in (("first", "llama", 51), ("third", "qwen2", 52)):
        make_expert(kind, seed, directory / "experts" / name, trio.tokenizer)  # type: ignore[arg-type]
    entries = [{"name": name, "path": f"experts/{name}", "prior": 0.2} for name in ("first", "third")]

    def add(manifest: dict[str, Any]) -> None:
        before = manifest["experts"]
        manifest["experts"] = [entries[0], before[0], entries[1], before[1]]

    edit(directory / "ensemble.json", add)
    done = await asyncio.to_thread(decar_reload, server)
    assert (done.returncode, done.stdout.strip()) == (0, "added first, third"), done.stderr
    new = Reference.load(directory)
    assert list(pids(server)) == list(new.experts)
    for case in (
        routed("posterior"),
        routed("prior"),
        weighted(**dict(zip(new.experts, (2, 3, 4, 5), strict=True))),
        weighted(third=1),
    ):
        await check(server, new, case, "velocity", 4)
    victim = pid_of(server, "third")
    os.kill(victim, signal.SIGKILL)
    wait_until(
        lambda: pid_of(server, "third") != victim and is_up(server, "third"), BACK_WITHIN_S, "it is back"
    )
    await check(server, new, routed("posterior"), "velocity", 4)
    wait_until(server.is_idle, 30, "nothing is left of those requests")


def test_a_server_that_is_told_to_stop_meanwhile_stops(
    server: Server, trio: Reference, directory: Path
) -> None:
    """The last one: nothing is left of the engine that was about to start."""
    first = json.loads((directory / "ensemble.json").read_text())["experts"][0]
    make_expert("llama", 60, directory / first["path"], trio.tokenizer)
    os.kill(server.process.pid, signal.SIGHUP)
    wait_until(lambda: not is_up(server, first["name"]), 60, "it is being exchanged", 0.01)
    assert server.stop() == 0, server.log_tail()
