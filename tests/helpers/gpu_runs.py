"""Runs of the real trainer that went through the planner, on this machine's GPU or, to rehearse, on its CPUs.

Needs neither pytest nor Ray: `bench/gpu.py` uses it on machines that have little more than torch.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from helpers.small_specs import causal_spec, classification_spec, locations, sentences, write_corpus
from helpers.trainer_processes import TrainerGang
from helpers.trainer_reference import plain_losses
from shardyard.v1 import job_pb2, model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.planning.node import this_node
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config


@dataclass(frozen=True)
class Run:
    """A run that ended well: `losses` and `tokens_per_s` by step, the newest progress, and the final evaluation."""

    attempt: worker_pb2.AttemptSpec
    losses: list[float]
    tokens_per_s: list[float]
    progress: job_pb2.Progress
    evaluation: job_pb2.Evaluation


def planned_attempt(spec: spec_pb2.JobSpec, folder: Path, *, gpus: int) -> worker_pb2.AttemptSpec:
    """An attempt with the plan that the service would make for this machine. Raises: ValueError with all violations."""
    asked = spec_pb2.JobSpec()
    asked.CopyFrom(spec)
    asked.resources.gpus_per_worker = gpus
    node = this_node()
    places = locations(folder)
    request = worker_pb2.PlanRequest(spec=asked, locations=places, node_shape=node)
    result = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
    if result.violations:
        raise ValueError("\n".join(f"{found.field}: {found.message}" for found in result.violations))
    name = f"job-{len(list(folder.glob('job-*')))}"
    job_dir = folder / name
    job_dir.mkdir()
    return worker_pb2.AttemptSpec(
        job_name=f"projects/default/jobs/{name}",
        job_uid=f"{len(name):032x}",
        epoch=1,
        spec=asked,
        plan=result.plan,
        locations=places,
        job_dir=str(job_dir),
        attempt_dir=str(job_dir / "e000001"),
        export_dir=str(job_dir / "model"),
        world_size=result.plan.batch.workers,
        threads_per_rank=1,
        node_shape=node,
    )


def trained(attempt: worker_pb2.AttemptSpec, *, timeout_s: float = 280) -> Run:
    """Trains in processes of its own. Raises: RuntimeError with what a rank reported."""
    gang = TrainerGang(attempt)
    if any(gang.wait(timeout_s=timeout_s)):
        raise RuntimeError(f"{attempt.job_name} failed: {[event.failure for event in gang.failures()]}")
    series: dict[str, list[tuple[int, float]]] = {}
    for event in gang.events:
        for each in event.metrics.series:
            series.setdefault(each.metric, []).extend((point.step, point.value) for point in each.points)
    evaluations = [event.evaluation for event in gang.events if event.evaluation.is_final]
    return Run(
        attempt=attempt,
        losses=[value for _, value in sorted(series["loss"])],
        tokens_per_s=[value for _, value in sorted(series["tokens_per_s"])],
        progress=[event.progress for event in gang.events if event.HasField("progress")][-1],
        evaluation=evaluations[-1] if evaluations else job_pb2.Evaluation(),
    )


def language_model(folder: Path, steps: int) -> spec_pb2.JobSpec:
    """A tiny GPT-2 on packed sequences, without dropout."""
    spec = causal_spec(write_corpus(folder))
    spec.optimization.max_steps = steps
    return spec


def classifier(folder: Path, steps: int) -> spec_pb2.JobSpec:
    """A tiny BERT that learns whether a text has the word `dog`."""
    texts = sentences(240)
    for name, part in (("train", texts[:200]), ("eval", texts[200:])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [(text, "dog" if "dog" in text.split() else "other") for text in part]
            csv.writer(file).writerows([("text", "label"), *rows])
    spec = classification_spec(folder / "train.csv")
    spec.eval_data.uri = str(folder / "eval.csv")
    spec.model.dropout = 0
    spec.optimization.max_steps = steps
    return spec


SPECS: dict[str, Callable[[Path, int], spec_pb2.JobSpec]] = {"gpt2": language_model, "bert": classifier}


def run_of(spec: spec_pb2.JobSpec, folder: Path, *, stage: int, precision: spec_pb2.Precision, gpus: int) -> Run:
    """The spec at one ZeRO stage in one precision."""
    changed = spec_pb2.JobSpec()
    changed.CopyFrom(spec)
    changed.parallelism.zero_stage = stage
    changed.optimization.precision = precision
    return trained(planned_attempt(changed, folder, gpus=gpus))


def plain_run(attempt: worker_pb2.AttemptSpec) -> list[float]:
    """The losses of the same training in plain PyTorch: fp32, on a CPU, in one process."""
    spec = attempt.plan.resolved_spec
    task = prepare(spec, attempt.locations)
    config = train_config(attempt, num_train_samples=task.train.num_samples)
    return plain_losses(task, build_module(task, spec), config)[0]


def farthest(losses: list[float], reference: list[float]) -> float:
    """The largest relative distance of two curves."""
    return max(abs(mine - other) / abs(other) for mine, other in zip(losses, reference, strict=True))


def predicted_accuracy(run: Run, rows: Path) -> float:
    """The accuracy of the exported model's answers over a CSV file of `text` and `label`."""
    with rows.open(newline="") as file:
        labelled = list(csv.DictReader(file))
    request = model_service_pb2.PredictRequest(
        model="projects/default/models/m", instances=[model_service_pb2.Instance(text=row["text"]) for row in labelled]
    )
    call = worker_pb2.PredictCall(folder=run.attempt.export_dir, request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    if reply.violations:
        raise RuntimeError(json_format.MessageToJson(reply))
    answers = [prediction.classification.label for prediction in reply.response.predictions]
    return sum(answer == row["label"] for answer, row in zip(answers, labelled, strict=True)) / len(labelled)
