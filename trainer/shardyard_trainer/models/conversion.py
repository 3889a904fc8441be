"""Models of other formats, converted once into a Hugging Face folder in the cache, which everything else then reads.

What a family knows about a checkpoint is a `Layout`: the configuration, and for each tensor of the Hugging Face model
the tensor that it is made of. Whatever a layout does not use is a slot, a counter or a text, which are skipped and
counted, or the checkpoint is refused with the names that did not match.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.data.store import build_once, fingerprint_of
from shardyard_trainer.models.door import MAX_VOCABULARY_BYTES, Folder, FolderInvalid, open_folder

VERSION = 2
"""Of the conversions: a folder in the cache that another version made is made again."""

NOTE = "conversion.json"
_LEFT_FREE_BYTES = 1024**3
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.txt", "vocab.json", "merges.txt"),
)
"""Files of a tokenizer, which the converted folder has as they are."""


Shapes = Mapping[str, tuple[int, ...]]
"""Names of a checkpoint's tensors, and their shapes."""


@dataclass(frozen=True)
class Weight:
    """The tensor that another one is made of: its values in the shape `shape`, then with the axes in the order `axes`.

    `stored` is the shape that it has in the file; empty: `shape`.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    stored: tuple[int, ...] = ()

    @property
    def target(self) -> tuple[int, ...]:
        """The shape that it ends with."""
        return tuple(self.shape[axis] for axis in self.axes) if self.axes else self.shape

    def made(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor, contiguous."""
        values = read(self.name).reshape(self.shape)
        return np.ascontiguousarray(values.transpose(self.axes) if self.axes else values)


