"""Where engines go, from sizes alone: no GPU is needed to plan for some."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from decar.router.errors import StartError
from decar.router.manifest import EngineOptions
from decar.server.inspection import inspect
from decar.server.placement import Gpu, _visible, device_order, exchanged, place, place_on, refuse_nodes

GIB = 1 << 30


def ensemble(*sizes_gib: float, ranks: Sequence[int | None] = ()) -> Any:
    names = [f"e{i}" for i in range(len(sizes_gib))]
    counts = ranks or [None] * len(sizes_gib)
    experts = [
        SimpleNamespace(
            name=name,
            path=Path(name),
            weight_bytes=int(size * GIB),
            options=EngineOptions(tensor_parallel_size=count),
        )
        for name, size, count in zip(names, sizes_gib, counts, strict=True)
    ]
    return SimpleNamespace(experts=experts, expert_names=names)


def gpus(count: int, gib: int = 80) -> list[Gpu]:
    return [Gpu(i, "H200", gib * GIB, str(i)) for i in range(count)]


def test_with_enough_gpus_each_engine_has_one_and_takes_what_is_left_of_it() -> None:
    places = place(ensemble(14, 14), gpus(3))
    assert [(placed.gpus, placed.kv_bytes) for placed in places] == [((0,), None), ((1,), None)]


def test_engines_that_share_a_gpu_get_equal_explicit_kv_sizes_that_fit() -> None:
    places = place(ensemble(14, 14, 1), gpus(2))
    assert [placed.gpus for placed in places] == [(0,), (1,), (0,)]
    shared = [placed for placed in places if placed.gpus == (0,)]
    assert shared[0].kv_bytes == shared[1].kv_bytes
    assert 0.8 * 80 * GIB < sum(placed.needed_bytes for placed in shared) <= 0.9 * 80 * GIB
    assert places[1].kv_bytes is None


def test_a_wish_and_a_users_kv_size_are_followed() -> None:
    places = place(ensemble(1, 1), gpus(2), "e0=1, e1=1", kv_bytes=2 * GIB)
    assert [(placed.gpus, placed.kv_bytes) for placed in places] == [((1,), 2 * GIB)] * 2


def test_an_expert_of_several_ranks_has_as_many_gpus_and_an_equal_part_on_each() -> None:
    places = place(ensemble(140, 14, 14, ranks=[4, None, 1]), gpus(6))
    assert [placed.gpus for placed in places] == [(0, 1, 2, 3), (4,), (5,)]
    assert [placed.devices for placed in places][1] == "4,0,1,2,3,5"
    assert places[0].kv_bytes is None
    assert 35 * GIB < places[0].needed_bytes < 39 * GIB
    everywhere = place(ensemble(80, 40), gpus(2), ranks=2)
    assert [placed.gpus for placed in everywhere] == [(0, 1), (0, 1)]
    assert 0 < (everywhere[0].kv_bytes or 0) == everywhere[1].kv_bytes
    wished = place(ensemble(14, 14, ranks=[2, None]), gpus(3), "e0=2+0,e1=1")
    assert [placed.gpus for placed in wished] == [(2, 0), (1,)]
    assert wished[0].devices == "2,0,1"
    # The GPUs that one shares with another leave it less; it has the same on each of its own.
    some = place(ensemble(14, 14, ranks=[2, 1]), gpus(2))
    assert [placed.gpus for placed in some] == [(0, 1), (0,)]
    assert some[0].kv_bytes == some[1].kv_bytes


def test_on_cpu_ranks_share_what_one_process_would_have() -> None:
    [alone, shared] = place(ensemble(2, 2, ranks=[1, 2]), [])
    assert (alone.ranks, shared.ranks) == (1, 2)
    assert alone.kv_bytes == 2 * (shared.kv_bytes or 0)


def test_who_takes_anothers_place_has_as_many_ranks() -> None:
    before = place(ensemble(14, 14, ranks=[2, None]), gpus(3))
    after = exchanged(before, ensemble(15, 15, ranks=[2, None]))
    assert [placed.gpus for placed in after] == [(0, 1), (2,)]
    with pytest.raises(StartError, match=r"'e1' would have another tensor_parallel_size \(2\)"):
        exchanged(before, ensemble(14, 14), ranks=2)


def test_on_cpu_every_engine_has_the_same() -> None:
    places = place(ensemble(1, 2), [], kv_bytes=GIB)
    assert [(placed.gpus, placed.kv_bytes) for placed in places] == [((), GIB)] * 2
    assert places[1].needed_bytes > 3 * GIB


@pytest.mark.parametrize(
    ("wish", "available", "said"),
    [
        ("e0=0,e2=0", gpus(1), "'e2' is none of the experts e0, e1"),
        ("e0=0,e1=3", gpus(2), "'e1=3' does not name a GPU from 0 to 1"),
        ("e0=0", gpus(2), "nothing of e1"),
        ("e0=0,e1=0", [], "there is none here"),
        (None, gpus(1, 40), "too small for e0, e1: weights 40.0 GiB"),
    ],
)
def test_what_cannot_be_is_said(wish: str | None, available: list[Gpu], said: str) -> None:
    with pytest.raises(StartError, match=said):
        place(ensemble(20, 20), available, wish)


@pytest.mark.parametrize(
    ("wish", "count", "said"),
    [
        (None, 1, "'e0' is to be on 2 GPUs .*, and 1 can be seen"),
        ("e0=0,e1=1", 2, "'e0=0' does not name 2 different GPUs"),
        ("e0=0+0,e1=1", 2, "'e0=0[+]0' does not name 2 different GPUs"),
        ("e0=0+1,e1=0+1", 2, "'e1=0[+]1' does not name 1 different GPUs"),
        ("e0=0+2,e1=1", 2, "'e0=0[+]2' does not name a GPU from 0 to 1"),
    ],
)
def test_what_cannot_be_of_ranks_is_said(wish: str | None, count: int, said: str) -> None:
    with pytest.raises(StartError, match=said):
        place(ensemble(1, 1, ranks=[2, None]), gpus(count), wish)


def test_a_kv_size_that_leaves_no_room_is_said() -> None:
    with pytest.raises(StartError, match="--kv-cache-memory-bytes"):
        place(ensemble(20, 20), gpus(1), kv_bytes=30 * GIB)


def test_who_takes_anothers_place_has_its_memory() -> None:
    before = place(ensemble(14, 14, 14), gpus(2))
    after = exchanged(before, ensemble(14, 20, 16))
    assert [placed.gpus for placed in after] == [(0,), (1,), (0,)]
    assert after[0] == before[0]
    assert after[1].kv_bytes is None
    assert after[2].needed_bytes == before[2].needed_bytes
    with pytest.raises(StartError, match="'e2' would need"):
        exchanged(before, ensemble(14, 14, 60))
    on_cpu = place(ensemble(1, 1), [])
    assert exchanged(on_cpu, ensemble(1, 1)) == on_cpu
    with pytest.raises(StartError, match="'e0' would need"):
        exchanged(on_cpu, ensemble(10_000, 1))


def test_room_for_more_is_kept() -> None:
    alone, room = place(ensemble(14, 10), gpus(1), seats=3)[0], place(ensemble(14, 10), gpus(1), seats=3)[2]
    assert (room.expert, room.gpus, room.weight_bytes) == ("", (0,), 14 * GIB)
    assert alone.kv_bytes is not None
    assert alone.kv_bytes < (place(ensemble(14, 10), gpus(1))[0].kv_bytes or 0)
    [added] = exchanged([room], ensemble(15))
    assert added.needed_bytes == room.needed_bytes
    [_, on_cpu] = place(ensemble(1), [], seats=2)
    assert exchanged([on_cpu], ensemble(1))[0].expert == "e0"
    with pytest.raises(StartError, match="'e0' would need"):
        exchanged([on_cpu], ensemble(10_000))


def test_only_visible_gpus_count_in_their_order() -> None:
    rows = [["0", "GPU-aa", "A", "10"], ["1", "GPU-bb", "B", "20"]]
    assert [gpu.name for gpu in _visible(rows, None)] == ["A", "B"]
    assert [(gpu.index, gpu.name) for gpu in _visible(rows, "1,0")] == [(0, "B"), (1, "A")]
    assert [gpu.name for gpu in _visible(rows, "GPU-bb")] == ["B"]
    assert _visible(rows, "") == []
    with pytest.raises(StartError, match="'2'"):
        _visible(rows, "2")
    many = [[str(i), f"GPU-{i}{i}", "A", "10"] for i in range(7)]
    assert device_order([1], _visible(many, "4,5,6")) == "5,4,6"
    assert device_order([1], _visible(many, "GPU-44,6")) == "6,GPU-44"
    assert device_order([2], _visible(many[:3], None)) == "2,0,1"
    assert device_order([1, 2], _visible(many[:3], None)) == "1,2,0"


def test_who_has_not_chosen_gets_first_what_nobody_has_chosen() -> None:
    sizes, counts = [(f"e{i}", GIB) for i in range(4)], [1, 1, 2, 1]
    places = place_on(gpus(4), sizes, counts, {1: (0,)})
    assert [placed.gpus for placed in places] == [(1,), (0,), (2, 3), (0,)]
    assert [placed.kv_bytes is None for placed in places] == [True, False, True, False]
    some = [Gpu(5, "A", 80 * GIB, "7"), Gpu(2, "B", 40 * GIB, "3")]
    [placed] = place_on(some, sizes[:1], [2], {})
    assert (placed.gpus, placed.devices, placed.gpu_bytes) == ((5, 2), "7,3", 40 * GIB)
    with pytest.raises(StartError, match=r"GPU 2 \(B, 40.0 GiB\) is too small for e0"):
        place_on(some, [("e0", 50 * GIB)], [1], {0: (1,)})


@pytest.mark.parametrize("wish", ["e0=gpu:0@ada", "e0=0,e1=node:ada", "e0=0+1@ada"])
def test_nodes_are_a_clusters(wish: str) -> None:
    refuse_nodes("e0=0, e1=1+2")
    with pytest.raises(StartError, match=r"names a node, which a Ray cluster has: add --ray"):
        refuse_nodes(wish)


def test_a_node_without_a_cluster_is_said_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(
        StartError, match="--placement says where engines are to be in a Ray cluster: add --ray"
    ):
        inspect(tmp_path, Console(), placement="e0=gpu:0@ada")
