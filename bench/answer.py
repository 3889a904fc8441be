"""What many callers at once get from one model, and how fast a sweep of settings is planned, from a real service.

A BERT of 11 million parameters answers texts of 18 words: one caller, then sixteen with a connection each. A call with
one text is made behind one with a thousand. Then specs are planned that differ in their learning rates alone.

python bench/answer.py [--seconds N] [--write]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import torch
from transformers import BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.tiny_folders import WORDS, bert_config, bert_tokenizer
from light import free_port, wait_for
from measure import report
from shardyard import Client
from shardyard.v1 import job_pb2, job_service_pb2, job_service_pb2_grpc, model_service_pb2, model_service_pb2_grpc

CALLERS = 16
TARGET_RATIO = 1.8
TARGET_SLICES = 2.0
TARGET_PLANS = 100.0
LARGE = 1000
SLICE = 64
BEHIND = 8
SIZES = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 128,
}
BIN = Path(sys.executable).parent


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        folder = Path(name)
        make_files(folder)
        address = f"127.0.0.1:{free_port()}"
        command = [BIN / "shardyard", "serve", "--launcher", "local", "--listen", address, "--data-root", name]
        with subprocess.Popen(
            [*command, "--state-dir", folder / "state"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        ) as service:
            try:
                wait_for(address, service)
                with Client(address) as client:
                    model = client.upload_model(folder / "bert").name
                numbers = asyncio.run(measure(address, model, folder, arguments.seconds))
            finally:
                service.send_signal(signal.SIGTERM)
                service.wait(timeout=60)
    return judge(numbers, write=arguments.write)


def make_files(folder: Path) -> None:
    """A model and data to plan with."""
    torch.manual_seed(0)
    BertForSequenceClassification(bert_config(**SIZES)).eval().save_pretrained(folder / "bert")
    bert_tokenizer().save_pretrained(folder / "bert")
    rows = "".join(f"{text(index)},{'good' if index % 2 else 'bad'}\n" for index in range(2000))
    (folder / "reviews.csv").write_text(f"text,label\n{rows}", encoding="utf-8")


def text(seed: int) -> str:
    """Eighteen words: with the two special tokens as many tokens as a sentence of SST-2 has."""
    return " ".join(random.Random(seed).choices(WORDS[:10], k=18))


class Caller:
    """One caller, with a connection of its own."""

    def __init__(self, channel: grpc.aio.Channel, model: str, folder: Path) -> None:
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.jobs = job_service_pb2_grpc.JobServiceStub(channel)
        self.model, self.folder = model, folder

    async def predict(self, number: int, seed: int) -> None:
        """Asks for the labels of that many texts."""
        instances = [model_service_pb2.Instance(text=text(seed + index)) for index in range(number)]
        await self.models.Predict(model_service_pb2.PredictRequest(model=self.model, instances=instances), timeout=300)

    async def plan(self, number: int) -> None:
        """Plans with a learning rate of its own."""
        job = job_pb2.Job()
        job.spec.fine_tuning.text_classification.max_length = 64
        job.spec.model.uri = str(self.folder / "bert")
        job.spec.train_data.uri = str(self.folder / "reviews.csv")
        job.spec.optimization.max_steps = 100
        job.spec.optimization.learning_rate = 1e-5 * (1 + number / 1000)
        await self.jobs.PlanJob(job_service_pb2.PlanJobRequest(parent="projects/default", job=job), timeout=300)


@asynccontextmanager
async def callers(number: int, address: str, model: str, folder: Path) -> AsyncIterator[list[Caller]]:
    """So many of them."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=own) for _ in range(number)]
    try:
        yield [Caller(channel, model, folder) for channel in channels]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def rate(several: list[Caller], seconds: float, call: Callable[[Caller, int], Awaitable[None]]) -> float:
    """Calls a second, of callers that each wait for their answer."""
    end, done = time.perf_counter() + seconds, 0
    begun = time.perf_counter()

    async def go(caller: Caller) -> None:
        nonlocal done
        while time.perf_counter() < end:
            done += 1
            await call(caller, done)

    await asyncio.gather(*(go(each) for each in several))
    return done / (time.perf_counter() - begun)


async def measure(address: str, model: str, folder: Path, seconds: float) -> dict[str, float]:
    """All figures by name."""
    numbers: dict[str, float] = {}
    async with callers(CALLERS, address, model, folder) as several:
        first, second = several[0], several[1]
        await first.predict(1, 0)
        numbers["one"] = await rate([first], seconds, lambda caller, at: caller.predict(1, at))
        numbers["many"] = await rate(several, seconds, lambda caller, at: caller.predict(1, at))
        begun = time.perf_counter()
        await first.predict(LARGE, 0)
        numbers["slice_s"] = (time.perf_counter() - begun) / (LARGE / SLICE)
        waits = []
        large = asyncio.create_task(first.predict(LARGE, 0))
        await asyncio.sleep(2 * numbers["slice_s"])
        while len(waits) < BEHIND and not large.done():
            begun = time.perf_counter()
            await second.predict(1, 0)
            waits.append(time.perf_counter() - begun)
        await large
        numbers["behind_s"] = statistics.median(waits)
        await first.plan(0)
        numbers["plans"] = await rate(several, seconds, lambda caller, at: caller.plan(at))
    return numbers


def judge(numbers: dict[str, float], *, write: bool) -> int:
    """Print the table; 0 if every target was met."""
    ratio = numbers["many"] / numbers["one"]
    slices = numbers["behind_s"] / numbers["slice_s"]
    rows = [
        ("`Predict`, one caller with one text", "", f"{numbers['one']:.0f} texts/s"),
        (f"{CALLERS} callers with one text each", "", f"{numbers['many']:.0f} texts/s"),
        (f"{CALLERS} callers ÷ one", f"at least {TARGET_RATIO}", f"{ratio:.2f}"),
        (f"one text behind a call of {LARGE:,}, median", "", f"{numbers['behind_s'] * 1000:.0f} ms"),
        (f"in slices of {SLICE} texts", f"under {TARGET_SLICES:g}", f"{slices:.2f}"),
        (
            f"`PlanJob` from {CALLERS} callers, specs that differ in the learning rate",
            f"at least {TARGET_PLANS:.0f}/s",
            f"{numbers['plans']:.0f}/s",
        ),
    ]
    report("answer", rows, write=write)
    return int(ratio < TARGET_RATIO or slices >= TARGET_SLICES or numbers["plans"] < TARGET_PLANS)


if __name__ == "__main__":
    sys.exit(main())
