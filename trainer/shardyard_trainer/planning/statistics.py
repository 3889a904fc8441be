"""What a plan says of the data beyond its size: lengths, classes, and what training and evaluation have in common."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from shardyard.v1 import job_pb2, plan_pb2, spec_pb2
from shardyard_trainer.inputs.base import ComparableSamples, CountedSamples, Samples
from shardyard_trainer.tasks.base import Prepared

MOST_CLASSES = 100
MOST_COMPARED = 2_000_000
"""Samples that are compared at most: a few seconds."""

_MOST_SHARED = 0.01


def data_stats(task: Prepared, samples: Samples) -> plan_pb2.DataStats:
    """The statistics of one split."""
    found = samples.stats().to_proto()
    lengths = samples.lengths()
    if lengths is not None and len(lengths):
        p50, p90, p99 = np.percentile(lengths, (50, 90, 99), method="inverted_cdf").tolist()
        found.lengths.CopyFrom(plan_pb2.LengthStats(p50=p50, p90=p90, p99=p99, longest=int(lengths.max())))
    labels = task.describe().get("labels") or ()
    if labels and isinstance(samples, CountedSamples):
        counts = samples.counts()
        # A stable order: classes that are equally frequent stay in the order of the outputs.
        for at in np.argsort(-counts, kind="stable")[:MOST_CLASSES].tolist():
            found.classes.add(label=labels[at], count=int(counts[at]))
    return found


def num_shared(task: Prepared) -> int | None:
    """Evaluation samples whose input is in the training data too; None: not compared."""
    train, held_out = task.train, task.eval
    if not (isinstance(train, ComparableSamples) and isinstance(held_out, ComparableSamples)):
        return None
    if train.num_samples + held_out.num_samples > MOST_COMPARED:
        return None
    return int(np.isin(held_out.digests(), train.digests()).sum())


def shared_warnings(spec: spec_pb2.JobSpec, task: Prepared, shared: int | None) -> Iterator[job_pb2.Warning]:
    """The warning about evaluation data that is trained on."""
    if shared is None or task.eval is None or shared <= _MOST_SHARED * task.eval.num_samples:
        return
    message = (
        f"{shared:,} of {task.eval.num_samples:,} evaluation samples are in the training data too: the evaluation says "
        "less about new data than it seems to; take them out of one of the two"
    )
    field = "spec.eval_data" if spec.HasField("eval_data") else "spec.train_data"
    yield job_pb2.Warning(reason="EVALUATED_ON_TRAINED", message=message, field=field)
