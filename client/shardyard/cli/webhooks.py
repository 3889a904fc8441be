"""`webhooks`: where the events of a project are sent."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, Json, Project, open_client

if TYPE_CHECKING:
    from shardyard._sync.webhooks import Webhook

HELP = "Have the events of a project sent to a URL, signed and in order."
WebhookId = Annotated[str, typer.Argument(metavar="WEBHOOK", help="A webhook's id or full name.")]
Kinds = Annotated[list[str] | None, typer.Option("--kind", help="Only this kind, such as state; may be repeated.")]
After = Annotated[str | None, typer.Option("--after", metavar="CURSOR", help="Send all events after this cursor.")]


def create(
    webhook_id: Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="https://…")],
    *,
    kinds: Kinds = None,
    after: After = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Make a webhook, and print its secret, which is not shown again."""
    with open_client(address, project) as client:
        made = client.create_webhook(webhook_id, url, kinds=kinds or (), after=after or "")
    _print_secret(made, as_json=json)


def list_webhooks(address: Address = None, project: Project = "default", json: Json = False) -> None:
    """List the webhooks of a project."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        found = [(each.id, each.info) for each in client.webhooks()]
    if json:
        print_json([to_plain(info) for _, info in found])
        return
    rows = [
        (name, info.state, info.url, ", ".join(info.kinds) or "all", moment(info.last_delivery_time), info.message)
        for name, info in found
    ]
    print_table(("WEBHOOK", "STATE", "URL", "KINDS", "DELIVERED", "WHY"), rows, empty="no webhooks")


def get(webhook: WebhookId, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Show a webhook: its state, and how far it has delivered."""
    with open_client(address, project) as client:
        _print(client.webhook(webhook), as_json=json)


def update(
    webhook: WebhookId,
    *,
    url: Annotated[str | None, typer.Option("--url", help="Another URL.")] = None,
    kinds: Kinds = None,
    after: After = None,
    disable: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Send nothing, or continue.", show_default=False)
    ] = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Change a webhook; --enable continues where it stopped, --after CURSOR delivers again, or skips."""
    if url is None and kinds is None and after is None and disable is None:
        raise typer.BadParameter("give what to change: --url, --kind, --after, --enable or --disable")
    with open_client(address, project) as client:
        found = client.webhook(webhook)
        found.update(url=url, kinds=kinds, cursor=after, disabled=disable)
        _print(found, as_json=json)


def test(webhook: WebhookId, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Send one request of type webhook.test now; the exit code is 1 if it was not delivered."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        delivery = client.webhook(webhook).test()
    if json:
        print_json(to_plain(delivery))
    else:
        print(f"delivered: HTTP {delivery.status}" if delivery.delivered else f"not delivered: {delivery.message}")
    raise typer.Exit(0 if delivery.delivered else 1)


def deliveries(
    webhook: WebhookId,
    *,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Maximum number of attempts.")] = 20,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List the attempts at delivery, the newest first."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        found = list(itertools.islice(client.webhook(webhook).deliveries(), limit))
    if json:
        print_json([to_plain(each) for each in found])
        return
    rows = [
        (str(each.number), moment(each.time), each.type, str(each.attempt), str(each.status or ""), each.message)
        for each in found
    ]
    print_table(("NUMBER", "TIME", "TYPE", "ATTEMPT", "STATUS", "WHY"), rows, empty="no attempts yet")


def rotate(webhook: WebhookId, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Make a new secret and print it; for a day the old one signs too."""
    with open_client(address, project) as client:
        found = client.webhook(webhook)
        found.rotate_secret()
    _print_secret(found, as_json=json)


def delete(webhook: WebhookId, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Delete a webhook; nothing is sent any more."""
    from shardyard.cli.output import print_json

    with open_client(address, project) as client:
        found = client.webhook(webhook)
        found.delete()
    if json:
        print_json({"deleted": found.name})
    else:
        print(f"deleted {found.name}")


COMMANDS: tuple[tuple[str, Any], ...] = (
    ("create", create),
    ("list", list_webhooks),
    ("get", get),
    ("update", update),
    ("test", test),
    ("deliveries", deliveries),
    ("rotate", rotate),
    ("delete", delete),
)


def _print_secret(webhook: Webhook, *, as_json: bool) -> None:
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    if as_json:
        print_json(to_plain(webhook.info))
    else:
        print(f"{webhook.name}\n  secret: {webhook.secret}\n  keep it: it is not shown again")


def _print(webhook: Webhook, *, as_json: bool) -> None:
    from shardyard.cli.output import print_json, print_pairs
    from shardyard.cli.plain import to_plain

    info = webhook.info
    if as_json:
        print_json(to_plain(info))
        return
    print_pairs(
        [
            ("webhook", info.name),
            ("url", info.url),
            ("kinds", ", ".join(info.kinds) or "all"),
            ("state", info.state),
            ("why", info.message),
            ("failures", str(info.failures or "")),
            ("since", str(info.failing_since or "")),
            ("next", str(info.next_attempt_time or "")),
            ("delivered", str(info.last_delivery_time or "")),
            ("cursor", info.cursor),
        ]
    )
