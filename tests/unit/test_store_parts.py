"""Metrics, models and data sets, checkpoints and plans in the store."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from helpers.clock import ManualClock
from helpers.core import ACTOR, new_job
from helpers.plain_curves import plain_downsample, plain_one_curve
from helpers.stores import store_at
from shardyard.v1 import model_service_pb2
from shardyard_coordinator.domain.errors import Refused
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.domain.records import FileRecord, MetricPoint, NewUpload, ResourceKind, ResourceState
from shardyard_coordinator.domain.states import JobState
from shardyard_coordinator.seams import NullTrace
from shardyard_coordinator.store import curves, encode, jobs, metrics, resources, submissions
from shardyard_coordinator.store.store import Store, open_store

ON_BOTH_STORES = True

FILES = (FileRecord("a.json", 3, "0" * 64), FileRecord("b.bin", 5, "1" * 64))


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store(store_at(tmp_path), ManualClock(), NullTrace())
    yield opened
    await opened.close()


def points(attempt: int, steps: range) -> list[MetricPoint]:
    return [MetricPoint(attempt, step, step * 10, float(step * attempt)) for step in steps]


async def test_points_come_back_as_one_curve_in_which_the_highest_attempt_wins(store: Store) -> None:
    def add(conn: Any) -> None:
        metrics.add_points(conn, "job", "loss", points(1, range(1, 2501)))
        metrics.add_points(conn, "job", "loss", points(2, range(2001, 2601)))

    await store.write(add, ACTOR)
    [curve] = await store.read(lambda conn: metrics.query_metrics(conn, "job", ["loss"], max_points=100_000))
    assert [(p.step, p.attempt) for p in curve.points] == [(s, 1 if s <= 2000 else 2) for s in range(1, 2601)]
    [both] = await store.read(
        lambda conn: metrics.query_metrics(conn, "job", [], max_points=100_000, all_attempts=True)
    )
    assert both.total_points == 3100
    [part] = await store.read(lambda conn: metrics.query_metrics(conn, "job", [], min_step=5, max_step=7))
    assert [p.step for p in part.points] == [5, 6, 7]


async def test_an_unknown_metric_is_refused(store: Store) -> None:
    with pytest.raises(Refused) as refused:
        await store.read(lambda conn: metrics.query_metrics(conn, "job", ["los"]))
    assert refused.value.reason is Reason.METRIC_NOT_FOUND


async def test_a_follower_of_metrics_gets_every_point_once(store: Store) -> None:
    seen: list[MetricPoint] = []
    counts: dict[str, int] = {}
    everything: list[MetricPoint] = []
    for attempt, steps in [(1, range(1, 700)), (1, range(700, 1500)), (2, range(1200, 1300)), (3, range(1, 4))]:
        fresh = points(attempt, steps)
        everything += fresh
        await store.write(lambda conn, fresh=fresh: metrics.add_points(conn, "job", "loss", fresh), ACTOR)
        while True:
            series, counts = await store.read(
                lambda conn, at=counts: metrics.metrics_after(conn, "job", [], at, limit=333)
            )
            if not series:
                break
            seen += series[0].points
    assert seen == everything


def curve_of(points_: list[MetricPoint]) -> curves.Curve:
    columns = zip(*(dataclasses.astuple(point) for point in points_), strict=True) if points_ else ((),) * 4
    kinds = (np.int64, np.int64, np.int64, np.float64)
    return curves.Curve(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


VALUES = st.floats() | st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.0, 1.0])
POINTS = st.builds(MetricPoint, st.integers(1, 3), st.integers(0, 12), st.integers(0, 5), VALUES)


@given(st.lists(POINTS, max_size=60))
def test_a_curve_of_arrays_is_that_of_single_points(given_points: list[MetricPoint]) -> None:
    curve = curve_of(given_points)
    assert repr(list(curves.one_curve(curve).points())) == repr(plain_one_curve(given_points))
    ordered = sorted(given_points, key=lambda point: (point.step, point.attempt))
    assert repr(list(curves.by_step(curve).points())) == repr(ordered)
    kept = [point for point in given_points if 3 <= point.step <= 9]
    assert repr(list(curves.in_steps(curve, 3, 9).points())) == repr(kept)


@given(st.lists(VALUES, max_size=300), st.integers(3, 50))
def test_downsampling_keeps_extremes_the_last_and_the_limit(values: list[float], most: int) -> None:
    given_points = [MetricPoint(1, step, 0, value) for step, value in enumerate(values)]
    kept = list(curves.downsample(curve_of(given_points), most).points())
    assert repr(kept) == repr(plain_downsample(given_points, most))
    assert len(kept) <= most
    assert [p.step for p in kept] == sorted({p.step for p in kept})
    if values:
        assert kept[-1].step == given_points[-1].step
        real = [value for value in values if not math.isnan(value)]
        assert not real or max(p.value for p in kept if not math.isnan(p.value)) == max(real)


def test_downsampling_never_hides_a_loss_that_is_not_a_number() -> None:
    values = [1.0] * 500 + [float("nan")] + [1.0] * 499
    kept = curves.downsample(curve_of([MetricPoint(1, step, 0, value) for step, value in enumerate(values)]), 30)
    assert 500 in kept.step


def upload(resource_id: str = "data", request_id: str = "r-1", files: tuple[FileRecord, ...] = FILES) -> NewUpload:
    uid = f"{hash((resource_id, request_id)) & 0xFFFFFFFF:032x}"
    return NewUpload(ResourceKind.DATASET, "default", resource_id, uid, f"/s/{uid}", "", request_id, files)


async def test_an_upload_continues_with_its_request_id_and_files_only(store: Store) -> None:
    begin = await store.write(lambda conn: resources.begin_upload(conn, upload(), ACTOR, 1), ACTOR)
    await store.write(lambda conn: resources.commit_parts(conn, begin.uid, {"b.bin": 4}), ACTOR)
    await store.write(lambda conn: resources.commit_parts(conn, begin.uid, {"b.bin": 2}), ACTOR)
    again = await store.write(lambda conn: resources.begin_upload(conn, upload(), ACTOR, 2), ACTOR)
    assert again == begin
    files = await store.read(lambda conn: resources.list_files(conn, begin.uid))
    assert [file.committed_bytes for file in files] == [0, 4]
    for other, reason in [
        (upload(request_id="r-2"), Reason.DATASET_EXISTS),
        (upload(files=FILES[:1]), Reason.REQUEST_ID_REUSED),
    ]:
        with pytest.raises(Refused) as refused:
            await store.write(lambda conn, other=other: resources.begin_upload(conn, other, ACTOR, 3), ACTOR)
        assert refused.value.reason is reason


async def test_only_what_is_ready_is_listed_the_newest_first(store: Store) -> None:
    for name in ("one", "two", "three"):
        made = await store.write(lambda conn, n=name: resources.begin_upload(conn, upload(n), ACTOR, 1), ACTOR)
        if name != "two":
            await store.write(
                lambda conn, uid=made.uid: resources.finish_upload(conn, uid, b"", actor=ACTOR, now_us=1), ACTOR
            )
    page = await store.read(lambda conn: resources.list_resources(conn, ResourceKind.DATASET, "default", limit=1))
    assert [each.resource_id for each in page] == ["three"]
    rest = await store.read(
        lambda conn: resources.list_resources(conn, ResourceKind.DATASET, "default", after=page[0].id)
    )
    assert [each.resource_id for each in rest] == ["one"]
    assert (await store.read(lambda conn: resources.stale_uploads(conn, 2)))[0].resource_id == "two"


async def test_what_a_live_job_reads_cannot_be_deleted(store: Store) -> None:
    made = await store.write(lambda conn: resources.begin_upload(conn, upload(), ACTOR, 1), ACTOR)
    new = new_job(uses=(made.name,))
    create = lambda conn: submissions.create_job(conn, new, ACTOR, 1)  # noqa: E731
    with pytest.raises(Refused) as refused:
        await store.write(create, ACTOR)
    assert refused.value.reason is Reason.DATASET_NOT_READY
    await store.write(lambda conn: resources.finish_upload(conn, made.uid, b"", actor=ACTOR, now_us=1), ACTOR)
    await store.write(create, ACTOR)
    delete = partial(
        resources.begin_delete,
        kind=ResourceKind.DATASET,
        project="default",
        resource_id="data",
        actor=ACTOR,
        now_us=2,
    )
    with pytest.raises(Refused) as refused:
        await store.write(delete, ACTOR)
    assert refused.value.reason is Reason.DATASET_IN_USE
    assert refused.value.metadata["job"] == "projects/default/jobs/job"
    job = await store.write(lambda conn: jobs.request_cancel(conn, "default", "job", "", actor=ACTOR, now_us=2), ACTOR)
    assert job.state is JobState.CANCELLED
    gone = await store.write(delete, ACTOR)
    assert gone.state is ResourceState.DELETING
    fresh = await store.write(
        lambda conn: resources.begin_upload(conn, dataclasses.replace(upload(), uid="f" * 32), ACTOR, 3), ACTOR
    )
    await store.write(lambda conn: resources.finish_delete(conn, gone.uid), ACTOR)
    assert await store.read(lambda conn: resources.get_resource(conn, ResourceKind.DATASET, "default", "data")) == fresh


async def test_a_model_is_shown_as_it_was_described(store: Store) -> None:
    new = dataclasses.replace(upload("m"), kind=ResourceKind.MODEL)
    described = model_service_pb2.Model(model_type="bert", labels=["a", "b"], num_parameters=7)
    await store.write(lambda conn: resources.begin_upload(conn, new, ACTOR, 1), ACTOR)
    record = await store.write(
        lambda conn: resources.finish_upload(conn, new.uid, described.SerializeToString(), actor=ACTOR, now_us=1), ACTOR
    )
    files = await store.read(lambda conn: resources.list_files(conn, new.uid))
    shown = encode.resource_to_model(record, files)
    assert (shown.model_type, list(shown.labels), shown.num_parameters) == ("bert", ["a", "b"], 7)
    assert (shown.state, shown.size_bytes) == (model_service_pb2.Model.STATE_READY, 8)
    assert [(file.path, file.committed_bytes) for file in shown.files] == [("a.json", 3), ("b.bin", 5)]


async def test_a_plan_is_kept_under_its_fingerprint(store: Store) -> None:
    await store.write(lambda conn: resources.put_plan(conn, b"f", b"one", 1), ACTOR)
    await store.write(lambda conn: resources.put_plan(conn, b"f", b"two", 2), ACTOR)
    assert await store.read(lambda conn: resources.get_plan(conn, b"f")) == b"two"
    assert await store.read(lambda conn: resources.get_plan(conn, b"g")) is None
