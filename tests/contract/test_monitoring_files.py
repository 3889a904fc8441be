"""Dashboard, alerts and docs name the metrics that exist, with the labels that they have, and leave none out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from helpers.repository import ROOT
from shardyard_coordinator.domain.causes import Cause
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.monitoring.families import FAMILIES, Kind

DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "shardyard.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
# Of the process: prometheus-client's own.
STANDARD = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
SERIES = {
    f"{family.name}{ending}": family
    for family in FAMILIES
    for ending in (("_bucket", "_sum", "_count") if family.kind is Kind.HISTOGRAM else ("",))
}
NAME = re.compile(r"\b((?:shardyard|process)_[a-z0-9_]+)\b(?:\{([^}]*)\})?")
VALUES = {
    "state": {state.value for state in JobState},
    "reason": {reason.value for reason in Reason},
    "cause": {cause.value for cause in Cause} | {"none"},
    "start": {"warm", "cold"},
}


def panels(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for each in part.get("panels", ()):
        yield each
        yield from panels(each)


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) pairs of the dashboard and of the alerts."""
    for panel in panels(DASHBOARD):
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def problem(expression: str) -> str:
    """What is wrong with an expression; empty: nothing."""
    if any(expression.count(opening) != expression.count(closing) for opening, closing in ("()", "[]", "{}")):
        return "brackets"
    for name, selector in NAME.findall(expression):
        if name in STANDARD:
            continue
        if name not in SERIES:
            return f"there is no series {name}"
        for label, _, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
            if label not in (*SERIES[name].labels, "instance", "le"):
                return f"{name} has no label {label}"
            if label in VALUES and not set(value.split("|")) <= VALUES[label]:
                return f"{name} has no {label} {value}"
    for grouped in re.findall(r"\bby \(([^)]*)\)", expression):
        known = {"le", "instance", *(label for name, _ in NAME.findall(expression) for label in _labels(name))}
        if unknown := {label.strip() for label in grouped.split(",")} - known:
            return f"grouped by {unknown}"
    return ""


def _labels(name: str) -> tuple[str, ...]:
    return SERIES[name].labels if name in SERIES else ()


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_expression_is_about_metrics_that_exist(where: str, expression: str) -> None:
    assert problem(expression) == "", where


@pytest.mark.parametrize(
    "expression",
    [
        "shardyard_made_up",
        "shardyard_loop_lag_seconds",
        'shardyard_jobs{job="x"}',
        'shardyard_jobs{state="DONE"}',
        "sum by (user) (shardyard_jobs)",
        "rate(shardyard_jobs[5m]",
    ],
)
def test_the_check_finds_what_is_wrong(expression: str) -> None:
    assert problem(expression) != ""


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {name for _, expression in expressions() for name, _ in NAME.findall(expression)}
    missing = [
        family.name for family in FAMILIES if not {name for name, each in SERIES.items() if each is family} & shown
    ]
    assert missing == []


def test_panels_have_a_title_a_place_and_a_target_that_names_its_source() -> None:
    found = [panel for panel in panels(DASHBOARD) if panel["type"] != "row"]
    assert len(found) > 20 and len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        assert panel["title"] and panel["targets"] and panel["gridPos"]["w"] > 0
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24


def test_every_alert_is_explained_in_the_docs() -> None:
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    names = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert [name for name in names if f"`{name}`" not in page] == []
