"""Classification heads for texts: transformers' own, or our linear layer on a pooled vector.

Shape suffixes: B texts, T positions, D width, C outputs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.base import batches
from shardyard_trainer.inputs.text import EncodedText, TextInputs
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks import distances
from shardyard_trainer.tasks.class_weights import as_tensor
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput, Scores
from shardyard_trainer.tasks.vectors import pool


class TextClassifier(HuggingFaceModule):
    """Scores a text for classes or a number; the loss is summed over texts."""

    def __init__(
        self,
        model: Any,
        own_head: nn.Linear | None,
        *,
        pooling: str,
        problem: int,
        dropout: float,
        label_smoothing: float,
        class_weights: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.own_head = own_head
        self.dropout = nn.Dropout(dropout)
        self._pooling = pooling
        self._problem = problem
        self._label_smoothing = label_smoothing
        self._class_weights = class_weights

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`labels`: classes [B], 0 or 1 for each class [B, C], or numbers [B]; without them the loss is 0."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits_BC = text_logits(self.model, self.own_head, inputs, pooling=self._pooling, dropout=self.dropout)
        loss = logits_BC.new_zeros((), dtype=torch.float32) if labels is None else self._loss(logits_BC.float(), labels)
        outputs = {"logits": logits_BC} if return_outputs else None
        return ModuleOutput(loss, outputs, scores=self._scores(logits_BC.float(), labels) if return_scores else None)

    def network(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs [B, C] of the head, be it the model's or our own."""
        return {"logits": text_logits(self.model, self.own_head, dict(inputs), pooling=self._pooling)}

    def answer_by(self, model: nn.Module) -> None:
        """Takes the `logits` of another network as they are."""
        self.model, self.own_head, self._pooling = model, None, ""

    def _scores(self, logits_BC: torch.Tensor, labels: torch.Tensor | None) -> Scores:
        if self._problem == spec_pb2.TextClassification.PROBLEM_REGRESSION:
            return Scores(logits_BC, distances.of_numbers)
        if self._problem == spec_pb2.TextClassification.PROBLEM_MULTI_LABEL:
            return Scores(logits_BC, distances.of_several_classes)
        weights_C = as_tensor(self._class_weights, logits_BC) if self.training else None
        return Scores(logits_BC, distances.of_classes, None if weights_C is None else weights_C[labels])

    def _loss(self, logits_BC: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._problem == spec_pb2.TextClassification.PROBLEM_REGRESSION:
            return F.mse_loss(logits_BC.squeeze(-1), labels.float(), reduction="sum")
        if self._problem == spec_pb2.TextClassification.PROBLEM_MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(logits_BC, labels.float(), reduction="none").mean(-1).sum()
        if not self.training:
            return F.cross_entropy(logits_BC, labels, reduction="sum")
        weights_C = as_tensor(self._class_weights, logits_BC)
        smoothing = self._label_smoothing
        return F.cross_entropy(logits_BC, labels, weight=weights_C, reduction="sum", label_smoothing=smoothing)


def text_logits(
    model: Any,
    own_head: nn.Linear | None,
    inputs: dict[str, torch.Tensor],
    *,
    pooling: str,
    dropout: nn.Module | None = None,
) -> torch.Tensor:
    """Outputs [B, C] of texts: by our own head if there is one, else by the model's, which `pooling` describes."""
    if own_head is None and pooling not in {"last", "end"}:
        return model(**inputs).logits  # type: ignore[no-any-return]
    hidden_BTD = architectures.backbone_of(model)(**inputs).last_hidden_state
    if own_head is not None:
        pooled_BD = pool(hidden_BTD, inputs["attention_mask"], pooling)
        return own_head(pooled_BD if dropout is None else dropout(pooled_BD))  # type: ignore[no-any-return]
    if pooling == "end":
        # transformers reads it too, but only of rows that have as many end tokens as each other.
        is_end_BT = (inputs["input_ids"] == model.config.eos_token_id) & (inputs["attention_mask"] > 0)
        return model.classification_head(_last_of(hidden_BTD, is_end_BT))  # type: ignore[no-any-return]
    return model.score(_read_by_transformers(hidden_BTD, inputs, model.config.pad_token_id))  # type: ignore[no-any-return]


def _read_by_transformers(
    hidden_BTD: torch.Tensor, inputs: dict[str, torch.Tensor], padding: int | None
) -> torch.Tensor:
    """The vectors [B, D] that the causal classifiers of transformers read: of the last token that is not `padding`.

    They look at ids, not at the mask: a text's own end token is skipped if it equals the padding token.
    """
    read_BT = inputs["attention_mask"] > 0
    if padding is not None:
        read_BT = read_BT & (inputs["input_ids"] != padding)
    return _last_of(hidden_BTD, read_BT)


def _last_of(hidden_BTD: torch.Tensor, read_BT: torch.Tensor) -> torch.Tensor:
    """The vectors [B, D] of the last place of each row that is read; of the first place if none is."""
    places_BT = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device) * read_BT
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), places_BT.argmax(-1)]


