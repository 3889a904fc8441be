"""The words for formats of a model's files, and where they are in its folder: for the SDK, coordinator and trainer."""

from __future__ import annotations

from shardyard.v1 import spec_pb2

FOLDER = "exports"
"""The folder in a model's folder that has one folder for each further format."""

_PREFIX = "EXPORT_FORMAT_"


def word_of(value: int) -> str:
    """The word for a format, such as `onnx-int8`."""
    name = spec_pb2.ExportFormat.Name(value)  # type: ignore[arg-type]
    return name.removeprefix(_PREFIX).lower().replace("_", "-")


def prefix_of(value: int) -> str:
    """Where the files of a format begin in a model's folder, such as `exports/onnx-int8/`."""
    return f"{FOLDER}/{word_of(value)}/"


def words() -> tuple[str, ...]:
    """The words for all formats, in the order of the contract."""
    return tuple(word_of(number) for number in sorted(spec_pb2.ExportFormat.values()) if number)
