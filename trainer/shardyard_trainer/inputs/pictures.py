"""Pictures of a source, checked once: the bytes of their files end to end on disk, each known to decode.

They are decoded again for every pass, a step ahead of it: augmentation wants the whole picture, and decoded ones would
take ten times the room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import REASON, BadRows
from shardyard_trainer.data.budget import in_use, tokenised
from shardyard_trainer.data.columns import Row, layout_key
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.label_column import LabelColumn, Labels, Wanted
from shardyard_trainer.data.labels import MULTI_LABEL, LabelSchema
from shardyard_trainer.data.picture_rows import Picture, read_pictures
from shardyard_trainer.data.pictures import PictureInvalid, check_picture
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.data.store import TokenStore, TokenWriter, files_fingerprint, fingerprint_of
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, seed_for
from shardyard_trainer.inputs.image import Augmentation, ImageInputs, positions
from shardyard_trainer.inputs.labelled import counts_of

PICTURES_VERSION = 2
_MOST_LISTED = 10


@dataclass(frozen=True)
class Pictures:
    """The pictures of a source.

    Sequences of the store are the bytes of files. Its arrays: `height` and `width` (int32, of pictures that are grey
    pixels; 0: the bytes are a file), and `names` (uint8, UTF-8 end to end) with their ends, `name_ends` (int64).
    """

    store: TokenStore

    @property
    def notes(self) -> list[tuple[str, str]]:
        """Warnings, as (reason, message)."""
        return [(reason, message) for reason, message in self.store.meta["notes"]]

    def content(self, row: int) -> bytes | np.ndarray:
        """The bytes of a picture's file, or its grey pixels."""
        store = self.store
        held = store.tokens[store.offsets[row] : store.offsets[row + 1]]
        height, width = int(store.arrays["height"][row]), int(store.arrays["width"][row])
        return np.asarray(held).reshape(height, width) if height else held.tobytes()

    def name(self, row: int) -> str:
        """A picture's path in its source; of tables and IDX the file and the number in it, if it has no path."""
        ends = self.store.arrays["name_ends"]
        first = int(ends[row - 1]) if row else 0
        return self.store.arrays["names"][first : int(ends[row])].tobytes().decode()


@dataclass(frozen=True)
class LabelledPictures(Pictures):
    """Pictures and what their labels mean; the array `labels` is as `inputs.labelled.Examples` has it."""

    schema: LabelSchema

    @property
    def label_way(self) -> str:
        """How the labels were read, for `Wanted.like`."""
        return str(self.store.meta["label_way"])


def load_pictures(files: Sequence[DataFile], source: spec_pb2.DataSource, *, cache_dir: Path, field: str) -> Pictures:
    """Reads and checks the pictures of a source once, labels apart. Raises DataError, SpecError."""
    key = {
        "version": PICTURES_VERSION,
        "files": files_fingerprint(files, field=field),
        "layout": layout_key(source),
        "labels": None,
    }

    def build(target: Path) -> None:
        _gather(files, source, None, target, field)

    return Pictures(TokenStore.open(tokenised(_folder(cache_dir, key), build)))


def load_labelled(
    files: Sequence[DataFile], source: spec_pb2.DataSource, *, wanted: Wanted, cache_dir: Path, field: str
) -> LabelledPictures:
    """Reads and checks a source with labels once. Raises DataError, SpecError."""
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
            return LabelledPictures(store, LabelSchema(wanted.problem, wanted.labels))

    def build(target: Path) -> None:
        try:
            _gather(files, source, wanted, target, field)
        except DataError as error:
            raise (error if error.field.startswith(field) else error.at(field)) from None

    store = TokenStore.open(tokenised(_folder(cache_dir, key), build))
    return LabelledPictures(store, LabelSchema(wanted.problem, tuple(store.meta["labels"])))


def _folder(cache_dir: Path, key: dict[str, object]) -> Path:
    return cache_dir / "pictures" / fingerprint_of(key)


def _gather(
    files: Sequence[DataFile], source: spec_pb2.DataSource, wanted: Wanted | None, target: Path, field: str
) -> None:
    """Writes the pictures of a source; without `wanted` their labels do not matter."""
    column = LabelColumn(wanted) if wanted is not None else None
    gathered, damaged, bad = _Gathered(TokenWriter(target, "|u1")), list[DataError](), BadRows(source)
    labels = wanted.labels if wanted is not None else None
    for picture in read_pictures(files, source, labels=labels, field=field, bad=bad):
        error = _complaint(picture, column, field)
        if error is None:
            gathered.add(picture)
        elif source.max_bad_rows_share or not isinstance(error, _Damaged):
            bad.skip_file(error)
        else:
            # Listed together, so that all of a folder's pictures can be fixed at once.
            damaged.append(error)
            if len(damaged) == _MOST_LISTED:
                break
    if damaged:
        damaged[0].others = tuple(damaged[1:])
        raise damaged[0]
    bad.finish(len(gathered.shapes), field)
    notes = [(REASON, note)] if (note := bad.note(len(gathered.shapes))) else []
    gathered.finish(column.finish() if column is not None else None, notes)


