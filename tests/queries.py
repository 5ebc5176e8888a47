"""What the dashboard and the alerts in deploy/ ask Prometheus for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana/decar.json"
ALERTS = DEPLOY / "prometheus/alerts.yaml"


def dashboard_queries() -> list[str]:
    """Of all panels, with an interval in the place of Grafana's variable."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [query.replace("$__rate_interval", "1m") for query in queries]


def alerts() -> list[dict[str, Any]]:
    """The rules, in their order."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(query: str) -> set[str]:
    """Names of the samples that a query asks for.

    Raises:
        ValueError: it is no PromQL.
    """
    found: set[str] = set()

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.add(node.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.add(node.vector_selector.name)
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found
