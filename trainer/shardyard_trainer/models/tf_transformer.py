"""The names of the Transformer (an encoder-decoder) in checkpoints of TensorFlow's Model Garden."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from typing import Any

import numpy as np

from shardyard_trainer.models.conversion import Constant, Layout, Shapes, Weight, check_shapes
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.tf_settings import Settings, garden_settings

MODEL_TYPE = "garden_transformer"
_WHAT = "Model Garden's Transformer"
_ANCHOR = re.compile(r"(.*?)encoder_layer/encoder_layers/0/_attention_layer/_query_dense/kernel")
_PROJECTIONS = {"q_proj": "_query_dense", "k_proj": "_key_dense", "v_proj": "_value_dense", "out_proj": "_output_dense"}
_ENCODER = {
    "self_attn": "_attention_layer",
    "self_attn_layer_norm": "_attention_layer_norm",
    "fc1": "_intermediate_dense",
    "fc2": "_output_dense",
    "final_layer_norm": "_output_layer_norm",
}
_DECODER = {
    "self_attn": "self_attention",
    "self_attn_layer_norm": "self_attention_layer_norm",
    "encoder_attn": "encdec_attention",
    "encoder_attn_layer_norm": "encdec_attention_layer_norm",
    "fc1": "intermediate_dense",
    "fc2": "output_dense",
    "final_layer_norm": "output_layer_norm",
}
_HALVES = {"encoder": _ENCODER, "decoder": _DECODER}
_POSITIONS = 1_024
"""Its positions are computed for any length; a table of them has an end."""

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_pytorch_tanh", "swish": "silu", "silu": "silu"}


def recognise(shapes: Shapes, folder: Folder) -> Layout | None:
    """The layout of a Transformer's tensors; None: it is another model. Raises FolderInvalid."""
    root = next((match[1] for name in shapes if (match := _ANCHOR.fullmatch(name))), None)
    if root is None:
        return None
    settings = garden_settings(folder)
    config = _config(shapes, root, settings)
    weights = dict(_weights(shapes, root, config))
    check_shapes(weights, shapes, _WHAT)
    notes: tuple[str, ...] = (f"its positions end at {_POSITIONS:,}",)
    if not settings.values:
        notes += (f"without {settings.file}, it is taken to normalise first, and to have relu and 1e-6 in its norms",)
    return Layout(_WHAT, config, weights, notes)


def _config(shapes: Shapes, root: str, settings: Settings) -> dict[str, Any]:
    table = shapes.get(f"{root}embedding_lookup/embeddings", ())
    if len(table) != 2 or table[1] % 2:
        raise FolderInvalid(
            f"this is {_WHAT}, but its embedding_lookup has the shape {list(table)}, where [tokens, an even width] is "
            "needed; save the whole model again",
            tensor=f"{root}embedding_lookup/embeddings",
        )
    config: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["GardenTransformerForConditionalGeneration"],
        "vocab_size": table[0],
        "d_model": table[1],
        "max_position_embeddings": _POSITIONS,
        "scale_embedding": True,
        "dropout": settings.number("dropout_rate", 0.1),
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    for half, parts in _HALVES.items():
        config |= _half(shapes, f"{root}{half}_layer/{half}_layers/", half, parts, settings.inner(half))
    own = settings.inner("encoder")
    config["activation_function"] = own.word("activation", "relu", _ACTIVATIONS)
    config["attention_dropout"] = own.number("attention_dropout_rate", 0.1)
    config["activation_dropout"] = own.number("intermediate_dropout", 0.1)
    config["norm_epsilon"] = own.number("norm_epsilon", 1e-6)
    return config


def _half(shapes: Shapes, place: str, half: str, parts: Mapping[str, str], settings: Settings) -> dict[str, int]:
    """The counts of encoder or decoder, from the shapes."""
    if settings.values.get("norm_first", True) is not True:
        raise settings.wrong("norm_first", "is not true: it normalises afterwards, which is not converted")
    first = f"/{parts['self_attn']}/_query_dense/kernel"
    layers = sum(1 for _ in takewhile(lambda index: f"{place}{index}{first}" in shapes, count()))
    query = shapes.get(f"{place}0{first}", ())
    inner = shapes.get(f"{place}0/{parts['fc1']}/kernel", ())
    if len(query) != 3 or len(inner) != 2:
        raise FolderInvalid(
            f"this is {_WHAT}, but its {half} has no attention or no dense layer; save the whole model again",
            tensor=f"{place}0{first}",
        )
    counts = {"num_layers": layers, "num_attention_heads": query[1], "intermediate_size": inner[1]}
    settings.check_same(counts)
    names = ("layers", "attention_heads", "ffn_dim")
    return {f"{half}_{name}": number for name, number in zip(names, counts.values(), strict=True)}


def _weights(shapes: Shapes, root: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Weight | Constant]]:
    width = config["d_model"]
    yield "model.shared.weight", Weight(f"{root}embedding_lookup/embeddings", (config["vocab_size"], width))
    for half, parts in _HALVES.items():
        own, place = f"model.{half}", f"{root}{half}_layer"
        yield f"{own}.embed_positions.weight", Constant((_POSITIONS, width), lambda: _positions(_POSITIONS, width))
        yield from _norm(f"{own}.layer_norm", f"{place}/output_normalization", width)
        inner, heads = config[f"{half}_ffn_dim"], config[f"{half}_attention_heads"]
        for index in range(config[f"{half}_layers"]):
            for part, name in parts.items():
                target, source = f"{own}.layers.{index}.{part}", f"{place}/{half}_layers/{index}/{name}"
                if part.endswith("norm"):
                    yield from _norm(target, source, width)
                elif part.startswith("fc"):
                    sizes = (width, inner) if part == "fc1" else (inner, width)
                    yield f"{target}.weight", Weight(f"{source}/kernel", sizes, (1, 0))
                    yield f"{target}.bias", Weight(f"{source}/bias", sizes[1:])
                else:
                    yield from _attention(shapes, target, source, width, heads)


def _attention(
    shapes: Shapes, target: str, source: str, width: int, heads: int
) -> Iterator[tuple[str, Weight | Constant]]:
    apart = (width, heads, width // heads)
    for name, place in _PROJECTIONS.items():
        stored = (heads, width // heads, width) if name == "out_proj" else apart
        kernel, bias = f"{source}/{place}/kernel", f"{source}/{place}/bias"
        yield f"{target}.{name}.weight", Weight(kernel, (width, width), (1, 0), stored=stored)
        if bias in shapes:
            yield f"{target}.{name}.bias", Weight(bias, (width,), stored=() if name == "out_proj" else apart[1:])
        else:
            # Its attention has no biases by default; Pegasus has some.
            yield f"{target}.{name}.bias", Constant((width,), lambda: np.zeros(width, np.float32))


def _norm(target: str, source: str, width: int) -> Iterator[tuple[str, Weight | Constant]]:
    yield f"{target}.weight", Weight(f"{source}/gamma", (width,))
    yield f"{target}.bias", Weight(f"{source}/beta", (width,))


def _positions(number: int, width: int) -> np.ndarray:
    """As `garden_transformer.positions`, without torch."""
    half = width // 2
    rates = np.exp(np.arange(half) * -(math.log(10_000) / max(half - 1, 1)))
    angles = np.arange(number)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], 1).astype(np.float32)
