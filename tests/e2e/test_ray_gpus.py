"""GPUs of a Ray cluster's nodes, without any: Ray and decar are told of some, and no engine starts.

What is not tried is an engine on one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from decar.benchmarks.network import Machine
from decar.benchmarks.nodes import RayCluster
from tests.reference import Reference

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]

NVIDIA_SMI = """#!/bin/sh
for index in 0 1 2 3; do echo "$index, GPU-$index$index, H200, $((140000 + index))"; done
"""

PLAN = """
import json, os, sys
from types import SimpleNamespace
import ray
from decar.router.manifest import EngineOptions
from decar.router.errors import StartError
from decar.server.cluster.gpus import hold, places_on
from decar.server.cluster.nodes import Cluster, options_of, plan_on
from decar.server.protocol.member import LockstepConfig
from decar.server.protocol.plane import Plane


class Engine:
    def __init__(self, config):
        self.first = os.environ["CUDA_VISIBLE_DEVICES"]

    def devices(self):
        return [self.first, os.environ["CUDA_VISIBLE_DEVICES"]]


experts = [
    SimpleNamespace(name=name, weight_bytes=1 << 30, options=EngineOptions(tensor_parallel_size=1)) for name in "ab"
]
ensemble = SimpleNamespace(experts=experts, expert_names=["a", "b"])
cluster, found = Cluster(sys.argv[1]), {}
nodes = cluster.nodes()
for wish in json.loads(sys.argv[2]):
    plan = plan_on(nodes, ensemble, wish, gpus=True)
    held = hold(cluster, plan)  # in place of those that it had
    places = places_on(plan, held, ensemble)
    while (left := [node.gpus for node in cluster.nodes()]) != [2.0 - plan.held[0]]:
        pass  # Ray's books are brought up to date a little later
    try:
        plan_on(cluster.nodes(), ensemble, None, gpus=True)
        refused = ""
    except StartError as error:
        refused = str(error)
    plane = Plane.create(experts=2, slots=1, vocab_size=5, positions=4)
    engines = []
    for k, placed in enumerate(places):
        config = LockstepConfig(k, plane.spec, (), placed.devices, os.getpid(), own_environment=True)
        options = options_of(plan.nodes[plan.of[k]], placed.ranks, {"SOME": "1"})
        engines.append(ray.remote(Engine).options(**options).remote(config))
    devices = ray.get([engine.devices.remote() for engine in engines], timeout=120)
    for engine in engines:
        cluster.end(engine)
    plane.unlink()
    given = [list(theirs.given) for theirs in held]
    found[wish or ""] = {"devices": devices, "given": given, "refused": refused}
print(json.dumps(found))
cluster.close()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """One node of two GPUs, which CUDA is to call 3 and 1, on a machine of four; vLLM there is its build for GPUs."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder,
    ):
        program, installed = (
            Path(folder, "bin/nvidia-smi"),
            Path(folder, "site/vllm-0.32.0.dist-info/METADATA"),
        )
        for path, text in ((program, NVIDIA_SMI), (installed, "Name: vllm\nVersion: 0.32.0\n")):
            path.parent.mkdir(parents=True)
            path.write_text(text)
        program.chmod(0o755)
        patch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", f"{installed.parents[1]}:{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
        (Path(folder) / "nodes").mkdir()
        cluster = RayCluster(Path(folder, "nodes"))
        try:
            cluster.start(Machine("ada", "127.0.0.1", ()), gpus=2)
            yield cluster
        finally:
            cluster.stop()


def run(cluster: RayCluster, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*cluster.head.inside, sys.executable, *command],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def inspected(cluster: RayCluster, experts: Reference, *wish: str) -> subprocess.CompletedProcess[str]:
    directory = str(experts.directory)
    return run(cluster, "-m", "decar.server", "inspect", directory, "--ray", cluster.address, *wish)


def test_actors_get_the_gpus_that_are_planned_for_them_and_nobody_else_does(cluster: RayCluster) -> None:
    wishes = [None, "a=gpu:1@ada,b=gpu:0@ada", "a=gpu:1@ada,b=gpu:1@ada"]
    done = run(cluster, "-c", PLAN, cluster.address, json.dumps(wishes))
    assert done.returncode == 0, done.stderr
    dealt, named, shared = json.loads(done.stdout.splitlines()[-1]).values()
    assert dealt["devices"] == [["3", "3"], ["1", "1"]], "in the order in which CUDA counts them there"
    assert sorted(dealt["given"][0]) == ["1", "3"]
    assert named["devices"] == [["1", "1"], ["3", "3"]]
    for found in (dealt, named):
        assert "'a' needs 1 free GPU and CPU" in found["refused"]
        assert "0 of 2 GPUs free" in found["refused"]
    assert shared["devices"] == [["1", "1"], ["1", "1"]]
    assert shared["refused"] == "", "there is one left"


def test_inspect_shows_the_plan(cluster: RayCluster, duo: Reference) -> None:
    first, second = duo.experts

    def rows(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        lines = [line.split() for line in done.stdout.splitlines() if " ada " in line]
        return {line[0]: line[1:] for line in lines}

    dealt = inspected(cluster, duo)
    assert dealt.returncode == 0, dealt.stderr
    assert (
        "node ada: GPU 0 (H200, 137 GiB), GPU 1 (H200, 137 GiB); 2 of 2 free in Ray's books" in dealt.stdout
    )
    assert [rows(dealt)[name][5:] for name in (first, second)] == [
        ["0", "what", "is", "left"],
        ["1", "what", "is", "left"],
    ]
    shared = inspected(cluster, duo, "--placement", f"{first}=gpu:1@ada,{second}=gpu:1@ada")
    assert shared.returncode == 0, shared.stderr
    assert [rows(shared)[name][5] for name in (first, second)] == ["1", "1"]
    assert rows(shared)[first][-1] == "GiB"


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("gpu:2@ada", "node 'ada' has no GPU 2, which expert"),
        ("gpu:0", "names no node: with --ray it is EXPERT=node:NAME, or EXPERT=gpu:N@NAME"),
        ("gpu:0+1@ada", "different GPU (tensor_parallel_size), and 0+1 is named"),
    ],
)
def test_inspect_says_what_is_wrong(cluster: RayCluster, duo: Reference, wish: str, said: str) -> None:
    wrong = inspected(cluster, duo, "--placement", f"{duo.experts[0]}={wish}")
    assert wrong.returncode == 1
    assert said in wrong.stderr
    assert "Traceback" not in wrong.stderr
