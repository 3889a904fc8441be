"""How long a step waits for its pictures: the share of `loader_wait_s` in a run of examples/flowers.yaml.

    python bench/loader.py [--pictures 1000] [--side 256] [--write]

The pictures are JPEGs made on the fly, decoded, cut and mirrored at random as the example says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from google.protobuf import json_format
from PIL import Image

from measure import report
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.__main__ import complete
from shardyard_trainer.entry import run

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "flowers.yaml"
LIMIT = 0.05
_RESULT = "result.txt"
_SKIPPED = 10
"""Steps at the start, in which the process warms up."""


def main() -> int:
    """Measure, print, and say by the exit code whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--train", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        return train(Path(arguments.train))
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        write_pictures(Path(name) / "data", arguments.pictures, arguments.side)
        command = [sys.executable, __file__, "--train", name]
        subprocess.run(command, check=True)
        measured = (Path(name) / _RESULT).read_text(encoding="utf-8")
    share, step_ms = (float(each) for each in measured.split())
    what = f"the loader's wait in a step, {arguments.pictures:,} JPEGs of {arguments.side} × {arguments.side}"
    report("loader", [(what, f"under {LIMIT:.0%}", f"{share:.1%} of {step_ms:.0f} ms")], write=arguments.write)
    return int(share > LIMIT)


def write_pictures(folder: Path, number: int, side: int) -> None:
    """Noise on a coarse pattern: about as many bytes as a photograph."""
    draw = np.random.default_rng(0)
    for at in range(number):
        path = folder / f"class-{at % 3}" / f"{at:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((side, side))
        noise = draw.normal(0, 12, (side, side, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(path, quality=85)


def train(folder: Path) -> int:
    """One epoch in this process; writes down the share and the milliseconds of a step."""
    spec = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))["job"]["spec"]
    spec["train_data"] = {"uri": str(folder / "data")}
    spec["evaluation"] = {"holdout": 0}
    spec["optimization"]["epochs"] = 2
    spec.pop("eval_data")
    spec.pop("resources")
    attempt = worker_pb2.AttemptSpec(
        job_name="projects/p/jobs/loader",
        epoch=1,
        world_size=1,
        threads_per_rank=max((os.cpu_count() or 1) - 1, 1),
        job_dir=str(folder),
        locations=worker_pb2.Locations(data_roots=[str(folder)], cache_dir=str(folder / "cache")),
    )
    json_format.ParseDict(spec, attempt.spec)
    complete(attempt)
    Path(attempt.attempt_dir).mkdir(parents=True)
    waits, rates = list[float](), list[float]()

    def send(request: bytes) -> bytes:
        for event in worker_pb2.ReportRequest.FromString(request).events:
            for series in event.metrics.series:
                if series.metric == "loader_wait_s":
                    waits.extend(point.value for point in series.points)
                if series.metric == "tokens_per_s":
                    rates.extend(point.value for point in series.points)
        return worker_pb2.ReportReply().SerializeToString()

    run(attempt.SerializeToString(), 0, 0, send)
    batch = spec["optimization"]["global_batch_size"]
    durations = [batch / each for each in rates]
    waited, took = sum(waits[_SKIPPED:]), sum(durations[_SKIPPED:])
    result = f"{waited / took} {1000 * took / len(durations[_SKIPPED:])}"
    (folder / _RESULT).write_text(result, encoding="utf-8")  # The rank's output goes into its log.
    return 0


if __name__ == "__main__":
    sys.exit(main())
