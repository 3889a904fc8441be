"""An encoder-decoder that learns to write targets for sources.

Shape suffixes: B texts, S source tokens, T target tokens, M target tokens with a label, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.losses import IGNORED, SmoothedLinear
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput
from shardyard_trainer.tasks.writing import step


def activation_bytes(config: Any, source: int, target: int) -> int:
    """The bytes that the backward pass keeps of a position of such a pair, in fp32; 0: by the common formula.

    T5 adds a learnt bias to the attention, so all of its attention weights are kept: measured on CPUs, with 80 to 576
    positions, 12 bytes a head and weight beside 118 D an encoder layer and 177 D a decoder layer.
    """
    if not hasattr(config, "relative_attention_num_buckets"):
        return 0
    width, heads = architectures.width(config), int(config.num_attention_heads)
    encoder = source * (118 * width + 12 * heads * source) * int(config.num_hidden_layers)
    decoder = target * (177 * width + 12 * heads * (source + target)) * int(config.num_decoder_layers)
    return (encoder + decoder) // (source + target)


class Seq2SeqModule(HuggingFaceModule):
    """An encoder-decoder; the loss is summed over the target tokens. Without labels it takes a step of writing."""

    def __init__(self, model: Any, *, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        self._smoothing = label_smoothing
        layer = model.get_output_embeddings()
        if type(layer) is nn.Linear:
            layer.__class__ = SmoothedLinear

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        return_outputs: bool = False,
        encoded: torch.Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """`labels` [B, T] are the target's tokens, then IGNORED; `decoder_input_ids` are the same, moved right by one.

        Without `labels` as `writing.step`: through this module, because ZeRO-3 counts its forward passes.
        """
        if labels is None:
            assert attention_mask is not None
            return step(
                self.model,
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoded=encoded,
                decoder_input_ids=decoder_input_ids,
                cache=cache,
            )
        encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden_BTD = self.model.get_decoder()(
            input_ids=decoder_input_ids,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state * architectures.decoder_scale(self.model.config)
        has_label_BT = labels != IGNORED
        loss = self._loss(hidden_BTD[has_label_BT], labels[has_label_BT])
        return ModuleOutput(loss, {} if return_outputs else None)

    def _loss(self, hidden_MD: torch.Tensor, labels_M: torch.Tensor) -> torch.Tensor:
        layer = self.model.get_output_embeddings()
        smoothing = self._smoothing if self.training else 0.0
        bias = getattr(self.model, "final_logits_bias", None)
        bias_V = None if bias is None else bias[0].to(hidden_MD.dtype)
        if isinstance(layer, SmoothedLinear):
            return layer(hidden_MD, labels_M, bias=bias_V, smoothing=smoothing)  # type: ignore[no-any-return]
        logits_MV = layer(hidden_MD).float()
        logits_MV = logits_MV if bias_V is None else logits_MV + bias_V
        return F.cross_entropy(logits_MV, labels_M, reduction="sum", label_smoothing=smoothing)
