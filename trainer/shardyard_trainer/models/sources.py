"""Models: which one a spec means, and the module that a task trains, fresh or from weights.

Only safetensors are read, and nothing of a model's folder is run, except code of PyTorch Hub that the operator allows
(`torch_hub`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import Message

from shardyard.remote_uris import is_remote
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, shorten
from shardyard_trainer.data.sources import resolve_uri
from shardyard_trainer.models import architectures
from shardyard_trainer.models.adapted import with_adapter
from shardyard_trainer.models.conversion import note_of
from shardyard_trainer.models.door import Folder, FolderInvalid, open_folder, refuse_links
from shardyard_trainer.models.folder import TORCH_HUB_TYPES, ModelFolder, read_folder
from shardyard_trainer.models.fresh import (
    fresh_config,
    number_complaint,
)
from shardyard_trainer.models.gguf_folder import dequantise, gguf_files, gguf_in
from shardyard_trainer.models.hub import resolve_hub
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.tf_checkpoint import convert, find_checkpoint
from shardyard_trainer.models.torch_hub import resolve_torch_hub
from shardyard_trainer.models.weight_heads import with_true_head
from shardyard_trainer.models.weights import WeightsInvalid, no_weights, weight_names
from shardyard_trainer.plain_words import in_plain_words
from shardyard_trainer.reading import about

FIELD = "spec.model"


@dataclass(frozen=True)
class ModelChoice:
    """The model that a spec means: its configuration, and the folder of its weights (None: a fresh one).

    `pinned` is the source as it always names the same files (see `Found`). `note` says how the folder was converted,
    if it was. `separate` are weights that the folder has of their own, though its configuration ties them.
    """

    config: Any
    folder: Folder | None
    described: ModelFolder | None = None
    pinned: Message | None = None
    note: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    field: str = FIELD
    separate: tuple[str, ...] = ()

    @property
    def is_fresh(self) -> bool:
        """Whether it starts from random weights."""
        return self.folder is None


def choose_model(
    source: spec_pb2.ModelSource, locations: worker_pb2.Locations, *, field: str = FIELD, image_size: int = 0
) -> ModelChoice:
    """The model that a source means, its configuration read and checked. Raises SpecError.

    `image_size` is the side of the task's pictures; 0: the spec says none, or they are not pictures.
    """
    kind = source.WhichOneof("source")
    if kind is None:
        raise SpecError(
            field, "SPEC_INVALID", "no model: give hub, uri, model, architecture, torch_hub, checkpoint or adapter"
        )
    if kind == "architecture":
        place = f"{field}.architecture"
        config, overrides = fresh_config(source.architecture, place)
        choice = ModelChoice(config, None, overrides=overrides, field=place)
    else:
        found = find_folder(source, locations, field=field, image_size=image_size)
        choice = replace(_pretrained(found.folder, f"{field}.{kind}"), pinned=found.pinned, note=found.note)
    # What is not a model of texts is refused by the task, which says what the model can do.
    if architectures.reads_text(choice.config) and (refusal := architectures.refusal(choice.config)):
        raise SpecError(choice.field, "OBJECTIVE_UNSUPPORTED", refusal)
    if source.HasField("dropout") and choice.config.model_type in TORCH_HUB_TYPES:
        text = (
            "the code of this model decides about its dropout; leave it out, and give it in `arguments` if there is one"
        )
        raise SpecError(f"{field}.dropout", "SPEC_INVALID", text)
    if source.HasField("dropout"):
        for name in architectures.dropout_names(choice.config):
            if getattr(choice.config, name) is not None or name == "classifier_dropout":
                setattr(choice.config, name, source.dropout)
    return choice


class Found(NamedTuple):
    """The folder of a source as everything reads it, its note (see `ModelChoice`), and the files that it is.

    `pinned` is what the source has in its oneof, with a commit or the one checkpoint of a folder; None: it is pinned.
    `origin` and `files` are the folder that the user gave and the names of what is read there; both are those of the
    folder itself unless it was converted.
    """

    folder: Folder
    pinned: Message | None = None
    note: str = ""
    origin: Folder | None = None
    files: tuple[str, ...] = ()


def find_folder(source: Any, locations: worker_pb2.Locations, *, field: str, image_size: int = 0) -> Found:
    """The folder of a model or tokenizer source that is not made afresh. Raises SpecError."""
    kind = source.WhichOneof("source")
    if kind is None:
        raise SpecError(field, "SPEC_INVALID", f"no source: give one of {', '.join(_names(source))}")
    about(f"{field}.{kind}", "MODEL_INVALID")
    if kind == "torch_hub":
        return _of_torch_hub(source.torch_hub, locations, f"{field}.torch_hub", image_size)
    return _FOLDERS[kind](getattr(source, kind), locations, f"{field}.{kind}")


def _names(source: Message) -> list[str]:
    return [each.name for each in source.DESCRIPTOR.oneofs_by_name["source"].fields]


def pin(source: Any, pinned: Message | None) -> None:
    """Writes what a source was found to mean into it, so that it always names the same model."""
    if pinned is not None:
        getattr(source, source.WhichOneof("source")).CopyFrom(pinned)


def _of_hub(hub: spec_pb2.HubModel, locations: worker_pb2.Locations, field: str) -> Found:
    found, commit = resolve_hub(hub, Path(locations.cache_dir), field=field)
    return Found(_checked(found, field), spec_pb2.HubModel(id=hub.id, revision=commit, token=hub.token))


def _of_uri(uri: str, locations: worker_pb2.Locations, field: str) -> Found:
    path = resolve_uri(uri, locations, field=field)
    if not path.is_dir():
        raise SpecError(field, "PATH_NOT_ALLOWED", f"{shorten(uri)!r} is a file; give its folder")
    # The service made a copy of objects itself, without links.
    roots = () if is_remote(uri) else tuple(Path(root) for root in locations.data_roots)
    return _as_read(_checked(open_folder(path, roots=roots), field), locations, field)


def _of_name(name: str, locations: worker_pb2.Locations, field: str) -> Found:
    kind = field.rpartition(".")[2]
    reason = "DATASET_NOT_FOUND" if kind == "dataset" else "MODEL_NOT_FOUND"
    place = locations.folders.get(name, "")
    if not place or not Path(place).is_dir():
        raise SpecError(field, reason, f"there is no {kind} {shorten(name)!r}")
    return _as_read(_checked(open_folder(Path(place), runs=locations.torch_hub), field), locations, field)


def _as_read(folder: Folder, locations: worker_pb2.Locations, field: str) -> Found:
    """A folder as it is, or what its GGUF file is converted into."""
    try:
        if (origin := gguf_in(folder)) is None:
            return Found(folder)
        converted = dequantise(origin, Path(locations.cache_dir))
        return Found(converted, None, note_of(converted), origin, gguf_files(origin))
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from None


def _of_torch_hub(hub: spec_pb2.TorchHubModel, locations: worker_pb2.Locations, field: str, image_size: int) -> Found:
    made, revision = resolve_torch_hub(hub, locations, field=field, image_size=image_size)
    pinned = spec_pb2.TorchHubModel()
    pinned.CopyFrom(hub)
    pinned.revision = revision
    return Found(_checked(made, field), pinned)


def _of_checkpoint(checkpoint: spec_pb2.TensorflowCheckpoint, locations: worker_pb2.Locations, field: str) -> Found:
    place = f"{field}.uri"
    try:
        found = find_checkpoint(checkpoint.uri, locations, field=place)
        _checked(found.folder, place)
        folder = convert(found, Path(locations.cache_dir))
        pinned = spec_pb2.TensorflowCheckpoint(uri=found.uri)
        return Found(folder, pinned, note_of(folder), found.folder, tuple(found.files()))
    except FolderInvalid as error:
        raise SpecError(place, error.reason, str(error), error.metadata) from None


def _of_adapter(adapted: spec_pb2.AdaptedModel, locations: worker_pb2.Locations, field: str) -> Found:
    adapter = find_folder(adapted.folder, locations, field=f"{field}.folder")
    base = find_folder(adapted.base, locations, field=f"{field}.base")
    pinned = spec_pb2.AdaptedModel()
    pinned.CopyFrom(adapted)
    pin(pinned.folder, adapter.pinned)
    pin(pinned.base, base.pinned)
    try:
        folder = with_adapter(adapter.folder, base.folder, Path(locations.cache_dir))
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from None
    except WeightsInvalid as error:
        raise SpecError(field, "MODEL_INVALID", str(error), {"file": error.file}) from None
    return Found(folder, pinned, "; ".join(filter(None, (base.note, note_of(folder)))))


_FOLDERS: Mapping[str, Callable[[Any, worker_pb2.Locations, str], Found]] = {
    "hub": _of_hub,
    "uri": _of_uri,
    "model": _of_name,
    "dataset": _of_name,
    "checkpoint": _of_checkpoint,
    "adapter": _of_adapter,
}
"""Where the folder of each kind of source is, but of `torch_hub`; `architecture` and `train` have none."""


def _checked(folder: Folder, field: str) -> Folder:
    try:
        refuse_links(folder)
    except FolderInvalid as error:
        raise SpecError(field, "PATH_NOT_ALLOWED", str(error), error.metadata) from None
    return folder


def _pretrained(folder: Folder, field: str) -> ModelChoice:
    try:
        described = read_folder(folder)
        if not weight_names(folder):
            raise no_weights(folder)
        with quiet():
            config = model_config(folder)
        for name, value in config.to_dict().items():
            if complaint := number_complaint(name, value):
                raise FolderInvalid(f"config.json has {name}: {complaint}", file="config.json")
        if not all(refuse(config) for refuse in architectures.REFUSALS):
            described = with_true_head(described)
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from None
    except WeightsInvalid as error:
        raise SpecError(field, "MODEL_INVALID", str(error), {"file": error.file}) from None
    except LOADING_ERRORS as error:
        raise SpecError(field, "MODEL_INVALID", f"config.json does not load: {in_plain_words(error)}") from None
    return ModelChoice(config, folder, described, field=field)


def untied(choice: ModelChoice) -> ModelChoice:
    """The choice with an output layer of its own, beside the embeddings."""
    config = copy.deepcopy(choice.config)
    config.tie_word_embeddings = False
    return replace(choice, config=config)
