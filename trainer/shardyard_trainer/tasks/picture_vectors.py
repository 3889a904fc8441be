"""Vectors of pictures: one for each place, or one for the whole picture.

Models with a class token (ViT, DINOv2) have the picture's vector there. All others (ResNet, ConvNeXT, Swin) average
over the places, some with a norm after it, and leave the result in `pooler_output`: it is what their own heads read.
Shape suffixes: B pictures, T places, D width, H and W places each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import batches
from shardyard_trainer.inputs.image import EncodedPicture, ImageInputs, complaints
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import violation
from shardyard_trainer.tasks.vectors import POOLINGS, Asked, Wish

_CLASS_TOKENS = ("cls_token", "class_embedding")
_SHAPE = 3
"""Dimensions of hidden states that are a sequence: [B, T, D]. Convolutions leave [B, D, H, W]."""


class PictureVectors:
    """Computes vectors of pictures."""

    kinds: tuple[str, ...] = ("image",)
    unit = "pictures"

    def __init__(self, loaded: Loaded, inputs: ImageInputs) -> None:
        self.loaded = loaded
        self.inputs = inputs
        # CLIP and its like are two models; the one that sees is inside.
        self._model: Any = getattr(loaded.backbone, "vision_model", loaded.backbone)
        names = [name for name, _ in self._model.named_parameters()]
        self._has_class_token = any(name.rpartition(".")[2] in _CLASS_TOKENS for name in names)
        self._is_composite = self._model is not loaded.backbone
        distils = any(name.endswith("distillation_token") for name in names)
        registers = getattr(self._model.config, "num_register_tokens", 0)
        self._num_first = 1 + distils + registers if self._has_class_token else 0
        averages = not self._has_class_token or getattr(self._model.config, "use_mean_pooling", False)
        self._default = "mean" if averages else "cls"

    @cached_property
    def _shape(self) -> tuple[int, int]:
        """Places and width of the last hidden state, measured with one black picture."""
        settings = self.inputs.settings
        blank = EncodedPicture(np.zeros((settings.channels, *settings.seen), np.float32))
        (hidden_TD,) = self.compute([blank], Wish(True, "", False))
        return hidden_TD.shape[0], hidden_TD.shape[1]

    @property
    def width(self) -> int:
        """The number of values in one vector."""
        return self._shape[1]

    def refuse(self, asked: Asked) -> list[worker_pb2.Violation]:
        """Refuses a length, and a pooling that the model does not have."""
        found = []
        if asked.HasField("max_length"):
            found.append(violation("max_length", "SPEC_INVALID", "pictures have no tokens to cut; leave it out"))
        if asked.pooling == spec_pb2.POOLING_LAST:
            found.append(violation("pooling", "SPEC_INVALID", "a picture has no last token; choose mean, max or cls"))
        if asked.pooling == spec_pb2.POOLING_CLS and not self._has_class_token:
            kind = self.loaded.folder.model_type
            message = f"{kind} has no class token; choose mean or max, or leave it out"
            found.append(violation("pooling", "SPEC_INVALID", message))
        return found

    def wish(self, asked: Asked) -> Wish:
        """The pooling as requested, else the architecture's own."""
        whole = asked.output == spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE
        return Wish(whole, POOLINGS.get(asked.pooling) or self._default, asked.normalize)

    def read(self, instances: Sequence[model_service_pb2.Instance], _wish: Wish) -> list[EncodedPicture]:
        """Decodes pictures; `complain` reports those that failed."""
        return [self.inputs.encode_or_say(instance.image) for instance in instances]

    def complain(self, encoded: Sequence[EncodedPicture]) -> list[worker_pb2.Violation]:
        """Reports bytes that are not a picture."""
        return [violation(field, "DATA_INVALID", message) for field, message in complaints(encoded)]

    def numbers(self, encoded: Sequence[EncodedPicture], wish: Wish) -> list[int]:
        """The size of one vector, the same for all pictures."""
        places, width = self._shape
        return [(places if wish.whole else 1) * width] * len(encoded)

    @torch.inference_mode()
    def compute(self, encoded: Sequence[EncodedPicture], wish: Wish) -> list[torch.Tensor]:
        """Last hidden states (those of a grid row by row), or what they are pooled to."""
        found: list[Any] = [None] * len(encoded)
        for batch in batches(encoded):
            tensors = self.inputs.tensors(self.loaded.model, [encoded[index] for index in batch])
            output = self._model(**tensors)
            hidden = output.get("last_hidden_state")
            hidden = output.feature_maps[-1] if hidden is None else hidden
            is_grid = hidden.dim() != _SHAPE
            states_BTD = hidden.flatten(2).transpose(1, 2) if is_grid else hidden
            vectors = states_BTD if wish.whole else self._pooled(output, states_BTD, wish, is_grid=is_grid)
            for row, vector in zip(batch, vectors.float().cpu(), strict=True):
                found[row] = vector
        return found

    def _pooled(self, output: Any, states_BTD: torch.Tensor, wish: Wish, *, is_grid: bool) -> torch.Tensor:
        """One vector a picture [B, D]. Class and register tokens are not places."""
        places_BTD = states_BTD if is_grid else states_BTD[:, self._num_first :]
        if wish.pooling == "cls":
            apart = output.get("cls_token_value")  # CvT returns its class token separately from the grid of places.
            vectors_BD = states_BTD[:, 0] if apart is None else apart.flatten(1)
        elif wish.pooling == "max":
            vectors_BD = places_BTD.max(1).values
        else:
            # The pooler of a model with a class token reads that token; CLIP and SigLIP have poolers of their own kind.
            own = output.get("pooler_output") if self._default == "mean" and not self._is_composite else None
            vectors_BD = places_BTD.mean(1) if own is None else own.flatten(1)
        return nn.functional.normalize(vectors_BD, dim=-1) if wish.normalize else vectors_BD
