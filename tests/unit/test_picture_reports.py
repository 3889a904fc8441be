"""Pictures and folders of public bug reports: read as people see them, or refused by name before a job queues."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from helpers.picture_jobs import accepted, content, planned
from helpers.small_pictures import CLASSES, picture, write_folders
from shardyard_trainer.data.pictures import PictureInvalid, check_picture, read_picture

WIDE = Image.new("RGB", (8, 4), (200, 40, 40))


def segment(marker: int, payload: bytes) -> bytes:
    """A JPEG with a segment of its own in front."""
    whole = content(WIDE, "JPEG", quality=95)
    return whole[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + whole[2:]


def tiff_notes(*entries: bytes) -> bytes:
    """EXIF: a header, and these entries of 12 bytes."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)


TURN = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
# A date that is a fraction, a text that is a floating-point number, and a place that is one: Pillow reads them, but
# cannot write them again, which its own `exif_transpose` does.
ODD = [struct.pack(">HHII", tag, kind, 1, 8) for tag, kind in ((0x0132, 10), (0x010E, 12), (0xA005, 12))]


def stack(kind: str) -> bytes:
    """Several pictures in a file."""
    stream = io.BytesIO()
    WIDE.save(stream, kind, save_all=True, append_images=[Image.new("RGB", (8, 4))])
    return stream.getvalue()


def sixteen_bits_a_colour() -> bytes:
    rows = b"".join(b"\0" + struct.pack(">24H", *[200 * 256, 40 * 256, 40 * 256] * 8) for _ in range(4))
    parts = [(b"IHDR", struct.pack(">2I5B", 8, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    written = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


READ: dict[str, tuple[bytes, tuple[int, int]]] = {
    "turned beside a date that is a fraction": (segment(0xE1, tiff_notes(TURN, ODD[0])), (4, 8)),
    "turned beside a text that is a number": (segment(0xE1, tiff_notes(TURN, ODD[1])), (4, 8)),
    "turned beside a place that is a fraction": (segment(0xE1, tiff_notes(TURN, ODD[2])), (4, 8)),
    "XMP that is not UTF-8": (segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x \xa8\xff/>"), (8, 4)),
    "EXIF that is cut short": (segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), (8, 4)),
    "an orientation that there is none of": (
        segment(0xE1, tiff_notes(struct.pack(">HHIHH", 0x0112, 3, 1, 99, 0))),
        (8, 4),
    ),
    "a camera's JPEG with a second picture": (stack("MPO"), (8, 4)),
    "an animated PNG": (stack("PNG"), (8, 4)),
    "a TIFF of several pages": (stack("TIFF"), (8, 4)),
    "bytes behind the end": (content(WIDE, "JPEG", quality=95) + b"\0" * 99, (8, 4)),
    "a PNG without its last chunk": (content(WIDE)[:-12], (8, 4)),
    "16 bits a colour": (sixteen_bits_a_colour(), (8, 4)),
}


@pytest.mark.parametrize("kind", READ)
def test_pictures_that_other_programs_show_are_read(kind: str) -> None:
    written, size = READ[kind]
    check_picture(written)
    found = read_picture(written, channels=3)
    assert found.size == size
    assert np.allclose(found.getpixel((2, 2)), (200, 40, 40), atol=8), found.getpixel((2, 2))


def with_long_notes() -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("prompt", "x" * 3_000_000, zip=True)
    return content(WIDE, pnginfo=notes)


REFUSED: dict[str, tuple[bytes, str]] = {
    "a browser shows it, half of it": (content(WIDE, "JPEG")[:-2], "cut short or damaged"),
    "notes over 1 MiB": (with_long_notes(), "save it without them"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a JPEG"),
    "a HEIC called jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not a JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_in_training_is_refused_when_it_is_checked(kind: str) -> None:
    written, said = REFUSED[kind]
    for look in (check_picture, lambda each: read_picture(each, channels=3)):
        with pytest.raises(PictureInvalid, match=said):
            look(written)


def metadata_of(names: Callable[[str, int], tuple[str, str]]) -> Callable[[Path], dict[str, Any]]:
    """Pictures with a metadata.csv that calls them otherwise than the disk; `names` gives both."""

    def write(folder: Path) -> dict[str, Any]:
        rows = ["file_name,label"]
        for kind in CLASSES:
            for number in range(4):
                on_disk, written = names(kind, number)
                (folder / on_disk).parent.mkdir(parents=True, exist_ok=True)
                picture(kind, number).save(folder / on_disk)
                rows.append(f"{written},{kind}")
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return {}

    return write


def station_folder(folder: Path) -> dict[str, Any]:
    """A picture's own name looks like a split."""
    for path in write_folders(folder, 4):
        path.rename(path.with_name(f"train station test {path.name.upper()}"))
    return {}


def web_dataset(folder: Path) -> dict[str, Any]:
    folder.mkdir()
    cells = [({"bytes": content(picture(kind, n)), "path": None}, kind) for n in range(4) for kind in CLASSES]
    table = pa.table({"jpg": [cell for cell, _ in cells], "cls": [kind for _, kind in cells]})
    pq.write_table(table, folder / "a.parquet")
    return {}


LAYOUTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "backslashes": metadata_of(lambda kind, n: (f"images/{kind}{n}.png", f"images\\{kind}{n}.png")),
    "accents apart": metadata_of(lambda kind, n: (f"e\u0301{kind}{n}.png", f"\u00e9{kind}{n}.png")),
    "names like splits": station_folder,
    "web dataset": web_dataset,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_and_tables_of_reports_have_their_classes(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    found = accepted(folder, LAYOUTS[layout](folder))
    assert list(found.labels) == list(CLASSES) and found.num_train_samples + found.num_eval_samples == 12
    assert "TEST_DATA_TRAINED_ON" not in {warning.reason for warning in found.warnings}


def test_labels_in_a_table_of_another_name_are_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        picture("rose", number).save(folder / f"{number}.png")
    (folder / "labels.csv").write_text("id,breed\n0,rose\n1,rose\n2,rose\n")
    (violation,) = planned(folder, {}).violations
    assert "give a metadata.csv with file_name and label" in violation.message
