"""Recommended models: users have them from `shardyard.types`, which says how to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from shardyard.plan_types import MemoryPlan, TimePlan

__all__ = [
    "ChoosingAssumptions",
    "LeftOut",
    "ModelRecommendation",
    "PublishedScore",
    "RankingPoints",
    "RecommendedModels",
]


@dataclass(frozen=True)
class PublishedScore:
    """A published result of a model; comparable with others of the same benchmark only."""

    benchmark: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class RankingPoints:
    """Points of the ranking, and what they are for: own, quality, data, cost, settings or terms."""

    criterion: str
    points: float


@dataclass(frozen=True)
class ModelRecommendation:
    """A model for a task: what it needs, what speaks for and against it, and the job's spec without its data.

    `licence_source` is where its licence was read; `unchecked` names facts that no source was found for.
    """

    name: str
    family: str
    model_type: str
    num_parameters: int
    licence: str
    gated: bool
    languages: tuple[str, ...]
    context: int
    memory: MemoryPlan | None
    time: TimePlan | None
    latency: timedelta | None
    scores: tuple[PublishedScore, ...]
    pros: tuple[str, ...]
    cons: tuple[str, ...]
    points: tuple[RankingPoints, ...]
    spec: Mapping[str, Any] | None
    command: str
    note: str
    licence_source: str
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """How many candidates miss a condition, and in which words."""

    reason: str
    count: int
    message: str


@dataclass(frozen=True)
class ChoosingAssumptions:
    """The data and the worker that estimates are for; 0: not known."""

    rows: int
    tokens_per_row: int
    memory_bytes: int
    epochs: float
    gpus_per_worker: int
    cpus_per_worker: int


@dataclass(frozen=True)
class RecommendedModels:
    """Models for a task, the best first, and why others are not among them."""

    recommendations: tuple[ModelRecommendation, ...]
    left_out: tuple[LeftOut, ...]
    num_candidates: int
    assumptions: ChoosingAssumptions | None
    notes: tuple[str, ...]
