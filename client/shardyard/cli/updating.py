"""`update` and `submit-all`: change a job, submit many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from shardyard.cli.options import Address, JobName, Json, Project, a_path, command_line, open_client

_NONE = "none"


def update(
    job: JobName,
    *,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Set a label; KEY= removes it.")
    ] = None,
    annotations: Annotated[
        list[str] | None, typer.Option("--annotation", metavar="KEY=VALUE", help="Set an annotation; KEY= removes it.")
    ] = None,
    display_name: Annotated[str | None, typer.Option("--display-name", help="A name for people.")] = None,
    external_uri: Annotated[str | None, typer.Option("--external-uri", help="A link back to a page of yours.")] = None,
    priority: Annotated[str | None, typer.Option("--priority", help="best_effort, normal, high or critical.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", help="Another queue.")] = None,
    max_run_time: Annotated[str | None, typer.Option("--max-run-time", help="Such as 2h; none: no limit.")] = None,
    retry_max: Annotated[str | None, typer.Option("--retry-max", help="Failed attempts; none: the default.")] = None,
    keep_last: Annotated[str | None, typer.Option("--keep-last", help="Checkpoints; none: the default.")] = None,
    etag: Annotated[str, typer.Option("--etag", help="Only if the job has not changed since.")] = "",
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Change a job: labels and links at any time, priority and limits until it has ended."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    fields: dict[str, Any] = {
        "labels": _pairs("--label", labels),
        "annotations": _pairs("--annotation", annotations),
        "display_name": display_name,
        "external_uri": external_uri,
        "priority": priority,
        "queue": queue,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    for name, text in (("max_run_time", max_run_time), ("retry_max", retry_max), ("keep_last", keep_last)):
        if text is not None:
            fields[name] = None if text == _NONE else text
    if not fields:
        raise typer.BadParameter("give what to change, such as --label team=nlp or --priority high")
    with open_client(address, project) as client:
        info = client.job(job).update(etag=etag, **fields)
    if json:
        print_json(to_plain(info))
    else:
        print(f"updated {info.id}: {', '.join(sorted(fields))}")


def submit_all(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.yaml...", parser=a_path, help="Spec files.")],
    *,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Run all checks, but no job.")] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Submit up to 100 spec files at once: all of them, or none."""
    from shardyard.cli.flags import UsageError
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain
    from shardyard.errors import InvalidArgument
    from shardyard.specfile import read_spec_file

    drafts = []
    for file in files:
        try:
            drafts.append(read_spec_file(file).draft(project=project))
        except InvalidArgument as error:
            raise UsageError.of(error) from None
    with open_client(address, project) as client:
        jobs = client.submit_all(drafts, validate_only=validate_only)
    if json:
        print_json([to_plain(job.info) for job in jobs])
    elif validate_only:
        print("valid: nothing was submitted")
    else:
        for job in jobs:
            print(f"submitted {job.id}\n  {command_line('watch', job.name, address=address)}")


def _pairs(flag: str, texts: list[str] | None) -> dict[str, str | None] | None:
    """KEY=VALUE as keys and values; a key without a value is to be removed."""
    if texts is None:
        return None
    found: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise typer.BadParameter(f"{flag} `{text}` is not KEY=VALUE; to remove a key, write KEY=")
        found[key] = value or None
    return found
