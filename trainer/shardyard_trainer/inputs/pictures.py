"""Labelled pictures, checked once: the bytes of their files end to end on disk, each known to decode.

They are decoded again for every pass, a step ahead of it: augmentation wants the whole picture, and decoded ones would
take ten times the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.columns import Row, layout_key
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.label_column import LabelColumn, Wanted
from shardyard_trainer.data.labels import MULTI_LABEL, LabelSchema
from shardyard_trainer.data.picture_rows import Picture, read_pictures
from shardyard_trainer.data.pictures import PictureInvalid, check_picture
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.data.store import TokenStore, TokenWriter, files_fingerprint, fingerprint_of
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, seed_for
from shardyard_trainer.inputs.image import Augmentation, ImageInputs, positions

PICTURES_VERSION = 1
_MOST_TOLD = 10


class Pictures(NamedTuple):
    """Labelled pictures, and what their labels mean.

    Sequences of the store are the bytes of files. Its arrays: `height` and `width` (int32, of pictures that are grey
    pixels; 0: the bytes are a file), and `labels` as `inputs.labelled.Examples` has them.
    """

    store: TokenStore
    schema: LabelSchema

    @property
    def label_notes(self) -> list[tuple[str, str]]:
        """Warnings, as (reason, message)."""
        return [(reason, message) for reason, message in self.store.meta["label_notes"]]

    @property
    def label_way(self) -> str:
        """How the labels were read, for `Wanted.like`."""
        return str(self.store.meta["label_way"])

    def content(self, row: int) -> bytes | np.ndarray:
        """The bytes of a picture's file, or its grey pixels."""
        store = self.store
        held = store.tokens[store.offsets[row] : store.offsets[row + 1]]
        height, width = int(store.arrays["height"][row]), int(store.arrays["width"][row])
        return np.asarray(held).reshape(height, width) if height else held.tobytes()


def load_pictures(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, wanted: Wanted, cache_dir: Path, field: str
) -> Pictures:
    """Reads and checks a source once. Raises DataError, SpecError."""
    key = {
        "version": PICTURES_VERSION,
        "files": files_fingerprint(files, field=field),
        "layout": layout_key(source),
        **wanted._asdict(),
    }
    # If the spec gave no labels, the plan found these; its cache is used again.
    found = _folder(cache_dir, {**key, "labels": ()})
    if wanted.labels and in_use(found):
        store = TokenStore.open(found)
        if tuple(store.meta["labels"]) == wanted.labels:
            return Pictures(store, LabelSchema(wanted.problem, wanted.labels))

    def build(target: Path) -> None:
        try:
            _gather(files, source, wanted, target, field)
        except DataError as error:
            raise (error if error.field.startswith(field) else error.at(field)) from None

    store = TokenStore.open(tokenised(_folder(cache_dir, key), build))
    return Pictures(store, LabelSchema(wanted.problem, tuple(store.meta["labels"])))


def _folder(cache_dir: Path, key: dict[str, object]) -> Path:
    return cache_dir / "pictures" / fingerprint_of(key)


def _gather(files: Sequence[DataFile], source: spec_pb2.DataSource, wanted: Wanted, target: Path, field: str) -> None:
    writer, column = TokenWriter(target, "|u1"), LabelColumn(wanted)
    ends, shapes, bad = [0], list[tuple[int, int]](), list[DataError]()
    for picture in read_pictures(files, source, labels=wanted.labels, field=field):
        if (error := _complaint(picture, field)) is not None:
            bad.append(error)
            if len(bad) == _MOST_TOLD:
                break
            continue
        column.add(Row(picture.file, picture.line, "", None, picture.label))
        content = picture.content
        raw = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content.reshape(-1)
        shapes.append((0, 0) if isinstance(content, bytes) else (content.shape[0], content.shape[1]))
        writer.add_array("tokens", raw)
        ends.append(ends[-1] + len(raw))
    if bad:
        bad[0].others = tuple(bad[1:])
        raise bad[0]
    labels = column.finish()
    writer.add_array("offsets", np.asarray(ends, np.int64))
    writer.add_array("height", np.asarray([height for height, _ in shapes], np.int32))
    writer.add_array("width", np.asarray([width for _, width in shapes], np.int32))
    writer.add_array("labels", labels.array)
    writer.finish(labels=labels.schema.labels, label_notes=labels.notes, label_way=labels.way)


def _complaint(picture: Picture, field: str) -> DataError | None:
    if not isinstance(picture.content, bytes):
        return None
    try:
        check_picture(picture.content)
    except PictureInvalid as error:
        return DataError(str(error), file=picture.file, line=picture.line, field=field)
    return None


class PictureSamples:
    """Pictures of one split; training changes them at random, seeded by (seed, data epoch, sample) alone."""

    def __init__(
        self,
        pictures: Pictures,
        index: np.ndarray,
        inputs: ImageInputs,
        *,
        augmentation: Augmentation | None,
        seed: int,
    ) -> None:
        self._pictures = pictures
        self._index = index
        self._inputs = inputs
        self._augmentation = augmentation
        self._seed = seed
        self.num_samples = len(index)
        self.num_tokens = len(index)

    def lengths(self) -> np.ndarray | None:
        """None: all pictures have the same size."""
        return None

    def stats(self) -> DataStats:
        """The number of pictures; nothing is cut or unknown."""
        return DataStats(self.num_samples, self.num_tokens, num_cut=0, num_words=0, num_unknown=0)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`pixel_values` [B, C, H, W] and `labels`."""
        pixels = torch.from_numpy(np.stack([self._pixels(sample) for sample in samples]))
        rows = self._index[[sample.sample for sample in samples]]
        inputs = {"pixel_values": pixels, "labels": torch.from_numpy(self._labels(rows))}
        size = len(rows) * positions(pixels.shape[2:])
        return MicroBatch(inputs, len(rows), len(rows), size)

    def _pixels(self, sample: SampleRef) -> np.ndarray:
        row = int(self._index[sample.sample])
        content = self._pictures.content(row)
        if self._augmentation is None:
            return self._inputs.encode(content)
        draw = np.random.default_rng(seed_for(self._seed, "picture", sample.data_epoch, row))
        return self._inputs.augment(content, self._augmentation, draw)

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        labels: np.ndarray = self._pictures.store.arrays["labels"]
        if self._pictures.schema.problem == MULTI_LABEL:
            return np.asarray(labels.reshape(-1, len(self._pictures.schema.labels))[rows], np.float32)
        return np.asarray(labels[rows], np.int64)
