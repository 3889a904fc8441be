"""Whether safetensors files are what they say: headers bounded, bytes covered exactly, shapes true, values finite.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets}}`, then the data. Nothing here runs code from the file or allocates by its word.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

MAX_HEADER_BYTES = 100 * 1000 * 1000
"""The format's own bound."""

MAX_TENSORS = 50_000
"""More in one file is no model; a header of many empty tensors would only cost memory."""

_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One entry of a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class WeightsInvalid(ValueError):
    """A file of weights is not one that loads; `tensor` is empty where no single one is to blame."""

    def __init__(self, message: str, *, file: str, tensor: str = "") -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a file in the order of their bytes. Raises WeightsInvalid."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise WeightsInvalid(f"{path.name} has {size} bytes, a safetensors file at least 8", file=path.name)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise WeightsInvalid(
                f"{path.name} announces a header of {length} bytes, but has {size} bytes in all "
                f"(at most {MAX_HEADER_BYTES} are allowed)",
                file=path.name,
            )
        text = file.read(length)
    tensors = _parse(path.name, text)
    _check_layout(path.name, tensors, size - 8 - length)
    return tensors


def _parse(file: str, text: bytes) -> list[Tensor]:
    try:
        entries = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsInvalid(f"the header of {file} is not JSON: {str(error)[:200]}", file=file) from error
    if not isinstance(entries, dict):
        raise WeightsInvalid(f"the header of {file} is not a JSON object", file=file)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise WeightsInvalid(f"{file} has {len(entries)} tensors; at most {MAX_TENSORS} are allowed", file=file)
    return sorted(
        (_entry(file, name, entry) for name, entry in entries.items()), key=lambda each: (each.begin, each.end)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands in it twice")
    return result


def _entry(file: str, name: str, entry: object) -> Tensor:
    if not isinstance(entry, dict):
        raise WeightsInvalid(f"tensor {name[:200]!r} of {file} has no dtype, shape and offsets", file=file, tensor=name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise WeightsInvalid(
            f"tensor {name[:200]!r} of {file} has the unknown dtype {str(dtype)[:40]!r}", file=file, tensor=name
        )
    if (
        not _naturals(shape)
        or len(shape) > 16
        or not _naturals(offsets)
        or len(offsets) != 2
        or offsets[0] > offsets[1]
    ):
        raise WeightsInvalid(
            f"tensor {name[:200]!r} of {file} has no valid shape and offsets: {str(shape)[:80]}, {str(offsets)[:80]}",
            file=file,
            tensor=name,
        )
    tensor = Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])
    needed = math.prod(tensor.shape) * _BITS[dtype]  # Python integers do not overflow
    if needed != 8 * (tensor.end - tensor.begin):
        raise WeightsInvalid(
            f"tensor {name[:200]!r} of {file} has shape {list(tensor.shape)} in {dtype}, which is {needed // 8} bytes, "
            f"but its offsets span {tensor.end - tensor.begin}",
            file=file,
            tensor=name,
        )
    return tensor


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_layout(file: str, tensors: list[Tensor], data_bytes: int) -> None:
    at = 0
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps the one before it" if tensor.begin < at else "leaves a hole before it"
            raise WeightsInvalid(
                f"tensor {tensor.name[:200]!r} of {file} {what}: it begins at byte {tensor.begin}, not {at}",
                file=file,
                tensor=tensor.name,
            )
        at = tensor.end
    if at != data_bytes:
        raise WeightsInvalid(
            f"the tensors of {file} end at byte {at}, but it has {data_bytes} bytes of data", file=file
        )


def check_finite(path: Path, tensors: list[Tensor]) -> None:
    """Raises WeightsInvalid at the first tensor with a value that is not finite."""
    from safetensors import safe_open  # Heavy imports stand where weights are really read.

    with safe_open(str(path), framework="pt") as file:
        for tensor in tensors:
            if tensor.dtype not in {"F64", "F32", "F16", "BF16"}:
                continue
            if not file.get_tensor(tensor.name).isfinite().all():
                raise WeightsInvalid(
                    f"tensor {tensor.name!r} of {path.name} has values that are not finite (NaN or infinite)",
                    file=path.name,
                    tensor=tensor.name,
                )


def weight_files(folder: Path) -> Iterator[Path]:
    """The safetensors files that hold the model: those of the index if there is one, else `model.safetensors`.

    Raises WeightsInvalid for an index that names files outside the folder or that are not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            yield folder / "model.safetensors"
        return
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsInvalid(f"{index.name} has no weight_map: {str(error)[:200]}", file=index.name) from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise WeightsInvalid(f"{index.name} names {str(name)[:200]!r}, which is not in the folder", file=index.name)
        yield folder / name