class _Damaged(DataError):
    """A picture that does not decode."""


def _complaint(picture: Picture, column: LabelColumn | None, field: str) -> DataError | None:
    """What is wrong with a picture or its label; None: nothing, and the label is noted."""
    try:
        if isinstance(picture.content, bytes):
            check_picture(picture.content)
        if column is not None:
            column.add(Row(picture.file, picture.line, "", None, picture.label))
    except PictureInvalid as error:
        return _Damaged(str(error), file=picture.file, line=picture.line, field=field)
    except DataError as error:
        return error
    return None


class _Gathered:
    """The pictures written so far."""

    def __init__(self, writer: TokenWriter) -> None:
        self._writer = writer
        self._ends, self._name_ends = [0], list[int]()
        self.shapes = list[tuple[int, int]]()

    def add(self, picture: Picture) -> None:
        """Writes one picture."""
        content, name = picture.content, picture.name.encode()
        raw = np.frombuffer(content, np.uint8) if isinstance(content, bytes) else content.reshape(-1)
        self.shapes.append((0, 0) if isinstance(content, bytes) else (content.shape[0], content.shape[1]))
        self._writer.add_array("tokens", raw)
        self._writer.add_array("names", np.frombuffer(name, np.uint8))
        self._ends.append(self._ends[-1] + len(raw))
        self._name_ends.append((self._name_ends[-1] if self._name_ends else 0) + len(name))

    def finish(self, labels: Labels | None, notes: Sequence[tuple[str, str]]) -> None:
        """Writes where each picture ends, its shape, and the labels; `notes` are warned of."""
        writer = self._writer
        writer.add_array("offsets", np.asarray(self._ends, np.int64))
        writer.add_array("name_ends", np.asarray(self._name_ends, np.int64))
        writer.add_array("height", np.asarray([height for height, _ in self.shapes], np.int32))
        writer.add_array("width", np.asarray([width for _, width in self.shapes], np.int32))
        if labels is None:
            writer.finish(notes=notes)
            return
        writer.add_array("labels", labels.array)
        writer.finish(notes=[*labels.notes, *notes], labels=labels.schema.labels, label_way=labels.way)


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

    def batch(self, samples: Sequence[SampleRef], others: dict[str, torch.Tensor]) -> MicroBatch:
        """`pixel_values` [B, C, H, W] with what else the model is given."""
        pixels = torch.from_numpy(np.stack([self._pixels(sample) for sample in samples]))
        size = len(samples) * positions(pixels.shape[2:])
        return MicroBatch({"pixel_values": pixels, **others}, len(samples), len(samples), size)

    def digests(self) -> np.ndarray:
        """A hash of the content of each picture, uint64."""
        return self._pictures.store.digests(self._index)

    def row(self, sample: SampleRef) -> int:
        """A sample's place among all pictures."""
        return int(self._index[sample.sample])

    def _pixels(self, sample: SampleRef) -> np.ndarray:
        row = self.row(sample)
        content = self._pictures.content(row)
        if self._augmentation is None:
            return self._inputs.encode(content)
        draw = np.random.default_rng(seed_for(self._seed, "picture", sample.data_epoch, row))
        return self._inputs.augment(content, self._augmentation, draw)


class LabelledSamples(PictureSamples):
    """The same with `labels`: classes [B], or 0 or 1 for each class [B, C]."""

    def __init__(
        self,
        pictures: LabelledPictures,
        index: np.ndarray,
        inputs: ImageInputs,
        *,
        augmentation: Augmentation | None,
        seed: int,
    ) -> None:
        super().__init__(pictures, index, inputs, augmentation=augmentation, seed=seed)
        self._schema = pictures.schema

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`pixel_values` [B, C, H, W] and `labels`."""
        rows = np.asarray([self.row(sample) for sample in samples])
        return self.batch(samples, {"labels": torch.from_numpy(self._labels(rows))})

    def counts(self) -> np.ndarray:
        """The number of pictures of each class, int64 [C]."""
        return counts_of(self._labels(self._index), self._schema)

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        labels: np.ndarray = self._pictures.store.arrays["labels"]
        if self._schema.problem == MULTI_LABEL:
            return np.asarray(labels.reshape(-1, len(self._schema.labels))[rows], np.float32)
        return np.asarray(labels[rows], np.int64)
