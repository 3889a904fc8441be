"""Which models to train for a task: RecommendRequest → RecommendResult. Nothing is fetched, and no weights are read."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator

from google.protobuf import json_format

from shardyard.v1 import choosing_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.choosing.candidates import HUB, Candidate, own, published
from shardyard_trainer.choosing.catalogue import Catalogue, load_catalogue
from shardyard_trainer.choosing.estimates import LENGTHS, Estimate, Wanted, estimate, path_of
from shardyard_trainer.choosing.filters import MEMORY, UNSUITED, Conditions, LeftOut
from shardyard_trainer.choosing.ranking import Ranked, rank
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Output

DEFAULT_RESULTS = 5
PLACE_OF_DATA = "DATA"
"""What stands in a command for the data."""

_log = logging.getLogger(__name__)


def recommend(request: bytes) -> bytes:
    """Ranks the models for a task: RecommendRequest → RecommendResult."""
    call = worker_pb2.RecommendRequest.FromString(request)
    if table.named(call.request.task).output is Output.METRICS:
        message = (
            f"`{call.request.task}` measures a model that is already trained; ask for the task that it was trained for"
        )
        found = worker_pb2.Violation(field="task", reason="SPEC_INVALID", message=message)
        return worker_pb2.RecommendResult(violations=[found]).SerializeToString()
    return worker_pb2.RecommendResult(response=answer(call, load_catalogue())).SerializeToString()


def answer(call: worker_pb2.RecommendRequest, catalogue: Catalogue) -> choosing_pb2.RecommendModelsResponse:
    """The recommendations of a catalogue and of the project's own models."""
    asked, node = call.request, call.node_shape
    wanted = Wanted(asked.task, asked.rows, asked.tokens_per_row, node, call.locations)
    price = call.slot_hour_price if call.HasField("slot_hour_price") else None
    available = node.gpu_memory_bytes if node.gpus and wanted.trains else node.memory_bytes - node.reserved_bytes
    conditions = Conditions(asked, catalogue, price, available)
    left_out, found, number = LeftOut(), [], 0
    for candidate in _candidates(call, catalogue):
        number += 1
        missed, needed = _look(candidate, wanted, conditions)
        if needed is None:
            left_out.counts[missed] += 1
        else:
            found.append((candidate, needed))
    ranked = rank(found, catalogue, wanted, conditions.languages)
    best = ranked[: asked.max_results or DEFAULT_RESULTS]
    return choosing_pb2.RecommendModelsResponse(
        recommendations=[_to_proto(each, wanted, price, call.currency) for each in best],
        left_out=left_out.to_proto(conditions),
        num_candidates=number,
        assumptions=_assumptions(found, wanted, available),
        notes=list(_notes(call, ranked, best, wanted)),
    )


def _candidates(call: worker_pb2.RecommendRequest, catalogue: Catalogue) -> Iterator[Candidate]:
    yield from published(catalogue, call.request.task)
    yield from own(list(call.models))


def _look(candidate: Candidate, wanted: Wanted, conditions: Conditions) -> tuple[str, Estimate | None]:
    """What a candidate needs; None if it misses a condition, which is named."""
    if missed := conditions.missed_at_once(candidate):
        return missed, None
    try:
        found = estimate(candidate, wanted)
    except SpecError as error:
        _log.info("%s cannot be planned for %s: %s", candidate.name, wanted.task, error)
        return MEMORY if error.reason == "MODEL_DOES_NOT_FIT" else UNSUITED, None
    if missed := conditions.missed_by(found):
        return missed, None
    return "", found


