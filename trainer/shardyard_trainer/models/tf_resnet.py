"""The names of ResNet in checkpoints of TensorFlow's Model Garden.

The backbone is a functional model of Keras: layer 0 is the stem's convolution, 1 its norm, and from 2 on each block is
a layer; a block with a shortcut begins a stage. Kernels are [height, width, in, out] in TensorFlow and
[out, in, height, width] in PyTorch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.conversion import Layout, Shapes, Weight, check_shapes
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.tf_settings import Settings, garden_settings

MODEL_TYPE = "garden_resnet"
_WHAT = "Model Garden's ResNet"
_FIRST = re.compile(r"(.*?)layer_with_weights-2/_conv1/kernel")
_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_DIMENSIONS = 4
# What Model Garden keeps of a picture's centre, and how it normalises.
_KEPT = 0.875
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
_PLAIN = {"stem_type": "v0", "se_ratio": 0, "resnetd_shortcut": False, "replace_stem_max_pool": False}
"""Settings of the backbone, with the only values of the plain ResNet (`None` too)."""


def recognise(shapes: Shapes, folder: Folder) -> Layout | None:
    """The layout of a ResNet's tensors; None: it is another model. Raises FolderInvalid for other kinds of it."""
    root = next((match[1] for name in shapes if (match := _FIRST.fullmatch(name))), None)
    if root is None:
        return None
    settings = garden_settings(folder)
    _check_plain(settings)
    stages = _stages(shapes, root)
    head = _head(shapes, root)
    config = _config(shapes, root, stages, head, settings)
    weights = dict(_weights(shapes, root, stages, head, config))
    check_shapes(weights, shapes, _WHAT)
    notes = (
        ()
        if settings.values
        else (f"without {settings.file}, its norm_epsilon is taken to be {config['norm_epsilon']}",)
    )
    return Layout(_WHAT, config, weights, notes, files={"preprocessor_config.json": _processor(config)})


def _check_plain(settings: Settings) -> None:
    """Raises FolderInvalid for settings of ResNet-RS and ResNet-D, which compute otherwise."""
    backbone = settings.inner("backbone").inner("resnet")
    for name, plain in _PLAIN.items():
        if (backbone.values.get(name) or plain) != plain:
            raise backbone.wrong(
                name, f"makes it another model than the plain ResNet ({plain}), which alone is converted"
            )
    activation = settings.inner("norm_activation")
    if activation.values.get("activation", "relu") != "relu":
        raise activation.wrong("activation", "is not relu, which alone is converted")


def _stages(shapes: Shapes, root: str) -> list[list[str]]:
    """The prefixes of the blocks of each stage."""
    names = (f"{root}layer_with_weights-{index}" for index in count(2))
    stages: list[list[str]] = []
    for name in takewhile(lambda name: f"{name}/_conv1/kernel" in shapes, names):
        if f"{name}/_shortcut/kernel" in shapes or not stages:
            stages.append([])
        stages[-1].append(name)
    return stages


def _head(shapes: Shapes, root: str) -> str:
    """The prefix of the layer that gives the classes; empty: there is none."""
    inside = f"{root}layer_with_weights-"
    kernels = [name for name in shapes if name.endswith("/kernel") and len(shapes[name]) == 2]
    return next((name.removesuffix("/kernel") for name in kernels if not name.startswith(inside)), "")


def _config(shapes: Shapes, root: str, stages: list[list[str]], head: str, settings: Settings) -> dict[str, Any]:
    stem = _kernel(shapes, f"{root}layer_with_weights-0/kernel")
    if stem[:2] != (7, 7):
        raise FolderInvalid(
            f"this is {_WHAT}, but its stem is a convolution of {stem[0]} × {stem[1]}, not of 7 × 7, as in "
            "ResNet-D and ResNet-RS, which compute otherwise; only the plain ResNet is converted",
            tensor=f"{root}layer_with_weights-0/kernel",
        )
    is_bottleneck = f"{stages[0][0]}/_conv3/kernel" in shapes
    last = "_conv3" if is_bottleneck else "_conv2"
    side = settings.values.get("input_size")
    norm = settings.inner("norm_activation")
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["GardenResNetForImageClassification" if head else "GardenResNetModel"],
        "num_channels": stem[2],
        "embedding_size": stem[3],
        "hidden_sizes": [_kernel(shapes, f"{stage[0]}/{last}/kernel")[3] for stage in stages],
        "depths": [len(stage) for stage in stages],
        "layer_type": "bottleneck" if is_bottleneck else "basic",
        "image_size": side[0] if isinstance(side, list) and side and type(side[0]) is int and side[0] > 0 else 224,
        "norm_epsilon": norm.number("norm_epsilon", 1e-3),
        "norm_momentum": norm.number("norm_momentum", 0.99),
    }
    if head:
        config["num_labels"] = shapes[f"{head}/kernel"][1]
    return config


def _kernel(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of a convolution's kernel."""
    shape = shapes.get(name, ())
    if len(shape) != _DIMENSIONS:
        found = f"has the shape {list(shape)}" if name in shapes else "is missing"
        raise FolderInvalid(
            f"this is {_WHAT}, but its tensor {shorten(name)!r} {found}; save the whole model again", tensor=name
        )
    return shape


def _weights(
    shapes: Shapes, root: str, stages: list[list[str]], head: str, config: dict[str, Any]
) -> Iterator[tuple[str, Weight]]:
    own = "resnet." if head else ""
    layers = 3 if config["layer_type"] == "bottleneck" else 2
    wide = config["embedding_size"]
    yield f"{own}stem.weight", _convolution(f"{root}layer_with_weights-0/kernel", config["num_channels"], wide, 7)
    yield from _norm(f"{own}stem_norm", f"{root}layer_with_weights-1", wide)
    for stage, (blocks, to) in enumerate(zip(stages, config["hidden_sizes"], strict=True)):
        for index, source in enumerate(blocks):
            target = f"{own}stages.{stage}.{index}"
            inner = to // 4 if layers == 3 else to
            sizes = [(wide, inner, 3), (inner, to, 3)]
            if layers == 3:
                sizes = [(wide, inner, 1), (inner, inner, 3), (inner, to, 1)]
            for layer, size in enumerate(sizes):
                yield f"{target}.convolutions.{layer}.weight", _convolution(f"{source}/_conv{layer + 1}/kernel", *size)
                yield from _norm(f"{target}.norms.{layer}", f"{source}/_norm{layer + 1}", size[1])
            if index == 0:
                yield f"{target}.shortcut.weight", _convolution(f"{source}/_shortcut/kernel", wide, to, 1)
                yield from _norm(f"{target}.shortcut_norm", f"{source}/_norm0", to)
            wide = to
    if head:
        labels = config["num_labels"]
        yield "classifier.weight", Weight(f"{head}/kernel", (wide, labels), (1, 0))
        yield "classifier.bias", Weight(f"{head}/bias", (labels,))


def _convolution(name: str, wide: int, to: int, side: int) -> Weight:
    return Weight(name, (side, side, wide, to), (3, 2, 0, 1))


def _norm(target: str, source: str, channels: int) -> Iterator[tuple[str, Weight]]:
    for part, name in _PARTS.items():
        yield f"{target}.{part}", Weight(f"{source}/{name}", (channels,))


def _processor(config: dict[str, Any]) -> dict[str, Any]:
    """How Model Garden prepares pictures for evaluation, as transformers' image processor has it."""
    side, channels = config["image_size"], config["num_channels"]
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side / _KEPT)},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _MEAN if channels == len(_MEAN) else [0.5] * channels,
        "image_std": _STD if channels == len(_STD) else [0.5] * channels,
    }