@torch.inference_mode()
def head_outputs(loaded: Loaded, inputs: TextInputs, encoded: Sequence[EncodedText]) -> torch.Tensor:
    """The outputs of a loaded model's head, fp32 [len(encoded), C], in the order given."""
    parts: list[torch.Tensor | None] = [None] * len(encoded)
    unpadded = loaded.head is None and loaded.model.config.model_type in architectures.HEAD_READS_LAST_PLACE
    for batch in batches(encoded, unpadded=unpadded):
        tensors = inputs.tensors(loaded.model, [encoded[index] for index in batch])
        logits_BC = outputs_of(loaded, tensors).cpu()
        for row, index in enumerate(batch):
            parts[index] = logits_BC[row]
    return torch.stack([part for part in parts if part is not None])


def outputs_of(loaded: Loaded, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outputs [B, C] of a loaded model's head for a batch."""
    native = architectures.native_pooling(loaded.model.config)
    pooling = loaded.folder.pooling if loaded.head is not None else native
    return text_logits(loaded.model, loaded.head, tensors, pooling=pooling)


def without_pooler(config: Any) -> dict[str, Any]:
    """Options of the backbone: an unused pooler is not built if the class allows it."""
    kind = transformers.MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}


def head_dropout(config: Any) -> float:
    """The dropout rate before a head, from the configuration."""
    for name in ("classifier_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout"):
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def start_afresh(model: Any) -> None:
    """Reinitialises the head of a transformers model."""
    for child in model.children():
        if child is not model.base_model:
            for module in child.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    draw(module, model.config)


def draw(layer: nn.Linear | nn.Conv2d, config: Any) -> None:
    """Initialises a linear layer as transformers does."""
    nn.init.normal_(layer.weight, std=getattr(config, "initializer_range", None) or 0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def load_with_labels(
    auto: Any,
    choice: ModelChoice,
    tokenizer: Any,
    labels: Sequence[str],
    *,
    keeps_head: bool,
    meta: bool,
    **settings: Any,
) -> Any:
    """A transformers model with a head whose outputs have names; a head that is not kept is reinitialised.

    `tokenizer` is None for a model that does not read text; `settings` go into its configuration. Raises SpecError if
    a head that is to be kept lacks weights.
    """
    starts = not keeps_head and not choice.is_fresh and not meta
    # Another number of labels has another shape; the head in the folder is discarded below.
    options = {"ignore_mismatched_sizes": True} if starts else {}
    model, lacking = loading.load(auto, with_labels(choice, labels, **settings), meta=meta, **options)
    if lacking and keeps_head:
        message = f"the weights lack {lacking[0]} of their own head; set new_head for a new one"
        raise SpecError(choice.field, "MODEL_INVALID", message)
    if tokenizer is not None:
        loading.ensure_pad_id(model, tokenizer)
    if starts:
        start_afresh(model)
    return model


def with_labels(choice: ModelChoice, labels: Sequence[str], **settings: Any) -> ModelChoice:
    """The choice with label names and further settings in its configuration."""
    config = copy.deepcopy(choice.config)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: at for at, label in enumerate(labels)}
    for name, value in settings.items():
        setattr(config, name, value)
    return replace(choice, config=config)
