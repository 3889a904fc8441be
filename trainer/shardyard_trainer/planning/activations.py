"""What the backward pass keeps of a text, counted in a forward pass without memory, as it is of pictures.

Whatever is frozen, adapted or built otherwise is then counted as it is. Attention is taken as computed in blocks, which
keeps its inputs and its output; what it keeps beside on CPUs is a formula (`attention_bytes`).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from shardyard_trainer.models.architectures import dropout_names
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.picture_module import Kept

WEIGHT_BYTES, MASK_BYTES = 12, 4
"""Of a position, layer and position attended to, on CPUs: with dropout torch computes attention as a product of
matrices and keeps its weights, those left by dropout and the mask of it, for each head; else only the mask of padding,
once. Counted with torch 2.13 on GPT-2, BERT and Llama.
"""

_IN_BLOCKS = "shardyard_in_blocks"


class _InBlocks(torch.autograd.Function):
    """Attention that computes nothing. [B, H, T, K] and its like → [B, T, H, K]."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Keeps its inputs and its output."""
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *_gradients: torch.Tensor) -> Any:
        """Is not called: nothing is computed backwards without memory."""
        raise RuntimeError("nothing can be computed backwards without memory")


def _attend(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **_settings: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _InBlocks.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output, None


def kept_bytes(module: HuggingFaceModule, length: int, source: int = 0) -> int | None:
    """Bytes in fp32 of one text of `length` positions, in all layers; None: the model does not compute without memory.

    An encoder-decoder's encoder reads `source` of them, its decoder the others. `module` is on the meta device; it is
    in training mode afterwards.
    """
    model = module.model
    before = getattr(model.config, "_attn_implementation", None)
    transformers.AttentionInterface.register(_IN_BLOCKS, _attend)
    kept = Kept(module)
    try:
        with quiet(), torch.device("meta"):
            inputs = {"input_ids": torch.zeros(1, source or length, dtype=torch.long)}
            if source:
                inputs["decoder_input_ids"] = torch.zeros(1, length - source, dtype=torch.long)
            if before == "sdpa":
                model.set_attn_implementation(_IN_BLOCKS)
                # Without one, some look for padding among the ids; no mask is made of it for this attention.
                inputs["attention_mask"] = torch.ones(1, source or length, dtype=torch.long)
            with kept:
                module.train().backbone(**inputs)
    except LOADING_ERRORS:
        return None
    finally:
        if before == "sdpa":
            model.set_attn_implementation(before)
    return kept.num_bytes


def attention_bytes(config: Any, length: int, source: int = 0) -> int:
    """Bytes that attention keeps of a position in a layer beside its inputs and output, on CPUs, among `length`.

    An encoder-decoder's source attends to itself in each layer of its encoder, and the rest, in each of its decoder, to
    all.
    """
    drops = any("att" in name and (getattr(config, name) or 0) > 0 for name in dropout_names(config))
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    attended = float(length)
    if source:
        encoders = int(config.num_hidden_layers)
        decoders = int(getattr(config, "decoder_layers", None) or encoders)
        attended = (source * source + (length - source) * length * decoders / encoders) / length
    return round(attended * max(WEIGHT_BYTES * heads if drops else 0, MASK_BYTES))
