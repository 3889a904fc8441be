"""One table of tasks: contract, trainer, SDK, docs and examples agree, and no code compares names of tasks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import shardyard
from helpers.task_table import ROWS
from shardyard_coordinator.control.spec_walk import tasks
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Output

ROOT = Path(__file__).parents[2]
# A comparison with a name, a choice by it, or a member of a set of names; paths of fields do not count.
_COMPARES = re.compile(
    r"""WhichOneof\("(task|objective)"\)\s*(==|!=|in\b)|\btask(\.name)?\s*(==|!=)\s*["']"""
    r"""|\bin\s*[{(\[]\s*["'](NAMES)["']|(==|!=)\s*["'](NAMES)["']|["'](NAMES)["']\s*(==|!=)""".replace(
        "NAMES", "|".join(table.NAMES)
    )
)


def test_the_table_has_the_tasks_of_the_contract_and_each_has_its_file() -> None:
    assert sorted(table.NAMES) == sorted(tasks())
    for name in table.NAMES:
        assert table.named(name).name == name
        # The data of an evaluation, and of a format's, is that of the model's own task; a copy has none.
        without = (Output.METRICS, Output.FORMAT, Output.COPY)
        assert set(table.named(name).roles) or table.named(name).output in without, name


@pytest.mark.parametrize("name", table.NAMES)
def test_a_task_has_a_row_in_the_docs_and_an_example_that_is_one(name: str) -> None:
    rows = [line for line in (ROOT / "docs" / "tasks.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split("|")]
    kind, flag = re.findall(r"`([^`]+)`", cells[1])
    assert hasattr(shardyard, kind) and flag == name.replace("_", "-")
    assert set(re.findall(r"`([^`]+)`", cells[2])) == set(table.named(name).roles)
    (example,) = re.findall(r"\]\(\.\./(examples/[^)]+)\)", cells[5])
    assert f"{name}:" in (ROOT / example).read_text()


def test_every_task_has_a_row_in_the_integration_table_and_each_number_of_workers_meets_each_stage() -> None:
    assert sorted(ROWS) == sorted(table.NAMES)
    trained = {name: row for name, row in ROWS.items() if row.story is not None}
    assert list(trained) == [name for name in ROWS if table.named(name).output is Output.MODEL]
    pairs = {(row.workers, row.zero_stage) for row in trained.values()}
    assert pairs == set(itertools.product((1, 2), range(4)))


def test_no_code_compares_the_names_of_tasks() -> None:
    found = []
    for package in ("trainer/shardyard_trainer", "coordinator/shardyard_coordinator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "table.py":
                text = path.read_text(encoding="utf-8")
                found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in _COMPARES.finditer(text)]
    assert not found
