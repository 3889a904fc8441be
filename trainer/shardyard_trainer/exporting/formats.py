"""Writes formats of a model into folders of their own, each loaded afresh, measured, and with a receipt."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from google.protobuf.json_format import MessageToDict

from shardyard.export_formats import prefix_of, word_of
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard_trainer.exporting.half import HalfNetwork, write_half
from shardyard_trainer.exporting.measuring import Measured, TooSlow, one_thread
from shardyard_trainer.exporting.network import Compute, one_by_one
from shardyard_trainer.exporting.onnx_file import (
    DATA_NAME,
    NAME,
    NotTraced,
    OnnxNetwork,
    RuntimeFailed,
    write_onnx,
    write_quantised,
)
from shardyard_trainer.exporting.readme import readme
from shardyard_trainer.models.door import Folder
from shardyard_trainer.models.folder import save_code

TOLERANCE = 1e-4
"""How far the outputs of ONNX in fp32 may be from the model's, relative to the largest of them (at least 1)."""

RECEIPT = "receipt.json"
_ONNX, _INT8, _BF16 = (
    spec_pb2.EXPORT_FORMAT_ONNX,
    spec_pb2.EXPORT_FORMAT_ONNX_INT8,
    spec_pb2.EXPORT_FORMAT_BF16,
)


class FormatRefused(Exception):
    """A format is not good enough, or cannot be made of the model; the text has the numbers, or the reason."""


@dataclass(frozen=True)
class Bound:
    """By which metric a format is judged, and how much worse it may be; None: by any amount."""

    metric: str
    max_drop: float | None


class Original:
    """A model with its folder and data, measured once for all of its formats."""

    def __init__(self, measured: Measured, source: Folder, *, threads: int) -> None:
        self.measured = measured
        self.source = source
        self.threads = threads
        self._examples = measured.examples()
        self._metrics: dict[str, float] | None = None
        self._latency_s = 0.0

    def write(self, number: int, folder: Path, bound: Bound) -> model_service_pb2.ModelExport:
        """Writes one format into an empty folder, and returns what its receipt says. Raises FormatRefused, OSError."""
        try:
            compute, alone = _WRITERS[number](self, folder)
        except NotTraced as error:
            raise FormatRefused(f"no ONNX graph can be made of it: {error}") from error
        except RuntimeFailed as error:
            raise FormatRefused(f"onnxruntime does not run it: {error}") from error
        difference = self.measured.difference(compute, self._examples)
        allowed = TOLERANCE if number == _ONNX else math.inf
        if not difference < math.inf:
            raise FormatRefused(f"{word_of(number)} gives outputs that are not numbers")
        if difference > allowed:
            text = f"its outputs differ by {difference:.3g} of the largest from the model's; {allowed:g} is allowed"
            raise FormatRefused(text)
        try:
            export = self._receipt(number, compute, alone, bound)
        except TooSlow as error:
            step = "export it from the stored model (ExportModel), or give less eval_data"
            raise FormatRefused(f"{error}; {step}") from error
        export.difference = difference
        self._copy_settings(folder)
        export.size_ratio = _weight_bytes(folder) / max(_bytes_of(self.source), 1)
        _judge(export, self.measured)
        (folder / "README.md").write_text(readme(export, self.measured, folder), encoding="utf-8")
        export.size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        _save_receipt(folder / RECEIPT, export)
        return export

    def _receipt(self, number: int, compute: Compute, alone: Compute, bound: Bound) -> model_service_pb2.ModelExport:
        if self._metrics is None:
            self._metrics = self.measured.metrics()
            with one_thread():
                self._latency_s = self.measured.latency_s(self.measured.own)
        metrics = self.measured.metrics(compute)
        with one_thread():
            latency_s = self.measured.latency_s(alone)
        direction = self.measured.task.metrics().directions()[bound.metric]
        export = model_service_pb2.ModelExport(
            format=number,  # type: ignore[arg-type]
            prefix=prefix_of(number),
            latency_s=latency_s,
            original_latency_s=self._latency_s,
            metrics=metrics,
            original_metrics=self._metrics,
            metric=bound.metric,
            drop=direction * (self._metrics[bound.metric] - metrics[bound.metric]),
            num_samples=self.measured.samples.num_samples,
        )
        if bound.max_drop is not None:
            export.max_drop = bound.max_drop
        return export

    def write_onnx(self, folder: Path) -> None:
        """Writes the graph in fp32."""
        write_onnx(folder, self.measured.module, self.measured.graph, self._examples[0][0])

    def _copy_settings(self, folder: Path) -> None:
        """Copies what reads inputs and outputs beside the weights; nothing that is there is replaced."""
        for name in sorted(self.source.names()):
            is_weights = name.endswith((".safetensors", ".safetensors.index.json"))
            if not is_weights and self.source.has(name) and not (folder / name).exists():
                target = folder / name
                target.parent.mkdir(exist_ok=True)
                with self.source.open(name) as file, target.open("wb") as copied:
                    shutil.copyfileobj(file, copied)
        save_code(folder, self.measured.task.choice.config.model_type)


