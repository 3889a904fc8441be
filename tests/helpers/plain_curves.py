"""Curves point by point: the reference that the arrays of `store/curves.py` are compared with."""

from __future__ import annotations

from collections.abc import Sequence

from shardyard_coordinator.domain.records import MetricPoint


def plain_one_curve(points: Sequence[MetricPoint]) -> list[MetricPoint]:
    """One point a step: the highest attempt's, and its last."""
    best: dict[int, MetricPoint] = {}
    for point in points:
        held = best.get(point.step)
        if held is None or point.attempt >= held.attempt:
            best[point.step] = point
    return [best[step] for step in sorted(best)]


def plain_downsample(points: Sequence[MetricPoint], max_points: int) -> list[MetricPoint]:
    """At most `max_points` (at least 3) points: minimum, maximum and last of every bucket, in their order."""
    if len(points) <= max_points:
        return list(points)
    buckets = max_points // 3
    kept: list[MetricPoint] = []
    for bucket in range(buckets):
        start, end = bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets
        places = range(start, end)
        # A NaN compares with nothing: it counts as the lowest, so that it is always shown.
        low = min(places, key=lambda i: (points[i].value == points[i].value, points[i].value))
        high = max(places, key=lambda i: (points[i].value == points[i].value, points[i].value))
        kept.extend(points[i] for i in sorted({low, high, end - 1}))
    return kept
