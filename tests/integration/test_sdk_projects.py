"""The SDK and the command line on a project: its events through a restart, webhooks, updates and batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.receivers import receiver
from helpers.service import PARENT, QUICK, Service, _slots, create, serving
from helpers.uploads import send_dataset
from shardyard.cli.app import run
from shardyard.v1 import job_pb2
from shardyard_coordinator.domain.records import EventKind
from shardyard_coordinator.seams import SYSTEM
from shardyard_coordinator.serve.access import Access
from shardyard_coordinator.serve.app import App, Info, make_door
from shardyard_coordinator.serve.protection import Authentication
from shardyard_coordinator.store import encode, events


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path, webhook_allow=("127.0.0.1",)) as running:
        await send_dataset(running, "corpus", {"a.txt": b"to be or not to be\n"})
        yield running


def draft(job_id: str) -> dict[str, Any]:
    """A spec file's content."""
    made = create(job_id).job
    return {
        "job_id": job_id,
        "job": {
            "spec": {
                "pretraining": {"causal_lm": {}},
                "model": {"architecture": {"model_type": "gpt2"}},
                "tokenizer": {"train": {}},
                "train_data": "dataset:corpus",
                "optimization": {"max_steps": made.spec.optimization.max_steps},
            }
        },
    }


async def emit(service: Service, job: shardyard.AsyncJob, count: int) -> None:
    drafts = [
        encode.draft(EventKind.PROGRESS, job_pb2.JobEvent(progress=job_pb2.Progress(step=step)), 1)
        for step in range(count)
    ]
    await service.store.write(lambda conn: events.append(conn, job.uid, drafts, service.clock.now_us()), SYSTEM)


async def test_a_project_is_followed_through_a_restart_each_event_once(service: Service) -> None:
    async with shardyard.AsyncClient(f"127.0.0.1:{service.port}") as client:
        first, second = await client.submit_all([draft("first"), draft("second")])
        seen: list[shardyard.ProjectEvent] = []

        async def follow() -> None:
            async for event in client.watch_events(min_interval=0.05):
                seen.append(event)
                if len(seen) == 42:
                    return

        following = asyncio.create_task(follow())
        await emit(service, first, 20)
        while len(seen) < 12:
            await asyncio.sleep(0.01)
        await service.app.stop(0)
        await emit(service, second, 20)
        door = make_door(service.parts.limits, Access(Authentication(), service.clock))
        await door.start(f"127.0.0.1:{service.port}")
        again = App(service.parts, Info(slots=_slots), QUICK, door=door)
        await again.start()
        again.health.set_serving(True)
        await asyncio.wait_for(following, 30)
        assert len({event.event.id for event in seen}) == 42
        for job in (first, second):
            assert [each.event.sequence for each in seen if each.job_uid == job.uid] == list(range(1, 22))
        listed = [event.event.id async for event in client.events()]
        assert listed == [event.event.id for event in seen]
        rest = [event.event.id async for event in client.events(after=seen[30].cursor, page_size=3)]
        assert rest == listed[31:]
        newest = [event.event.id async for event in client.events(newest_first=True, kinds=["state"])]
        assert newest == [f"{second.uid}-1", f"{first.uid}-1"]
        assert str(seen[0]).startswith("first") and seen[0].job_id == "first"
        await again.stop(0)


async def test_jobs_are_updated_and_cancelled_by_the_sdk(service: Service) -> None:
    async with shardyard.AsyncClient(f"127.0.0.1:{service.port}") as client:
        jobs = await client.submit_all([draft(f"job-{at}") for at in range(3)])
        job = jobs[0]
        info = await job.update(
            labels={"team": "nlp", "gone": "x"}, annotations={"ticket": "7"}, external_uri="https://example.org/7",
            priority="high", retry_max=3, max_run_time="2h", keep_last=5, display_name="Seven",
        )  # fmt: skip
        assert (info.labels, info.priority, info.display_name) == ({"team": "nlp", "gone": "x"}, "high", "Seven")
        assert info.spec is not None and info.spec["max_run_time"] == "7200s" and info.spec["retry"] == {"max": 3}
        info = await job.update(labels={"gone": None}, max_run_time=None, etag=info.etag)
        assert info.labels == {"team": "nlp"} and info.spec is not None and "max_run_time" not in info.spec
        with pytest.raises(shardyard.Aborted) as stale:
            await job.update(labels={"a": "b"}, etag="old")
        assert stale.value.reason == "ETAG_MISMATCH"
        with pytest.raises(shardyard.InvalidArgument) as bad:
            await job.update(priority="urgent", keep_last="many")  # type: ignore[arg-type]
        assert {each.field for each in bad.value.violations} == {"job.priority", "job.spec.checkpoints.keep_last"}
        with pytest.raises(TypeError, match="no field `state`"):
            await job.update(state="failed")  # type: ignore[call-arg]
        assert [each.id async for each in client.jobs(filter="annotations.ticket = 7")] == ["job-0"]
        found = [event.event async for event in client.events(kinds=["updated"])]
        assert [str(event).split("  ")[-1] for event in found][1] == "updated by local: labels.gone, spec.max_run_time"
        with pytest.raises(shardyard.NotFound) as missing:
            await client.cancel_all([*jobs, "none"])
        assert [each.field for each in missing.value.violations] == ["names[3]"]
        assert {info.state for info in await client.cancel_all(jobs)} == {"cancelled"}
        with pytest.raises(shardyard.NotFound) as refused:
            await client.submit_all([draft("a"), {"job": {**draft("b")["job"], "queue": "none"}}])
        assert [each.field for each in refused.value.violations] == ["requests[1].job.queue"]


