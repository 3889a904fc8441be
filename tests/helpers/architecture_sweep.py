"""One architecture through everything: plan, two steps, export, inspection, prediction, fine-tuning, features.

`python -m helpers.architecture_sweep [TYPE ...]` prints a line for each, with the first thing that went wrong.
"""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from helpers import small_specs, tiny_architectures
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.explain import explain
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import Prepared, build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.training.export import export_model

_SHORT, _LONG = "the quick fox", "the quick brown fox jumps over a lazy dog while seven small grey birds sing"


class Fault(Exception):
    """What went wrong, and at which stage."""


@dataclass
class Sweep:
    """What came of one architecture: `refused` by name (task: message), else `faults`; `trained` is what worked.

    `explained` is why its answers have no explanation, empty if they have one.
    """

    model_type: str
    folder: Path
    refused: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    explained: str = ""

    def run(self) -> Sweep:
        """Goes through all tasks."""
        small_specs.write_corpus(self.folder, 120)
        small_specs.write_labelled(self.folder / "labelled.csv")
        model = {
            "architecture": {
                "modelType": self.model_type,
                "overrides": tiny_architectures.overrides_of(self.model_type),
            }
        }
        train = {"tokenizer": {"train": {"vocabSize": 120, "algorithm": "ALGORITHM_WORDPIECE"}}}
        corpus = self.folder / "corpus.txt"
        trained = None
        for name, make in (("causal_lm", small_specs.causal_spec), ("masked_lm", small_specs.masked_spec)):
            spec = make(corpus, model=model, **train)
            found = self._trained(name, spec)
            trained = found or trained
        if trained is None:
            self._trained(
                "classification", small_specs.classification_spec(self.folder / "labelled.csv", model, **train)
            )
        else:
            for pooling in ("UNSPECIFIED", "MEAN", "CLS"):
                self._trained(
                    f"fine-tuning {pooling}",
                    small_specs.classification_spec(
                        self.folder / "labelled.csv", {"uri": str(trained)}, classify={"pooling": f"POOLING_{pooling}"}
                    ),
                )
        return self

    def _trained(self, name: str, spec: spec_pb2.JobSpec) -> Path | None:
        stage = "plan"
        try:
            spec.optimization.global_batch_size = 4
            locations = small_specs.locations(self.folder)
            request = worker_pb2.PlanRequest(
                spec=spec, locations=locations, node_shape=worker_pb2.NodeShape(memory_bytes=2**33, cpus=4)
            )
            planned = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
            if planned.violations:
                self.refused[name] = "; ".join(f"{v.reason} {v.field}: {v.message}" for v in planned.violations)
                return None
            self.warned += [f"{name}:{w.reason}" for w in planned.plan.warnings]
            stage = "build"
            torch.manual_seed(1)
            task = prepare(spec, locations)
            module = build_module(task, spec)
            stage = "steps"
            two_steps(task, module)
            stage = "leak"
            check_no_leak(task, module)
            stage = "export"
            folder = self.folder / name.replace(" ", "-")
            attempt = worker_pb2.AttemptSpec(
                spec=planned.plan.resolved_spec,
                locations=locations,
                job_name="j",
                job_uid="0" * 32,
                epoch=1,
                world_size=1,
            )
            export_model(module, module.state_dict(), task, attempt, {}, folder=folder)
            stage = "inspect"
            result = worker_pb2.InspectModelResult.FromString(
                inspect_model(worker_pb2.InspectModelRequest(folder=str(folder)).SerializeToString())
            )
            if result.violations:
                raise Fault(f"{[v.message for v in result.violations]}")
            stage = "predict"
            check_answers(folder, result.model.task, task)
            if task.task.name == "text_classification":
                stage = "explain"
                self.explained = self.explained or check_explanation(folder)
            stage = "embed"
            check_embeddings(folder)
        except Exception as error:  # edge: a sweep continues
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.faults[name] = (
                f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]} "
                f"({Path(where.filename).name}:{where.lineno})"
            )
            return None
        self.trained.append(name)
        return folder


