"""TensorFlow checkpoints as models: found at a path, recognised by the names of their tensors, and converted once."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, listed, shorten
from shardyard_trainer.data.sources import resolve_uri
from shardyard_trainer.models import tf_bert, tf_resnet, tf_transformer
from shardyard_trainer.models.conversion import COPIED, Layout, Shapes, converted_folder, refuse_unmatched, write_folder
from shardyard_trainer.models.door import MAX_CONFIG_BYTES, Folder, FolderInvalid, open_folder
from shardyard_trainer.models.known_files import digest
from shardyard_trainer.models.other_formats import OF_V1, checkpoints_in, other_than_checkpoint
from shardyard_trainer.models.tensor_bundle import Bundle, Entry, open_bundle
from shardyard_trainer.models.tf_settings import FILES as SETTINGS
from shardyard_trainer.models.tf_training import OF_OBJECTS, skipped_as

_STATE = "checkpoint"
_ALSO = re.compile(
    rf"{_STATE}|{'|'.join(map(re.escape, SETTINGS))}"
    r"|[^./\x00-\x1f][^/\x00-\x1f]*\.(index|data-[0-9]{5}-of-[0-9]{5})"
)
_OF_A_CHECKPOINT = re.compile(r"\.(index|data-[0-9]{5}-of-[0-9]{5})$")


class Family(Protocol):
    """A module that knows the names of one kind of model."""

    def recognise(self, shapes: Shapes, folder: Folder) -> Layout | None:
        """The layout of these tensors; None: it is another kind. Raises FolderInvalid."""


FAMILIES: tuple[Family, ...] = (tf_bert, tf_resnet, tf_transformer)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a folder: `prefix` is what its files' names begin with, `uri` the path of its index as given."""

    folder: Folder
    prefix: str
    uri: str

    def files(self) -> list[str]:
        """The files that are read: of the checkpoint itself, and settings and vocabularies beside it."""
        beside = [name for name in (*SETTINGS, *COPIED) if self.folder.has(name)]
        return sorted({*open_bundle(self.folder, self.prefix).files, *beside})


def find_checkpoint(uri: str, locations: worker_pb2.Locations, *, field: str) -> Checkpoint:
    """The checkpoint at a path: a folder that has one, its index, or the path as TensorFlow gives it (`…/model.ckpt`).

    Raises SpecError, and FolderInvalid for a folder that has none, or several.
    """
    roots = tuple(Path(root) for root in locations.data_roots)
    try:
        path = resolve_uri(uri, locations, field=field)
    except SpecError:
        path = _index_at(uri, locations, field)
    if path.is_dir():
        folder = open_folder(path, roots=roots, also=_ALSO)
        prefix = _only_prefix(folder)
        return Checkpoint(folder, prefix, str(Path(uri, f"{prefix}.index")))
    name = Path(uri).name
    if not _OF_A_CHECKPOINT.search(path.name):
        step = OF_V1 if path.suffix == ".ckpt" else "give its folder, or its file that ends in .index"
        message = f"{shorten(uri)!r} is not a TensorFlow checkpoint; {step}"
        raise SpecError(field, "MODEL_INVALID", message, {"file": name})
    # The name is the one that was given: a link may be called otherwise than the file.
    parent = resolve_uri(str(Path(uri).parent), locations, field=field)
    prefix = _OF_A_CHECKPOINT.sub("", name)
    folder = open_folder(parent, roots=roots, also=_ALSO)
    return Checkpoint(folder, prefix, str(Path(uri).with_name(f"{prefix}.index")))


def _index_at(uri: str, locations: worker_pb2.Locations, field: str) -> Path:
    """The index of a checkpoint that is named without its ending. Raises the SpecError about the path as given."""
    try:
        return resolve_uri(f"{uri}.index", locations, field=field)
    except SpecError:
        return resolve_uri(uri, locations, field=field)


def folder_of(uri: str) -> str:
    """The path of the folder that a checkpoint's files are in, existing or not."""
    return uri if Path(uri).is_dir() else str(Path(uri).parent)


def convert(checkpoint: Checkpoint, cache_dir: Path) -> Folder:
    """The checkpoint as a Hugging Face folder in the cache. Raises FolderInvalid."""
    folder = checkpoint.folder
    key = {name: digest(folder, name) for name in checkpoint.files()}

    def build(target: Path) -> None:
        bundle = open_bundle(folder, checkpoint.prefix)
        names, skipped = _tensors(bundle)
        layout = _recognised(bundle, {name: entry.shape for name, entry in names.items()})
        refuse_unmatched(set(names) - layout.used, layout.what, bundle.index)
        if layout.unused:
            skipped["tensors without a use"] = len(layout.unused)
        write_folder(target, layout, lambda name: bundle.read(names[name].name), folder, skipped)

    return converted_folder(cache_dir, {"checkpoint": key, "prefix": checkpoint.prefix}, build)


def _only_prefix(folder: Folder) -> str:
    """The prefix of a folder's only checkpoint, or of that which TensorFlow's `checkpoint` file says is the latest."""
    prefixes = checkpoints_in(folder)
    if len(prefixes) == 1:
        return prefixes[0]
    if not prefixes:
        raise FolderInvalid(
            "the folder has no TensorFlow checkpoint: a file that ends in .index is looked for, with .data-… files "
            f"beside it; {other_than_checkpoint(folder)}"
        )
    state = folder.read_text(_STATE, most_bytes=MAX_CONFIG_BYTES) if folder.has(_STATE) else ""
    latest = next((line for line in state.splitlines() if line.startswith("model_checkpoint_path:")), "")
    # TensorFlow writes the path that it saved to: its last part is the prefix.
    named = re.split(r"[/\\]+", latest.partition(":")[2].strip().strip('"'))[-1]
    if named in prefixes:
        return named
    raise FolderInvalid(
        f"the folder has {len(prefixes):,} checkpoints: {listed(prefixes, most=4)}; name one of them by its file that "
        f"ends in .index, such as {prefixes[-1]}.index"
    )


def _tensors(bundle: Bundle) -> tuple[dict[str, Entry], Counter[str]]:
    """What may be weights, by names without what TensorFlow adds to them; and the numbers of what is skipped."""
    skipped: Counter[str] = Counter()
    found: dict[str, Entry] = {}
    for name, entry in bundle.entries.items():
        if kind := skipped_as(name, entry, bundle.entries):
            skipped[kind] += 1
        else:
            found[name.removesuffix(OF_OBJECTS)] = entry
    return found, skipped


def _recognised(bundle: Bundle, shapes: Shapes) -> Layout:
    for family in FAMILIES:
        if (layout := family.recognise(shapes, bundle.folder)) is not None:
            return layout
    what = f" ({listed(shapes, most=5)})" if shapes else ""
    raise FolderInvalid(
        f"{bundle.index} has {len(shapes):,} tensors{what}: this is not a BERT, ResNet or Transformer that is "
        "known here; convert it with the tools that made it, and give the Hugging Face folder as `uri`",
        file=bundle.index,
    )
