"""Which expert goes to which node of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from decar.router.errors import StartError
from decar.server.cluster.gpus import check_gateway, places_on, shared
from decar.server.cluster.nodes import Held, Node, Plan, plan_on
from decar.server.commands import with_ray_address
from decar.server.placement import Gpu
from tests.server.test_placement import GIB, ensemble

NODES = [
    Node("1", "ada", "10.0.0.1", 2.0),
    Node("2", "grace", "10.0.0.2", 2.0),
    Node("3", "mary", "10.0.0.3", 1.0),
]


def where(plan: Plan) -> list[str]:
    return [plan.nodes[host].name for host in plan.of]


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        (None, ["ada", "grace", "mary", "ada"]),
        ("e1=node:mary", ["ada", "mary", "grace", "ada"]),
        ("e0=node:grace,e1=node:grace", ["grace", "grace", "ada", "mary"]),
        ("e3=node:10.0.0.3, e0=node:ada", ["ada", "ada", "grace", "mary"]),
    ],
)
def test_experts_are_dealt_out_where_nothing_is_wished(wish: str | None, found: list[str]) -> None:
    assert where(plan_on(NODES, ensemble(1, 1, 1, 1), wish)) == found


def test_the_gateways_node_is_the_first_host_though_it_has_no_expert() -> None:
    plan = plan_on(NODES, ensemble(1), "e0=node:mary")
    assert [node.name for node in plan.nodes] == ["ada", "mary"]
    assert plan.of == (1,)


def test_an_expert_of_two_processes_needs_two_cpus_of_one_node() -> None:
    assert where(plan_on(NODES, ensemble(1, 1, ranks=(None, 2)), None)) == ["ada", "grace"]
    assert where(plan_on(NODES, ensemble(1, 1), None, ranks=2)) == ["ada", "grace"]
    with pytest.raises(
        StartError, match=r"'e2' needs 2 free CPUs .* ada has 0 left, grace has 0 left, mary has 1 left"
    ):
        plan_on(NODES, ensemble(1, 1, 1), None, ranks=2)


def test_there_is_room_for_experts_that_come_later() -> None:
    assert plan_on(NODES, ensemble(1, 1), None, seats=4).of == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ("e0=node:bob", r"no node 'bob' .* ada, grace, mary"),
        ("x=node:ada", r"'x' is none of the experts e0, e1, e2"),
        ("e0=0", r"'e0=0' names no node"),
        ("e0=gpu:1@ada", r"'e0=gpu:1@ada' names a GPU, and vLLM here is its build for CPUs"),
        ("e0", r"names no node"),
        ("e0=node:mary,e1=node:mary", r"'e1' needs 1 free CPU of Ray's on one node; mary has 0 left"),
    ],
)
def test_wishes_that_cannot_be(wish: str, said: str) -> None:
    with pytest.raises(StartError, match=said):
        plan_on(NODES, ensemble(1, 1, 1), wish)


def test_a_name_that_two_nodes_have_says_nothing() -> None:
    twins = [*NODES, Node("4", "ada", "10.0.0.4", 2.0)]
    with pytest.raises(StartError, match="several nodes"):
        plan_on(twins, ensemble(1), "e0=node:ada")
    assert where(plan_on(twins, ensemble(1), "e0=node:10.0.0.4")) == ["ada"]


@pytest.mark.parametrize(
    ("args", "found"),
    [
        (["dir", "--ray"], ["dir", "--ray", "auto"]),
        (["dir", "--ray", "--port", "1"], ["dir", "--ray", "auto", "--port", "1"]),
        (["dir", "--ray", "10.0.0.1:6379"], ["dir", "--ray", "10.0.0.1:6379"]),
        (["dir", "--ray=10.0.0.1:6379"], ["dir", "--ray=10.0.0.1:6379"]),
        (["dir"], ["dir"]),
        ([], []),
    ],
)
def test_ray_without_an_address_is_the_cluster_here(args: Sequence[str], found: Sequence[str]) -> None:
    assert with_ray_address(list(args)) == list(found)


# --- nodes with GPUs --------------------------------------------------------------------------------------

WITH_GPUS = [
    Node("1", "ada", "10.0.0.1", 8.0, 1.0, 1),
    Node("2", "grace", "10.0.0.2", 8.0, 3.0, 3),
    Node("3", "mary", "10.0.0.3", 8.0),
]


def on_gpus(
    wish: str | None,
    *sizes_gib: float,
    ranks: Sequence[int | None] = (),
    seats: int = 0,
    nodes: Sequence[Node] = WITH_GPUS,
) -> Plan:
    return plan_on(nodes, ensemble(*sizes_gib, ranks=ranks), wish, seats=seats, gpus=True)


def given(node: Node, count: int, first: int = 0, gib: int = 80) -> Held:
    """What a node shows, and ``count`` GPUs from the ``first`` on that Ray has given. CUDA counts from 4 there."""
    seen = tuple(Gpu(i, "H200", gib * GIB, str(4 + i)) for i in range(node.all_gpus))
    return Held(seen, tuple(gpu.device for gpu in seen[first : first + count]))


def gpus_of(plan: Plan, *sizes_gib: float, ranks: Sequence[int | None] = (), gib: int = 80) -> list[str]:
    held = [given(node, count, gib=gib) for node, count in zip(plan.nodes, plan.held, strict=True)]
    places = places_on(plan, held, ensemble(*sizes_gib, ranks=ranks))
    return [
        f"{'+'.join(map(str, placed.gpus))}@{plan.nodes[host].name}"
        for host, placed in zip(plan.of, places, strict=True)
    ]


@pytest.mark.parametrize(
    ("wish", "ranks", "found"),
    [
        (None, [1], ["0@ada"]),
        (None, [1, 1, 1, 1], ["0@ada", "0@grace", "1@grace", "2@grace"]),
        (None, [1, 2, 1], ["0@ada", "0+1@grace", "2@grace"]),
        (None, [2, 1], ["0+1@grace", "0@ada"]),
        (None, [1] * 6, ["0@ada", "0@grace", "1@grace", "2@grace", "0@ada", "0@grace"]),
        ("e0=gpu:2@grace", [1, 1], ["2@grace", "0@ada"]),
        ("e1=gpu:2@grace,e0=node:grace", [1, 1], ["0@grace", "2@grace"]),
        ("e0=gpu:2+0@10.0.0.2,e1=gpu:0@ada", [2, 1], ["2+0@grace", "0@ada"]),
        ("e0=gpu:0@grace,e1=gpu:0@grace", [1, 1], ["0@grace", "0@grace"]),
        ("e0=node:ada,e1=node:ada", [1, 1], ["0@ada", "0@ada"]),
        ("e0=node:grace,e1=node:grace", [2, 2], ["0+1@grace", "2+0@grace"]),
    ],
)
def test_engines_have_gpus_of_their_own_where_there_are_enough(
    wish: str | None, ranks: list[int], found: list[str]
) -> None:
    sizes = [1.0] * len(ranks)
    assert gpus_of(on_gpus(wish, *sizes, ranks=ranks), *sizes, ranks=ranks) == found


def test_a_node_gives_as_many_gpus_as_its_engines_use() -> None:
    plan = on_gpus("e0=gpu:1@grace,e1=gpu:1@grace,e2=node:grace", 1, 1, 1)
    assert [node.name for node in plan.nodes] == ["ada", "grace"]
    assert plan.held == (0, 2), "the gateway's node has no engine"
    assert on_gpus("e0=node:ada,e1=node:ada", 1, 1).held == (1,)
    assert on_gpus(None, 1, 1, ranks=[2, 1]).held == (1, 2)


def test_those_that_ray_gives_are_used_unless_others_are_named() -> None:
    nodes = [Node("2", "grace", "10.0.0.2", 8.0, 2.0, 3)]
    experts = ensemble(1, 1)
    free = on_gpus(None, 1, 1, nodes=nodes)
    assert free.held == (2,)
    places = places_on(free, [given(nodes[0], 2, first=1)], experts)
    assert [(placed.gpus, placed.devices) for placed in places] == [((1,), "5"), ((2,), "6")]
    named = on_gpus("e1=gpu:0@grace", 1, 1, nodes=nodes)
    places = places_on(named, [given(nodes[0], 2, first=1)], experts)
    assert [placed.devices for placed in places] == ["5", "4"]


def test_engines_that_share_a_gpu_are_told_and_have_an_equal_part_of_it() -> None:
    plan = on_gpus("e0=node:ada,e1=node:ada,e2=node:grace", 10, 10, 10)
    held = [given(node, count) for node, count in zip(plan.nodes, plan.held, strict=True)]
    places = places_on(plan, held, ensemble(10, 10, 10))
    assert places[0].kv_bytes == places[1].kv_bytes is not None
    assert places[2].kv_bytes is None
    assert [placed.gpu_bytes for placed in places] == [80 * GIB] * 3
    assert shared(plan, places) == {"GPU 0 of node 'ada'": ["e0", "e1"]}


def test_room_for_experts_that_come_later_is_where_there_are_gpus() -> None:
    plan = on_gpus("e0=node:grace", 10, seats=3)
    assert [plan.nodes[host].name for host in plan.of] == ["grace"] * 3
    assert plan.held == (0, 3)
    assert gpus_of(plan, 10) == ["0@grace", "1@grace", "2@grace"]


@pytest.mark.parametrize(
    ("wish", "ranks", "said"),
    [
        ("e0=gpu:0@bob", [1, 1], r"no node 'bob' .* ada, grace, mary"),
        (
            "e0=gpu:3@grace",
            [1, 1],
            r"node 'grace' has no GPU 3, which expert 'e0' .* by Ray's books it has 0 to 2",
        ),
        ("e0=gpu:0@mary", [1, 1], r"node 'mary' has no GPU 0, .* it has none"),
        (
            "e0=gpu:0@grace",
            [2, 1],
            r"'e0' is to be on 2 different GPUs, as in gpu:0[+]1@NAME .*, and 0 is named",
        ),
        ("e0=gpu:1+1@grace", [2, 1], r"'e0' is to be on 2 different GPUs.* and 1[+]1 is named"),
        ("e0=gpu:0+1@grace", [1, 1], r"'e0' is to be on 1 different GPU \(tensor.* and 0[+]1 is named"),
        ("e0=gpu:x@grace", [1, 1], r"'e0=gpu:x@grace' names no node: .* or EXPERT=gpu:N@NAME"),
        ("e0=gpu:1", [1, 1], r"'e0=gpu:1' names no node"),
        ("e0=gpu:@grace", [1, 1], r"'e0=gpu:@grace' names no node"),
        ("e0=gpu:0@", [1, 1], r"'e0=gpu:0@' names no node"),
        (
            "e0=node:mary",
            [1, 1],
            r"'e0' needs 1 free GPU and CPU .* build for GPUs.* mary has 8 .* 0 of 0 GPUs",
        ),
        (None, [1, 4], r"'e1' needs 4 free GPUs and CPUs .* ada has 7 CPUs left and 1 of 1 GPUs free, grace"),
    ],
)
def test_gpus_that_cannot_be(wish: str | None, ranks: list[int], said: str) -> None:
    with pytest.raises(StartError, match=said):
        on_gpus(wish, 1, 1, ranks=ranks)


def test_gpus_that_others_have_are_not_given() -> None:
    taken = [Node("1", "ada", "10.0.0.1", 8.0, 0.5, 1), Node("2", "grace", "10.0.0.2", 8.0, 1.0, 3)]
    with pytest.raises(StartError, match=r"names 2 GPUs of node 'grace', of which 1 are free in Ray's books"):
        on_gpus("e0=gpu:0@grace,e1=gpu:1@grace", 1, 1, nodes=taken)
    with pytest.raises(StartError, match=r"ada has 8 CPUs left and 0.5 of 1 GPUs free"):
        on_gpus("e0=node:ada", 1, nodes=taken)
    assert where(on_gpus(None, 1, 1, nodes=taken)) == ["grace", "grace"]


def test_a_gpu_that_is_too_small_is_told_with_its_node() -> None:
    plan = on_gpus("e0=gpu:2@grace,e1=gpu:2@grace", 20, 20)
    with pytest.raises(StartError, match=r"node 'grace': GPU 2 \(H200, 40.0 GiB\) is too small for e0, e1"):
        gpus_of(plan, 20, 20, gib=40)


def test_a_node_that_shows_other_gpus_than_ray_has_counted_is_told() -> None:
    plan = on_gpus("e0=gpu:2@grace,e1=node:ada", 1, 1)
    seen = given(WITH_GPUS[1], 1).seen
    ada = given(WITH_GPUS[0], 1)
    with pytest.raises(StartError, match=r"node 'grace' has no GPU 2: nvidia-smi shows 4, 5 there"):
        places_on(plan, [ada, Held(seen[:2], ("4",))], ensemble(1, 1))
    with pytest.raises(StartError, match=r"'grace': Ray has given GPU 0 there, and nvidia-smi shows 4, 5, 6"):
        places_on(plan, [ada, Held(seen, ("0",))], ensemble(1, 1))
    with pytest.raises(
        StartError, match=r"'ada': Ray has given GPU 4 there, and nvidia-smi shows none there"
    ):
        places_on(plan, [Held((), ("4",)), Held(seen, ("4",))], ensemble(1, 1))


def test_vllms_build_for_gpus_needs_one_where_the_gateway_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa, H200, 140000'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gateway()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StartError, match="needs one also where the gateway runs"):
        check_gateway()
