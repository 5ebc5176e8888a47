"""Which expert goes to which node of a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from decar.router.errors import StartError
from decar.server.cluster.nodes import Node, Plan, plan_on
from decar.server.commands import with_ray_address
from tests.server.test_placement import ensemble

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
        ("e0=gpu:1@ada", r"names no node: with --ray it is EXPERT=node:NAME"),
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
