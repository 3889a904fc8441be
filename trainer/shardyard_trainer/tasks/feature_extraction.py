"""Vectors of texts or pictures as a data set: planned in `planning.extraction`, computed in `training.extracting`."""

from __future__ import annotations

from shardyard_trainer.tasks.base import Output


class FeatureExtraction:
    """The task `feature_extraction`."""

    name = "feature_extraction"
    output = Output.DATASET
    roles = ("text", "text_pair", "image")


TASK = FeatureExtraction()
