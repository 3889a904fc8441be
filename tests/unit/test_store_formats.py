"""Formats in the store: one writer of each at a time, and files, bytes and receipt that change together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest_asyncio
from sqlalchemy import Connection

from helpers.clock import ManualClock
from helpers.core import ACTOR, add_model, new_job
from helpers.stores import store_at
from shardyard.export_formats import prefix_of, word_of, words
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard_coordinator.control.formats import part_of
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import CreatedJob, FileRecord, NewJob, ResourceRecord
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store import encode, jobs, resources, submissions
from shardyard_coordinator.store.store import Store, open_store
from shardyard_coordinator.store.submissions import Submission

ON_BOTH_STORES = True

MODEL = "projects/default/models/m"
INT8, BF16 = spec_pb2.EXPORT_FORMAT_ONNX_INT8, spec_pb2.EXPORT_FORMAT_BF16


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    await opened.write(add_model, ACTOR)
    yield opened
    await opened.close()


async def accept(store: Store, *new: NewJob) -> Sequence[CreatedJob | Exception]:
    together = [Submission(each, ACTOR) for each in new]
    return await store.write(lambda conn: submissions.create_jobs(conn, together, 1), ACTOR)


def writer(job_id: str, number: int, **others: object) -> NewJob:
    spec = spec_pb2.JobSpec(model=spec_pb2.ModelSource(model=MODEL))
    spec.model_export.format = number  # type: ignore[assignment]
    return new_job(job_id, uses=(MODEL,), adds=part_of(spec), **others)


def test_a_format_has_one_word_everywhere() -> None:
    assert words() == ("onnx", "onnx-int8", "bf16")
    assert (word_of(INT8), prefix_of(INT8)) == ("onnx-int8", "exports/onnx-int8/")
    assert part_of(spec_pb2.JobSpec(model=spec_pb2.ModelSource(model=MODEL))) == ""


async def test_one_job_at_a_time_writes_a_format_of_a_model(store: Store) -> None:
    first, same, other = await accept(store, writer("a", INT8), writer("b", INT8), writer("c", BF16))
    assert isinstance(first, CreatedJob) and isinstance(other, CreatedJob)
    assert isinstance(same, Refused) and same.reason is Reason.MODEL_IN_USE
    (late, again) = await accept(store, writer("d", INT8), writer("e", BF16, request_id="r", fingerprint=b"one"))
    assert isinstance(late, Refused) and "jobs/a writes" in late.message and isinstance(again, Refused)
    await store.write(lambda conn: jobs.request_cancel(conn, "default", "a", "", actor=ACTOR, now_us=2), ACTOR)
    (retried,) = await accept(store, writer("d", INT8, request_id="s", fingerprint=b"two"))
    assert isinstance(retried, CreatedJob)
    # The same request is the same job, though a live one writes the format: it is that job.
    (repeated,) = await accept(store, writer("d", INT8, request_id="s", fingerprint=b"two"))
    assert isinstance(repeated, CreatedJob) and repeated.existed and repeated.job.uid == retried.job.uid


async def test_a_format_replaces_its_files_bytes_and_receipt_and_no_others(store: Store) -> None:
    def add(number: int, *sizes: int, drop: float) -> Callable[[Connection], ResourceRecord]:
        def write(conn: Connection) -> ResourceRecord:
            record = resources.ready_resource(conn, MODEL)
            prefix = prefix_of(number)
            files = [FileRecord(f"{prefix}{at}", size, "0" * 64) for at, size in enumerate(sizes)]
            receipt = model_service_pb2.ModelExport(format=number, prefix=prefix, drop=drop)  # type: ignore[arg-type]
            described = encode.with_export(record.description, receipt)
            return resources.replace_part(conn, record, prefix, files, description=described)

        return write

    def add_another(conn: Connection) -> ResourceRecord:
        record, name = resources.ready_resource(conn, MODEL), "Exports/bf16/0"
        file = FileRecord(name, 1, "0" * 64)
        return resources.replace_part(conn, record, name, [file], description=record.description)

    await store.write(add_another, ACTOR)
    before = await store.read(lambda conn: resources.list_files(conn, resources.ready_resource(conn, MODEL).uid))
    own = sum(file.size_bytes for file in before)
    for change, size in (
        (add(INT8, 5, 6, 7, drop=0.1), 18),
        (add(BF16, 10, drop=0.2), 28),
        (add(INT8, 3, drop=0.3), 13),
    ):
        record = await store.write(change, ACTOR)
        assert record.size_bytes == own + size
    files = await store.read(lambda conn: resources.list_files(conn, record.uid))
    assert {file.path for file in files} == {*(file.path for file in before), "exports/bf16/0", "exports/onnx-int8/0"}
    model = encode.resource_to_model(record, files)
    assert [(word_of(each.format), each.drop) for each in model.exports] == [("bf16", 0.2), ("onnx-int8", 0.3)]
    assert await store.read(lambda conn: resources.held_bytes(conn, "default")) == own + 13
