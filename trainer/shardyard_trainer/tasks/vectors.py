"""Vectors of what a model reads: what is asked for; and those of texts, as training, answers and features pool them.

Shape suffixes: B texts, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import batches
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models import architectures
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answers import text_of
from shardyard_trainer.tasks.base import violation
from shardyard_trainer.tasks.texts import DEFAULT_MAX_LENGTH

POOLINGS: Mapping[int, str] = {
    spec_pb2.POOLING_MEAN: "mean",
    spec_pb2.POOLING_CLS: "cls",
    spec_pb2.POOLING_LAST: "last",
    spec_pb2.POOLING_MAX: "max",
}
"""The name of each pooling, by its value in a spec."""

POOLING_VALUES: Mapping[str, spec_pb2.Pooling.ValueType] = {
    name: spec_pb2.Pooling.ValueType(value) for value, name in POOLINGS.items()
}

Asked = model_service_pb2.EmbedRequest | spec_pb2.FeatureExtraction
"""What says which vectors are wanted; both have the same fields for it."""


class Wish(NamedTuple):
    """Which vectors are made. `whole`: all of an input instead of one; `length`: tokens that texts are cut to."""

    whole: bool
    pooling: str
    normalize: bool
    length: int = 0


class Vectors(Protocol):
    """What makes vectors of one modality with a loaded model."""

    kinds: tuple[str, ...]
    """The members of `Instance.input` that it takes."""

    unit: str
    """What it reads, in the plural."""

    loaded: Loaded
    """The model."""

    @property
    def width(self) -> int:
        """Numbers in one vector."""

    def refuse(self, asked: Asked) -> list[worker_pb2.Violation]:
        """What of the settings does not fit the model; fields relative to `asked`."""

    def wish(self, asked: Asked) -> Wish:
        """The settings with the defaults filled in, once nothing is refused."""

    def read(self, instances: Sequence[model_service_pb2.Instance], wish: Wish) -> list[Any]:
        """Instances for the model. Raises SpecError."""

    def complain(self, encoded: Sequence[Any]) -> list[worker_pb2.Violation]:
        """What is wrong with instances once they are read."""

    def numbers(self, encoded: Sequence[Any], wish: Wish) -> list[int]:
        """How many numbers the answer to each has."""

    def compute(self, encoded: Sequence[Any], wish: Wish) -> list[torch.Tensor]:
        """For each one vector [D], or all [T, D], fp32."""


def choose_pooling(loaded: Loaded, asked: spec_pb2.Pooling.ValueType) -> str:
    """The pooling as requested, else as trained, else `mean` for encoders and `last` for causal models."""
    return POOLINGS.get(asked) or architectures.default_pooling(loaded.model.config, loaded.folder)


def choose_length(loaded: Loaded, asked: int | None) -> int:
    """Texts are cut to this many tokens: as requested, else as trained. Raises ValueError if the model takes fewer."""
    longest = loaded.longest
    if asked is None:
        trained = loaded.folder.max_length or DEFAULT_MAX_LENGTH
        return trained if longest is None else min(trained, longest)
    if asked < 1 or (longest is not None and asked > longest):
        rule = f"1 to {longest:,} tokens, which it can address" if longest is not None else "at least 1"
        raise ValueError(f"{asked:,}: the model takes {rule}")
    return asked


def pool(hidden_BTD: torch.Tensor, mask_BT: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a text [B, D] from right-padded positions: mean, maximum, the first, or the last real one's."""
    if pooling == "mean":
        weights_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        return (hidden_BTD * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)
    if pooling == "max":
        return hidden_BTD.masked_fill(mask_BT.unsqueeze(-1) == 0, -torch.inf).max(1).values
    if pooling == "cls":
        return hidden_BTD[:, 0]
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), mask_BT.sum(1) - 1]


class TextVectors:
    """Vectors of texts and pairs of texts."""

    kinds: tuple[str, ...] = ("text", "pair")
    unit = "texts"

    def __init__(self, loaded: Loaded, inputs: TextInputs) -> None:
        self.loaded = loaded
        self.inputs = inputs

    @property
    def width(self) -> int:
        """Numbers in one vector."""
        return self.loaded.width

    def refuse(self, asked: Asked) -> list[worker_pb2.Violation]:
        """A length that the model does not take."""
        try:
            self._length(asked)
        except ValueError as error:
            return [violation("max_length", "SPEC_INVALID", str(error))]
        return []

    def wish(self, asked: Asked) -> Wish:
        """As asked, else as trained."""
        loaded = self.loaded
        return Wish(
            asked.output == spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE,
            choose_pooling(loaded, asked.pooling),
            asked.normalize or loaded.folder.normalize,
            self._length(asked),
        )

    def _length(self, asked: Asked) -> int:
        return choose_length(self.loaded, asked.max_length if asked.HasField("max_length") else None)

    def read(self, instances: Sequence[model_service_pb2.Instance], wish: Wish) -> list[EncodedText]:
        """Texts as tokens. Raises SpecError."""
        return self.inputs.encode([text_of(each) for each in instances], wish.length)

    def complain(self, encoded: Sequence[EncodedText]) -> list[worker_pb2.Violation]:
        """Nothing: any text will do."""
        return []

    def numbers(self, encoded: Sequence[EncodedText], wish: Wish) -> list[int]:
        """Of each text's tokens, or of one vector."""
        return [(len(each.ids) if wish.whole else 1) * self.width for each in encoded]

    @torch.inference_mode()
    def compute(self, encoded: Sequence[EncodedText], wish: Wish) -> list[torch.Tensor]:
        """Last hidden states without padding, or what they are pooled to."""
        found = dict(self._hidden_states(encoded))
        states = [found[index] for index in range(len(encoded))]
        if wish.whole:
            return states
        return [self._pooled(hidden_TD, wish) for hidden_TD in states]

    def _pooled(self, hidden_TD: torch.Tensor, wish: Wish) -> torch.Tensor:
        vector_D = pool(hidden_TD.unsqueeze(0), torch.ones(1, len(hidden_TD), dtype=torch.long), wish.pooling)[0]
        return torch.nn.functional.normalize(vector_D, dim=-1) if wish.normalize else vector_D

    def _hidden_states(self, encoded: Sequence[EncodedText]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields (index, last hidden state [T, D] without padding) for every text."""
        for batch in batches(encoded):
            some = [encoded[index] for index in batch]
            tensors = self.inputs.tensors(self.loaded.model, some)
            hidden_BTD = self.loaded.backbone(**tensors).last_hidden_state.cpu()
            for row, index in enumerate(batch):
                yield index, hidden_BTD[row, : len(some[row].ids)]
