"""Training speed: ours, streaming, beside a minimal raw DeepSpeed loop and transformers' `Trainer`, taking turns.

    python bench/trainer.py [--blocks 20] [--steps 5] [--only gpt2|bert|ner|questions|seq2seq|images] [--write]

Real tokens (or pictures) a second: padding is not counted. One rank and all cores for every side.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from google.protobuf import json_format

from gate import Block, Side, take_turns
from kinds import KINDS, start
from measure import Ratio, quantile, ratio_of, report
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from supervisor import FD, Supervisor
from workload import Workload

HERE = Path(__file__).resolve().parent
WARM_UP = 8
ROUNDS_OF_WARM_UP = 2
TARGET_RAW, TARGET_HF, LOWER_BOUND = 0.98, 1.0, 0.96
# Of a vocabulary of 16k, whose logits the Trainer holds whole.
TARGETS_HF, MEMORY_TARGETS = {"gpt2": 1.25}, {"gpt2": 0.6}


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20, help="measured blocks a side")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=tuple(KINDS))
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    missed = 0
    for kind in [arguments.only] if arguments.only else KINDS:
        with tempfile.TemporaryDirectory(prefix="sy") as folder:
            workload = KINDS[kind].prepare(start(Path(folder), threads=arguments.threads))
            blocks = measure(kind, workload, blocks=arguments.blocks, steps=arguments.steps)
        rows, kind_missed = judge(kind, blocks)
        missed += kind_missed
        report(f"trainer {kind}", rows, write=arguments.write)
    return int(missed > 0)


def measure(kind: str, workload: Workload, *, blocks: int, steps: int) -> dict[str, list[Block]]:
    """Blocks of every side by its name. Ours makes raw's batches, so its tokens are raw's."""
    num_batches = WARM_UP * ROUNDS_OF_WARM_UP + blocks * steps
    workload_file, spec_file = workload.folder / "workload.json", workload.folder / "spec.json"
    workload_file.write_text(json.dumps(workload.to_dict()), encoding="utf-8")
    spec_file.write_text(json_format.MessageToJson(attempt_spec(kind, workload, num_batches)), encoding="utf-8")
    # As the launch does: ranks make no folders above their own.
    (workload.folder / "job" / "e000001").mkdir(parents=True)
    supervisor = Supervisor(workload.folder / "attempt", job_uid=uuid.uuid4().hex)
    environment = {"OMP_NUM_THREADS": str(workload.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    commands = {
        "ours": [HERE / "our_side.py", spec_file],
        "raw": [HERE / "raw_side.py", spec_file, num_batches],
        "hf": [HERE / "hf_side.py", kind, workload_file],
    }
    if KINDS[kind].grouped:
        commands["hf-grouped"] = [HERE / "hf_side.py", kind, workload_file, "group_by_length"]
    sides = []
    try:
        for name, command in commands.items():
            fd = supervisor.theirs.fileno() if name == "ours" else None
            extra = {FD: str(fd)} if fd is not None else {}
            sides.append(
                Side(
                    name,
                    [sys.executable, *map(str, command)],
                    log=workload.folder / f"{name}.log",
                    environment={**environment, **extra},
                    keep_fds=(fd,) if fd is not None else (),
                )
            )
        for _ in range(ROUNDS_OF_WARM_UP - 1):
            for side in sides:
                side.block(WARM_UP)
        measured = take_turns(sides, blocks=blocks, steps=steps, warm_up=WARM_UP)
    finally:
        for side in sides:
            side.close()
    pairs = zip(measured["ours"], measured["raw"], strict=True)
    measured["ours"] = [replace(mine, tokens=raw.tokens) for mine, raw in pairs]
    return measured


def attempt_spec(kind: str, workload: Workload, num_steps: int) -> worker_pb2.AttemptSpec:
    """The job as the service would hand it to its gang; the canary is its only evaluation and checkpoint."""
    spec = spec_pb2.JobSpec(
        optimization=spec_pb2.Optimization(
            max_steps=10 * num_steps,
            global_batch_size=workload.batch_size,
            micro_batch_size=workload.batch_size,
            learning_rate=workload.learning_rate,
        ),
        parallelism=spec_pb2.Parallelism(zero_stage=0),
        resources=spec_pb2.Resources(workers=1, cpus_per_worker=workload.threads),
        checkpoints=spec_pb2.CheckpointPolicy(every=10 * num_steps),
        evaluation=spec_pb2.EvaluationPolicy(every=10 * num_steps, holdout=0.01),
    )
    KINDS[kind].fill(spec, workload)
    folder = workload.folder
    return worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/bench",
        job_uid=uuid.uuid4().hex,
        epoch=1,
        spec=spec,
        locations=worker_pb2.Locations(data_roots=["/"], cache_dir=str(folder / "cache")),
        job_dir=str(folder / "job"),
        attempt_dir=str(folder / "job" / "e000001"),
        export_dir=str(folder / "export"),
        world_size=1,
        threads_per_rank=workload.threads,
        rendezvous=f"file://{folder}/rendezvous",
    )


def judge(kind: str, blocks: dict[str, list[Block]]) -> tuple[list[tuple[str, str, str]], int]:
    """Rows of the table, and how many targets were missed."""
    what, counts = KINDS[kind].what, KINDS[kind].counts
    speeds = {name: [block.tokens / block.seconds for block in found] for name, found in blocks.items()}
    names = {"raw": "raw DeepSpeed", "hf": "HF Trainer", "hf-grouped": "HF Trainer, group_by_length"}
    targets = {"raw": TARGET_RAW, "hf": TARGETS_HF.get(kind, TARGET_HF), "hf-grouped": TARGET_HF}
    rows = [(f"{what}, ours", "", f"{quantile(speeds['ours'], 0.5):,.0f} {counts}/s")]
    missed = 0
    for name in [name for name in names if name in speeds]:
        ratio = ratio_of(speeds["ours"], speeds[name])
        rows.append((f"{what}, ours ÷ {names[name]}", wanted(targets.get(name)), str(ratio)))
        missed += name in targets and not is_met(ratio, targets[name])
    memory, too_much = judge_memory(kind, blocks)
    return [*rows, memory], missed + too_much


def judge_memory(kind: str, blocks: dict[str, list[Block]]) -> tuple[tuple[str, str, str], bool]:
    """The row of the peak of memory beside the Trainer's, and whether it is over its target."""
    ours, theirs = (blocks[name][-1].peak_bytes for name in ("ours", "hf"))
    limit = MEMORY_TARGETS.get(kind)
    target = f"at most {limit:.2f}" if limit else ""
    shown = f"{ours / theirs:.2f} ({ours / 2**20:,.0f} and {theirs / 2**20:,.0f} MiB)"
    row = (f"{KINDS[kind].what}, peak memory over that before the model, ours ÷ HF Trainer", target, shown)
    return row, limit is not None and ours / theirs > limit


def wanted(target: float | None) -> str:
    """A target in words."""
    return f"at least {target:.2f}, lower bound {LOWER_BOUND:.2f}" if target is not None else "(no target)"


def is_met(ratio: Ratio, target: float) -> bool:
    """Whether the median reaches the target and the interval's lower end the lower bound."""
    return ratio.median >= target and ratio.low >= LOWER_BOUND


if __name__ == "__main__":
    sys.exit(main())
