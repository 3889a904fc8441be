"""Webhooks through the front door: a real receiver, a clock that tests move, and receivers that fail in every way."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import shardyard
from helpers.receivers import Answer, Listening, Received, receiver
from helpers.service import PARENT, Service, refused, serving
from helpers.uploads import send_dataset
from helpers.webhook_calls import HOOK, PATIENT, SENDING, add, change, emit, get, submit, until, until_state
from shardyard.v1 import event_service_pb2, job_service_pb2
from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.app import Sending
from shardyard_coordinator.serve.delivering import Patience
from shardyard_coordinator.serve.receiver import Timeouts
from shardyard_coordinator.store import jobs, webhooks

EVER = 1e12
"""Seconds: the tests' clock began years ago."""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path, webhook_allow=("127.0.0.1",), sending=SENDING) as running:
        await send_dataset(running, "corpus", {"a.txt": b"to be or not to be\n"})
        yield running


@pytest.fixture
def listening() -> Iterator[Listening]:
    with receiver() as made:
        yield made


async def settled(service: Service, listening: Listening) -> pb.Webhook:
    """The webhook, which fails, once nothing is due at this time of the clock: its attempts are made and recorded."""
    while True:
        webhook = await get(service)
        if webhook.disabled:
            return webhook
        is_due = webhook.next_attempt_time.ToMicroseconds() <= service.clock.now_us()
        if webhook.failures == len(listening.received) and not is_due:
            return webhook
        await asyncio.sleep(0.005)


async def all_ids(service: Service) -> list[str]:
    page = await service.events.ListEvents(event_service_pb2.ListEventsRequest(parent=PARENT, page_size=1000))
    return [each.event.id for each in page.events]


