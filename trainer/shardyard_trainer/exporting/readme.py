"""The README of a format's folder: what it is, how to run it, and how it was measured."""

from __future__ import annotations

from pathlib import Path

from shardyard.export_formats import word_of
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard_trainer.exporting.measuring import Measured
from shardyard_trainer.exporting.network import PICTURES

_WHAT = {
    spec_pb2.EXPORT_FORMAT_ONNX: "ONNX in fp32",
    spec_pb2.EXPORT_FORMAT_ONNX_INT8: "ONNX with weights of 8 bits",
    spec_pb2.EXPORT_FORMAT_BF16: "safetensors in bfloat16",
}

_TEXT = '"Once upon a time"'
_PAIR = '"How many moons has Mars?", "Mars has two moons, Phobos and Deimos."'


def readme(export: model_service_pb2.ModelExport, measured: Measured, folder: Path) -> str:
    """The whole text, in Markdown."""
    rows = "\n".join(
        f"| {name} | {export.original_metrics[name]:.4g} | {value:.4g} |"
        for name, value in sorted(export.metrics.items())
    )
    return (
        f"# {word_of(export.format)}\n\n"
        f"This folder has a {measured.task.task.name} model as {_WHAT[export.format]}, made by Shardyard. Its weights "
        f"have {export.size_ratio:.2f} of the bytes of the model's own, and a sample takes "
        f"{export.latency_s * 1e3:.3g} ms on one thread of a CPU, the model {export.original_latency_s * 1e3:.3g} ms "
        f"(`receipt.json` has all numbers).\n\n"
        f"## Use it\n\n```python\n{usage(export.format, measured, folder)}```\n\n"
        f"## Results\n\nOn {export.num_samples:,} samples:\n\n| metric | model | {word_of(export.format)} |\n"
        f"| --- | --- | --- |\n{rows}\n"
    )


def usage(number: int, measured: Measured, folder: Path) -> str:
    """Plain Python, run in the format's folder, that ends with the outputs of one example."""
    task = measured.task.task
    first = next(iter(measured.graph.outputs))
    if number == spec_pb2.EXPORT_FORMAT_BF16:
        auto = task.auto if measured.module.own_head is None else "AutoModel"
        head = (
            'head = load_file("head.safetensors")  # for what `pooling` in shardyard.json makes of the hidden states\n'
        )
        has_head = measured.module.own_head is not None
        return (
            f"import torch\n{'from safetensors.torch import load_file' * has_head}\nfrom transformers import {auto}\n\n"
            f'model = {auto}.from_pretrained(".", dtype=torch.bfloat16).eval()  # this folder\n{head * has_head}'
        )
    session = 'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
    outputs = f'{first} = session.run(["{first}"], inputs)[0]\n'
    if measured.names == (PICTURES,):
        return (
            "import onnxruntime\nfrom PIL import Image, ImageOps\nfrom transformers import AutoImageProcessor\n\n"
            'processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # this folder\n'
            f"{session}"
            'mode = "RGB" if len(processor.image_mean) == 3 else "L"\n'
            'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert(mode)\n'
            'inputs = {"pixel_values": processor(picture, return_tensors="np")["pixel_values"]}\n'
            f"{outputs}"
        )
    if (folder / "items.json").exists():
        return (
            "import json\n\nimport numpy as np\nimport onnxruntime\n\n"
            f"{session}"
            "ids = np.array([[1, 2, 3]])  # numbers of items, see items.json; the latest last\n"
            f'inputs = {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}\n{outputs}'
        )
    length = f", truncation=True, max_length={measured.task.length}" if task.cuts else ""
    example = task.example or (_PAIR if len(measured.graph.outputs) > 1 else _TEXT)
    return (
        "import onnxruntime\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
        f"{session}"
        f'texts = tokenizer({example}{length}, return_tensors="np")\n'
        'inputs = {each.name: texts[each.name].astype("int64") for each in session.get_inputs()}\n'
        f"{outputs}"
    )
