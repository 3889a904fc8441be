"""Inputs that would stop any process that opens them, sent through the public calls: only their sender is affected.

The service looks at one for two seconds of computing. Meanwhile it answers everybody else, and afterwards it knows.
How long something takes is told in the CPU seconds of the service's processes, so that no other work on the machine
counts; a service that waits instead of computing runs into the calls' own time-outs.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shardyard
from helpers.served import BIN, Served, served
from helpers.service import Failure, failure_of
from helpers.tiny_folders import save_folder
from shardyard.v1 import (
    job_pb2,
    job_service_pb2,
    job_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
)
from shardyard_coordinator.launch.confine import landlock_version

LIMIT_S = 2
# Of all processes together, the bystander's plans included.
LATEST_S = 8 * LIMIT_S


def split_by(pattern: str, text: str) -> Callable[[Path], None]:
    """A tokenizer whose regex tries every way to cut a word, and texts to try it on."""

    def change(place: Path) -> None:
        content = json.loads((place / "bert" / "tokenizer.json").read_text())
        content["pre_tokenizer"] = {
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
        }  # fmt: skip
        (place / "bert" / "tokenizer.json").write_text(json.dumps(content))
        (place / "reviews.csv").write_text("text,label\n" + f"{text},good\nmy dog,bad\n" * 40)

    return change


BACKTRACKING = r"(?:a+)+(?=b)|(?:(a|aa)+)+\1b"
slow_tokenizer = split_by(BACKTRACKING, ("a" * 20 + " ") * 2000)
panicking_tokenizer = split_by(BACKTRACKING, "a" * 5000)


def multiplying_tokenizer(place: Path) -> None:
    """Each letter becomes a thousand, four times over: the library aborts its process for want of memory."""
    content = json.loads((place / "bert" / "tokenizer.json").read_text())
    thousandfold = {"type": "Replace", "pattern": {"String": "z"}, "content": "z" * 1000}
    content["normalizer"] = {"type": "Sequence", "normalizers": [thousandfold] * 4}
    (place / "bert" / "tokenizer.json").write_text(json.dumps(content))
    (place / "reviews.csv").write_text("text,label\n" + "zz film,good\nmy dog,bad\n" * 8)


def nested_tokenizer(place: Path) -> None:
    """A hundred thousand sequences in one another."""
    content = (place / "bert" / "tokenizer.json").read_text()
    depth = 100_000
    nested = '{"type":"Sequence","normalizers":[' * depth + "]}" * depth
    (place / "bert" / "tokenizer.json").write_text(content.replace('"normalizer": null', f'"normalizer": {nested}', 1))


def parquet_bomb(place: Path) -> None:
    """A kilobyte that says the same long text two million times."""
    text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int32)), pa.array(["good film " * 400]))
    label = pa.array(["good"]).take(pa.array(np.zeros(2_000_000, np.int64)))
    pq.write_table(pa.table({"text": text, "label": label}), place / "reviews.parquet", compression="zstd")


def many_keys(place: Path) -> None:
    row = {"text": "good", "label": "good"} | {f"k{index}": 1 for index in range(40_000)}
    (place / "reviews.jsonl").write_text((json.dumps(row) + "\n") * 40)


def without_end(place: Path) -> None:
    """A terabyte that takes no place."""
    os.truncate(place / "reviews.csv", 2**40)


def deep_config(**changes: object) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        config = json.loads((place / "bert" / "config.json").read_text())
        (place / "bert" / "config.json").write_text(json.dumps({**config, **changes}))

    return change


ROWS: list[tuple[str, Callable[[Path], None], str, set[str]]] = [
    ("a regex that takes for ever", slow_tokenizer, "reviews.csv", {"DATA_INVALID"}),
    ("a regex that gives up by a panic", panicking_tokenizer, "reviews.csv", {"MODEL_INVALID"}),
    ("a normaliser that multiplies", multiplying_tokenizer, "reviews.csv", {"DATA_INVALID", "MODEL_INVALID"}),
    ("a normaliser in itself", nested_tokenizer, "reviews.csv", {"MODEL_INVALID"}),
    ("a small file that is large", parquet_bomb, "reviews.parquet", {"DATA_INVALID"}),
    ("a file without end", without_end, "reviews.csv", {"DATA_INVALID"}),
    ("many keys", many_keys, "reviews.jsonl", {"DATA_INVALID"}),
    ("many layers", deep_config(num_hidden_layers=10**6), "reviews.csv", {"MODEL_INVALID"}),
    ("many labels", deep_config(num_labels=10**7), "reviews.csv", {"MODEL_INVALID"}),
]


class Caller:
    """One caller with a connection of its own."""

    def __init__(self, service: Served) -> None:
        self.channel = grpc.insecure_channel(service.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.jobs = job_service_pb2_grpc.JobServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.server = server_service_pb2_grpc.ServerServiceStub(self.channel)

    def plan(self, place: Path, data: str = "reviews.csv", **settings: float) -> job_service_pb2.PlanJobRequest:
        job = job_pb2.Job()
        job.spec.fine_tuning.text_classification.pooling = 1
        job.spec.fine_tuning.text_classification.max_length = 16
        job.spec.model.uri = str(place / "bert")
        job.spec.train_data.uri = str(place / data)
        job.spec.optimization.max_steps = 4
        for name, value in settings.items():
            setattr(job.spec.optimization, name, value)
        request = job_service_pb2.PlanJobRequest(parent="projects/default", job=job)
        return self.jobs.PlanJob(request, timeout=60)

    def predict(self, model: str, *texts: str) -> model_service_pb2.PredictResponse:
        instances = [model_service_pb2.Instance(text=text) for text in texts]
        return self.models.Predict(model_service_pb2.PredictRequest(model=model, instances=instances), timeout=60)

    def embed(self, model: str, number: int) -> model_service_pb2.EmbedResponse:
        instances = [model_service_pb2.Instance(text=f"good film {index}") for index in range(number)]
        return self.models.Embed(model_service_pb2.EmbedRequest(model=model, instances=instances), timeout=60)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("hostile")
    settings = {"SHARDYARD_INSPECTION_S": str(LIMIT_S), "SHARDYARD_COMPUTE_MEMORY_BYTES": str(2**30)}
    with served(folder, "local", "--data-root", str(folder), environment=settings) as running:
        yield running


@pytest.fixture
def place(service: Served, request: pytest.FixtureRequest) -> Path:
    """A folder under the data root with a model and data, all in order."""
    folder = service.folder / f"place-{abs(hash(request.node.name))}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_folder(folder / "bert", "BertModel")
    (folder / "reviews.csv").write_text("text,label\n" + "good film,good\nbad film,bad\n" * 20)
    return folder


def refusal(call: Callable[[], object]) -> Failure:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return failure_of(raised.value)


class Bystander(threading.Thread):
    """Somebody else, who asks for other things all the time."""

    def __init__(self, service: Served, place: Path) -> None:
        super().__init__(daemon=True)
        self._service, self._place = service, place
        self._stop_asking = threading.Event()
        self.info_s: list[float] = []
        self.plans_s: list[float] = []
        self.failures: list[str] = []

    def run(self) -> None:
        caller, steps = Caller(self._service), 1e-5
        while not self._stop_asking.is_set():
            try:
                for times, ask in (
                    (self.info_s, lambda: caller.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())),
                    (self.plans_s, lambda steps=steps: caller.plan(self._place, learning_rate=steps)),
                ):
                    begin = self._service.computing_s()
                    ask()
                    times.append(self._service.computing_s() - begin)
            except grpc.RpcError as error:
                self.failures.append(str(error))
            steps += 1e-6
            time.sleep(0.05)

    def end(self) -> None:
        self._stop_asking.set()
        self.join(60)


@pytest.mark.parametrize(("change", "data", "reasons"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_an_input_that_stops_its_reader_is_refused_and_stops_no_other_call(
    service: Served, place: Path, change: Callable[[Path], None], data: str, reasons: set[str]
) -> None:
    other = service.folder / "other"
    if not other.exists():
        shutil.copytree(place, other)
    change(place)
    caller, bystander = Caller(service), Bystander(service, other)
    caller.plan(other)  # Starting the processes is not part of the inspection.
    bystander.start()
    begin = service.computing_s()
    failure = refusal(lambda: caller.plan(place, data))
    took_s = service.computing_s() - begin
    bystander.end()
    assert failure.code == grpc.StatusCode.INVALID_ARGUMENT, failure
    assert failure.reason in reasons, failure
    assert took_s < LATEST_S, took_s
    assert not bystander.failures and bystander.info_s and bystander.plans_s
    assert max(bystander.plans_s) < LATEST_S
    begin = service.computing_s()
    again = refusal(lambda: caller.plan(place, data))
    assert (again.reason, again.message) == (failure.reason, failure.message)
    assert service.computing_s() - begin < LIMIT_S / 2


def test_what_its_reader_died_of_names_the_file_and_the_next_step(service: Served, place: Path) -> None:
    slow_tokenizer(place)
    failure = refusal(lambda: Caller(service).plan(place))
    (field,) = failure.violations
    assert field.startswith("job.spec.")
    assert "reviews.csv" in failure.message or "tokenizer.json" in failure.message
    assert "takes more than" in failure.message


def test_a_sweep_of_learning_rates_is_planned_from_what_was_read_once(service: Served, place: Path) -> None:
    caller = Caller(service)
    first = caller.plan(place, learning_rate=1e-4)
    begin = service.computing_s()
    plans = [caller.plan(place, learning_rate=1e-4 + 1e-6 * index) for index in range(1, 20)]
    assert service.computing_s() - begin < LIMIT_S
    assert {plan.num_parameters for plan in plans} == {first.num_parameters}
    assert len({plan.resolved_spec.optimization.learning_rate for plan in plans}) == 19


def uploaded(service: Served, folder: Path) -> str:
    with shardyard.Client(service.address) as client:
        return client.upload_model(folder).name


def test_compute_processes_that_are_stopped_are_replaced_and_every_call_is_answered(
    service: Served, place: Path
) -> None:
    save_folder(place / "bert", "BertForSequenceClassification")
    model, caller = uploaded(service, place / "bert"), Caller(service)
    caller.plan(place, learning_rate=1e-4)
    before = caller.predict(model, "good film")
    assert service.process is not None
    stopped = psutil.Process(service.process.pid).children(recursive=True)
    for process in stopped:
        process.suspend()
    # Each within its time-out; one is for a process that was kept, one for the model's.
    assert caller.plan(place, learning_rate=2e-4).num_parameters
    assert caller.predict(model, "good film") == before
    assert not [process for process in stopped if process.is_running()]


def test_texts_that_stop_a_model_are_refused_and_stop_no_other_caller(service: Served, place: Path) -> None:
    save_folder(place / "bert", "BertForSequenceClassification")
    split_by(BACKTRACKING, "good")(place)
    model, caller, other = uploaded(service, place / "bert"), Caller(service), Caller(service)
    assert len(other.predict(model, "good film").predictions) == 1
    for text, how in (("a" * 5000, "tokenizer"), (("a" * 20 + " ") * 3000, "takes more than")):
        asked = [threading.Thread(target=other.predict, args=(model, "good film")) for _ in range(3)]
        for each in asked:
            each.start()
        failure = refusal(lambda text=text: caller.predict(model, *[text] * 8))
        for each in asked:
            each.join(60)
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MODEL_INVALID"), failure
        assert "model" in failure.violations and how in failure.message
        begin = service.computing_s()
        assert refusal(lambda text=text: caller.predict(model, *[text] * 8)).message == failure.message
        assert service.computing_s() - begin < LIMIT_S
        assert len(other.predict(model, "good film").predictions) == 1


def test_a_large_honest_question_is_answered_and_leaves_others_their_turn(service: Served, place: Path) -> None:
    save_folder(place / "bert", "BertModel", hidden_size=128, num_hidden_layers=4, intermediate_size=512)
    model, other = uploaded(service, place / "bert"), Caller(service)
    other.embed(model, 1)
    found: list[int] = []
    large = threading.Thread(target=lambda: found.append(len(Caller(service).embed(model, 1900).embeddings)))
    begin = time.monotonic()
    large.start()
    waits = []
    while large.is_alive():
        at = time.monotonic()
        other.embed(model, 1)
        other.server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
        waits.append(time.monotonic() - at)
    large.join()
    assert found == [1900]
    assert len(waits) > 1 and max(waits) < (time.monotonic() - begin) / 2


def test_the_service_says_what_its_processes_may_not_do(service: Served) -> None:
    Caller(service).server.GetServerInfo(server_service_pb2.GetServerInfoRequest())
    holds = Caller(service).server.GetServerInfo(server_service_pb2.GetServerInfoRequest()).confinement
    version = landlock_version()
    assert holds["landlock"] == (f"version {version}" if version else "not available: the kernel has none")
    done = service.run(str(BIN / "shardyard"), "doctor")
    assert "confinement: files" in done.stdout and holds["landlock"] in done.stdout
