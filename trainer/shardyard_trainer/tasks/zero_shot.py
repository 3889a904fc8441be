"""Classes of the caller's by a model that predicts whether one text follows from another (NLI).

The scores are those of transformers' zero-shot pipeline. Shape suffix: C outputs of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.answers import classification, refuse_kinds
from shardyard_trainer.tasks.base import Parts, violation
from shardyard_trainer.tasks.heads import head_outputs

DEFAULT_TEMPLATE = "This example is {}."
DEFAULT_THRESHOLD = 0.5
_PLACE = "{}"
_TWO = 2


class Entailment(NamedTuple):
    """The outputs for entailment and for its opposite; the latter is None if no label is known to be it."""

    yes: int
    no: int | None


def entailment_of(labels: Sequence[str]) -> Entailment | None:
    """Which outputs of a head are entailment and contradiction; None: it has no entailment, or more than one."""
    names = [label.casefold() for label in labels]
    yes = [at for at, name in enumerate(names) if name.startswith("entail")]
    if len(yes) != 1 or len(names) < _TWO:
        return None
    no = [at for at, name in enumerate(names) if name.startswith("contra")]
    if len(names) == _TWO:
        no = [1 - yes[0]]
    return Entailment(yes[0], no[0] if len(no) == 1 else None)


def refuse(
    request: model_service_pb2.PredictRequest, loaded: Loaded, inputs: TextInputs, length: int
) -> list[worker_pb2.Violation]:
    """What does not fit: a model without entailment, pairs, a template without a place, classes that are too long."""
    asked, folder = request.zero_shot, loaded.folder
    entailment = entailment_of(folder.labels) if folder.problem == "single_label" else None
    if entailment is None:
        message = (
            f"the model predicts {listed(folder.labels, most=8) or 'a number'}; zero_shot needs a classification of "
            "pairs with one label that begins with `entail`, as models fine-tuned on MNLI or XNLI have (bart, "
            "deberta-v2, xlm-roberta); leave zero_shot out, or use such a model"
        )
        return [violation("zero_shot", "TASK_MISMATCH", message)]
    found = refuse_kinds(request.instances, ("text",), "zero_shot makes the pairs itself; send `text`")
    if _several(asked) and entailment.no is None:
        message = (
            f"the model's labels are {listed(folder.labels, most=8)}, none of which begins with `contra`, so a class "
            "cannot be judged by itself; give several labels without multi_label"
        )
        found.append(violation("zero_shot.multi_label", "TASK_MISMATCH", message))
    template = asked.hypothesis_template or DEFAULT_TEMPLATE
    # `{{}}` is how Python escapes the place: in some libraries every label would then give the same sentence.
    if template.count(_PLACE) != 1 or set(template.replace(_PLACE, "")) & {"{", "}"}:
        message = f"{shorten(template)!r} must have {{}} once, in the place of the label, and no other braces"
        found.append(violation("zero_shot.hypothesis_template", "SPEC_INVALID", message))
        return found
    for at, label in enumerate(asked.labels):
        if not label.strip():
            found.append(violation(f"zero_shot.labels[{at}]", "SPEC_INVALID", "a label is blank; name the class"))
    if found:
        return found
    # Without a text before it: at least one token of the text has to fit as well.
    empty = inputs.encode([("", hypothesis) for hypothesis in _hypotheses(asked)], length + 1)
    for at, encoded in enumerate(empty):
        if encoded.num_positions >= length:
            message = (
                f"{shorten(asked.labels[at])!r} in its sentence leaves nothing of {length} tokens for a text; shorten "
                "the label, or hypothesis_template"
            )
            found.append(violation(f"zero_shot.labels[{at}]", "SPEC_INVALID", message))
    return found


def answer(
    request: model_service_pb2.PredictRequest, loaded: Loaded, inputs: TextInputs, texts: Sequence[str], length: int
) -> Parts:
    """The classes of each text, one text a turn."""
    asked = request.zero_shot
    entailment = entailment_of(loaded.folder.labels)
    assert entailment is not None
    threshold = asked.threshold if asked.HasField("threshold") else DEFAULT_THRESHOLD
    found = []
    for text in texts:
        pairs = [(text, hypothesis) for hypothesis in _hypotheses(asked)]
        logits_LC = head_outputs(loaded, inputs, inputs.encode(pairs, length, keeps_pairs=True))
        scores_L = _scores(logits_LC, entailment, several=_several(asked))
        found.append(classification(scores_L, asked.labels, several=_several(asked), threshold=threshold))
        yield
    return found


def _scores(logits_LC: torch.Tensor, entailment: Entailment, *, several: bool) -> torch.Tensor:
    """A number for each class: its softmax over the classes, or its sigmoid, is the probability."""
    if not several:
        return logits_LC[:, entailment.yes]
    assert entailment.no is not None
    # The softmax over entailment and contradiction alone is the sigmoid of their difference.
    return logits_LC[:, entailment.yes] - logits_LC[:, entailment.no]


def _several(asked: model_service_pb2.ZeroShotParameters) -> bool:
    return asked.multi_label or len(asked.labels) == 1


def _hypotheses(asked: model_service_pb2.ZeroShotParameters) -> list[str]:
    template = asked.hypothesis_template or DEFAULT_TEMPLATE
    return [template.replace(_PLACE, label) for label in asked.labels]
