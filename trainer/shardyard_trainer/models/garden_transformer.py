"""The encoder-decoder of TensorFlow's Model Garden, in the form of a transformers model. Needs torch and transformers.

It is Pegasus but for two things: the wave lengths of its positions reach 10,000 with the last pair, not after it, and
its norms have an epsilon of 1e-6. Each exported model has a copy of this file; `register()` makes it known to
transformers' auto classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSeq2SeqLM, PegasusConfig
from transformers.models.pegasus.modeling_pegasus import (
    PegasusForConditionalGeneration,
    PegasusModel,
    PegasusSinusoidalPositionalEmbedding,
)

MODEL_TYPE = "garden_transformer"


class GardenTransformerConfig(PegasusConfig):  # type: ignore[misc]
    """That of Pegasus, and the epsilon of the norms."""

    model_type = MODEL_TYPE
    norm_epsilon: float = 1e-6


class GardenPositions(PegasusSinusoidalPositionalEmbedding):  # type: ignore[misc]
    """A table of sines and cosines."""

    def create_weight(self) -> torch.Tensor:
        """The table [positions, width]."""
        return positions(*self.weight.shape)


def positions(number: int, width: int) -> torch.Tensor:
    """Sines in the first half and cosines in the second, of wave lengths from 2 pi to 10,000 times that."""
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float64) * -(math.log(10_000) / max(half - 1, 1)))
    angles = torch.arange(number, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


class GardenTransformerModel(PegasusModel):  # type: ignore[misc]
    """Encoder and decoder."""

    config_class: Any = GardenTransformerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _differ(self, config)


class GardenTransformerForConditionalGeneration(PegasusForConditionalGeneration):  # type: ignore[misc]
    """Encoder and decoder with an output layer that is the table of tokens."""

    config_class: Any = GardenTransformerConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        _differ(self.model, config)


def _differ(model: Any, config: Any) -> None:
    """Makes a Pegasus what its configuration asks for."""
    for half in (model.encoder, model.decoder):
        half.embed_positions = GardenPositions(config.max_position_embeddings, config.d_model)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = config.norm_epsilon


def register() -> None:
    """Makes the model known to transformers' auto classes."""
    AutoConfig.register(MODEL_TYPE, GardenTransformerConfig, exist_ok=True)
    AutoModel.register(GardenTransformerConfig, GardenTransformerModel, exist_ok=True)
    AutoModelForSeq2SeqLM.register(GardenTransformerConfig, GardenTransformerForConditionalGeneration, exist_ok=True)
