"""`make quickstart TASK=…`: one more story each, on real material and beside its baselines.

A story is a module of this package with what `Story` lists. `tell` runs it through the SDK against a service.
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
"""The stories, each the name of its module."""


class Story(Protocol):
    """What a story's module has. `prepare` returns the material, which the other functions get back."""

    TITLE: str
    WHAT: str
    """What is trained, in the table's words."""
    METRIC: str
    """What the table shows, a number that is the better the higher it is."""

    def prepare(self, folder: Path) -> Any:
        """Fetches the material and writes its files. Raises AssetsUnavailable."""

    def job(self, material: Any) -> JobSpec:
        """What to train."""

    def compare(
        self, client: shardyard.Client, outcome: story.Outcome, material: Any
    ) -> tuple[float, dict[str, float]]:
        """What the trained model reached, and what there is to beat, by the words of the table."""

    def ask(self, client: shardyard.Client, model: str, material: Any) -> None:
        """Prints a few answers of the model. Raises WrongAnswer."""


def tell(name: str, client: shardyard.Client, folder: Path) -> None:
    """Fetch, train, compare and ask. Raises WrongAnswer if the model does not beat all baselines."""
    chosen = cast("Story", importlib.import_module(f"stories.{name}"))
    print(f"\n1. {chosen.TITLE}", flush=True)
    material = chosen.prepare(folder)
    print(f"\n2. Train a {chosen.WHAT}", flush=True)
    outcome = story.run_job(client, chosen.job(material), name)
    reached, baselines = chosen.compare(client, outcome, material)
    print(f"\n  {'on what was held out':44}{chosen.METRIC:>10}{'time':>8}")
    for what, value in sorted({**baselines, chosen.WHAT: reached}.items(), key=lambda row: row[1]):
        took = f"{outcome.took.total_seconds():.0f} s" if what == chosen.WHAT else ""
        print(f"  {what:44}{value:>10.3f}{took:>8}")
    if reached <= max(baselines.values()):
        raise show.WrongAnswer(f"the {chosen.WHAT} reached {reached:.3f}, not more than {max(baselines.values()):.3f}")
    print("\n3. Ask it", flush=True)
    chosen.ask(client, outcome.model, material)