def _to_proto(each: Ranked, wanted: Wanted, price: float | None, currency: str) -> choosing_pb2.ModelRecommendation:
    candidate, needed = each.candidate, each.estimate
    made = choosing_pb2.ModelRecommendation(
        name=candidate.name,
        family=candidate.family,
        model_type=candidate.model_type,
        num_parameters=needed.num_parameters,
        licence=candidate.licence,
        licence_source=candidate.licence_source,
        unchecked=candidate.unchecked,
        gated=candidate.gated,
        languages=sorted(candidate.languages),
        context=candidate.context,
        memory=needed.memory.to_proto(0 if needed.resources.gpus_per_worker else wanted.node.reserved_bytes),
        scores=[
            choosing_pb2.PublishedScore(
                benchmark=score.benchmark, metric=score.metric, value=score.value, source=score.source
            )
            for score in candidate.scores
        ],
        pros=each.pros,
        cons=each.cons,
        points=[
            choosing_pb2.RankingPoints(criterion=name, points=round(points, 2))
            for name, points in sorted(each.points.items())
        ],
        spec=needed.spec,
        command=command_of(candidate, needed, wanted),
        note=candidate.note,
    )
    made.latency.FromMicroseconds(round(needed.reading_s * 1e6))
    if needed.time is not None:
        made.time.CopyFrom(needed.time)
        if price is not None:
            made.time.cost, made.time.currency = needed.time.slot_hours * price, currency
    return made


def command_of(candidate: Candidate, needed: Estimate, wanted: Wanted) -> str:
    """The command that submits the recommended spec; `DATA` is to be replaced."""
    words = ["shardyard", "submit", "--task", wanted.task.replace("_", "-")]
    sets: dict[str, object] = {}
    if candidate.is_new:
        architecture = candidate.source.architecture
        words += ["--architecture", architecture.model_type]
        overrides = json_format.MessageToDict(architecture.overrides)
        for name, value in sorted(overrides.items()):
            whole = isinstance(value, float) and value.is_integer()
            sets[f"spec.model.architecture.overrides.{name}"] = int(value) if whole else value
    else:
        words += ["--model", candidate.name]
    if wanted.trains:
        words += ["--train", PLACE_OF_DATA, "--epochs", f"{needed.spec.optimization.epochs:g}"]
    else:
        words += ["--data", PLACE_OF_DATA]
    sets |= _lengths(needed.spec, wanted) | dict(needed.settings)
    for path, value in sets.items():
        words += ["--set", f"{path}={value}"]
    return shlex.join(words)


def _lengths(spec: spec_pb2.JobSpec, wanted: Wanted) -> dict[str, object]:
    """The length of a row, if it was asked for."""
    message, place = table.message_of(spec), ".".join(("spec", *path_of(wanted.task)))
    known = message.DESCRIPTOR.fields_by_name
    return {f"{place}.{name}": getattr(message, name) for name in LENGTHS if wanted.tokens and name in known}


def _assumptions(
    found: list[tuple[Candidate, Estimate]], wanted: Wanted, available: int
) -> choosing_pb2.ChoosingAssumptions:
    estimates = [needed for _, needed in found]
    return choosing_pb2.ChoosingAssumptions(
        rows=wanted.rows,
        tokens_per_row=wanted.tokens or max((needed.length for needed in estimates), default=0),
        memory_bytes=available,
        epochs=max((needed.spec.optimization.epochs for needed in estimates), default=0.0),
        gpus_per_worker=estimates[0].resources.gpus_per_worker if estimates else 0,
        cpus_per_worker=estimates[0].resources.cpus_per_worker if estimates else 0,
    )


def _notes(
    call: worker_pb2.RecommendRequest, ranked: list[Ranked], best: list[Ranked], wanted: Wanted
) -> Iterator[str]:
    if call.is_offline and any(each.candidate.name.startswith(HUB) for each in best):
        yield (
            "the service does not reach the Hub (HF_HUB_OFFLINE): a `hub:` model must be in its cache already; else "
            "upload its folder, and name that with --model"
        )
    if not wanted.rows and wanted.trains:
        yield "rows were not given: no time is estimated, and models are compared by the time to read one input"
    if not call.node_shape.memory_bytes and not call.node_shape.gpu_memory_bytes:
        yield "the memory of the cluster's nodes is not known: nothing was left out for its memory"
    if len(ranked) > len(best):
        yield f"{len(ranked) - len(best):,} more models meet the request; raise max_results to see them"