@dataclass(frozen=True)
class Constant:
    """A tensor that the checkpoint does not have, because the model that it is of computes it, or has none."""

    target: tuple[int, ...]
    make: Callable[[], np.ndarray]

    def made(self, _read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The tensor."""
        return self.make()


@dataclass(frozen=True)
class Layout:
    """What a checkpoint was found to be.

    `what` names it in messages; `config` becomes config.json; `weights` go by the names of the Hugging Face model;
    `notes` say what was assumed; `unused` are tensors that the model does not need; `files` are
    further JSON files of its folder.
    """

    what: str
    config: Mapping[str, Any]
    weights: Mapping[str, Weight | Constant]
    notes: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def used(self) -> frozenset[str]:
        """The names of the checkpoint's tensors that have a place, or need none."""
        return frozenset(weight.name for weight in self.weights.values() if isinstance(weight, Weight)) | self.unused


def converted_folder(cache_dir: Path, key: Mapping[str, Any], build: Callable[[Path], None]) -> Folder:
    """The folder in the cache for a source of this key, made by `build` if it is not there yet."""
    folder = cache_dir / "converted" / fingerprint_of({"version": VERSION, **key})
    made = open_folder(build_once(folder, build))
    return replace(made, no_tokenizer=str(_noted(made).get("no_tokenizer", "")))


def write_folder(
    target: Path, layout: Layout, read: Callable[[str], np.ndarray], source: Folder, skipped: Counter[str]
) -> None:
    """Writes a Hugging Face folder: the weights one tensor at a time, the configuration, and the tokenizer's files."""
    (target / "config.json").write_text(json.dumps(layout.config, indent=2))
    _write_weights(target / "model.safetensors", layout.weights, read)
    for name, content in layout.files.items():
        (target / name).write_text(json.dumps(content, indent=2))
    for name in COPIED:
        if source.has(name):
            (target / name).write_bytes(source.read(name, most_bytes=MAX_VOCABULARY_BYTES))
    left_out = ", ".join(f"{number:,} {what}" for what, number in sorted(skipped.items()))
    note = f"converted from {layout.what}: {len(layout.weights):,} tensors" + (f"; skipped {left_out}" * bool(left_out))
    write_note(target, note, layout.notes, no_tokenizer=_no_tokenizer(source))


def _no_tokenizer(source: Folder) -> str:
    """What to do about a checkpoint without a vocabulary, whose folder may have one under another name."""
    if any(source.has(name) for name in COPIED if name.startswith(("tokenizer.", "vocab."))):
        return ""
    others = sorted(name for name in source.names() if name.endswith(".txt") and "vocab" in name.lower())
    step = f"call {shorten(others[0])} so" if others else "put the one of this model there"
    return f"the checkpoint has no vocab.txt beside it: {step}, or give a `tokenizer`"


def write_note(target: Path, note: str, more: Iterable[str] = (), *, no_tokenizer: str = "") -> None:
    """Says in a converted folder what it was made of, and why it has no tokenizer."""
    (target / NOTE).write_text(json.dumps({"note": "; ".join((note, *more)), "no_tokenizer": no_tokenizer}))


def note_of(folder: Folder) -> str:
    """What was converted, what was skipped, and what was assumed."""
    return str(_noted(folder)["note"])


def _noted(folder: Folder) -> dict[str, Any]:
    return dict(json.loads((folder.path / NOTE).read_text()))


def check_room(what: str, num_weights: int, target: Path, *, file: str = "") -> None:
    """Raises FolderInvalid for weights that the disk has no room for in 32 bits."""
    need, free = 4 * num_weights, shutil.disk_usage(target).free - _LEFT_FREE_BYTES
    if need > free:
        raise FolderInvalid(
            f"{what} has {num_weights:,} weights, {need:,} bytes in 32 bits, but the service's cache has room "
            f"for {max(free, 0):,}; use a smaller model, or ask the operator to make space",
            reason="STORAGE_FULL",
            file=file,
        )


def check_complete(info: Mapping[str, Any], what: str, file: str, step: str) -> None:
    """Raises FolderInvalid unless each tensor of a model was in its file, by transformers' report of the loading."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise FolderInvalid(
            f"{file} has {shorten(name)!r} in the shape {list(found)}, but {what} has {list(wanted)}; {step}",
            file=file,
            tensor=name,
        )
    if lacking := sorted(info["missing_keys"]):
        raise FolderInvalid(
            f"{file} lacks {len(lacking):,} tensors of {what}: {listed(lacking, most=3)}; {step}",
            file=file,
            tensor=lacking[0],
        )


def check_shapes(weights: Mapping[str, Weight | Constant], shapes: Shapes, what: str) -> None:
    """Raises FolderInvalid for tensors that a layout needs and the checkpoint lacks, or has in another shape."""
    needed = [weight for weight in weights.values() if isinstance(weight, Weight)]
    if lacking := sorted({weight.name for weight in needed} - shapes.keys()):
        raise FolderInvalid(
            f"this is {what}, but the checkpoint lacks {len(lacking):,} tensors of it: {listed(lacking, most=3)}; save "
            "the whole model again",
            tensor=lacking[0],
        )
    for weight in needed:
        wanted = weight.stored or weight.shape
        if shapes[weight.name] != wanted:
            raise FolderInvalid(
                f"this is {what}, but its tensor {shorten(weight.name)!r} has the shape {list(shapes[weight.name])}, "
                f"where the others ask for {list(wanted)}; save the whole model again",
                tensor=weight.name,
            )


_ALONE = "save the encoder alone, or convert it with the tools that made it"


def refuse_unmatched(names: Iterable[str], what: str, file: str, step: str = _ALONE) -> None:
    """Raises FolderInvalid if there are names that a model has no place for."""
    if left := sorted(names):
        raise FolderInvalid(
            f"{file} is {what}, but has {len(left):,} tensors that it has no place for: {listed(left, most=5)}; "
            f"without them it would be another model: {step}",
            file=file,
            tensor=left[0],
        )


def _write_weights(path: Path, weights: Mapping[str, Weight | Constant], read: Callable[[str], np.ndarray]) -> None:
    """Writes the safetensors format: the header's length and the header, then the values in the header's order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, weight in weights.items():
        end = at + 4 * math.prod(weight.target)
        header[name] = {"dtype": "F32", "shape": list(weight.target), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for weight in weights.values():
            file.write(weight.made(read).astype("<f4", copy=False).data)