def signed_by(secret: str, request: Received) -> bool:
    """By the words of the specification, without the code under test."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{request.id}.{request.headers['webhook-timestamp']}.".encode() + request.body
    expected = "v1," + base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return expected in request.headers["webhook-signature"].split(" ")


async def test_every_event_arrives_once_in_order_and_signed(service: Service, listening: Listening) -> None:
    webhook = await add(service, listening.url)
    assert webhook.secret.startswith("whsec_") and webhook.state == pb.Webhook.STATE_ACTIVE
    job = await submit(service)
    await emit(service, job, 20)
    await until(lambda: len(listening.received) == 21)
    assert listening.accepted == [each.id for each in listening.received] == await all_ids(service)
    assert all(signed_by(webhook.secret, each) for each in listening.received)
    first = listening.received[0]
    assert (first.path, first.headers["content-type"]) == ("/hook?from=shardyard", "application/json")
    assert first.payload["type"] == "job.state" and first.payload["timestamp"].endswith("Z")
    assert first.payload["data"]["job"] == job.name and first.payload["data"]["event"]["sequence"] == "1"
    assert listening.received[-1].payload["data"]["event"]["progress"]["loss"] == "NaN"
    assert listening.connections < 21  # One connection serves requests that follow each other.
    event = shardyard.read_webhook(webhook.secret, first.headers, first.body, tolerance_s=EVER)
    assert event is not None and (event.job, event.event.id, event.event.state) == (job.name, first.id, "queued")
    later = event_service_pb2.ListEventsRequest(parent=PARENT, after_cursor=event.cursor)
    assert len((await service.events.ListEvents(later)).events) == 20
    for body, headers in ((first.body + b" ", first.headers), (first.body, {**first.headers, "webhook-id": "x"})):
        with pytest.raises(shardyard.Unauthenticated, match="not signed"):
            shardyard.read_webhook(webhook.secret, headers, body, tolerance_s=EVER)
    with pytest.raises(shardyard.Unauthenticated, match="clock"):
        shardyard.read_webhook(webhook.secret, first.headers, first.body)
    with pytest.raises(shardyard.Unauthenticated):
        shardyard.read_webhook(webhook.secret, {"webhook-timestamp": "NaN", "webhook-id": "x"}, b"{}")


async def test_a_receiver_that_fails_for_an_hour_gets_every_event_afterwards(
    service: Service, listening: Listening
) -> None:
    down = True
    listening.answer = lambda _: 503 if down else 200
    await add(service, listening.url)
    job = await submit(service)
    for minute in range(60):
        await emit(service, job, 2)
        failing = await settled(service, listening)
        if minute < 59:
            service.clock.advance(60)
    assert failing.state == pb.Webhook.STATE_FAILING and "HTTP 503" in failing.message
    assert 12 <= failing.failures <= 40 and failing.failures == len(listening.received)
    assert {each.id for each in listening.received} == {f"{job.uid}-1"}
    down = False
    service.clock.advance(300)
    await until(lambda: len(listening.accepted) == 121)
    assert listening.accepted == await all_ids(service)
    well = await get(service)
    assert (well.state, well.failures, well.message) == (pb.Webhook.STATE_ACTIVE, 0, "")
    deliveries = await service.webhooks.ListDeliveries(pb.ListDeliveriesRequest(parent=HOOK, page_size=1000))
    numbers = [each.number for each in deliveries.deliveries]
    assert numbers == sorted(numbers, reverse=True) and len(numbers) == len(listening.received)
    assert [each.delivered for each in deliveries.deliveries].count(False) == failing.failures


async def test_after_a_day_of_failures_it_is_disabled_and_continues_where_it_stopped(
    tmp_path: Path, listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    sending = Sending(timeouts=PATIENT, patience=Patience(longest_s=7200.0, look_s=0.005))
    listening.answer = lambda _: 500
    async with serving(tmp_path, webhook_allow=("127.0.0.1",), sending=sending) as service:
        await send_dataset(service, "corpus", {"a.txt": b"x\n"})
        made = await add(service, listening.url)
        job = await submit(service)
        await emit(service, job, 3)
        webhook = await settled(service, listening)
        while webhook.state != pb.Webhook.STATE_DISABLED:
            service.clock.advance(1800)
            webhook = await settled(service, listening)
        assert webhook.disabled and "has failed for a day" in webhook.message
        failing_us = service.clock.now_us() - webhook.failing_since.ToMicroseconds()
        assert 86_400e6 <= failing_us <= 1.3 * 86_400e6
        warned = [each.getMessage() for each in caplog.records if "is disabled" in each.getMessage()]
        assert len(warned) == 1 and made.secret not in caplog.text and listening.url not in caplog.text
        sent = len(listening.received)
        service.clock.advance(100_000)
        await asyncio.sleep(0.05)
        assert len(listening.received) == sent
        # What was before does not count: another failure does not disable it again.
        again = await change(service, disabled=False)
        assert again.state == pb.Webhook.STATE_ACTIVE
        await until_state(service, pb.Webhook.STATE_FAILING)
        listening.answer = lambda _: 200
        service.clock.advance(2)
        await until(lambda: len(listening.accepted) == 4)
        assert listening.accepted == await all_ids(service)


async def test_a_dead_receiver_costs_nobody_else_anything(service: Service, listening: Listening) -> None:
    with receiver() as slow:
        slow.hold_s = 20.0
        await add(service, slow.url, "slow")
        await add(service, "http://127.0.0.1:1/", "dead")
        await add(service, listening.url)
        job = await submit(service)
        await emit(service, job, 50)
        await until(lambda: len(listening.accepted) == 51)
        assert len(slow.received) <= 2
    page = await service.webhooks.ListWebhooks(pb.ListWebhooksRequest(parent=PARENT, page_size=2))
    rest = pb.ListWebhooksRequest(parent=PARENT, page_size=2, page_token=page.next_page_token)
    found = [*page.webhooks, *(await service.webhooks.ListWebhooks(rest)).webhooks]
    assert [each.name.rsplit("/")[-1] for each in found] == ["slow", "dead", "hook"]
    assert "refused" in found[1].message and not any(each.secret for each in found)


BAD_ANSWERS: dict[str, tuple[Answer, str]] = {
    "redirect": ((302, {"location": "http://127.0.0.1:9/"}, b""), "redirects are not followed"),
    "not found": (404, "HTTP 404"),
    "not modified": (304, "HTTP 304"),
}


@pytest.mark.parametrize("row", BAD_ANSWERS)
async def test_an_answer_other_than_2xx_is_a_failure(service: Service, listening: Listening, row: str) -> None:
    answer, words = BAD_ANSWERS[row]
    listening.answer = lambda _: answer
    await add(service, listening.url)
    await submit(service)
    await until(lambda: bool(listening.received))
    await until_state(service, pb.Webhook.STATE_FAILING)
    assert words in (await get(service)).message


async def test_410_disables_at_once_and_a_delay_is_respected(service: Service, listening: Listening) -> None:
    listening.answer = lambda _: (429, {"retry-after": "120"}, b"later")
    await add(service, listening.url)
    await submit(service)
    await until_state(service, pb.Webhook.STATE_FAILING)
    due_us = (await get(service)).next_attempt_time.ToMicroseconds()
    assert due_us - service.clock.now_us() == pytest.approx(120e6, abs=1e6)
    listening.answer = lambda _: 410
    service.clock.advance(121)
    await until_state(service, pb.Webhook.STATE_DISABLED)
    assert "410 Gone" in (await get(service)).message and len(listening.received) == 2


@pytest.mark.parametrize("size", [100, 5_000_000])
async def test_a_long_answer_is_not_read_but_counts(service: Service, listening: Listening, size: int) -> None:
    listening.answer = lambda _: (200, {}, b"x" * size)
    await add(service, listening.url)
    job = await submit(service)
    await emit(service, job, 3)
    await until(lambda: len(listening.accepted) == 4)
    assert (await get(service)).failures == 0


async def test_what_is_not_http_or_never_ends_is_a_failure(tmp_path: Path) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answers.pop(0))
        await writer.drain()
        await over.wait()
        writer.close()

    over = asyncio.Event()
    answers = [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
        b"HTTP/1.1 200",
    ]
    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    sending = Sending(timeouts=Timeouts(connect_s=3.0, answer_s=3.0))
    async with serving(tmp_path, webhook_allow=("127.0.0.1",), sending=sending) as service:
        await add(service, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        messages = []
        for _ in range(4):
            delivery = await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
            assert not delivery.delivered
            messages.append(delivery.message)
    assert messages == ["the answer is not HTTP/1.1"] * 3 + ["no answer within 3 s"]
    over.set()
    server.close()


async def test_an_update_wins_over_the_request_that_is_being_sent(service: Service, listening: Listening) -> None:
    job = await submit(service)
    await emit(service, job, 4)
    start = (await service.events.ListEvents(event_service_pb2.ListEventsRequest(parent=PARENT, page_size=1))).cursor
    listening.hold_s = 0.2
    await add(service, listening.url)
    await emit(service, job, 1)
    await until(lambda: bool(listening.received))
    updated = await change(service, cursor=start)  # While the sixth event is being sent.
    assert updated.cursor == start
    listening.hold_s = 0.0
    await until(lambda: len(listening.received) == 6)
    assert [each.id for each in listening.received[1:]] == (await all_ids(service))[1:]


async def test_kinds_are_chosen_and_what_is_passed_is_written_down(service: Service, listening: Listening) -> None:
    made = await add(service, listening.url, kinds=[job_service_pb2.EVENT_KIND_STATE])
    job = await submit(service)
    await emit(service, job, 700)
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=job.name))
    await until(lambda: len(listening.accepted) == 2)
    assert [each.payload["type"] for each in listening.received] == ["job.state"] * 2
    await emit(service, job, 10)
    left = [made.cursor]
    while left:  # How far it has looked is written down although nothing was sent.
        request = event_service_pb2.ListEventsRequest(parent=PARENT, after_cursor=(await get(service)).cursor)
        left = [each.cursor for each in (await service.events.ListEvents(request)).events]
        await asyncio.sleep(0.01)
    assert len(listening.received) == 2


async def test_a_rotated_secret_signs_beside_the_new_one_for_a_day(service: Service, listening: Listening) -> None:
    old = (await add(service, listening.url)).secret
    new = (await service.webhooks.RotateWebhookSecret(pb.RotateWebhookSecretRequest(name=HOOK))).secret
    assert new != old
    await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
    service.clock.advance(86_401)
    await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
    during, after = listening.received
    assert [signed_by(key, during) for key in (old, new)] == [True, True]
    assert [signed_by(key, after) for key in (old, new)] == [False, True]
    assert shardyard.read_webhook(old, during.headers, during.body, tolerance_s=EVER) is None  # A test.


async def test_a_test_moves_nothing_and_wakes_a_webhook_that_waits(service: Service, listening: Listening) -> None:
    listening.answer = lambda _: 500
    made = await add(service, listening.url)
    job = await submit(service)
    await until_state(service, pb.Webhook.STATE_FAILING)
    failed = await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
    assert (failed.delivered, failed.status, failed.type) == (False, 500, "webhook.test")
    assert (await get(service)).cursor == made.cursor
    listening.answer = lambda _: 204
    worked = await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
    assert worked.delivered and worked.number > failed.number
    await until(lambda: f"{job.uid}-1" in listening.accepted)  # Although its wait is not over.


async def test_what_a_webhook_has_not_delivered_is_not_removed(service: Service, listening: Listening) -> None:
    await add(service, listening.url, disabled=True)
    job = await submit(service)
    await emit(service, job, 5)
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=job.name))
    await service.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name=job.name))
    await service.store.write(lambda conn: jobs.purge_job(conn, job.uid), SYSTEM)
    assert len(await all_ids(service)) == 8
    await change(service, disabled=False)
    await until(lambda: len(listening.accepted) == 8)
    assert listening.received[-1].payload["data"]["job"] == job.name
    await service.store.write(lambda conn: jobs.purge_job(conn, job.uid), SYSTEM)
    assert await all_ids(service) == []


async def test_after_a_week_a_disabled_webhook_holds_nothing_and_says_so(
    service: Service, listening: Listening
) -> None:
    await add(service, listening.url, disabled=True)
    job = await submit(service)
    await service.jobs.CancelJob(job_service_pb2.CancelJobRequest(name=job.name))
    await service.jobs.DeleteJob(job_service_pb2.DeleteJobRequest(name=job.name))
    service.clock.advance(8 * 86_400)
    await service.store.write(lambda conn: webhooks.release_old(conn, service.clock.now_us()), SYSTEM)
    await service.store.write(lambda conn: jobs.purge_job(conn, job.uid), SYSTEM)
    request = pb.UpdateWebhookRequest(webhook=pb.Webhook(name=HOOK))
    request.update_mask.paths.append("disabled")
    failure = await refused(service.webhooks.UpdateWebhook(request))
    assert failure.reason == "CURSOR_EXPIRED" and "webhook.cursor" in failure.violations
    updated = await change(service, "disabled", "cursor", cursor=failure.metadata["cursor"])
    assert updated.state == pb.Webhook.STATE_ACTIVE
    job = await submit(service, "next")
    await until(lambda: f"{job.uid}-1" in listening.accepted)
