"""From texts to tensors and back, in the order asked: the same preparation as in training, batched by length.

Shape suffixes: B texts, T positions, D width, C outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardyard_trainer.answering.warm import WarmModel
from shardyard_trainer.inputs.packed import causal_frame
from shardyard_trainer.inputs.tokenization import encode_batch, encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.modules import pool, text_logits

POSITIONS_AT_ONCE = 8192
"""Token positions in one forward pass: enough to keep the cores busy, little enough to stay in memory."""

TEXTS_AT_ONCE = 64

_TOKENIZING = threading.Lock()


@dataclass(frozen=True)
class Encoded:
    """One text, or pair of texts, as token ids; `type_ids` tell the texts of a pair apart."""

    ids: list[int]
    type_ids: list[int]


def encode(model: WarmModel, texts: Sequence[tuple[str, str | None]], max_length: int) -> list[Encoded]:
    """Texts and pairs as tokens, through the same code as in training; none is empty."""
    encoded: list[Encoded | None] = [None] * len(texts)
    # A fast tokenizer refuses to be used by two threads at once.
    with _TOKENIZING:
        for paired in (False, True):
            indices = [index for index, (_, pair) in enumerate(texts) if (pair is not None) == paired]
            if not indices:
                continue
            pairs = [texts[index][1] or "" for index in indices] if paired else None
            ids, types = encode_batch(model.tokenizer, [texts[index][0] for index in indices], pairs, max_length)
            for index, row, kinds in zip(indices, ids, types, strict=True):
                encoded[index] = Encoded(row, kinds)
    return [each for each in encoded if each is not None]


def encode_prompts(model: WarmModel, texts: Sequence[str]) -> list[Encoded]:
    """Texts to be continued: behind the token that a document begins with in training, and with no end."""
    before = list(causal_frame(model.tokenizer).before)
    with _TOKENIZING, encoding_raises(encoding_fault):
        found = model.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    # A model without a begin token still needs one token to go on from.
    prompts = [before + list(ids) or [model.tokenizer.pad_token_id or 0] for ids in found]
    return [Encoded(prompt, [0] * len(prompt)) for prompt in prompts]


def batches(encoded: Sequence[Encoded], *, unpadded: bool = False) -> Iterator[list[int]]:
    """Indices of texts to compute together: of like length, so that little is padding, or `unpadded` nothing."""
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].ids))
    batch: list[int] = []
    for index in order:
        # In this order the newest is the longest: it sets the width of the batch.
        length = len(encoded[index].ids)
        is_full = len(batch) == TEXTS_AT_ONCE or length * (len(batch) + 1) > POSITIONS_AT_ONCE
        if batch and (is_full or (unpadded and length != len(encoded[batch[0]].ids))):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def tensors(model: WarmModel, encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """The inputs of the model: ids_BT, mask_BT, and type ids where the model has them; padded on the right."""
    longest = max(len(each.ids) for each in encoded)
    padding = model.tokenizer.pad_token_id or 0  # Behind the mask its value does not matter.
    inputs = {
        "input_ids": torch.tensor([each.ids + [padding] * (longest - len(each.ids)) for each in encoded]),
        "attention_mask": torch.tensor([[1] * len(each.ids) + [0] * (longest - len(each.ids)) for each in encoded]),
    }
    if getattr(model.model.config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = torch.tensor([each.type_ids + [0] * (longest - len(each.ids)) for each in encoded])
    device = next(model.model.parameters()).device
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@torch.inference_mode()
def hidden_states(model: WarmModel, encoded: Sequence[Encoded]) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, last hidden state [T, D] without padding) of every text."""
    for batch in batches(encoded):
        inputs = tensors(model, [encoded[index] for index in batch])
        hidden_BTD = model.backbone(**inputs).last_hidden_state.cpu()
        for row, index in enumerate(batch):
            yield index, hidden_BTD[row, : len(encoded[index].ids)]


@torch.inference_mode()
def text_vectors(model: WarmModel, encoded: Sequence[Encoded], *, pooling: str, normalize: bool) -> torch.Tensor:
    """One vector a text, fp32 [len(encoded), D], in the order given."""
    vectors = torch.empty(len(encoded), model.width)
    for index, hidden_TD in hidden_states(model, encoded):
        vectors[index] = pool(hidden_TD.unsqueeze(0), torch.ones(1, len(hidden_TD), dtype=torch.long), pooling)[0]
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors


@torch.inference_mode()
def head_outputs(model: WarmModel, encoded: Sequence[Encoded]) -> torch.Tensor:
    """The classification head's outputs, fp32 [len(encoded), C], in the order given."""
    parts: list[torch.Tensor | None] = [None] * len(encoded)
    unpadded = model.head is None and model.model.config.model_type in architectures.HEAD_READS_LAST_PLACE
    for batch in batches(encoded, unpadded=unpadded):
        logits_BC = _head_outputs_of(model, [encoded[index] for index in batch]).cpu()
        for row, index in enumerate(batch):
            parts[index] = logits_BC[row]
    return torch.stack([part for part in parts if part is not None])


def _head_outputs_of(model: WarmModel, encoded: Sequence[Encoded]) -> torch.Tensor:
    inputs = tensors(model, encoded)
    if model.head is not None:
        return text_logits(model.model, model.head, inputs, pooling=model.folder.pooling)
    native = architectures.native_pooling(model.model.config)
    return text_logits(model.model, None, inputs, pooling=native)
