"""What training leaves in a TensorFlow checkpoint beside the weights: optimizer slots, counters, metrics, averages."""

from __future__ import annotations

import re
from collections.abc import Mapping

from shardyard_trainer.models.tensor_bundle import Entry

OF_OBJECTS = "/.ATTRIBUTES/VARIABLE_VALUE"
"""What the names of variables of TensorFlow 2 end with."""

_SLOTS = "slots of the optimizer"
_SLOT = "/.OPTIMIZER_SLOT/"
_OPTIMIZER = re.compile(r"(^|/)_?optimizer(/|$)")
_FACTORED = re.compile(r"(adafactor_)?v[rc]|adafactor_[vm]|Adafactor(_[0-9]+)?")
"""Last parts of slots that have another shape than their variable."""

_AVERAGES = frozenset({"ExponentialMovingAverage", "average"})
_METRICS = re.compile(r"keras_api/metrics/|([a-z]+_)*metrics/|(train|validation|eval|test)_loss/")
_SCALES = re.compile(r"(current_)?loss_scale(_optimizer/.*)?")
_COUNTERS = frozenset({"beta1_power", "beta2_power", "learning_rate"})


def skipped_as(stored: str, entry: Entry, entries: Mapping[str, Entry]) -> str:
    """The kind of a tensor that is not a weight; empty: it may be one."""
    if entry.dtype == "string":
        return "texts"
    name = stored.removesuffix(OF_OBJECTS)
    owner, last = entries.get(name.rpartition("/")[0]), name.rpartition("/")[2]
    if last in _AVERAGES and (owner is not None or _SLOT in name):
        return "averaged weights (EMA): those that were not averaged are used"
    if _SLOT in name or _OPTIMIZER.search(name):
        return _SLOTS
    # TensorFlow 1 names a slot after its variable: `…/kernel/adam_m` beside `…/kernel`.
    if owner is not None and (owner.shape == entry.shape or _FACTORED.fullmatch(last)):
        return _SLOTS
    if _METRICS.match(name):
        return "metrics"
    if entry.shape:
        return ""
    is_counter = not entry.is_float or last in _COUNTERS or _SCALES.fullmatch(name)
    return "counters" if is_counter else ""
