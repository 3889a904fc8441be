"""Answers as parts of a context: a model's logits for first and last tokens, and the likeliest pairs of these.

Shape suffixes: W windows, T positions, L lengths of an answer, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from shardyard_trainer.inputs.contexts import ContextCutter
from shardyard_trainer.inputs.questions import IGNORED
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput


class Spans(NamedTuple):
    """The best parts of each window: scores (the sum of two logits), first and last positions [W, K]; the score of
    no answer [W]; and the logsumexp of all parts' scores [W].
    """

    scores_WK: torch.Tensor
    firsts_WK: torch.Tensor
    lasts_WK: torch.Tensor
    rests_W: torch.Tensor
    totals_W: torch.Tensor


def best_spans(
    logits_WT2: torch.Tensor, contexts_W2: torch.Tensor, rests_W: torch.Tensor, *, longest: int, most: int
) -> Spans:
    """The parts of at most `longest` tokens of the context with the highest scores, exactly; ties: the earliest.

    `contexts_W2` are the first position of each context and the one after its last; `rests_W` score no answer.
    """
    starts_WT, ends_WT = logits_WT2.float().unbind(-1)
    of_rest_W1 = rests_W[:, None]
    rest_W = (starts_WT.gather(1, of_rest_W1) + ends_WT.gather(1, of_rest_W1))[:, 0]
    places_T = torch.arange(starts_WT.shape[1], device=starts_WT.device)
    is_outside_WT = (places_T < contexts_W2[:, :1]) | (places_T >= contexts_W2[:, 1:])
    starts_WT, ends_WT = (each.masked_fill(is_outside_WT, -torch.inf) for each in (starts_WT, ends_WT))
    lengths = min(longest, starts_WT.shape[1])
    ends_WTL = F.pad(ends_WT, (0, lengths - 1), value=-torch.inf).unfold(1, lengths, 1)
    scores_WN = (starts_WT[:, :, None] + ends_WTL).flatten(1)
    scores_WK, found_WK = scores_WN.topk(min(most, scores_WN.shape[1]))
    firsts_WK = found_WK // lengths
    return Spans(scores_WK, firsts_WK, firsts_WK + found_WK % lengths, rest_W, scores_WN.double().logsumexp(1))


class AnswerModule(HuggingFaceModule):
    """Finds the first and the last token of an answer; the loss is summed over the windows that have a label."""

    def __init__(self, model: Any, longest: int) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        self._longest = longest

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        starts: torch.Tensor,
        stops: torch.Tensor,
        *,
        contexts: torch.Tensor,
        rests: torch.Tensor,
        return_outputs: bool = False,
        **inputs: torch.Tensor,
    ) -> ModuleOutput:
        """The mean of the cross-entropies of first and last token, of windows whose labels are not IGNORED.

        `inputs` may have `token_type_ids`, which go to the model as the ids and the mask do.
        """
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        logits_WT2 = span_logits(self.model, inputs)
        # Exclude padding: a window's loss would otherwise depend on the other windows of its batch.
        padded_WT = attention_mask == 0
        losses = [
            F.cross_entropy(
                logits_WT2[..., side].float().masked_fill(padded_WT, -torch.inf),
                labels,
                ignore_index=IGNORED,
                reduction="sum",
            )
            for side, labels in enumerate((starts, stops))
        ]
        outputs = None
        if return_outputs:
            # Keep only the best answer: the logits of a large evaluation would not fit in memory.
            found = best_spans(logits_WT2, contexts, rests, longest=self._longest, most=1)
            outputs = {
                "scores": found.scores_WK[:, 0],
                "rests": found.rests_W,
                "firsts": found.firsts_WK[:, 0],
                "lasts": found.lasts_WK[:, 0],
            }
        return ModuleOutput((losses[0] + losses[1]) / 2, outputs)

    def network(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The logits [W, T] of each position to be the first, and the last one, of the answer."""
        outputs = self.model(**inputs)
        return {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits}


def span_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of each position to be the first and the last one of the answer, [W, T, 2]."""
    outputs = model(**inputs)
    return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)


def trimmed(context: str, start: int, end: int) -> tuple[int, int]:
    """Removes white space around a part of a context: some tokens begin with the space before their word."""
    part = context[start:end]
    bare = part.strip()
    begin = start + len(part) - len(part.lstrip())
    return begin, begin + len(bare)


def rest_place(config: Any, cutter: ContextCutter) -> int | None:
    """The place where a model can score "no answer": its first token, if that sees the whole text; else None."""
    reads_on = architectures.is_causal(config.model_type) != architectures.is_turned(config)
    return None if reads_on else cutter.rest
