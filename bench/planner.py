"""The planner's formulas against what jobs need: memory of one worker, by task, stage and way to save memory.

    python bench/planner.py [--only NAME] [--write]

Each row is planned, then run for a few steps by torchrun, without a coordinator; the peak of its ranks is compared with
the plan. A worker's peak counts everything of its process, as `VmHWM` does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import json_format

from kinds import KINDS, start
from measure import report
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.node import this_node
from shardyard_trainer.planning.plan import plan

WITHIN = 0.15
STEPS = 6


@dataclass(frozen=True)
class Row:
    """A configuration: the kind of `bench/trainer.py`, workers, ZeRO stage, and what else differs."""

    kind: str
    workers: int = 1
    stage: int = 0
    change: Callable[[spec_pb2.JobSpec], None] = lambda spec: None


def adapters(spec: spec_pb2.JobSpec) -> None:
    """LoRA of rank 8."""
    spec.fine_tuning.lora.rank = 8


def again(spec: spec_pb2.JobSpec) -> None:
    """Layers computed again in the backward pass."""
    spec.parallelism.activation_checkpointing = True


def large(spec: spec_pb2.JobSpec) -> None:
    """A batch of 64 at once."""
    spec.optimization.global_batch_size = spec.optimization.micro_batch_size = 64


ROWS: Mapping[str, Row] = {
    "GPT-2, pretraining": Row("gpt2"),
    "GPT-2, pretraining, layers computed again": Row("gpt2", change=again),
    "GPT-2, pretraining, ZeRO-1 on two workers": Row("gpt2", 2, 1),
    "GPT-2, pretraining, ZeRO-2 on two workers": Row("gpt2", 2, 2),
    "GPT-2, pretraining, ZeRO-3 on two workers": Row("gpt2", 2, 3),
    "BERT, texts": Row("bert"),
    "BERT, texts, 64 at once": Row("bert", change=large),
    "BERT, texts, adapters": Row("bert", change=adapters),
    "BERT, words, ZeRO-2 on two workers": Row("ner", 2, 2),
    "BERT, questions": Row("questions"),
    "T5, pairs of texts": Row("seq2seq"),
    "ViT, pictures": Row("images"),
}


def main() -> int:
    """Plan, run, compare; the exit code says whether every row is within 15 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(ROWS))
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    table, missed = [], 0
    for name in [arguments.only] if arguments.only else ROWS:
        with tempfile.TemporaryDirectory(prefix="sy") as folder:
            planned, measured = compare(ROWS[name], Path(folder))
        error = planned.total_bytes / measured - 1
        missed += abs(error) > WITHIN
        found = f"{planned.total_bytes / 1e6:,.0f} MB planned, {measured / 1e6:,.0f} MB measured: {error:+.1%}"
        table.append((name, f"within {WITHIN:.0%}", found))
        print(*table[-1], sep=" | ", flush=True)
    report("planner memory", table, write=arguments.write)
    return int(missed > 0)


def compare(row: Row, folder: Path) -> tuple[plan_pb2.MemoryPlan, int]:
    """The planned memory of a worker, and the highest peak of the ranks, in bytes."""
    attempt = attempt_of(row, folder)
    request = worker_pb2.PlanRequest(spec=attempt.spec, locations=attempt.locations, node_shape=attempt.node_shape)
    result = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
    if result.violations:
        raise SystemExit("\n".join(f"{found.field}: {found.message}" for found in result.violations))
    attempt.plan.CopyFrom(result.plan)
    file = folder / "attempt.json"
    file.write_text(json_format.MessageToJson(attempt, preserving_proto_field_name=True), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={row.workers}"]
    done = subprocess.run(
        [*command, "-m", "shardyard_trainer", str(file)], capture_output=True, text=True, cwd=folder, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    progress = [line.split(" ", 2)[2] for line in done.stdout.splitlines() if line[9:].startswith("progress ")]
    return result.plan.memory, max(int(json.loads(text)["peak_memory_bytes"]) for text in progress)


def attempt_of(row: Row, folder: Path) -> worker_pb2.AttemptSpec:
    """The attempt of a row, but for its plan."""
    kind = KINDS[row.kind]
    workload = kind.prepare(start(folder, threads=1))
    attempt = worker_pb2.AttemptSpec(
        world_size=row.workers,
        job_dir=str(folder / "job"),
        log_interval_s=0.1,
        threads_per_rank=1,
        locations=worker_pb2.Locations(data_roots=["/"], cache_dir=str(folder / "cache")),
    )
    attempt.node_shape.CopyFrom(this_node())
    spec = attempt.spec
    kind.fill(spec, workload)
    spec.optimization.max_steps = STEPS
    spec.optimization.global_batch_size = workload.batch_size
    spec.optimization.learning_rate = workload.learning_rate
    spec.resources.workers = row.workers
    spec.parallelism.zero_stage = row.stage
    row.change(spec)
    return attempt


if __name__ == "__main__":
    raise SystemExit(main())
