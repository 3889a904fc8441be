"""`make quickstart TASK=…`: one task each, on real material, compared with baselines.

A story is a module of this package with the members of `Story`. `tell` runs it through the SDK against a service.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol, cast

import show
import story

import shardyard
from shardyard.specs import JobSpec

NAMES = ("ner", "images", "recommend", "instruct", "translate")
"""The stories, by the names of their modules."""


class Story(Protocol):
    """The members of a story's module. `prepare` returns the material that the other functions get."""

    TITLE: str
    WHAT: str
    """The name of the trained model in the table."""
    METRIC: str
    """The metric in the table; higher is better."""

    def prepare(self, folder: Path) -> Any:
        """Fetches the material and writes its files. Raises AssetsUnavailable."""

    def job(self, material: Any) -> JobSpec:
        """The spec of the job."""

    def compare(
        self, client: shardyard.Client, outcome: story.Outcome, material: Any
    ) -> tuple[float, dict[str, float]]:
        """The metric of the trained model, and those of the baselines by their names in the table."""

    def ask(self, client: shardyard.Client, model: str, material: Any) -> None:
        """Prints a few answers of the model. Raises WrongAnswer."""


def tell(name: str, client: shardyard.Client, folder: Path) -> None:
    """Fetches, trains, compares and asks. Raises WrongAnswer if the model does not beat all baselines."""
    chosen = cast("Story", importlib.import_module(f"stories.{name}"))
    print(f"\n1. {chosen.TITLE}", flush=True)
    material = chosen.prepare(folder)
    print(f"\n2. Train a {chosen.WHAT}", flush=True)
    outcome = story.run_job(client, chosen.job(material), name)
    reached, baselines = chosen.compare(client, outcome, material)
    print(f"\n  {'on held-out data':44}{chosen.METRIC:>10}{'time':>8}")
    for what, value in sorted({**baselines, chosen.WHAT: reached}.items(), key=lambda row: row[1]):
        took = f"{outcome.took.total_seconds():.0f} s" if what == chosen.WHAT else ""
        print(f"  {what:44}{value:>10.3f}{took:>8}")
    if reached <= max(baselines.values()):
        raise show.WrongAnswer(f"the {chosen.WHAT} reached {reached:.3f}, not more than {max(baselines.values()):.3f}")
    print("\n3. Ask it", flush=True)
    chosen.ask(client, outcome.model, material)
