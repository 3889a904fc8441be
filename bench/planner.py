"""The planner's formulas against what jobs need: memory of one worker and time, by task, stage and way to save memory.

    python bench/planner.py [--only NAME] [--time] [--write]

Each row is planned, then run without a coordinator, by ranks that start cold. The peak of its ranks after a few steps
is compared with the plan; a worker's peak counts everything of its process, as `VmHWM` does. Every batch reaches the
longest length. With `--time` more steps are run, and two things are compared with the whole duration: the plan, and
what the first progress after the canary says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from google.protobuf import json_format

from kinds import start
from long_rows import LONG
from measure import report
from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.planning.node import this_node
from shardyard_trainer.planning.plan import plan

WITHIN, WITHIN_TIME = 0.15, 0.30
STEPS, TIMED_STEPS = 6, 60


@dataclass(frozen=True)
class Row:
    """A configuration: the kind of `long_rows`, workers, ZeRO stage, and what else differs."""

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
    "BERT, texts, learning from a larger BERT": Row("taught"),
    "BERT, questions": Row("questions"),
    "T5, pairs of texts": Row("seq2seq"),
    "ViT, pictures": Row("images"),
    "GPT-2, recommendations": Row("histories"),
}


def main() -> int:
    """Plan, run, compare; the exit code says whether every row is within its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=tuple(ROWS))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    compare, name = (compare_time, "planner time") if arguments.time else (compare_memory, "planner memory")
    table, missed = [], 0
    for row in [arguments.only] if arguments.only else ROWS:
        with tempfile.TemporaryDirectory(prefix="sy") as folder:
            error, target, found = compare(ROWS[row], Path(folder))
        missed += abs(error) > target
        table.append((row, f"within {target:.0%}", found))
        print(*table[-1], sep=" | ", flush=True)
    report(name, table, write=arguments.write)
    return int(missed > 0)


def compare_memory(row: Row, folder: Path) -> tuple[float, float, str]:
    """The error of the planned memory of a worker, its bound, and both in words."""
    planned, events = run(row, folder, steps=STEPS)
    measured = max(int(each.data["peak_memory_bytes"]) for each in events if each.kind == "progress")
    error = planned.memory.total_bytes / measured - 1
    found = f"{planned.memory.total_bytes / 1e6:,.0f} MB planned, {measured / 1e6:,.0f} MB measured: {error:+.1%}"
    return error, WITHIN, found


def compare_time(row: Row, folder: Path) -> tuple[float, float, str]:
    """The error of the time that is said to be left after the canary, its bound, and that of the plan besides."""
    planned, events = run(row, folder, steps=TIMED_STEPS)
    canary_s = next(each.time_s for each in events if each.kind == "canary")
    said = next(each for each in events if each.kind == "progress" and each.time_s > canary_s)
    left_s, said_s = events[-1].time_s - said.time_s, float(said.data["eta"].removesuffix("s"))
    expected_s, error = planned.time.expected.ToTimedelta().total_seconds(), said_s / left_s - 1
    found = (
        f"{said_s:.1f} s left were said, {left_s:.1f} s it took: {error:+.0%}; "
        f"planned {expected_s:.0f} s, all {events[-1].time_s:.0f} s"
    )
    return error, WITHIN_TIME, found


class Event(NamedTuple):
    """A line of rank 0, and when it came, in seconds since the start."""

    time_s: float
    kind: str
    data: dict[str, Any]


def run(row: Row, folder: Path, *, steps: int) -> tuple[plan_pb2.JobPlan, list[Event]]:
    """The plan of a row, and what its ranks reported; the last event is the export."""
    attempt = attempt_of(row, folder, steps)
    request = worker_pb2.PlanRequest(spec=attempt.spec, locations=attempt.locations, node_shape=attempt.node_shape)
    result = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
    if result.violations:
        raise SystemExit("\n".join(f"{found.field}: {found.message}" for found in result.violations))
    attempt.plan.CopyFrom(result.plan)
    file = folder / "attempt.json"
    file.write_text(json_format.MessageToJson(attempt, preserving_proto_field_name=True), encoding="utf-8")
    events, started_s = [], time.monotonic()
    with (folder / "stderr").open("w+") as errors:
        chief, *others = [_start(file, rank, errors) for rank in range(row.workers)]
        assert chief.stdout is not None
        for line in chief.stdout:
            _, kind, text = (*line.split(" ", 2), "")[:3]
            if kind in {"progress", "canary", "exported"}:
                events.append(Event(time.monotonic() - started_s, kind, json.loads(text or "{}")))
        codes = [rank.wait() for rank in (chief, *others)]
        if any(codes):
            errors.seek(0)
            raise SystemExit(errors.read()[-3000:])
    return result.plan, events


def _start(file: Path, rank: int, errors: IO[str]) -> subprocess.Popen[str]:
    """One rank of an attempt, as a program of its own; all but the first print nothing."""
    command = [sys.executable, "-m", "shardyard_trainer", str(file), "--rank", str(rank), "--local-rank", str(rank)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=file.parent)


def attempt_of(row: Row, folder: Path, steps: int) -> worker_pb2.AttemptSpec:
    """The attempt of a row, but for its plan."""
    kind = LONG[row.kind]
    workload = kind.prepare(start(folder, threads=1))
    attempt = worker_pb2.AttemptSpec(
        world_size=row.workers,
        job_dir=str(folder / "job"),
        rendezvous=f"file://{folder / 'rendezvous'}",
        log_interval_s=0.1,
        threads_per_rank=1,
        locations=worker_pb2.Locations(data_roots=["/"], cache_dir=str(folder / "cache")),
    )
    attempt.node_shape.CopyFrom(this_node())
    spec = attempt.spec
    kind.fill(spec, workload)
    spec.optimization.max_steps = steps
    spec.optimization.global_batch_size = workload.batch_size
    spec.optimization.learning_rate = workload.learning_rate
    spec.resources.workers = row.workers
    spec.parallelism.zero_stage = row.stage
    if steps == STEPS:
        # What an evaluation holds depends neither on how often there is one nor on how long it takes.
        spec.evaluation.every, spec.evaluation.holdout = steps, 0.01
    row.change(spec)
    return attempt


if __name__ == "__main__":
    raise SystemExit(main())
