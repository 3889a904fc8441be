"""The models that a task may be trained with: those of the catalogue, and the project's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard_trainer.choosing.catalogue import Catalogue, Entry, Score
from shardyard_trainer.models.folder import TORCH_HUB_TYPES

HUB, NEW = "hub:", "new:"


@dataclass(frozen=True)
class Candidate:
    """A model, as a job names it (`source`) and as it is planned without its weights (`planned`).

    `languages` and `licence` are empty if they are not on record; `own` is set for the project's own models.
    """

    name: str
    family: str
    model_type: str
    licence: str
    licence_source: str
    gated: bool
    weights: str
    languages: frozenset[str]
    context: int
    image_size: int
    scores: tuple[Score, ...]
    unchecked: tuple[str, ...]
    note: str
    source: spec_pb2.ModelSource
    planned: spec_pb2.ModelSource
    own: model_service_pb2.Model | None = None

    @property
    def is_new(self) -> bool:
        """Whether it starts from random weights."""
        return self.source.HasField("architecture")


def published(catalogue: Catalogue, task: str) -> Iterator[Candidate]:
    """The entries of the catalogue for a task."""
    for entry in catalogue.entries:
        if task in entry.tasks:
            yield _of_entry(entry)


def own(models: list[model_service_pb2.Model]) -> Iterator[Candidate]:
    """The project's own models, without those of PyTorch Hub, whose code would have to run to be planned."""
    for model in models:
        if model.model_type in TORCH_HUB_TYPES:
            continue
        source = spec_pb2.ModelSource(model=model.name)
        yield Candidate(
            name=model.name,
            family=model.model_type,
            model_type=model.model_type,
            licence="",
            licence_source="",
            gated=False,
            weights="safetensors",
            languages=frozenset(),
            context=0,
            image_size=0,
            scores=(),
            unchecked=(),
            note="",
            source=source,
            planned=source,
            own=model,
        )


def _of_entry(entry: Entry) -> Candidate:
    planned = spec_pb2.ModelSource()
    planned.architecture.model_type = entry.model_type
    planned.architecture.overrides.update(dict(entry.architecture))
    source = spec_pb2.ModelSource()
    if entry.is_new:
        source.CopyFrom(planned)
    else:
        source.hub.id = entry.id
    return Candidate(
        name=f"{NEW if entry.is_new else HUB}{entry.id}",
        family=entry.family,
        model_type=entry.model_type,
        licence=entry.licence,
        licence_source=entry.licence_source,
        gated=entry.gated,
        weights=entry.weights,
        languages=entry.languages,
        context=entry.context,
        image_size=entry.image_size,
        scores=entry.scores,
        unchecked=entry.unchecked,
        note=entry.note,
        source=source,
        planned=planned,
    )
