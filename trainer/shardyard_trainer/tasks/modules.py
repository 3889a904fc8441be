"""The modules that tasks train: a transformers model, and where it has no head for the task one of our own.

Shape suffixes: B samples, T positions, D width, V vocabulary, C outputs, M masked positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shardyard.v1 import spec_pb2
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.base import ModuleOutput, TaskModule
from shardyard_trainer.tasks.losses import IGNORED, LossLinear

_TEXT = spec_pb2.TextClassification

POOLINGS = {
    spec_pb2.POOLING_MEAN: "mean",
    spec_pb2.POOLING_CLS: "cls",
    spec_pb2.POOLING_LAST: "last",
    spec_pb2.POOLING_MAX: "max",
}
"""How poolings are called, by their value in a spec."""


class HuggingFaceModule(TaskModule):
    """A module around a transformers model.

    `model` is what `save_pretrained` writes; `own_head` is what goes into `head.safetensors` beside it, None where the
    model has its head inside.
    """

    model: Any
    own_head: nn.Linear | None

    # An attribute would register the backbone's parameters under a second name.
    @property
    def backbone(self) -> nn.Module:  # type: ignore[override]
        """The part that gives `last_hidden_state`."""
        return architectures.backbone_of(self.model)  # type: ignore[no-any-return]


class CausalLm(HuggingFaceModule):
    """Next-token prediction; the loss is summed over the labels that are not `IGNORED`."""

    def __init__(self, model: Any, *, plain_output_layer: bool) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        layer = model.get_output_embeddings()
        self._is_chunked = plain_output_layer and type(layer) is nn.Linear
        if self._is_chunked:
            layer.__class__ = LossLinear

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`labels` [B, T] are the next tokens: nothing is shifted here."""
        # No attention mask and no cache: with either, transformers does not see from restarted positions where
        # documents begin, and lets them look into one another.
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if self._is_chunked:
            hidden_BTD = self.backbone(**inputs).last_hidden_state
            loss = self.model.get_output_embeddings()(hidden_BTD.flatten(0, 1), labels.flatten())
        else:
            logits_BTV = self.model(**inputs).logits
            loss = F.cross_entropy(
                logits_BTV.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
        return ModuleOutput(loss, {} if return_outputs else None)


class MaskedLm(HuggingFaceModule):
    """Prediction of masked tokens; only their vectors go through the head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        layer = model.get_output_embeddings()
        heads = [
            name
            for name, child in model.named_children()
            if child is not model.base_model and any(module is layer for module in child.modules())
        ]
        # A head in several parts (DistilBERT's) is known to its model only.
        others = [name for name, child in model.named_children() if child is not model.base_model]
        self._head_name = heads[0] if len(heads) == 1 and len(others) == 1 else ""

    def forward(  # noqa: PLR0917 - torch's own signature; always called with keywords
        self,
        input_ids: torch.Tensor,
        masked_places: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`masked_places` [M] index the flattened [B·T] positions, `targets` [M] are their tokens."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        if self._head_name:
            hidden_MD = self.backbone(**inputs).last_hidden_state.flatten(0, 1)[masked_places]
            logits_MV = getattr(self.model, self._head_name)(hidden_MD)
            if isinstance(logits_MV, tuple):  # XLM's head gives its logits with the loss, even if it has none.
                logits_MV = logits_MV[0]
        else:
            logits_MV = self.model(**inputs).logits.flatten(0, 1)[masked_places]
        loss = F.cross_entropy(logits_MV.float(), targets, reduction="sum")
        outputs = {"correct": (logits_MV.argmax(-1) == targets).sum()} if return_outputs else None
        return ModuleOutput(loss, outputs)


class TextClassifier(HuggingFaceModule):
    """Classes or a score for a text; the loss is summed over texts."""

    def __init__(
        self,
        model: Any,
        own_head: nn.Linear | None,
        *,
        pooling: str,
        problem: int,
        dropout: float,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.own_head = own_head
        self.dropout = nn.Dropout(dropout)
        self._pooling = pooling
        self._problem = problem
        self._label_smoothing = label_smoothing

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`labels`: classes [B], 0 or 1 for each class [B, C], or numbers [B]; without them the loss is 0."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits_BC = text_logits(self.model, self.own_head, inputs, pooling=self._pooling, dropout=self.dropout)
        loss = logits_BC.new_zeros((), dtype=torch.float32) if labels is None else self._loss(logits_BC.float(), labels)
        return ModuleOutput(loss, {"logits": logits_BC} if return_outputs else None)

    def _loss(self, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._problem == _TEXT.PROBLEM_REGRESSION:
            return F.mse_loss(logits_BC.squeeze(-1), labels.float(), reduction="sum")
        if self._problem == _TEXT.PROBLEM_MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits_BC, labels.float(), reduction="none").mean(-1).sum()
        smoothing = self._label_smoothing if self.training else 0.0
        return F.cross_entropy(logits_BC, labels, reduction="sum", label_smoothing=smoothing)


def text_logits(
    model: Any,
    own_head: nn.Linear | None,
    inputs: dict[str, torch.Tensor],
    *,
    pooling: str,
    dropout: nn.Module | None = None,
) -> torch.Tensor:
    """A text's outputs [B, C]: by our own head where there is one, else by the model's, which `pooling` describes."""
    if own_head is None and pooling != "last":
        return model(**inputs).logits  # type: ignore[no-any-return]
    hidden_BTD = architectures.backbone_of(model)(**inputs).last_hidden_state
    if own_head is not None:
        pooled_BD = pool(hidden_BTD, inputs["attention_mask"], pooling)
        return own_head(pooled_BD if dropout is None else dropout(pooled_BD))  # type: ignore[no-any-return]
    return model.score(_read_by_transformers(hidden_BTD, inputs, model.config.pad_token_id))  # type: ignore[no-any-return]


def _read_by_transformers(
    hidden_BTD: torch.Tensor, inputs: dict[str, torch.Tensor], padding: int | None
) -> torch.Tensor:
    """The vectors [B, D] that the causal classifiers of transformers read: of the last token that is not `padding`.

    They look at ids and not at the mask: a text's own end token is passed over if it is the padding too.
    """
    read_BT = inputs["attention_mask"] > 0
    if padding is not None:
        read_BT = read_BT & (inputs["input_ids"] != padding)
    places_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) * read_BT
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), places_BT.argmax(-1)]


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
