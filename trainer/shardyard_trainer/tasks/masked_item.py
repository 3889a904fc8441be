"""Pretraining by predicting masked items of histories (BERT4Rec, Sun et al., 2019) with a bidirectional transformer.

It predicts the next item at a mask after the history. The loss is the cross-entropy over the whole catalogue at every
mask. Shape suffixes: B histories, T positions, M masks, V tokens (padding, items, mask).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.inputs.histories import Histories
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.items import PADDING, ItemInputs
from shardyard_trainer.inputs.masked_items import MaskedHistories, MaskedTargets, with_mask
from shardyard_trainer.models import loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import Footprint, Graph, Output
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.item_tasks import ROLES, PreparedItems, Reads, Ready, imagine_items, prepare_items
from shardyard_trainer.tasks.masked_lm import MaskedLmModule
from shardyard_trainer.tasks.module import ModuleOutput
from shardyard_trainer.tasks.ranking import ranks_of
from shardyard_trainer.tasks.recommender import Recommender

DEFAULT_MASK_PROBABILITY = 0.2

_USAGE = """\
import json

import torch
from transformers import AutoModelForMaskedLM

saved = json.load(open("items.json", encoding="utf-8"))  # this folder; token 0 is the padding, the first item is 1
model = AutoModelForMaskedLM.from_pretrained(".").eval()
history = saved["items"][:3]  # the latest item last
tokens = [saved["items"].index(item) + 1 for item in history]
logits = model(torch.tensor([[*tokens[-saved["max_history"] :], saved["mask"]]])).logits[0, -1]
best = logits.index_fill(0, torch.tensor([0, saved["mask"], *tokens]), float("-inf")).argsort(descending=True)[:10]
print([saved["items"][token - 1] for token in best])
"""

_READS = Reads("masked_lm", "bert or distilbert", masks=True)


class MaskedItem:
    """The task `masked_item`."""

    name = "masked_item"
    output = Output.MODEL
    roles = ROLES
    auto = "AutoModelForMaskedLM"
    pipeline = ""
    example = ""
    usage = _USAGE
    cuts = False
    holds_out_by_lot = False
    inputs = ItemInputs
    explains = "items"
    graph = Graph({"logits": ("batch", "length")})

    def prepare(self, job: Ingredients) -> PreparedMaskedItem:
        """Finds and checks model and data. Raises SpecError."""
        wanted = job.wanted
        probability = wanted.mask_probability if wanted.HasField("mask_probability") else DEFAULT_MASK_PROBABILITY

        def samples(histories: Histories, is_target: np.ndarray, max_history: int) -> MaskedHistories:
            return MaskedHistories(histories, is_target, max_history, seed=job.seed, probability=probability)

        return PreparedMaskedItem(prepare_items(job, self, _READS, samples, MaskedTargets), probability)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedMaskedItem:
        """With full histories. Raises SpecError."""
        return PreparedMaskedItem(imagine_items(job, self, _READS, data), DEFAULT_MASK_PROBABILITY)

    def open(self, loaded: Loaded, inputs: ItemInputs) -> Recommender:
        """The predictor that recommends items."""
        return Recommender(self.name, loaded, inputs, logits_behind)


TASK = MaskedItem()


class PreparedMaskedItem(PreparedItems):
    """The task with its model and data."""

    task = TASK

    def __init__(self, ready: Ready, mask_probability: float) -> None:
        super().__init__(ready)
        self._mask_probability = mask_probability

    def make_module(self, *, meta: bool) -> MaskedItemModule:
        """The model with its masked-LM head, over items instead of words."""
        model, _ = loading.load(transformers.AutoModelForMaskedLM, self.choice, meta=meta)
        return MaskedItemModule(model, num_items=len(self.inputs.items))

    def resolve(self, message: Any) -> None:
        """Fills in the defaults, and the share of masks."""
        super().resolve(message)
        message.mask_probability = self._mask_probability

    def footprint(self) -> Footprint:
        """A score for each token, for masked positions only."""
        return Footprint(self.inputs.num_tokens, 0, predicted=self._mask_probability)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {**super().describe(), "mask_probability": self._mask_probability}


class MaskedItemModule(MaskedLmModule):
    """Prediction of masked items; the loss is summed over the masks."""

    def __init__(self, model: Any, *, num_items: int) -> None:
        super().__init__(model)
        self._num_items = num_items

    # No model of items is a teacher, so it has no scores.
    def forward(  # type: ignore[override]  # noqa: PLR0917 - torch's own signature; always called with keywords
        self,
        input_ids: torch.Tensor,
        masked_places: torch.Tensor,
        targets: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`masked_places` [M] index the flattened [B·T] positions, `targets` [M] are their items. With `seen` [M, S],
        tokens to leave out, the outputs have the targets' `ranks` among all items.
        """
        logits_MV = self.logits({"input_ids": input_ids, "attention_mask": attention_mask}, masked_places).float()
        losses_M = F.cross_entropy(logits_MV, targets, reduction="none")
        if seen is None:
            return ModuleOutput(losses_M.sum(), {} if return_outputs else None)
        # The mask is not an item that a user could have.
        ranks_M = ranks_of(logits_MV[:, : self._num_items + 1], targets, seen)
        return ModuleOutput(losses_M.sum(), {"losses": losses_M, "ranks": ranks_M})


def logits_behind(loaded: Loaded, histories_BT: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits of the padding and the items for a mask after each history, [B, V - 1]."""
    lengths_B = torch.tensor([len(ids) for ids in histories_BT])
    ids_BT = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for ids in histories_BT], batch_first=True, padding_value=PADDING
    )
    mask = int(loaded.model.config.vocab_size) - 1
    ids_BT, attention_mask = with_mask(ids_BT, lengths_B, mask)
    places_B = torch.arange(len(ids_BT)) * ids_BT.shape[1] + lengths_B
    module = MaskedLmModule(loaded.model)
    return module.logits({"input_ids": ids_BT, "attention_mask": attention_mask}, places_B)[:, :mask]
