"""What lies in a folder that is not what was asked for, and the next step: models have many formats."""

from __future__ import annotations

import re
from itertools import islice

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import Folder, open_folder

_INDEX = re.compile(r"(.+)\.index")
_MOST_FOLDERS = 100
OF_V1 = (
    "if it is one of the first format (V1: a single file without an .index), save it again with a Saver of TensorFlow, "
    "which writes the second"
)


def checkpoints_in(folder: Folder) -> list[str]:
    """The prefixes of a folder's TensorFlow checkpoints; numbers in them are sorted as numbers."""
    names = folder.names()
    found = [match[1] for name in names if "/" not in name and (match := _INDEX.fullmatch(name))]
    having = [prefix for prefix in found if any(name.startswith(f"{prefix}.data-") for name in names)]
    return sorted(having or found, key=_in_order)


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def other_than_checkpoint(folder: Folder) -> str:
    """The next step for a folder that has no TensorFlow checkpoint."""
    names = sorted(folder.names())
    if "saved_model.pb" in names:
        return (
            "it is a SavedModel, whose tensors have other names; save a checkpoint of the model (tf.train.Checkpoint), "
            "or give a Hugging Face folder as `uri`"
        )
    if (inner := _folder_with_checkpoint(folder)) is not None:
        return f"its folder {shorten(inner.path.name)!r} has {checkpoints_in(inner)[-1]}: give the path of that"
    if keras := next((name for name in names if name.endswith((".h5", ".keras"))), ""):
        return (
            f"{shorten(keras)} is a file of Keras; save a checkpoint of the model (tf.train.Checkpoint), or give a "
            "Hugging Face folder as `uri`"
        )
    if single := next((name for name in names if name.endswith(".ckpt")), ""):
        return f"it has {shorten(single)}: {OF_V1}"
    return "give a Hugging Face folder as `uri`"


def other_than_folder(folder: Folder) -> str:
    """Why a folder has no config.json, as far as it is known."""
    inner = folder if checkpoints_in(folder) else _folder_with_checkpoint(folder)
    if inner is None or not checkpoints_in(inner):
        return "a Hugging Face model folder has one"
    return (
        f"{shorten(checkpoints_in(inner)[-1])} is a TensorFlow checkpoint: copy it under a data root, and give its "
        "path as `checkpoint` (TensorflowCheckpoint of the SDK)"
    )


def _folder_with_checkpoint(folder: Folder) -> Folder | None:
    """A folder in it that has a checkpoint. Links are not followed."""
    inner = (path for path in islice(folder.path.iterdir(), _MOST_FOLDERS) if path.is_dir() and not path.is_symlink())
    found = (open_folder(path, roots=folder.roots, also=folder.also) for path in sorted(inner))
    return next((each for each in found if checkpoints_in(each)), None)
