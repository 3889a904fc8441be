"""A checkpoint of TensorFlow is read by NumPy alone, and nothing in its files is believed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import Part, Written, floats, varint
from helpers.small_specs import shared_data
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.leveldb_table import MAX_BYTES
from shardyard_trainer.models.tensor_bundle import Bundle, open_bundle

ALL = re.compile(r".*")
GOOD = Written(
    {"a": floats(2, 3), "a/adam_m": floats(2, 3, seed=1), "b": floats(4, seed=2), "step": Part(9, (), b"\0" * 8)}
)


def opened(folder: Path, prefix: str = "model.ckpt") -> Bundle:
    return open_bundle(open_folder(folder, also=ALL), prefix)


def test_a_real_checkpoint_is_read(tmp_path: Path) -> None:
    bundle = opened(shared_data("tf1_bert_tiny"), "bert_model.ckpt")
    assert len(bundle.entries) == 139 and bundle.num_shards == 1
    words = bundle.read("bert/embeddings/word_embeddings")
    assert words.shape == (15, 4) and words.dtype == np.float32 and np.isfinite(words).all()


def test_every_type_of_floats_is_read_as_float32(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 0.0], np.float32)
    as_brain = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    kinds = {1: values.tobytes(), 2: values.astype("<f8").tobytes(), 14: as_brain, 19: values.astype("<f2").tobytes()}
    Written({f"t{kind}": Part(kind, (3,), content) for kind, content in kinds.items()}).save(tmp_path)
    bundle = opened(tmp_path)
    for name in bundle.entries:
        assert bundle.read(name).tolist() == values.tolist(), name


def test_long_names_and_many_blocks_are_in_order(tmp_path: Path) -> None:
    parts = {f"layer_{index:04}/kernel": floats(2, seed=index) for index in range(300)}
    Written(parts).save(tmp_path)
    bundle = opened(tmp_path)
    assert list(bundle.entries) == sorted(parts)
    assert bundle.read("layer_0123/kernel").tobytes() == parts["layer_0123/kernel"].content


def cut(name: str, size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, size if size >= 0 else (folder / name).stat().st_size + size)

    return change


def flipped(name: str, at: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 0x40
        (folder / name).write_bytes(content)

    return change


INDEX, DATA = "model.ckpt.index", "model.ckpt.data-00000-of-00001"
HOSTILE: list[tuple[str, Written, Callable[[Path], None] | None, str]] = [
    ("an empty index", GOOD, cut(INDEX, 0), "it has 0 bytes"),
    ("a cut index", GOOD, cut(INDEX, -7), "its last 8 bytes are not those"),
    ("another file", replace(GOOD, magic=1), None, "its last 8 bytes are not those"),
    ("a changed byte", GOOD, flipped(INDEX, 9), "does not have its checksum"),
    ("a footer that points outside", GOOD, flipped(INDEX, -44), "outside of it|no end|checksum"),
    ("a snappy block", replace(GOOD, compression=1), None, r"compressed \(snappy\)"),
    ("a block of an unknown kind", replace(GOOD, compression=9), None, r"compressed \(kind 9\)"),
    ("no header", Written({}, header=b""), None, "announces 0 files"),
    ("a billion shards", replace(GOOD, header=b"\x08" + varint(10**9)), None, "announces 1000000000 files"),
    ("big endian", replace(GOOD, header=b"\x08\x01\x10\x01"), None, "another byte order"),
    ("a header that is cut", replace(GOOD, header=b"\x08"), None, "is cut"),
    ("a group of old protobufs", replace(GOOD, header=b"\x0b"), None, "cannot be parsed"),
    ("a message longer than there is", GOOD.changed("a", extra=b"\x3a\xff\xff\xff\xff\x0f"), None, "is cut"),
    ("an endless number", GOOD.changed("a", extra=b"\x18" + b"\xff" * 11), None, "longer than 64 bits"),
    ("a name that is not text", replace(GOOD, names={"a": b"\xff\xfe"}), None, "not UTF-8"),
    ("a name twice", replace(GOOD, names={"a": b"b"}), None, "twice"),
    ("a name of a megabyte", replace(GOOD, names={"a": b"n" * 10**6}), None, "longer than the block, or its name"),
    ("a shape of 2**62 values", GOOD.changed("a", shape=(2**31, 2**31)), None, "but 24 of it"),
    ("a dimension of 2**60", GOOD.changed("a", shape=(2**60,)), None, "which no tensor has"),
    ("a negative dimension", GOOD.changed("a", shape=(2**64 - 1,)), None, "which no tensor has"),
    ("forty dimensions", GOOD.changed("a", shape=(1,) * 40), None, "which no tensor has"),
    ("a shape of other bytes", GOOD.changed("a", shape=(2, 2)), None, r"\[2, 2\], 16 bytes, but 24"),
    ("a tensor in another shard", GOOD.changed("a", shard=3), None, "in file 3 of 1"),
    ("a tensor past the end", GOOD.changed("b", offset=10**12), None, "which has 72: it is cut"),
    ("a tensor over another", GOOD.changed("b", offset=8), None, "where 'a' is too"),
    ("values that are cut", GOOD, cut(DATA, 50), "which has 50: it is cut"),
    (
        "a missing shard",
        replace(GOOD, header=b"\x08\x02"),
        None,
        "2 files of values, but model.ckpt.data-00000-of-00002",
    ),
    ("no values", GOOD, lambda folder: (folder / DATA).unlink(), "data-00000-of-00001 is missing"),
    ("a pipe of values", GOOD, lambda folder: ((folder / DATA).unlink(), os.mkfifo(folder / DATA))[0], "is missing"),
    ("an LFS pointer", GOOD, lambda f: (f / INDEX).write_text("version https://git-lfs.github.com/x"), "git lfs pull"),
    ("a link out of the folder", GOOD, lambda f: linked_out(f / DATA), "a link out of it"),
    ("too large an index", GOOD, cut(INDEX, MAX_BYTES + 1), "is larger than"),
]


def linked_out(path: Path) -> None:
    outside = path.parent.with_name("outside")
    outside.mkdir()
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


@pytest.mark.parametrize(("what", "written", "change", "said"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_bad_checkpoint_is_refused_with_its_file_and_reason(
    what: str, written: Written, change: Callable[[Path], None] | None, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    written.save(folder)
    if change is not None:
        change(folder)
    with pytest.raises(FolderInvalid, match=said) as refused:
        opened(folder)
    assert "model.ckpt." in refused.value.metadata["file"] and len(str(refused.value)) < 500


BAD_TENSORS = [
    ("a wrong checksum", GOOD.changed("a", crc=1), "does not have its checksum: the file is damaged"),
    ("NaN", Written({"a": Part(1, (2,), np.array([1, np.nan], "<f4").tobytes())}), "not finite"),
    ("beyond 32 bits", Written({"a": Part(2, (1,), np.array([1e300]).tobytes())}), "not finite"),
    ("whole numbers", Written({"a": Part(9, (1,), b"\1" * 8)}), "has values of <i8"),
    ("texts", Written({"a": Part(7, (1,), b"\1x")}), "has values of string"),
    ("an unknown type", GOOD.changed("a", dtype=77), "has values of an unknown kind"),
    ("slices", GOOD.changed("a", extra=b"\x3a\x00"), "is split into slices"),
]


@pytest.mark.parametrize(("what", "written", "said"), BAD_TENSORS, ids=[row[0] for row in BAD_TENSORS])
def test_a_bad_tensor_is_refused_by_name_when_it_is_read(
    what: str, written: Written, said: str, tmp_path: Path
) -> None:
    written.save(tmp_path)
    with pytest.raises(FolderInvalid, match=said) as refused:
        opened(tmp_path).read("a")
    assert refused.value.metadata == {"file": DATA, "tensor": "a"}


def test_any_byte_of_an_index_may_be_wrong(tmp_path: Path) -> None:
    index = GOOD.save(tmp_path)
    content = index.read_bytes()
    draw = np.random.default_rng(3)
    for _ in range(300):
        spoiled = bytearray(content)
        for at in draw.integers(0, len(content), 3):
            spoiled[at] = draw.integers(0, 256)
        index.write_bytes(spoiled)
        try:
            opened(tmp_path).read("a")
        except (FolderInvalid, KeyError) as error:
            assert not isinstance(error, KeyError) or str(error) == "'a'"
