"""From submitting a BERT to its first training step: Shardyard, and the way others take, on one Ray with a dashboard.

    python bench/start.py [--repeats 3] [--write]

`ray job submit` → TorchTrainer (2 workers) → transformers' Trainer, beside Shardyard that joins the same Ray by its
address; a plain script without Ray is printed with them. All of them read the same model and the same 2,000 labels: the
BERT of the quickstart, and a small one. Shardyard's ranks start warm, as forks of a process that has imported what they
need, and in the cold rows from an interpreter, as on machines with GPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
from transformers import BertConfig, BertModel

from light import BIN, free_port, wait_for
from measure import report
from workload import Workload

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "quickstart"))

import assets  # noqa: E402  the quickstart's, from beside
import material  # noqa: E402
from service import Service, running  # noqa: E402

MARK = "SHARDYARD_BENCH"


FOUND_S = 20.0

WAYS = {
    "plain": "plain HF Trainer script, one process, no Ray",
    "ray job": "`ray job submit` → TorchTrainer → HF Trainer",
    "ray job, small": "the same, small model",
    "warm": "Shardyard, ranks start warm",
    "warm, small": "the same, small model",
    "cold": "Shardyard, ranks start cold",
}

COLD, WARM, WARM_SMALL = 0.5, 0.25, 0.125
"""Targets: parts of the time of a Ray job with the same model."""


def main() -> int:
    """Measure, print, and say by the exit code whether the targets were met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    took: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="sy") as folder, ray_head(Path(folder)) as (address, dashboard):
        bert = prepare(Path(folder))
        small = smaller(bert, Path(folder) / "small")
        with running(Path(folder) / "state", launcher="ray", flags=("--ray-address", address)) as service:
            ways: dict[str, Callable[[int], float]] = {
                "plain": lambda number: plain_script(bert, number),
                "ray job": lambda number: ray_job(bert, dashboard, number),
                "ray job, small": lambda number: ray_job(small, dashboard, number),
                "warm": lambda number: shardyard_job(bert, service.address, f"warm-{number}"),
                "warm, small": lambda number: shardyard_job(small, service.address, f"small-{number}"),
                "cold": lambda number: cold_job(bert, service, f"cold-{number}"),
            }
            for number in range(arguments.repeats):
                for name, measure in ways.items():
                    took.setdefault(name, []).append(measure(number))
                print({name: round(each[-1], 1) for name, each in took.items()}, file=sys.stderr)
    median = {name: statistics.median(each) for name, each in took.items()}
    ratios = {
        "cold": (median["cold"] / median["ray job"], COLD),
        "warm": (median["warm"] / median["ray job"], WARM),
        "warm, small": (median["warm, small"] / median["ray job, small"], WARM_SMALL),
    }
    rows = [(f"{WAYS[name]}, median", "", f"{seconds:.1f} s") for name, seconds in median.items()]
    rows += [
        (f"Shardyard, {name} ÷ Ray job", f"at most {most:g}", f"{ratio:.3f} ({arguments.repeats} rounds)")
        for name, (ratio, most) in ratios.items()
    ]
    report("start", rows, write=arguments.write)
    return int(any(ratio > most for ratio, most in ratios.values()))


def prepare(folder: Path) -> Workload:
    """The BERT and its labels, as the quickstart has them."""
    data = material.reviews(assets.snippets_folder(), folder / "reviews")
    return Workload(
        folder=folder / "runs",
        text=data.unlabelled,
        labelled=data.few,
        model=assets.bert_folder(),
        tokenizer=assets.bert_folder() / "tokenizer.json",
        sequence_length=64,
        batch_size=32,
        learning_rate=1e-4,
        threads=1,
        workers=2,
    )


