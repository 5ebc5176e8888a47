"""The fork server is given the environment that vLLM will have set, as far as that is known, and else a new one."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

BEGIN = """
    import json, multiprocessing, os, sys
    from pathlib import Path
    from decar.server.vllm_adapter import fork_server
    from decar.server.vllm_adapter.cache import cache_file

    def tell(pipe):
        names = ("SET_LATER", "SET_BEFORE", "DROPPED", "VLLM_USE_V2_MODEL_RUNNER")
        pipe.send({"parent": os.getppid(), **{name: os.environ.get(name) for name in names}})

    def told():
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("forkserver").Process(target=tell, args=(theirs,))
        process.start()
        said = ours.recv()
        process.join()
        return said

    if __name__ == "__main__":
        fork_server._PRELOADED = "json"
        folder = Path(sys.argv[1])
        os.environ["DROPPED"] = "yes"
        server = fork_server.ForkServer(folder)
        server.start_early()
        early = fork_server._pid()
        os.environ["SET_LATER"] = sys.argv[2]
        del os.environ["DROPPED"]
        before = dict(os.environ)
        server.use()
        assert dict(os.environ) == before
        said = told()
        print(json.dumps({"early": early, "kept": cache_file("environment").exists(), **said}))
"""


def run(folder: Path, value: str) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(BEGIN))
    work = folder / "run"
    work.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, str(script), str(work), value], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_what_vllm_sets_is_known_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SET_BEFORE", "as it was")
    first = run(tmp_path, "1")
    assert first["early"] is None, "nothing is known yet"
    assert first["kept"]
    again = run(tmp_path, "1")
    assert again["parent"] == again["early"], "it has been started early, and is right"
    other = run(tmp_path, "2")
    assert other["early"] is not None
    assert other["parent"] != other["early"], "it was wrong"
    back = run(tmp_path, "2")
    assert back["parent"] == back["early"]
    for said, value in ((first, "1"), (again, "1"), (other, "2"), (back, "2")):
        assert (said["SET_LATER"], said["SET_BEFORE"], said["DROPPED"]) == (value, "as it was", None)


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"SET_LATER": 1}'])
def test_what_cannot_be_read_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(tmp_path, "1")
    [kept] = (tmp_path / "cache/decar").glob("*environment*")
    kept.write_text(broken)
    assert run(tmp_path, "1")["early"] is None
    assert run(tmp_path, "1")["early"] is not None
