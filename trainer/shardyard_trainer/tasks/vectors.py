"""One vector a text, pooled from its token vectors: in training, in answers and in feature extraction.

Shape suffixes: B texts, T positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.inputs.base import batches
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models import architectures
from shardyard_trainer.models.loaded import Loaded
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


@torch.inference_mode()
def hidden_states(
    loaded: Loaded, inputs: TextInputs, encoded: Sequence[EncodedText]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields (index, last hidden state [T, D] without padding) for every text."""
    for batch in batches(encoded):
        tensors = inputs.tensors(loaded.model, [encoded[index] for index in batch])
        hidden_BTD = loaded.backbone(**tensors).last_hidden_state.cpu()
        for row, index in enumerate(batch):
            yield index, hidden_BTD[row, : len(encoded[index].ids)]


@torch.inference_mode()
def text_vectors(
    loaded: Loaded, inputs: TextInputs, encoded: Sequence[EncodedText], *, pooling: str, normalize: bool
) -> torch.Tensor:
    """One vector a text, fp32 [len(encoded), D], in the order given."""
    vectors = torch.empty(len(encoded), loaded.width)
    for index, hidden_TD in hidden_states(loaded, inputs, encoded):
        vectors[index] = pool(hidden_TD.unsqueeze(0), torch.ones(1, len(hidden_TD), dtype=torch.long), pooling)[0]
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
