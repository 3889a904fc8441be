"""Series of numbers as arrays, so that a curve of a million steps is downsampled without an object per point."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardyard_coordinator.domain.records import MetricPoint

# The layout of points in a block of the store.
_PACKED = np.dtype([("step", "<i8"), ("time_us", "<i8"), ("value", "<f8")])
_Array = NDArray[Any]


@dataclass(frozen=True)
class Curve:
    """Points in columns: attempt [N], step [N], time_us [N] int64, value [N] float64."""

    attempt: _Array
    step: _Array
    time_us: _Array
    value: _Array

    def __len__(self) -> int:
        return len(self.step)

    def take(self, places: _Array) -> Curve:
        """The points at these indices, or where this mask is true."""
        return Curve(self.attempt[places], self.step[places], self.time_us[places], self.value[places])

    def points(self) -> tuple[MetricPoint, ...]:
        """The points of the curve as records."""
        columns = (self.attempt, self.step, self.time_us, self.value)
        return tuple(map(MetricPoint, *(column.tolist() for column in columns)))


def unpack(blocks: Iterable[tuple[int, bytes]]) -> Curve:
    """The points of (attempt, packed points) pairs, in their order."""
    pairs = [(attempt, np.frombuffer(data, _PACKED)) for attempt, data in blocks]
    packed = np.concatenate([points for _, points in pairs]) if pairs else np.empty(0, _PACKED)
    counts = [len(points) for _, points in pairs]
    attempts = np.repeat(np.array([attempt for attempt, _ in pairs], np.int64), counts)
    return Curve(attempts, packed["step"], packed["time_us"], packed["value"])


def in_steps(curve: Curve, first: int, last: int) -> Curve:
    """The points of the steps `first` to `last`; `last` 0: to the end."""
    mask = curve.step >= first
    return curve.take(mask & (curve.step <= last) if last else mask)


def by_step(curve: Curve) -> Curve:
    """All points, by step and then by attempt; equal ones stay in their order."""
    return curve.take(np.lexsort((curve.attempt, curve.step)))


def one_curve(curve: Curve) -> Curve:
    """One point a step: the highest attempt's, and its last."""
    if len(curve) < 2:
        return curve
    if (np.diff(curve.step) <= 0).any():
        curve = by_step(curve)
    return curve.take(np.append(np.diff(curve.step) != 0, True))


def downsample(curve: Curve, max_points: int) -> Curve:
    """At most `max_points` (at least 3) points: minimum, maximum and last of every bucket, in their order."""
    total = len(curve)
    if total <= max_points:
        return curve
    buckets = max_points // 3
    starts = np.arange(buckets, dtype=np.int64) * total // buckets
    ends = np.append(starts[1:], total)
    low = _first_lowest(curve.value, starts, ends)
    high = _first_highest(curve.value, starts, ends)
    return curve.take(np.unique(np.concatenate([low, high, ends - 1])))


def _first_lowest(value: _Array, starts: _Array, ends: _Array) -> _Array:
    """The index of the lowest value of each bucket; NaN counts as lower, so that it is shown."""
    odd = np.isnan(value)
    lowest = np.minimum.reduceat(np.where(odd, np.inf, value), starts)
    is_lowest = value == np.repeat(lowest, ends - starts)
    has_odd = np.logical_or.reduceat(odd, starts)
    return _first_of(np.where(np.repeat(has_odd, ends - starts), odd, is_lowest), starts)


def _first_highest(value: _Array, starts: _Array, ends: _Array) -> _Array:
    """The index of the highest value of each bucket; of the first one if all are NaN."""
    odd = np.isnan(value)
    highest = np.maximum.reduceat(np.where(odd, -np.inf, value), starts)
    is_highest = value == np.repeat(highest, ends - starts)
    is_highest[starts] |= np.logical_and.reduceat(odd, starts)
    return _first_of(is_highest, starts)


def _first_of(mask: _Array, starts: _Array) -> _Array:
    """The first index of each bucket at which the mask is true; every bucket has one."""
    places = np.flatnonzero(mask)
    return places[np.searchsorted(places, starts)]