def smaller(workload: Workload, folder: Path) -> Workload:
    """The same with a BERT of 1 layer and width 64, new, with the same tokenizer."""
    shutil.copytree(workload.model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = BertConfig.from_pretrained(
        folder, num_hidden_layers=1, hidden_size=64, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(folder)
    return replace(workload, model=folder, tokenizer=folder / "tokenizer.json")


@contextlib.contextmanager
def ray_head(folder: Path) -> Iterator[tuple[str, str]]:
    """A Ray with a dashboard on loopback, as people start one; its address and its dashboard's."""
    port, dashboard, client = free_port(), free_port(), free_port()
    # For processes that join it, too: else Ray replaces 127.0.0.1 by the outer address, where nothing listens.
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_AUTH_MODE="disabled")
    environment = {**os.environ, MARK: folder.name}
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)]
    command += ["--include-dashboard", "true", "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--ray-client-server-port", str(client), "--temp-dir", str(folder / "ray"), "--num-cpus", "2"]
    command += ["--disable-usage-stats", "--object-store-memory", "200000000"]
    with (folder / "ray.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_for(f"127.0.0.1:{port}", process)
        wait_for_jobs(f"http://127.0.0.1:{dashboard}")
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        end_marked(folder.name)


def wait_for_jobs(dashboard: str) -> None:
    """Return when a job that does nothing went through. Raises RuntimeError after a minute."""
    deadline = time.monotonic() + 60
    nothing = [BIN / "ray", "job", "submit", "--address", dashboard, "--", sys.executable, "-c", "pass"]
    while time.monotonic() < deadline:
        done = subprocess.run(nothing, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(1)
    raise RuntimeError(f"Ray takes no jobs:\n{done.stderr[-2000:]}")


def end_marked(mark: str) -> None:
    """End what the head left behind: it carries the bench's mark in its environment."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.pid != os.getpid():
                process.kill()


def plain_script(workload: Workload, number: int) -> float:
    """Seconds from the start of a script to its first step, in one process with both cores."""
    one = replace(workload, workers=1, threads=2)
    return stamped(one, number, lambda file, stamp: [sys.executable, HERE / "ray_train_job.py", file, stamp, "--plain"])


def ray_job(workload: Workload, dashboard: str, number: int) -> float:
    """Seconds from `ray job submit` to the first step."""
    return stamped(
        workload,
        number,
        lambda file, stamp: [
            *(BIN / "ray", "job", "submit", "--address", dashboard, "--"),
            *(sys.executable, HERE / "ray_train_job.py", file, stamp),
        ],
    )


def cold_job(workload: Workload, service: Service, name: str) -> float:
    """The same with ranks that find no warm process: a file is meanwhile in the place of their server's folder."""
    folder = service.state / "warm"
    folder.rename(folder.with_name("warm-aside"))
    folder.write_text("")
    try:
        return shardyard_job(workload, service.address, name)
    finally:
        folder.unlink()
        deadline = time.monotonic() + FOUND_S
        while not (folder / "socket").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        shutil.rmtree(folder.with_name("warm-aside"))


def shardyard_job(workload: Workload, address: str, name: str) -> float:
    """Seconds from `submit`, its uploads included, until step 1 was done, as its point in the metrics says.

    Steps are reported together, the first two after the second. The job is then cancelled and waited for.
    """
    import shardyard

    with shardyard.Client(address) as client:
        started = time.time()
        job = client.submit(
            shardyard.TextClassification(pooling="cls", max_length=workload.sequence_length),
            job_id=name,
            model=workload.model,
            train_data=workload.labelled,
            optimization=shardyard.Optimization(
                epochs=1, global_batch_size=workload.batch_size, learning_rate=workload.learning_rate
            ),
            resources=shardyard.Resources(workers=workload.workers),
        )
        first = next(job.watch_metrics("loss")).points[0]
        assert first.step == 1, f"the first point is of step {first.step}"
        assert first.time is not None
        took = first.time.timestamp() - started
        job.cancel()
        job.wait(120, check=False)
        return took


def stamped(workload: Workload, number: int, command: Callable[[Path, Path], list[Path | str]]) -> float:
    """Run a command that writes down the time of its first step; seconds until then."""
    workload.folder.mkdir(exist_ok=True)
    file, stamp = workload.folder / f"w{number}.json", workload.folder / f"stamp-{time.monotonic_ns()}"
    file.write_text(json.dumps(workload.to_dict()), encoding="utf-8")
    started = time.time()
    done = subprocess.run(
        [str(part) for part in command(file, stamp)], capture_output=True, text=True, timeout=300, check=False
    )
    if not stamp.is_file():
        raise RuntimeError(f"no first step:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return float(stamp.read_text(encoding="utf-8").split()[0]) - started


if __name__ == "__main__":
    sys.exit(main())
