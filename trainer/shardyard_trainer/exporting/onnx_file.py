"""A network as an ONNX file: traced by torch, quantised by onnxruntime, and run by it.

Only files that were written here are opened: nobody's ONNX file is ever read.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shardyard_trainer.exporting.network import PICTURES, Tensors
from shardyard_trainer.tasks.base import Graph
from shardyard_trainer.tasks.module import HuggingFaceModule

NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
OPSET = 17
MOST_IN_ONE_FILE = 1_500_000_000
"""Bytes of weights up to which they are in the file itself; a protobuf message has at most 2 GiB."""

_QUANTISED = ("MatMul", "Gemm", "Gather")
_EXTERNAL_FROM = 1024


class NotTraced(Exception):
    """No graph can be made of a network; the text says why."""


class RuntimeFailed(Exception):
    """onnxruntime cannot quantise or load a graph; the text is its own."""


class _Traced(nn.Module):
    """The network with its inputs by position and its outputs as a tuple, as torch's exporter wants them."""

    def __init__(self, module: HuggingFaceModule, names: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self._module = module
        self._names = names
        self._outputs = outputs

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self._module.network(dict(zip(self._names, inputs, strict=True)))
        return tuple(found[name] for name in self._outputs)


def write_onnx(
    folder: Path,
    module: HuggingFaceModule,
    graph: Graph,
    example: Tensors,
    *,
    most_in_one_file: int = MOST_IN_ONE_FILE,
) -> None:
    """Writes `model.onnx`, for any batch and any length, and the weights beside it if they are large.

    `example` are the inputs of two samples or more. Raises NotTraced.
    """
    import onnx  # An optional extra.

    names, outputs = tuple(example), tuple(graph.outputs)
    axes: dict[str, dict[int, str]] = {name: _axes_of_input(name) for name in names}
    axes |= {name: dict(enumerate(graph.outputs[name])) for name in outputs}
    path = folder / NAME
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The older of torch's exporters: on these architectures it is as exact as the newer one, ten times faster,
            # and needs no further package. What it may get wrong, a shape that it took for fixed, is compared later.
            torch.onnx.export(
                _Traced(module, names, outputs).eval(),
                tuple(example.values()),
                str(path),
                input_names=names,
                output_names=outputs,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
    except (RuntimeError, ValueError, TypeError, torch.onnx.errors.OnnxExporterError) as error:
        raise NotTraced(_first_line(error)) from error
    model = onnx.load(str(path))
    _join_equal_weights(model)
    for left in folder.iterdir():
        if left != path and _is_external(left, model):
            left.unlink()
    _save(model, path, most_in_one_file)


def _axes_of_input(name: str) -> dict[int, str]:
    return {0: "batch", 1: "length"} if name != PICTURES else {0: "batch"}


def write_quantised(folder: Path, original: Path, *, most_in_one_file: int = MOST_IN_ONE_FILE) -> None:
    """Writes `model.onnx` with the weights of `original` as whole numbers of 8 bits, each row with a scale of its own.

    Activations are quantised when it runs: no data is needed.
    """
    import onnx  # As above.
    from onnxruntime.quantization import QuantType, quantize_dynamic

    size = sum(path.stat().st_size for path in (original, original.with_name(DATA_NAME)) if path.exists())
    path = folder / NAME
    with _plainly(), _without_advice():
        quantize_dynamic(
            str(original),
            str(path),
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=size > most_in_one_file,
            extra_options={"MatMulConstBOnly": True},
        )
    if size > most_in_one_file:
        model = onnx.load(str(path))
        for left in folder.iterdir():
            if left.name.endswith(".data"):
                left.unlink()
        _save(model, path, most_in_one_file)


class OnnxNetwork:
    """An ONNX file as a `Compute`, on this many threads of the CPU."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        import onnxruntime  # An optional extra.

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        with _plainly():
            self._session: Any = onnxruntime.InferenceSession(
                str(folder / NAME), options, providers=["CPUExecutionProvider"]
            )
        self._outputs = [each.name for each in self._session.get_outputs()]

    def __call__(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The outputs by their names, fp32."""
        given = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in inputs.items()}
        with _plainly():
            found = self._session.run(self._outputs, given)
        return {name: torch.from_numpy(values) for name, values in zip(self._outputs, found, strict=True)}


@contextmanager
def _plainly() -> Iterator[None]:
    """Raises RuntimeFailed for whatever onnxruntime raises: its errors have no common class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # An optional extra.

    own = [each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception)]
    errors: tuple[type[Exception], ...] = (*own, ValueError, RuntimeError, TypeError, KeyError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except errors as error:
        raise RuntimeFailed(_first_line(error)) from error


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without what the quantiser writes to the root logger: advice about a script of its own."""

    def drop(_record: logging.LogRecord) -> bool:
        return False

    # A logger's filter sees only what is logged by that logger itself.
    root = logging.getLogger()
    root.addFilter(drop)
    try:
        yield
    finally:
        root.removeFilter(drop)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _join_equal_weights(model: Any) -> None:
    """Keeps one of several equal weights: layers that share theirs get a copy each when they are traced."""
    first: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    kept = []
    for tensor in model.graph.initializer:
        key = (tensor.data_type, tuple(tensor.dims), tensor.raw_data)
        if len(tensor.raw_data) >= _EXTERNAL_FROM and (name := first.setdefault(key, tensor.name)) != tensor.name:
            renamed[tensor.name] = name
        else:
            kept.append(tensor)
    if renamed:
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        for node in model.graph.node:
            for at, name in enumerate(node.input):
                node.input[at] = renamed.get(name, name)


def _is_external(path: Path, model: Any) -> bool:
    """Whether the exporter has put a weight of the model into a file of its own."""
    return path.is_file() and any(path.name == tensor.name for tensor in model.graph.initializer)


def _save(model: Any, path: Path, most_in_one_file: int) -> None:
    import onnx  # As above.

    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= most_in_one_file:
        onnx.save_model(model, str(path))
        return
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=DATA_NAME,
        size_threshold=_EXTERNAL_FROM,
    )
