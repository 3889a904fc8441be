"""The conditions of a request, in the order of the checks; a candidate counts for the first that it misses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from google.protobuf.duration_pb2 import Duration

from shardyard.v1 import choosing_pb2
from shardyard_trainer.choosing.candidates import Candidate
from shardyard_trainer.choosing.catalogue import Catalogue
from shardyard_trainer.choosing.estimates import Estimate
from shardyard_trainer.data.errors import shorten

WEIGHTS, LANGUAGE, LICENCE, CONTEXT, UNSUITED = "WEIGHTS", "LANGUAGE", "LICENCE", "CONTEXT", "UNSUITED"
MEMORY, LATENCY, TIME, COST = "MEMORY", "LATENCY", "TIME", "COST"


@dataclass(frozen=True)
class Conditions:
    """What a model must meet; `price` is that of a slot-hour, None if the service has none."""

    request: choosing_pb2.RecommendModelsRequest
    catalogue: Catalogue
    price: float | None
    available: int = 0

    @property
    def languages(self) -> frozenset[str]:
        """The languages that it must know."""
        return frozenset(self.request.languages)

    def missed_at_once(self, candidate: Candidate) -> str:
        """The first condition that it misses by what is on record; empty: none."""
        request = self.request
        if candidate.weights == "pickle":
            return WEIGHTS
        if candidate.own is None and not candidate.is_new:
            if not self.languages <= candidate.languages and not candidate.image_size:
                return LANGUAGE
            if candidate.image_size and self.languages:
                return LANGUAGE
            if self._misses_licence(candidate):
                return LICENCE
        if 0 < candidate.context < request.tokens_per_row:
            return CONTEXT
        return ""

    def _misses_licence(self, candidate: Candidate) -> bool:
        """Whether its licence is asked about, and is another one, does not allow it, or was not checked."""
        request = self.request
        if not request.licences and not request.commercial_use:
            return False
        if "licence" in candidate.unchecked or (request.licences and candidate.licence not in request.licences):
            return True
        return request.commercial_use and not self.catalogue.commercial_use.get(candidate.licence, False)

    def missed_by(self, estimate: Estimate) -> str:
        """The first condition that it misses by what it needs; empty: none."""
        request, time = self.request, estimate.time
        if not estimate.fits:
            return MEMORY
        if request.HasField("max_latency") and estimate.reading_s > seconds_of(request.max_latency):
            return LATENCY
        if time is None:
            return ""
        if request.HasField("max_time") and seconds_of(time.expected) > seconds_of(request.max_time):
            return TIME
        over = request.max_cost and self.price is not None and time.slot_hours * self.price > request.max_cost
        return COST if over else ""

    def words(self, reason: str, count: int) -> str:
        """What is said of the candidates that miss a condition."""
        request, one = self.request, count == 1
        be, have, do, need = ("is", "has", "does", "needs") if one else ("are", "have", "do", "need")
        words = {
            WEIGHTS: f"{have} only pickles on the Hub's main branch: convert the weights to safetensors, and upload "
            "the folder (docs/choosing.md)",
            LANGUAGE: f"{do} not know {shorten(', '.join(sorted(self.languages)))}",
            LICENCE: f"{have} another licence, or one that is not known to allow it, or is unchecked",
            CONTEXT: f"{'reads' if one else 'read'} fewer than {request.tokens_per_row:,} tokens",
            UNSUITED: f"{be} not taken by this task, or cannot be read",
            MEMORY: f"{need} more than {self.available:,} bytes of memory, with LoRA too",
            LATENCY: f"{need} more than {seconds_of(request.max_latency):g} s to read an input",
            TIME: f"{need} more than {seconds_of(request.max_time):g} s to train",
            COST: f"{need} more than {request.max_cost:g} to train",
        }
        return f"{count:,} {words[reason]}"


@dataclass
class LeftOut:
    """Counts of candidates by the condition that they miss."""

    counts: Counter[str] = field(default_factory=Counter)

    def to_proto(self, conditions: Conditions) -> list[choosing_pb2.LeftOut]:
        """In the order of the conditions."""
        order = (WEIGHTS, LANGUAGE, LICENCE, CONTEXT, UNSUITED, MEMORY, LATENCY, TIME, COST)
        return [
            choosing_pb2.LeftOut(
                reason=reason, count=self.counts[reason], message=conditions.words(reason, self.counts[reason])
            )
            for reason in order
            if self.counts[reason]
        ]


def seconds_of(duration: Duration) -> float:
    """A duration in seconds."""
    return float(duration.seconds + duration.nanos / 1e9)
