"""Everything that needs a GPU, in one run of under eight minutes: no package index, no Ray, no pytest.

    PYTHONPATH=client:trainer python bench/gpu.py [--write] [--rehearse]

Losses against plain PyTorch at every ZeRO stage in fp32 and bf16; steps of a GPT-2 of 124 M parameters and of a BERT of
base size beside a plain loop and transformers' `Trainer`; memory against the plan; a job from its plan to its answers.
`--rehearse` runs all of it with tiny models on CPUs: to see that it works before a GPU is available.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))

import torch  # noqa: E402 - the tests' folder comes first.

from gpu_sides import Sides, plain_speed, trainer_speed  # noqa: E402
from helpers import gpu_runs  # noqa: E402
from measure import quantile, report  # noqa: E402
from shardyard.v1 import spec_pb2  # noqa: E402

Row = tuple[str, str, str]
FP32, BF16 = spec_pb2.PRECISION_FP32, spec_pb2.PRECISION_BF16
LIMITS = {FP32: 1e-4, BF16: 2e-2}
AT_ONCE = 4
"""Tiny runs that share the GPU: they wait for their imports most of the time."""

PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}
"""Dense bf16 operations a second by the makers' data sheets; `NVIDIA H100 PCIe` and others differ and are left out."""


@dataclass(frozen=True)
class Mode:
    """How large everything is; `gpus` is 0 in a rehearsal."""

    gpus: int
    steps: int
    stages: tuple[tuple[int, spec_pb2.Precision], ...]
    sides: Sides


FULL = Mode(1, 20, tuple((s, FP32) for s in range(4)) + tuple((s, BF16) for s in range(1, 4)), Sides.full())
REHEARSAL = Mode(0, 6, ((0, FP32), (2, FP32)), Sides.tiny())


def main() -> int:
    """Run everything, print the table, and say by the exit code whether every check held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on CPUs")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("torch sees no GPU here; --rehearse runs the same with tiny models on CPUs", file=sys.stderr)
        return 2
    mode = REHEARSAL if arguments.rehearse else FULL
    rows, failed = [("GPU", "", device_name(mode))], 0
    for part in (exactness, whole_job, speed):
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="sy") as folder:
            for row, held in part(mode, Path(folder)):
                rows.append(row)
                failed += not held
        print(f"== {part.__name__}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    report("gpu", rows, write=arguments.write and not arguments.rehearse)
    return int(failed > 0)


def device_name(mode: Mode) -> str:
    """The GPU and the versions that were measured."""
    name = torch.cuda.get_device_name() if mode.gpus else "none: a rehearsal on CPUs"
    return f"{name}, torch {torch.__version__}"


def exactness(mode: Mode, folder: Path) -> Iterator[tuple[Row, bool]]:
    """The farthest relative distance of any loss from plain PyTorch in fp32 on a CPU."""
    for kind, make in gpu_runs.SPECS.items():
        (folder / kind).mkdir()
        spec = make(folder / kind, mode.steps)

        def run(
            stage: int, precision: spec_pb2.Precision, spec: spec_pb2.JobSpec = spec, kind: str = kind
        ) -> gpu_runs.Run:
            return gpu_runs.run_of(spec, folder / kind, stage=stage, precision=precision, gpus=mode.gpus)

        # The first one alone: it fills the cache of tokenised data that the others read.
        runs = [run(*mode.stages[0])]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            runs += pool.map(lambda case: run(*case), mode.stages[1:])
        reference = gpu_runs.plain_run(runs[0].attempt)
        for (stage, precision), found in zip(mode.stages, runs, strict=True):
            distance, limit = gpu_runs.farthest(found.losses, reference), LIMITS[precision]
            name = "bf16" if precision == BF16 else "fp32"
            what = f"Tiny {kind}, ZeRO-{stage}, {name}: farthest loss from plain PyTorch over {mode.steps} steps"
            yield (what, f"at most {limit:g}", f"{distance:.1e}"), distance <= limit


def whole_job(mode: Mode, folder: Path) -> Iterator[tuple[Row, bool]]:
    """Plan, train, export, predict, with whatever precision the plan chose."""
    spec = gpu_runs.classifier(folder, 60)
    run = gpu_runs.trained(gpu_runs.planned_attempt(spec, folder, gpus=mode.gpus))
    chosen = spec_pb2.Precision.Name(run.attempt.plan.resolved_spec.optimization.precision)
    predicted = gpu_runs.predicted_accuracy(run, folder / "eval.csv")
    evaluated = run.evaluation.metrics["accuracy"]
    what = f"A job from plan to answers ({chosen.removeprefix('PRECISION_').lower()}): accuracy of Predict"
    held = abs(predicted - evaluated) < 1e-9
    yield (what, f"the evaluation's {evaluated:.4f}", f"{predicted:.4f}"), held


def speed(mode: Mode, folder: Path) -> Iterator[tuple[Row, bool]]:
    """Real tokens a second of ours, a plain loop and the `Trainer`, in turn; peak memory against the plan."""
    for kind, make in mode.sides.specs.items():
        spec = make(folder / kind)
        run = gpu_runs.trained(gpu_runs.planned_attempt(spec, folder / kind, gpus=mode.gpus), timeout_s=400)
        plan = run.attempt.plan
        ours = quantile(run.tokens_per_s[mode.sides.warm_up :], 0.5)
        name = f"{kind}, {plan.num_parameters / 1e6:.0f} M parameters, micro batch {plan.batch.micro_batch_size}"
        yield (f"{name}: ours", "", f"{ours:,.0f} tokens/s{mfu(mode, run, ours)}"), True
        others: dict[str, Callable[..., float]] = {"a plain bf16 loop": plain_speed, "the Trainer": trainer_speed}
        for other, measure in others.items():
            try:
                theirs = measure(kind, run.attempt, warm_up=mode.sides.warm_up)
            except ImportError as missing:
                yield (f"{kind}: ours ÷ {other}", "", f"not run: {missing.name} is not installed"), True
                continue
            yield (f"{kind}: ours ÷ {other}", "", f"{ours / theirs:.2f} ({theirs:,.0f} tokens/s)"), True
        planned = plan.memory.total_bytes - (plan.memory.process_bytes if mode.gpus else 0)
        peak = run.progress.peak_memory_bytes
        yield (
            (f"{kind}: memory planned ÷ peak", "0.85 to 1.15", f"{planned / peak:.2f} of {peak / 2**30:.2f} GiB"),
            True,
        )


def mfu(mode: Mode, run: gpu_runs.Run, tokens_per_s: float) -> str:
    """Model FLOPs utilisation (Chowdhery et al., 2022): (6 N + 12 L D T) operations a token of the peak in bf16."""
    kind = next((name for name in PEAK_BF16 if mode.gpus and name in torch.cuda.get_device_name().split()), "")
    if not kind:
        return ""
    config = mode.sides.shape_of(run.attempt)
    operations = 6 * run.attempt.plan.num_parameters + 12 * config.num_layers * config.width * config.length
    return f", MFU {tokens_per_s * operations / PEAK_BF16[kind]:.1%} of {PEAK_BF16[kind] / 1e12:.0f} TFLOPS"


if __name__ == "__main__":
    sys.exit(main())
