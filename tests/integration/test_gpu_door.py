"""A job for GPUs through the public calls: what the nodes report reaches the planner and the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers.scripted_launcher import ScriptedLauncher
from helpers.service import ANSWERS, PARENT, Service, create, refused, serving
from helpers.small_specs import causal_spec, write_corpus
from shardyard.v1 import job_pb2, job_service_pb2, plan_pb2, spec_pb2
from shardyard_coordinator.control.attempt_spec import launch_shape
from shardyard_coordinator.launch.protocols import ClusterView, Node
from shardyard_trainer.planning.plan import plan

GIB = 2**30


def gpu_node(name: str = "g", **facts: Any) -> Node:
    told = {"accelerator": "H200", "gpu_name": "NVIDIA H200", "gpu_memory_bytes": 139 * GIB, "compute_capability": 9.0}
    return Node(name, "10.0.0.1", **({"cpus": 16, "gpus": 4, "memory_bytes": 128 * GIB} | told | facts))


H200 = gpu_node()
V100 = gpu_node("v", accelerator="V100", gpu_name="Tesla V100", gpu_memory_bytes=16 * GIB, compute_capability=7.0)
UNTOLD = gpu_node("u", accelerator="", gpu_name="", gpu_memory_bytes=0, compute_capability=0.0)
CPU = Node("c", "10.0.0.2", 8, 0, 32 * GIB)


def job_of(folder: Path, **resources: int) -> job_pb2.Job:
    """Pretraining that says nothing of precision."""
    spec = causal_spec(write_corpus(folder))
    for name, value in resources.items():
        setattr(spec.resources, name, value)
    return job_pb2.Job(spec=spec)


class planning:
    """A service with these nodes, whose plans are made by the real planner."""

    def __init__(self, folder: Path, *nodes: Node) -> None:
        answers: Mapping[str, Any] = {**ANSWERS, "shardyard_trainer.planning.plan:plan": plan}
        self._serving = serving(
            folder, answers=answers, data_roots=(str(folder),), launcher=ScriptedLauncher(nodes=nodes)
        )

    async def __aenter__(self) -> Service:
        return await self._serving.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        await self._serving.__aexit__(*error)


async def planned(service: Service, job: job_pb2.Job) -> plan_pb2.JobPlan:
    answer: plan_pb2.JobPlan = await service.jobs.PlanJob(job_service_pb2.PlanJobRequest(parent=PARENT, job=job))
    return answer


async def test_a_job_without_a_precision_is_accepted_on_gpus_and_computes_bf16(tmp_path: Path) -> None:
    async with planning(tmp_path, H200, CPU) as service:
        job = job_of(tmp_path)
        found = await planned(service, job)
        created = await service.jobs.CreateJob(create("gpus", job))
    assert found.resolved_spec.optimization.precision == spec_pb2.PRECISION_BF16
    assert found.resolved_spec.resources.gpus_per_worker == 1
    assert found.memory.available_bytes == 139 * GIB
    assert found.memory.verdict == plan_pb2.MEMORY_VERDICT_FITS
    assert created.resolved_spec == found.resolved_spec


@pytest.mark.parametrize("node", [V100, UNTOLD], ids=["older", "untold"])
async def test_gpus_that_are_not_known_to_compute_bf16_are_trained_on_in_fp32_with_a_warning(
    tmp_path: Path, node: Node
) -> None:
    async with planning(tmp_path, node) as service:
        found = await planned(service, job_of(tmp_path))
    assert found.resolved_spec.optimization.precision == spec_pb2.PRECISION_FP32
    assert found.memory.available_bytes == node.gpu_memory_bytes
    (warning,) = [each for each in found.warnings if each.reason == "PRECISION_FP32"]
    assert (node.gpu_name or "not known") in warning.message


async def test_bf16_is_refused_if_the_gpus_are_known_not_to_compute_it(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    job.spec.optimization.precision = spec_pb2.PRECISION_BF16
    async with planning(tmp_path, V100) as service:
        failure = await refused(planned(service, job))
    assert failure.reasons == {"job.spec.optimization.precision": "PRECISION_UNSUPPORTED"}
    assert "Tesla V100" in failure.violations["job.spec.optimization.precision"]


async def test_a_model_larger_than_one_gpu_is_refused_by_the_gpus_memory(tmp_path: Path) -> None:
    small = gpu_node(gpu_memory_bytes=4 * GIB)
    job = job_of(tmp_path)
    job.spec.model.architecture.overrides.update({"n_layer": 24, "n_embd": 2048, "n_head": 16})
    async with planning(tmp_path, small) as service:
        plan = await planned(service, job)
        request = job_service_pb2.CreateJobRequest(parent="projects/default", job=job)
        failure = await refused(service.jobs.CreateJob(request))
    assert plan.memory.verdict == plan_pb2.MEMORY_VERDICT_NO_FIT
    assert failure.reasons == {"job.spec.model": "MODEL_DOES_NOT_FIT"}
    assert f"{4 * GIB:,}" in failure.violations["job.spec.model"]


async def test_a_job_that_asks_for_no_gpu_is_planned_for_the_nodes_without(tmp_path: Path) -> None:
    async with planning(tmp_path, H200, CPU) as service:
        found = await planned(service, job_of(tmp_path, gpus_per_worker=0))
    assert found.resolved_spec.optimization.precision == spec_pb2.PRECISION_FP32
    assert found.memory.available_bytes == CPU.memory_bytes


@pytest.mark.parametrize(
    ("nodes", "memory_bytes", "bf16"),
    [
        ((H200, gpu_node("h", gpu_memory_bytes=80 * GIB)), 80 * GIB, True),
        # Four of one kind against eight of another: the job runs on the eight.
        ((H200, gpu_node("v8", gpus=8, accelerator="V100", gpu_memory_bytes=16 * GIB, compute_capability=7.0)),
         16 * GIB, False),
        # Of one name to the scheduler: any of them may be the job's.
        ((gpu_node(accelerator=""), gpu_node("v", accelerator="", gpu_memory_bytes=16 * GIB, compute_capability=7.0)),
         16 * GIB, False),
        ((H200, gpu_node("w", compute_capability=0.0)), 139 * GIB, False),
    ],
    ids=["smaller", "more of another kind", "unnamed", "one does not tell"],
)  # fmt: skip
async def test_a_plan_holds_on_every_node_that_the_job_may_get(
    tmp_path: Path, nodes: tuple[Node, ...], memory_bytes: int, bf16: bool
) -> None:
    async with planning(tmp_path, *nodes) as service:
        found = await planned(service, job_of(tmp_path))
    assert found.memory.available_bytes == memory_bytes
    assert (found.resolved_spec.optimization.precision == spec_pb2.PRECISION_BF16) is bf16


def test_ranks_know_the_nodes_that_they_were_placed_on() -> None:
    view = ClusterView(True, "id", "ray", (H200, V100, CPU))
    assert launch_shape(view, ((H200.id, 2),)).bf16
    both = launch_shape(view, ((H200.id, 2), (V100.id, 1)))
    assert (both.bf16, both.gpu_memory_bytes, both.gpu_name) == (False, 16 * GIB, "Tesla V100")
    assert launch_shape(view, ((CPU.id, 1),)).gpus == 0
    assert not launch_shape(view, (("gone", 1),)).memory_bytes
