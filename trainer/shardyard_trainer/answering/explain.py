"""ExplainPrediction in a warm process: what an answer of a model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.asking import (
    Asking,
    Refused,
    check_instances,
    in_turns,
    model_of,
    predictions,
    predictor_of,
    refuse_large,
    reply,
)
from shardyard_trainer.answering.serving import Steps, Work, finish
from shardyard_trainer.explaining.integral import DEFAULT_STEPS, Unexplainable, integrate
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Explainer, Parts, violation
from shardyard_trainer.tasks.opening import Opened

EXPLAIN = "shardyard_trainer.answering.explain:explain"


def explain(request: bytes) -> bytes:
    """ExplainCall → ExplainReply, computed alone."""
    return finish(explain_steps(request))


def explain_steps(request: bytes) -> Steps:
    """`explain` in steps, between which other requests may have a turn."""
    return (yield from reply(_explain(worker_pb2.ExplainCall.FromString(request)), worker_pb2.ExplainReply))


def _explain(call: worker_pb2.ExplainCall) -> Asking[model_service_pb2.Explanation]:
    request = call.request
    asked = model_service_pb2.PredictRequest(model=request.model, instances=[request.instance])
    violations = check_instances(asked.instances)
    opened = model_of(call)
    predictor = _explainer(opened, violations)
    violations += predictor.refuse(asked)
    if violations := _of_the_instance(violations) + predictor.refuse_target(request):
        raise Refused(violations)
    encoded = yield from in_turns(asked.instances, predictor.read)
    violations = _of_the_instance(predictor.complain(encoded)) + predictor.complain_target(request, encoded[0])
    if violations:
        raise Refused(violations)
    refuse_large(predictor.most_bytes(asked, encoded), call.max_response_bytes)
    (prediction,) = yield from predictions(opened, predictor, asked, encoded)
    compute = partial(_computed, predictor, request, prediction)
    # A key of its own: no two explanations are computed together.
    results: list[model_service_pb2.Explanation | Unexplainable] = yield Work(object(), compute, encoded, [0])
    found = results[0]
    if isinstance(found, Unexplainable):
        raise Refused([violation("model", "TASK_MISMATCH", f"{found}; use another model")])
    refuse_large([found.ByteSize()], call.max_response_bytes)
    return found


def _explainer(opened: Opened, violations: Sequence[worker_pb2.Violation]) -> Explainer:
    """The predictor of a model, if it can explain. Raises Refused."""
    predictor = predictor_of(opened, violations)
    if isinstance(predictor, Explainer):
        return predictor
    known = ", ".join(f"{name} ({what})" for name, what in table.explainable().items())
    text = f"the model is one for {opened.task}, whose answers cannot be explained; those of these tasks can: {known}"
    raise Refused([*_of_the_instance(violations), violation("model", "TASK_MISMATCH", text)])


def _computed(
    predictor: Explainer,
    request: model_service_pb2.ExplainPredictionRequest,
    prediction: model_service_pb2.Prediction,
    encoded: Sequence[Any],
    _places: Sequence[int],
) -> Parts:
    """The explanation of the one instance, or an Unexplainable."""
    try:
        what = predictor.explain(request, encoded[0], prediction)
        yield
        found = yield from integrate(what.line, request.max_steps or DEFAULT_STEPS)
    except Unexplainable as problem:
        return [problem]
    explanation = model_service_pb2.Explanation(
        prediction=prediction,
        output=found.output,
        baseline_output=found.baseline_output,
        baseline=what.baseline,
        completeness_error=found.error,
        is_complete=found.is_complete,
        steps=found.steps,
    )
    what.fill(found.shares, explanation)
    return [explanation]


def _of_the_instance(violations: Sequence[worker_pb2.Violation]) -> list[worker_pb2.Violation]:
    """Violations of the only instance of a Predict request, as those of this one."""
    found = []
    for each in violations:
        moved = worker_pb2.Violation()
        moved.CopyFrom(each)
        moved.field = each.field.replace("instances[0]", "instance", 1)
        found.append(moved)
    return found
