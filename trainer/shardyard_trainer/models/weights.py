"""Checks safetensors files: bounded headers, bytes covered exactly, matching shapes, finite values.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object
`{name: {dtype, shape, data_offsets}}`, then the data. Nothing here runs code from the file or allocates by its word.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard

from shardyard_trainer.models.door import Folder, FolderInvalid

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

MAX_INDEX_BYTES = 64 * 1024 * 1024
MAX_HEADER_BYTES = 100 * 1000 * 1000
"""The format's own bound."""

MAX_TENSORS = 50_000
"""More in one file is not a model; a header of many empty tensors would only cost memory."""

_BITS = {
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
    "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
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
    """A file of weights is not one that loads; `tensor` is empty if no single one is to blame."""

    def __init__(self, message: str, *, file: str, tensor: str = "") -> None:
        super().__init__(message)
        self.file = file
        self.tensor = tensor


def load_pretrained(kind: Any, folder: Folder, config: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers' class for the configuration, in fp32, and what of the weights was missing or too many.

    `kind` is an `AutoModelFor…`. The class gets the configuration and the tensors, and no path: it reads no file, no
    adapter and no generation settings by itself. Raises FolderInvalid, WeightsInvalid and `loading.LOADING_ERRORS`.
    """
    import torch

    with open_tensors(folder) as tensors:
        return _class_of(kind, config).from_pretrained(  # type: ignore[no-any-return]
            None,
            config=config,
            state_dict=tensors,
            # Without it transformers takes the checkpoint's own type.
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )


def _class_of(kind: Any, config: Any) -> Any:
    found = kind._model_mapping[type(config)]
    if not isinstance(found, tuple):
        return found
    # A few architectures have two backbones.
    return next((each for each in found if each.__name__ in (config.architectures or ())), found[0])


@contextmanager
def open_tensors(folder: Folder) -> Iterator[dict[str, Any]]:
    """The tensors of a model by name, as slices that are read when they are used, while the files are open."""
    from safetensors import safe_open  # Heavy imports come where weights are really read.

    with ExitStack() as stack:
        tensors: dict[str, Any] = {}
        for name in weight_names(folder):
            file = stack.enter_context(folder.open(name))
            # By its descriptor: the file that was checked is read, whatever the name leads to by now.
            slices = stack.enter_context(safe_open(f"/proc/self/fd/{file.fileno()}", framework="pt"))
            tensors.update({key: slices.get_slice(key) for key in slices.keys()})  # noqa: SIM118 - not a mapping
        yield tensors


def read_tensors(folder: Folder, name: str) -> dict[str, Any]:
    """The tensors of one file, read as a whole. Raises FolderInvalid and SafetensorError."""
    from safetensors.torch import load_file

    with folder.open(name) as file:
        return {key: tensor.clone() for key, tensor in load_file(f"/proc/self/fd/{file.fileno()}").items()}


def read_header(folder: Folder, name: str) -> list[Tensor]:
    """The tensors of a file in the order of their bytes. Raises WeightsInvalid, and FolderInvalid."""
    with folder.open(name) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        if len(start) < 8:
            raise WeightsInvalid(
                f"{name} has {size} bytes, a safetensors file at least 8; copy or upload it again", file=name
            )
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise WeightsInvalid(
                f"{name} announces a header of {length} bytes, but has {size} bytes in all "
                f"(at most {MAX_HEADER_BYTES} are allowed); it is cut or no safetensors file: copy or upload it again",
                file=name,
            )
        text = file.read(length)
    tensors = _parse(name, text)
    _check_layout(name, tensors, size - 8 - length)
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
        raise ValueError("it has a duplicate key")
    return result


def _entry(file: str, name: str, entry: object) -> Tensor:
    if not isinstance(entry, dict):
        raise WeightsInvalid(f"tensor {name[:200]!r} of {file} has no dtype, shape and offsets", file=file, tensor=name)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise WeightsInvalid(
            f"tensor {name[:200]!r} of {file} has the unknown dtype {str(dtype)[:40]!r}; save the model in float32, "
            "float16 or bfloat16",
            file=file,
            tensor=name,
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
            f"the tensors of {file} end at byte {at}, but it has {data_bytes} bytes of data; copy or upload it again",
            file=file,
        )


def check_finite(folder: Folder, name: str, tensors: list[Tensor]) -> None:
    """Raises WeightsInvalid at the first tensor of a file with a value that is not finite."""
    from safetensors import safe_open

    with folder.open(name) as opened, safe_open(f"/proc/self/fd/{opened.fileno()}", framework="pt") as file:
        for tensor in tensors:
            if not tensor.dtype.startswith(("F", "BF", "C")):
                _refuse_whole_numbers(name, tensor)
                continue
            values = file.get_tensor(tensor.name)
            # As the model will have it: what is finite in 64 bits need not be in 32.
            if not (values if values.is_complex() else values.float()).isfinite().all():
                raise WeightsInvalid(
                    f"tensor {tensor.name!r} of {name} has values that are not finite (NaN, infinite, or too large for "
                    "32 bits); take a checkpoint from before it diverged",
                    file=name,
                    tensor=tensor.name,
                )


def _refuse_whole_numbers(file: str, tensor: Tensor) -> None:
    """A mask or a table of positions may be one of whole numbers; a weight of them means something else."""
    if tensor.name.endswith("weight"):
        raise WeightsInvalid(
            f"tensor {tensor.name!r} of {file} has whole numbers ({tensor.dtype}), as quantised weights have, which "
            "would be taken for the weights themselves; use the model that it was made from, or save it dequantised",
            file=file,
            tensor=tensor.name,
        )


def weight_names(folder: Folder) -> list[str]:
    """The safetensors files that hold the model: `model.safetensors` as transformers does, else those of the index.

    Raises WeightsInvalid for an index that names files outside the folder or that are not there, and FolderInvalid.
    """
    if folder.has(WHOLE):
        return [WHOLE]
    return _indexed(folder) if folder.has(INDEX) else []


def spare_weights(folder: Folder) -> str:
    """The message about an index of other files beside `model.safetensors`, as a second save leaves it; else empty."""
    if not (folder.has(WHOLE) and folder.has(INDEX)):
        return ""
    try:
        others = [name for name in _indexed(folder) if name != WHOLE]
    except WeightsInvalid:  # It names files that were removed.
        return ""
    return (
        f"the folder has {WHOLE}, which is read, and {INDEX} with {len(others)} other files, which are not, as in "
        "transformers; remove those that are left from an earlier save"
        if others
        else ""
    )


def _indexed(folder: Folder) -> list[str]:
    listed = folder.read_json(INDEX, most_bytes=MAX_INDEX_BYTES)
    by_tensor = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(by_tensor, dict):
        raise WeightsInvalid(f"{INDEX} is not an index of weights: it has no weight_map of names", file=INDEX)
    names = {str(name) for name in by_tensor.values()}
    for name in sorted(names):
        if "/" in name or not name.endswith(".safetensors") or not folder.has(name):
            raise WeightsInvalid(
                f"{INDEX} names {name[:200]!r}, which is not a file of the folder; copy or upload all parts", file=INDEX
            )
    return sorted(names)


_FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".npz")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def no_weights(folder: Folder) -> FolderInvalid:
    """The message about a folder without weights: it has pickles, or nothing at all."""
    unsafe = sorted(name for name in folder.names() if name.endswith(_PICKLES))
    if not unsafe:
        # An adapter's would be no model under another name either.
        others = ", ".join(name for name in folder.weight_names() if not name.startswith("adapter_"))
        what = f"; it has {others}, which no index names: call it so" if others else ""
        foreign = next((name for name in sorted(folder.names()) if name.endswith(_FOREIGN)), "")
        if foreign:
            what = f"; {foreign} is another framework's: save the model with `save_pretrained` of transformers"
        return FolderInvalid(
            f"the folder has no weights: model.safetensors is looked for{what}", file="model.safetensors"
        )
    return FolderInvalid(
        f"{unsafe[0]} is a pickle, which can run code when it is loaded, and is never opened; save the model as "
        "model.safetensors (`save_pretrained` of transformers does) and upload it again",
        reason="MODEL_UNSAFE",
        file=unsafe[0],
    )
