"""Dashboard and alerts ask for metrics that there are, and every alert and metric has a row in docs/operations.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from decar.server.protocol.plane import PlaneSpec
from tests.queries import ALERTS, DASHBOARD, alerts, dashboard_queries, names_in
from tests.server.fake_engine import FakeServer

ROOT = Path(__file__).parents[1]
OPERATIONS = (ROOT / "docs/operations.md").read_text()


SUFFIXES = {"counter": ["_total"], "histogram": ["", "_bucket", "_count", "_sum"], "info": ["_info"]}


@pytest.fixture(scope="module")
def registered() -> dict[str, str]:
    """Every name that Prometheus has of decar's own metrics -> how an operator calls that metric."""
    found = {}
    for family in FakeServer(1, 1).client._metrics.collect():
        names = [family.name + suffix for suffix in SUFFIXES.get(family.type, [""])]
        found |= dict.fromkeys(names, names[0])
    return found


def test_the_patterns_find_what_there_is() -> None:
    assert len(dashboard_queries()) >= 30
    assert len(alerts()) >= 9
    assert names_in("sum(rate(decar:a_total[5m])) / on (x) max_over_time(vllm:b{c='d:e'}[1h])") == {
        "decar:a_total",
        "vllm:b",
    }


@pytest.mark.parametrize("query", [*dashboard_queries(), *(alert["expr"] for alert in alerts())])
def test_decars_names_are_those_of_its_metrics(query: str, registered: dict[str, str]) -> None:
    """vLLM's are held to a running server's /metrics by tests/e2e/test_metrics.py."""
    assert names_in(query)
    assert {name for name in names_in(query) if name.startswith("decar:")} <= set(registered)


def test_the_dashboard_has_a_title_and_a_place_for_every_panel() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def rows(heading: str) -> dict[str, list[str]]:
    """The rows of the table under a heading of docs/operations.md, by what their first cell has in backquotes."""
    section = re.split(r"^## ", OPERATIONS, flags=re.MULTILINE)
    [text] = [part for part in section if part.startswith(f"{heading}\n")]
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): row for row in cells}


def test_every_alert_has_a_row_that_says_what_to_do_and_nothing_else_has() -> None:
    documented = rows("When an alert fires")
    assert list(documented) == [alert["alert"] for alert in alerts()]
    assert all(len(row) == 3 and all(map(str.strip, row)) for row in documented.values())


def test_every_metric_has_a_row_that_says_what_it_means_and_nothing_else_has(
    registered: dict[str, str],
) -> None:
    assert set(rows("What each metric means")) == set(registered.values())


def test_rows_take_the_shared_memory_that_is_written() -> None:
    examples = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", OPERATIONS, re.MULTILINE)
    assert len(examples) == 3
    for experts, slots, vocab_size, mb in (map(int, row) for row in examples):
        spec = PlaneSpec("", experts, slots, vocab_size, positions=4096)
        assert round(spec.size_bytes / 1e6) == mb
        assert spec.size_bytes == pytest.approx(8 * experts * slots * vocab_size, rel=0.02)


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load(ALERTS.with_name("alerts.test.yaml").read_text())["tests"]
    cases: list[Any] = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == {a["alert"] for a in alerts()}


def test_what_is_no_promql_is_found() -> None:
    with pytest.raises(ValueError, match="unclosed"):
        names_in("sum(rate(decar:queued[5m])")