async def test_webhooks_by_the_sdk(service: Service) -> None:
    with receiver() as listening:
        async with shardyard.AsyncClient(f"127.0.0.1:{service.port}") as client:
            webhook = await client.create_webhook("hook", listening.url, kinds=["state"])
            assert webhook.secret and webhook.info.kinds == ("state",) and webhook.info.state == "active"
            delivery = await webhook.test()
            assert delivery.delivered and delivery.duration is not None
            test = listening.received[0]
            assert shardyard.read_webhook(webhook.secret, test.headers, test.body, tolerance_s=1e12) is None
            assert (await webhook.update(disabled=True)).state == "disabled"
            await client.submit_all([draft("story")])
            assert (await webhook.update(disabled=False, kinds=["state", "progress"])).kinds == ("state", "progress")
            # A request that is not recorded yet when the webhook changes is sent again.
            while len(delivered := [each.delivered async for each in webhook.deliveries()]) < 2:
                await asyncio.sleep(0.01)
            old = webhook.secret
            assert await webhook.rotate_secret() != old and delivered == [True, True]
            assert [each.name async for each in client.webhooks()] == [f"{PARENT}/webhooks/hook"]
            read = await client.webhook("hook")
            assert read.secret == "" and read.info.last_delivery_time is not None
            await read.delete()
            with pytest.raises(shardyard.NotFound):
                await webhook.refresh()


async def test_the_commands(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDYARD_ADDRESS", f"127.0.0.1:{service.port}")

    async def shell(*arguments: str, code: int = 0) -> str:
        assert await asyncio.to_thread(run, arguments) == code, capsys.readouterr()
        return capsys.readouterr().out

    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(draft(name)))
    files = [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml")]
    assert "nothing was submitted" in await shell("submit-all", *files, "--validate-only")
    assert "submitted two" in await shell("submit-all", *files)
    await shell(
        "update", "one", "--label", "team=nlp", "--priority", "high", "--max-run-time", "2h", "--retry-max", "1"
    )
    shown = json.loads(await shell("update", "one", "--label", "team=", "--max-run-time", "none", "--json"))
    assert (shown["labels"], shown["priority"]) == ({}, "high") and "max_run_time" not in shown["spec"]
    assert "is cancelled" in await shell("cancel", "one", "two")
    lines = [json.loads(line) for line in (await shell("events", "--json")).splitlines()]
    assert lines[-1]["event"]["state"]["to"] == "cancelled" and lines[0]["job"] == f"{PARENT}/jobs/one"
    after = await shell("events", "--after", lines[1]["cursor"], "--kind", "updated")
    assert after.count("updated by local") == 2
    with receiver() as listening:
        assert "whsec_" in await shell("webhooks", "create", "hook", listening.url, "--kind", "state")
        assert "delivered: HTTP 204" in await shell("webhooks", "test", "hook")
        assert "active" in await shell("webhooks", "list") and "whsec_" not in await shell("webhooks", "get", "hook")
        assert "disabled" in await shell("webhooks", "update", "hook", "--disable")
        assert "active" in await shell("webhooks", "update", "hook", "--enable", "--after", lines[0]["cursor"])
        while len(listening.received) < 4:  # The test, and three states after the first event.
            await asyncio.sleep(0.01)
        assert "webhook.test" in await shell("webhooks", "deliveries", "hook")
        assert "whsec_" in await shell("webhooks", "rotate", "hook")
    assert "not delivered" in await shell("webhooks", "test", "hook", code=1)
    assert "deleted" in await shell("webhooks", "delete", "hook")
    for wrong in (["update", "one"], ["update", "one", "--label", "team"], ["webhooks", "update", "hook"]):
        await shell(*wrong, code=2)
