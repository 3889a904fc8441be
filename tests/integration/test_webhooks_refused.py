"""Webhooks that are refused: requests against the rules, and addresses to which nothing may be sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from helpers.receivers import Listening, receiver
from helpers.service import PARENT, Service, refused, serving
from helpers.uploads import send_dataset
from helpers.webhook_calls import HOOK, PATIENT, SENDING, add, get, submit, until_state
from shardyard.v1 import webhook_service_pb2 as pb
from shardyard_coordinator.serve.app import Sending
from shardyard_coordinator.serve.delivering import Patience


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(tmp_path, webhook_allow=("127.0.0.1",), sending=SENDING) as running:
        await send_dataset(running, "corpus", {"a.txt": b"to be or not to be\n"})
        yield running


@pytest.fixture
def listening() -> Iterator[Listening]:
    with receiver() as made:
        yield made


async def test_a_repeated_create_is_one_webhook_and_another_request_is_refused(
    service: Service, listening: Listening
) -> None:
    request = pb.CreateWebhookRequest(
        parent=PARENT,
        webhook_id="hook",
        webhook=pb.Webhook(url=listening.url),
        request_id="6f1c1c4e-9d1b-4a53-9d3e-2f4c8f1f7a11",
    )
    first, second = [await service.webhooks.CreateWebhook(request) for _ in range(2)]
    assert (first.uid, first.secret) == (second.uid, second.secret)
    request.webhook.url += "&more"
    assert (await refused(service.webhooks.CreateWebhook(request))).reason == "REQUEST_ID_REUSED"
    request.request_id = ""
    assert (await refused(service.webhooks.CreateWebhook(request))).reason == "WEBHOOK_EXISTS"
    stale = pb.DeleteWebhookRequest(name=HOOK, etag="old")
    assert (await refused(service.webhooks.DeleteWebhook(stale))).reason == "ETAG_MISMATCH"
    await service.webhooks.DeleteWebhook(pb.DeleteWebhookRequest(name=HOOK, etag=first.etag))
    assert (await refused(service.webhooks.GetWebhook(pb.GetWebhookRequest(name=HOOK)))).reason == "WEBHOOK_NOT_FOUND"
    for at in range(20):
        await add(service, listening.url, f"hook-{at}", disabled=True)
    over = pb.CreateWebhookRequest(parent=PARENT, webhook_id="more", webhook=pb.Webhook(url=listening.url))
    assert (await refused(service.webhooks.CreateWebhook(over))).reason == "QUOTA_EXCEEDED"


BAD_URLS = {
    "": "is missing",
    "ftp://example.org/": "https://",
    "https://user:pw@example.org/": "user or password",
    "https://example.org/#part": "fragment",
    "https:///path": "no host",
    "https://example.org:99999/": "port",
    "https://example.org:0/": "port",
    "https://exa mple.org/": "characters",
    "https://exämple.org/": "ASCII",
    "https://example.org\\@127.0.0.1/": "characters",
    "javascript:alert(1)": "https://",
}


@pytest.mark.parametrize("url", BAD_URLS)
async def test_a_bad_url_is_refused_with_its_rule(service: Service, url: str) -> None:
    request = pb.CreateWebhookRequest(parent=PARENT, webhook_id="hook", webhook=pb.Webhook(url=url))
    failure = await refused(service.webhooks.CreateWebhook(request))
    assert failure.code.name == "INVALID_ARGUMENT" and BAD_URLS[url] in failure.violations["webhook.url"]


async def test_all_violations_come_at_once_and_masks_are_checked(service: Service, listening: Listening) -> None:
    bad = pb.CreateWebhookRequest(
        parent=PARENT, webhook_id="Hook", request_id="x", webhook=pb.Webhook(url="gopher://x", kinds=[99])
    )
    failure = await refused(service.webhooks.CreateWebhook(bad))
    assert set(failure.violations) == {"webhook_id", "request_id", "webhook.url", "webhook.kinds[0]"}
    await add(service, listening.url)
    for paths, field, words in (
        ([], "update_mask", "is missing"),
        (["urls"], "update_mask.paths[0]", "did you mean `url`"),
        (["url", "secret"], "update_mask.paths[1]", "cannot be changed"),
    ):
        request = pb.UpdateWebhookRequest(webhook=pb.Webhook(name=HOOK, url=listening.url))
        request.update_mask.paths.extend(paths)
        failure = await refused(service.webhooks.UpdateWebhook(request))
        assert list(failure.violations) == [field] and words in failure.violations[field]
    request = pb.UpdateWebhookRequest(webhook=pb.Webhook(name=HOOK, cursor="nonsense"))
    request.update_mask.paths.append("cursor")
    assert (await refused(service.webhooks.UpdateWebhook(request))).reason == "CURSOR_INVALID"


async def test_a_name_that_leads_elsewhere_later_is_not_followed(tmp_path: Path, listening: Listening) -> None:
    """DNS rebinding: public when it is checked, this machine when it is connected to."""
    found = ["8.8.8.8"]
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[str]:
        asked.append(host)
        return found

    sending = Sending(resolve=resolve, timeouts=PATIENT, patience=Patience(look_s=0.005))
    async with serving(tmp_path, sending=sending) as service:
        await send_dataset(service, "corpus", {"a.txt": b"x\n"})
        await add(service, f"https://rebinding.example:{listening.port}/")
        found[:] = ["8.8.8.8", "127.0.0.1"]  # One that is not public is enough.
        await submit(service)
        await until_state(service, pb.Webhook.STATE_FAILING)
        message = (await get(service)).message
        assert "not public" in message and "127.0.0.1" not in message
        assert asked == ["rebinding.example"] * 2 and listening.connections == 0
        for address in ("127.0.0.1", "169.254.169.254", "10.0.0.1", "::1", "::ffff:10.0.0.1", "fe80::1%eth0"):
            found[:] = [address]
            request = pb.CreateWebhookRequest(
                parent=PARENT, webhook_id="inside", webhook=pb.Webhook(url="https://inside.example/")
            )
            failure = await refused(service.webhooks.CreateWebhook(request))
            assert (failure.reason, list(failure.violations)) == ("ADDRESS_NOT_ALLOWED", ["webhook.url"])
            assert address not in failure.message
        found[:] = ["8.8.8.8"]
        clear = pb.CreateWebhookRequest(parent=PARENT, webhook_id="clear", webhook=pb.Webhook(url="http://x.example/"))
        assert "use https" in (await refused(service.webhooks.CreateWebhook(clear))).violations["webhook.url"]


async def test_https_is_spoken_or_nothing_is_sent(tmp_path: Path) -> None:
    with receiver() as plain:
        async with serving(tmp_path, webhook_allow=("127.0.0.0/8",), sending=SENDING) as service:
            await add(service, f"https://127.0.0.1:{plain.port}/")
            delivery = await service.webhooks.TestWebhook(pb.TestWebhookRequest(name=HOOK))
            assert not delivery.delivered and "TLS" in delivery.message and not plain.received
