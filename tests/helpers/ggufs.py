"""GGUF files of tiny models, written by the library that llama.cpp's converters use, or byte by byte."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.tiny_folders import WORDS

WIDTH, INNER, HEADS, LAYERS = 32, 64, 4, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS), "▁", *"abcdefghijklmnopqrstuvwxyz"]


def write_llama(
    path: Path,
    *,
    quantised: bool = False,
    seed: int = 0,
    more: Mapping[str, np.ndarray | None] | None = None,
    say: Callable[[Any], None] = lambda writer: None,
    vocabulary: Callable[[Any], None] | None = None,
) -> dict[str, np.ndarray]:
    """A Llama with a SentencePiece vocabulary; returns its tensors as they are meant, by GGUF's names.

    `more` are further tensors, or None for one that is left out; `say` writes further settings.
    """
    import gguf  # An extra of the service: tests of other things do without.

    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        shapes |= {f"{block}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"{block}.attn_{name}.weight": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{name}.weight": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{block}.ffn_down.weight": (WIDTH, INNER)}
    tensors = {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    given: dict[str, Any] = {**tensors, **(more or {})}
    tensors = {name: values for name, values in given.items() if values is not None}
    writer = gguf.GGUFWriter(path, "llama")
    write_sizes(writer)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10_000.0)
    say(writer)
    (vocabulary or write_pieces)(writer)
    for name, values in tensors.items():
        if quantised and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            packed = gguf.quantize(values, kind)
            writer.add_tensor(name, packed, raw_dtype=kind)
            tensors[name] = gguf.dequantize(packed, kind)
        else:
            writer.add_tensor(name, values)
    write_out(writer)
    return tensors


def write_sizes(writer: Any) -> None:
    """The settings that every decoder has."""
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def write_pieces(writer: Any) -> None:
    """A SentencePiece vocabulary."""
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([float(-index) for index in range(len(TOKENS))])
    writer.add_token_types([2, 3, 3, *([1] * (len(TOKENS) - 3))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def byte_pairs(split: str) -> Callable[[Any], None]:
    """Writes a vocabulary of bytes, and of the pair `12`, whose texts are split in this way; empty: it does not say."""

    def write(writer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        writer.add_tokenizer_model("gpt2")
        if split:
            writer.add_tokenizer_pre(split)
        writer.add_token_list([*bytes_to_unicode().values(), "12"])
        writer.add_token_merges(["1 2"])
        writer.add_token_types([1] * 257)

    return write


def write_settings(path: Path, architecture: str, say: Callable[[Any], None], tensors: Mapping[str, Any]) -> None:
    """A file with little more than settings."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    write_sizes(writer)
    say(writer)
    for name, values in {"token_embd.weight": np.zeros((9, WIDTH)), **tensors}.items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    write_out(writer)


def write_out(writer: Any) -> None:
    """Ends a file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def text(value: str) -> bytes:
    """A text as GGUF has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def setting(name: str, value: str) -> bytes:
    """A setting that is a text."""
    return text(name) + struct.pack("<I", 8) + text(value)


def tensor(name: str, dims: tuple[int, ...], *, kind: int = 0, offset: int = 0) -> bytes:
    """A tensor in the header; kind 0 is of 32 bits."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(*, settings: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), values: bytes = b"") -> bytes:
    """A whole file of these parts."""
    found = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(settings)) + b"".join(settings) + b"".join(tensors)
    return found + bytes(-len(found) % 32) + values