def _write_onnx(original: Original, folder: Path) -> tuple[Compute, Compute]:
    original.write_onnx(folder)
    return OnnxNetwork(folder, threads=original.threads), OnnxNetwork(folder, threads=1)


def _write_int8(original: Original, folder: Path) -> tuple[Compute, Compute]:
    # The graph in fp32 is only a step on the way.
    whole = folder / "fp32"
    whole.mkdir()
    original.write_onnx(whole)
    write_quantised(folder, whole / NAME)
    shutil.rmtree(whole)
    # Activations are quantised over all that runs at once: in a batch an answer would depend on the ones beside it.
    compute = one_by_one(OnnxNetwork(folder, threads=original.threads), original.measured.graph)
    return compute, OnnxNetwork(folder, threads=1)


def _write_bf16(original: Original, folder: Path) -> tuple[Compute, Compute]:
    write_half(folder, original.measured.module)
    compute = HalfNetwork(folder, original.measured.module)
    return compute, compute


_WRITERS: Mapping[int, Callable[[Original, Path], tuple[Compute, Compute]]] = {
    _ONNX: _write_onnx,
    _INT8: _write_int8,
    _BF16: _write_bf16,
}
"""How each format is written: the network on all threads, and the one that is timed."""


def _judge(export: model_service_pb2.ModelExport, measured: Measured) -> None:
    """Raises FormatRefused if the metric is worse than the bound allows, or not a number."""
    name, word = export.metric, word_of(export.format)
    now, before = export.metrics[name], export.original_metrics[name]
    if not math.isfinite(now) and math.isfinite(before):
        raise FormatRefused(f"{word} has {now} as its {name}, the model {before:.4g}")
    if export.HasField("max_drop") and not export.drop <= export.max_drop:
        raise FormatRefused(
            f"{word} has a {name} of {now:.4g} on {measured.samples.num_samples:,} samples, the model {before:.4g}: "
            f"{export.drop:.3g} worse (at {export.size_ratio:.2f} of the size), and {export.max_drop:g} is allowed"
        )


def _weight_bytes(folder: Path) -> int:
    names = (NAME, DATA_NAME)
    weights = [path for path in folder.iterdir() if path.name in names or path.suffix == ".safetensors"]
    return sum(path.stat().st_size for path in weights)


def _bytes_of(source: Folder) -> int:
    return sum((source.path / name).stat().st_size for name in source.weight_names())


def _save_receipt(path: Path, export: model_service_pb2.ModelExport) -> None:
    value: dict[str, Any] = MessageToDict(export, preserving_proto_field_name=True)
    value["format"] = word_of(export.format)
    value["torch"] = torch.__version__
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
