"""Models and tokenizers are pinned by their bytes: a job trains on the bytes inspected at submission, or not at all.

Only files that are ever read count (`door.is_allowed`). What the service itself keeps is compared with the sha256 that
it was uploaded or exported with; what the Hub's cache keeps, with the hash that its blob is named by.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardyard.v1 import plan_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.models import sources, torch_hub
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.known_files import CHANGED, check_known, digest, file_names

_GIT_BLOB = re.compile(r"[0-9a-f]{40}")
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")


def model_fingerprint(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> str:
    """Of the model's files; empty for one that is made afresh. Raises SpecError, MODEL_CHANGED for a damaged file."""
    if spec.model.WhichOneof("source") in (None, "architecture"):
        return ""
    return _of_source(spec.model, locations, "spec.model")


def tokenizer_fingerprint(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> str:
    """Of the tokenizer's files; empty for the model's own, and for one that is trained. Raises SpecError likewise."""
    if spec.tokenizer.WhichOneof("source") in (None, "train"):
        return ""
    return _of_source(spec.tokenizer, locations, "spec.tokenizer")


def teacher_fingerprint(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> str:
    """Of the teacher's files; empty if there is none. Raises SpecError likewise."""
    if not spec.HasField("distillation"):
        return ""
    return _of_source(spec.distillation.teacher, locations, "spec.distillation.teacher")


def check_same_model(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, plan: plan_pb2.JobPlan) -> None:
    """Raises RunFailed MODEL_NOT_FOUND or MODEL_CHANGED; a plan without fingerprints is compared with nothing."""
    for what, field, planned, found in (
        ("model", "spec.model", plan.model_fingerprint, model_fingerprint),
        ("tokenizer", "spec.tokenizer", plan.tokenizer_fingerprint, tokenizer_fingerprint),
        ("teacher", "spec.distillation.teacher", plan.teacher_fingerprint, teacher_fingerprint),
    ):
        if not planned:
            continue
        try:
            now = found(spec, locations)
        except SpecError as error:
            if error.reason == CHANGED:
                raise _changed(error.message, error.metadata) from error
            if error.reason == "HUB_UNREACHABLE":
                raise
            raise RunFailed(
                "MODEL_NOT_FOUND",
                f"the {what} that the job was submitted with cannot be read any more: {error.message}",
                "restore it, or submit the job with its new path",
                error.metadata,
            ) from error
        if now != planned:
            raise _changed(
                f"the files of the {what} are not those that were inspected when the job was submitted",
                {"field": field, "fingerprint": now, "planned_fingerprint": planned},
            )


def _of_source(source: Any, locations: worker_pb2.Locations, field: str) -> str:
    kind = source.WhichOneof("source")
    if kind == "torch_hub":
        return torch_hub.identity(source.torch_hub, locations, field=f"{field}.torch_hub")
    if kind == "adapter":
        adapted, field = source.adapter, f"{field}.adapter"
        both = (_of_source(getattr(adapted, part), locations, f"{field}.{part}") for part in ("folder", "base"))
        return hashlib.sha256("".join(both).encode()).hexdigest()
    found = sources.find_folder(source, locations, field=field)
    folder = found.origin or found.folder
    try:
        check_known(folder, _known(folder, locations.known_files))
        if kind == "hub":
            _check_blobs(folder)
        parts = "".join(f"{name}:{digest(folder, name)}\n" for name in found.files or file_names(folder))
    except FolderInvalid as error:
        raise SpecError(f"{field}.{kind}", error.reason, str(error), error.metadata) from None
    return hashlib.sha256(parts.encode()).hexdigest()


def _known(folder: Folder, known: Mapping[str, worker_pb2.KnownFiles]) -> list[transfer_pb2.StoredFile]:
    return [file for place, files in known.items() if Path(place).resolve() == folder.path for file in files.files]


def _check_blobs(folder: Folder) -> None:
    """The Hub's cache names each file by the hash of its bytes. Raises FolderInvalid MODEL_CHANGED."""
    for name in file_names(folder):
        blob = (folder.path / name).resolve().name
        if _LFS_BLOB.fullmatch(blob):
            is_whole = digest(folder, name) == blob
        elif _GIT_BLOB.fullmatch(blob):
            is_whole = digest(folder, name, as_git=True) == blob
        else:
            continue
        if not is_whole:
            raise FolderInvalid(
                f"the cached file {name} of the Hub model is damaged: its bytes do not have the hash {blob}; have the "
                "operator remove the model from the service's Hub cache, then submit again",
                reason=CHANGED,
                file=name,
            )


def _changed(message: str, metadata: Mapping[str, str]) -> RunFailed:
    next_step = "submit the job again with the model as it is, or bring back what was there"
    return RunFailed(CHANGED, message, next_step, metadata)