def two_steps(task: Prepared, module: HuggingFaceModule) -> None:
    """Two steps of AdamW; the loss must be a number and every weight that is trained have a gradient."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    module.train()
    for step in range(2):
        batch = task.train.micro_batch([SampleRef(0, 4 * step + i) for i in range(4)])
        loss = module(**batch.inputs).loss_sum / batch.num_units
        if not loss.isfinite():
            raise Fault(f"the loss is {loss.item()}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    without = [name for name, p in module.named_parameters() if p.grad is None]
    if without and len(without) > 0.5 * len(list(module.parameters())):
        raise Fault(f"{len(without)} weights without a gradient, {without[0]}")


@torch.no_grad()
def check_no_leak(task: Prepared, module: HuggingFaceModule) -> None:
    """Packed documents that are said to be kept apart are; causal ones do not see ahead."""
    module.eval()
    if task.task.name == "text_classification":
        batch = task.train.micro_batch([SampleRef(0, i) for i in range(6)])
        together = module(**batch.inputs, return_outputs=True).outputs["logits"]
        for i in range(6):
            alone = task.train.micro_batch([SampleRef(0, i)])
            logits = module(**alone.inputs, return_outputs=True).outputs["logits"]
            off = (logits[0] - together[i]).abs().max().item()
            if not off < 1e-4:
                raise Fault(f"padding changes logits by {off:.3g}")
        return
    batch = task.train.micro_batch([SampleRef(0, i) for i in range(4)])
    inputs = {k: v for k, v in batch.inputs.items() if k not in ("labels", "masked_places", "targets")}
    if task.task.name == "causal_lm":
        inputs["use_cache"] = False
        ids = inputs["input_ids"].clone()
        before = module.model(**inputs).logits
        ids[:, 20:] = (ids[:, 20:] + 7) % 60
        after = module.model(**{**inputs, "input_ids": ids}).logits
        off = (before[:, :20] - after[:, :20]).abs().max().item()
        if not off < 1e-4:
            raise Fault(f"sees ahead: {off:.3g}")
    if any(w.reason == "DOCUMENTS_NOT_SEPARATED" for w in task.warnings):
        return
    positions = inputs.get("position_ids")
    if positions is None:
        raise Fault("no position ids")
    first = positions.min()
    row = int((positions == first).sum(1).argmax())
    second = int((positions[row] == first).nonzero()[1])
    ids = inputs["input_ids"].clone()
    ids[row, :second] = (ids[row, :second] + 7) % 60
    a = module.model(**inputs).logits[row, second:]
    b = module.model(**{**inputs, "input_ids": ids}).logits[row, second:]
    off = (a - b).abs().max().item()
    if not off < 1e-4:
        raise Fault(f"documents leak: {off:.3g}")


def check_answers(folder: Path, kind: str, task: Prepared) -> None:
    """Predictions are made, and are the same alone and together with others."""
    mask = f" {task.inputs.tokenizer.mask_token}" if kind == "masked_lm" else ""
    texts = [_SHORT + mask, _LONG + mask, "a dog" + mask]
    alone = [_predict(folder, [text], kind)[0] for text in texts]
    together = _predict(folder, texts, kind)
    for a, b in zip(alone, together, strict=True):
        if kind == "text_classification":
            off = max(abs(x - y) for x, y in zip(a.logits, b.logits, strict=True))
        elif kind == "masked_lm":
            off = max(
                abs(x.score - y.score)
                for x, y in zip(a.masked_tokens.masks[0].candidates, b.masked_tokens.masks[0].candidates, strict=True)
            )
        else:
            off = float(a.generated_text != b.generated_text)
        if not off < 1e-4:
            raise Fault(f"answers depend on their neighbours: {off:.3g}")


def _predict(folder: Path, texts: list[str], kind: str) -> Any:
    request = pb.PredictRequest(model="m", instances=[pb.Instance(text=t) for t in texts])
    if kind == "causal_lm":
        request.generation.max_new_tokens = 6
    reply = worker_pb2.PredictReply.FromString(
        predict(worker_pb2.PredictCall(folder=str(folder), request=request).SerializeToString())
    )
    if reply.violations:
        raise Fault(f"{[v.message for v in reply.violations]}")
    return reply.response.predictions


def check_explanation(folder: Path) -> str:
    """The shares of words add up as the answer says; why there are none if the model is refused."""
    request = pb.ExplainPredictionRequest(model="m", instance=pb.Instance(text=_SHORT))
    call = worker_pb2.ExplainCall(folder=str(folder), request=request)
    reply = worker_pb2.ExplainReply.FromString(explain(call.SerializeToString()))
    if reply.violations:
        return "; ".join(violation.message for violation in reply.violations)
    found = reply.response
    difference = found.output - found.baseline_output
    missed = abs(sum(each.score for each in found.attributions) + found.rest - difference)
    if abs(missed - found.completeness_error * abs(difference)) > 1e-6:
        raise Fault(f"the shares miss the difference by {missed:.3g}, and it says {found.completeness_error:.3g} of it")
    if abs(found.output - max(found.prediction.logits)) > 1e-4:
        raise Fault(f"explains {found.output:.5f}, but the model answers {max(found.prediction.logits):.5f}")
    return ""


def check_embeddings(folder: Path) -> None:
    """Vectors are the same alone and together with others."""

    def ask(texts: list[str]) -> Any:
        request = pb.EmbedRequest(model="m", instances=[pb.Instance(text=t) for t in texts])
        reply = worker_pb2.EmbedReply.FromString(
            embed(worker_pb2.EmbedCall(folder=str(folder), request=request).SerializeToString())
        )
        if reply.violations:
            raise Fault(f"{[v.message for v in reply.violations]}")
        return torch.stack([torch.tensor(e.values) for e in reply.response.embeddings])

    texts = [_SHORT, _LONG, "a dog"]
    together = ask(texts)
    off = (together - torch.cat([ask([t]) for t in texts])).abs().max().item() / max(1.0, together.abs().max().item())
    if not off < 1e-4:
        raise Fault(f"vectors depend on their neighbours: {off:.3g}")


def sweep(model_type: str) -> Sweep:
    """One architecture in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Sweep(model_type, Path(folder)).run()


def main(names: list[str]) -> Iterator[str]:
    torch.set_num_threads(1)
    for name in names or tiny_architectures.text_architectures():
        began = time.monotonic()
        try:
            found = sweep(name)
        except Exception as error:  # edge: a sweep continues
            yield f"{name}: CRASH {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        yield f"{name} {time.monotonic() - began:.1f}s" + ("" if found.faults else " ok")
        for task, message in found.refused.items():
            yield f"    refused {task}: {message[:250]}"
        for task, message in found.faults.items():
            yield f"    FAULT {task}: {message}"
        if found.warned:
            yield f"    warned {' '.join(found.warned)}"


if __name__ == "__main__":
    for line in main(sys.argv[1:]):
        print(line, flush=True)
