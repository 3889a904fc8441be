"""The catalogue of published models: data in `catalogue.json`, read once. docs/choosing.md says how to add to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, NamedTuple

ENGLISH = "en"

UNCHECKABLE = ("licence", "gated", "context")
"""Facts that may lack a source; weights that nobody looked for are `unknown`, results without a source stay out."""


class Score(NamedTuple):
    """A published result; comparable with others of the same benchmark only."""

    benchmark: str
    metric: str
    value: float
    higher_is_better: bool
    source: str


class Comparison(NamedTuple):
    """A benchmark of a task, and the model whose result on it counts as 0 points."""

    benchmark: str
    reference: str


@dataclass(frozen=True)
class Entry:
    """A published model, or an architecture that starts from random weights (`weights` is `new`).

    `architecture` are the settings of its configuration that the planner needs; `weights` is `safetensors`, `pickle`
    (only such on the main branch), or `unknown`; `context` is in tokens, 0 for pictures and items, whose side in pixels
    is `image_size` if they are pictures. `licence_source` says where the licence was read, and `unchecked` names the
    facts that no source was found for (`UNCHECKABLE`).
    """

    id: str
    family: str
    model_type: str
    architecture: Mapping[str, Any]
    parameters: int
    counted_as: str
    licence: str
    licence_source: str
    gated: bool
    weights: str
    languages: frozenset[str]
    context: int
    image_size: int
    tasks: tuple[str, ...]
    scores: tuple[Score, ...]
    unchecked: tuple[str, ...]
    note: str

    @property
    def is_new(self) -> bool:
        """Whether it starts from random weights."""
        return self.weights == "new"


@dataclass(frozen=True)
class Catalogue:
    """All entries; `commercial_use` says of each licence whether it is known to allow that.

    `comparisons` are the benchmarks of a task for models of English texts or pictures, `other_comparisons` for texts in
    other languages.
    """

    entries: tuple[Entry, ...]
    commercial_use: Mapping[str, bool]
    comparisons: Mapping[str, tuple[Comparison, ...]]
    other_comparisons: Mapping[str, tuple[Comparison, ...]]

    def compared_by(self, task: str, languages: frozenset[str]) -> tuple[Comparison, ...]:
        """The benchmarks that models for a task are compared by."""
        found = self.comparisons if languages <= {ENGLISH} else self.other_comparisons
        return found.get(task, ())


@lru_cache(maxsize=1)
def load_catalogue() -> Catalogue:
    """The catalogue of the package."""
    text = resources.files(__package__).joinpath("catalogue.json").read_text(encoding="utf-8")
    return read_catalogue(json.loads(text))


def read_catalogue(content: Mapping[str, Any]) -> Catalogue:
    """A catalogue from the content of its file. Raises LookupError or TypeError for another form."""
    groups = {name: group["languages"] for name, group in content["language_groups"].items()}
    compared = content["comparisons"]
    return Catalogue(
        tuple(_entry(each, groups) for each in content["models"]),
        dict(content["commercial_use"]),
        {task: tuple(Comparison(**each) for each in lists["english"]) for task, lists in compared.items()},
        {task: tuple(Comparison(**each) for each in lists["other"]) for task, lists in compared.items()},
    )


def _entry(written: Mapping[str, Any], groups: Mapping[str, list[str]]) -> Entry:
    known: set[str] = set()
    for name in written["languages"]:
        known |= set(groups[name[1:]]) if name.startswith("@") else {name}
    return Entry(
        **{
            **written,
            "languages": frozenset(known),
            "tasks": tuple(written["tasks"]),
            "scores": tuple(Score(**each) for each in written["scores"]),
            "unchecked": tuple(written["unchecked"]),
        }
    )
