"""Pictures that cannot be used are left out up to the share that a source allows, counted and listed."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.picture_jobs import accepted, content, planned
from helpers.small_pictures import CLASSES, picture, write_folders


def bomb() -> bytes:
    header = b"IHDR" + struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in (header, b"IDATx")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def folders(folder: Path) -> None:
    write_folders(folder, 6)
    (folder / "rose" / "cut.jpg").write_bytes((folder / "rose" / "000.jpg").read_bytes()[:300])
    (folder / "daisy" / "bomb.png").write_bytes(bomb())


def metadata(folder: Path) -> None:
    folder.mkdir()
    rows = ["file_name,label"]
    for number in range(6):
        for kind in CLASSES:
            name = f"{kind}-{number}.png"
            picture(kind, number).save(folder / name)
            rows.append(f"{name},{kind}")
    (folder / "rose-0.png").unlink()
    picture("rose", 9).save(folder / "unnamed.png")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def parquet(folder: Path) -> None:
    folder.mkdir()
    cells = [({"bytes": content(picture(kind, n)), "path": None}, kind) for n in range(6) for kind in CLASSES]
    cells += [({"bytes": None, "path": "/etc/passwd"}, "rose"), ({"bytes": b"GIF89a", "path": None}, "rose")]
    pq.write_table(
        pa.table({"image": [cell for cell, _ in cells], "label": [k for _, k in cells]}), folder / "a.parquet"
    )


def idx(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 10, 8), dtype=np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 20, 10, 8) + pixels.tobytes())
    labels = bytes([*(at % 3 for at in range(18)), 7, 9])
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">4BI", 0, 0, 8, 1, 20) + labels)


BAD: list[tuple[Callable[[Path], None], int, list[str]]] = [
    (
        folders,
        18,
        ["2 of 20 rows", "rose/cut.jpg: the picture is cut short", "daisy/bomb.png: over 178,000,000 pixels"],
    ),
    (
        metadata,
        17,
        ["2 of 19 rows", "metadata.csv, line 3: there is no picture 'rose-0.png'", "unnamed.png: no row in"],
    ),
    (
        parquet,
        18,
        ["2 of 20 rows", "a.parquet, line 19: the picture names a file outside", "line 20: not a JPEG, PNG"],
    ),
    (idx, 18, ["2 of 20 rows", "train-images-idx3-ubyte, line 19: the label 7"]),
]


@pytest.mark.parametrize(("write", "kept", "said"), BAD, ids=lambda each: getattr(each, "__name__", ""))
def test_bad_pictures_are_left_out_up_to_a_share_and_listed(
    write: Callable[[Path], None], kept: int, said: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    write(folder)
    names: dict[str, Any] = {"labels": list(CLASSES)} if write is idx else {}
    assert planned(folder, {}, **names).violations
    found = accepted(folder, {"max_bad_rows_share": 0.2}, **names)
    assert found.num_train_samples + found.num_eval_samples == kept
    assert set(found.labels) == set(CLASSES)
    (message,) = [warning.message for warning in found.warnings if warning.reason == "BAD_ROWS_LEFT_OUT"]
    for part in said:
        assert part in message, message
    (violation,) = planned(folder, {"max_bad_rows_share": 0.05}, **names).violations
    assert "more than the 0.05 of max_bad_rows_share" in violation.message
