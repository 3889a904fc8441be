"""Fine-tuning that recommends the next item of a history (SASRec, Kang and McAuley, 2018), by a causal transformer.

The loss is the cross-entropy over the whole catalogue at every item of a history (Klenitskiy and Vasilev, 2023), so
there are no negatives to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn

from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.items import ItemInputs
from shardyard_trainer.inputs.next_items import HistorySamples
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import Graph, Output
from shardyard_trainer.tasks.causal_lm import CausalLmModule
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.item_tasks import ROLES, PreparedItems, Reads, imagine_items, prepare_items
from shardyard_trainer.tasks.losses import IGNORED
from shardyard_trainer.tasks.module import ModuleOutput
from shardyard_trainer.tasks.ranking import RankingLinear, losses_and_ranks
from shardyard_trainer.tasks.recommender import Recommender

_USAGE = """import json

import torch
from transformers import AutoModelForCausalLM

saved = json.load(open("items.json", encoding="utf-8"))  # this folder; token 0 is the padding, the first item is 1
model = AutoModelForCausalLM.from_pretrained(".").eval()
history = saved["items"][:3]  # the latest item last
tokens = [saved["items"].index(item) + 1 for item in history]
logits = model(torch.tensor([tokens[-saved["max_history"] :]])).logits[0, -1]
best = logits.index_fill(0, torch.tensor([0, *tokens]), float("-inf")).argsort(descending=True)[:10]
print([saved["items"][token - 1] for token in best])
"""

_READS = Reads("causal_lm", "gpt2 or llama")


class Recommendation:
    """The task `recommendation`."""

    name = "recommendation"
    output = Output.MODEL
    roles = ROLES
    auto = "AutoModelForCausalLM"
    pipeline = ""
    example = ""
    usage = _USAGE
    cuts = False
    holds_out_by_lot = False
    inputs = ItemInputs
    explains = "items"
    graph = Graph({"logits": ("batch", "length")})

    def prepare(self, job: Ingredients) -> PreparedRecommendation:
        """Finds and checks model and data. Raises SpecError."""
        return PreparedRecommendation(prepare_items(job, self, _READS, HistorySamples))

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedRecommendation:
        """With full histories. Raises SpecError."""
        return PreparedRecommendation(imagine_items(job, self, _READS, data))

    def open(self, loaded: Loaded, inputs: ItemInputs) -> Recommender:
        """A predictor that recommends items."""
        return Recommender(self.name, loaded, inputs, next_item_logits)


TASK = Recommendation()


class PreparedRecommendation(PreparedItems):
    """The task with its model and data."""

    task = TASK

    def make_module(self, *, meta: bool) -> NextItemModule:
        """The model with its own output layer, over items instead of words."""
        model, _ = loading.load(transformers.AutoModelForCausalLM, self.choice, meta=meta)
        plain = self.choice.config.model_type in architectures.PLAIN_OUTPUT_LAYER
        return NextItemModule(model, plain_output_layer=plain)


class NextItemModule(CausalLmModule):
    """Next-item prediction; the loss is summed over the labels that are not `IGNORED`."""

    def __init__(self, model: Any, *, plain_output_layer: bool) -> None:
        super().__init__(model, plain_output_layer=plain_output_layer)
        if self._is_chunked:
            model.get_output_embeddings().__class__ = RankingLinear

    # No model of items is a teacher, so it has no scores.
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        seen: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        """`labels` [B, T] are the next items. With `seen` [B, S], tokens to leave out, the outputs have the labels'
        `ranks`, in the order of the labels.

        Nothing attends to the padding: it comes after the items, and the model reads from left to right.
        """
        if seen is None:
            return super().forward(input_ids, labels, return_outputs=return_outputs)
        is_target_BT = labels != IGNORED
        targets_N, seen_NS = labels[is_target_BT], seen[is_target_BT.nonzero()[:, 0]]
        inputs = {"input_ids": input_ids, "use_cache": False}
        if self._is_chunked:
            hidden_BTD = self.backbone(**inputs).last_hidden_state
            losses_N, ranks_N = self.model.get_output_embeddings()(hidden_BTD[is_target_BT], targets_N, seen_NS)
        else:
            logits_NV = self.model(**inputs).logits[is_target_BT].float()
            losses_N, ranks_N = losses_and_ranks(logits_NV, targets_N, seen_NS)
        return ModuleOutput(losses_N.sum(), {"losses": losses_N, "ranks": ranks_N})


def next_item_logits(loaded: Loaded, histories_BT: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits for the item after each history, [B, V]."""
    model = loaded.model
    if model.config.model_type not in architectures.PLAIN_OUTPUT_LAYER:
        # One history at a time: all its positions have their logits in memory here.
        rows = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for ids in histories_BT]
        return torch.stack(rows)
    lengths = torch.tensor([len(ids) for ids in histories_BT])
    ids_BT = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in histories_BT], batch_first=True)
    hidden_BTD = loaded.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits: torch.Tensor = model.get_output_embeddings()(hidden_BTD[torch.arange(len(lengths)), lengths - 1])
    return logits
