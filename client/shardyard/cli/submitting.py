"""`submit` and `plan`: a spec file, flags, or a file with flags on top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.flags import JobFlags
from shardyard.cli.options import Address, Json, Project, a_path, command_line, open_client, with_options

if TYPE_CHECKING:
    from shardyard._parse import Draft
    from shardyard.specfile import SpecFile

SpecPath = Annotated[
    Path | None, typer.Argument(metavar="FILE.yaml", parser=a_path, help="A spec file; see examples/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Set a field, such as spec.optimization.max_steps=100."),
]


@with_options(JobFlags)
def submit(
    flags: JobFlags,
    file: SpecPath = None,
    *,
    sets: Overrides = None,
    job_id: Annotated[str | None, typer.Option("--job-id", "--name", help="The job's id [made from the task].")] = None,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Follow the job, or return at once.")] = True,
    plan: Annotated[str, typer.Option("--plan", metavar="ETAG", help="Only if it runs as in this plan.")] = "",
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Run all checks, but no job.")] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Submit a job from a spec file, or by flags.

    Flags override the file, --set overrides both. Ctrl-C stops watching, never the job.
    """
    import dataclasses

    from shardyard.cli.output import print_json_line
    from shardyard.cli.plain import to_plain
    from shardyard.cli.watching import follow
    from shardyard.errors import InvalidArgument

    source, draft = _draft(file, sets or [], flags, job_id, project)
    draft = dataclasses.replace(draft, plan_etag=plan)
    with open_client(address, project) as client:
        if draft.uploads and not json:
            for item in draft.uploads:
                print(f"uploading {item.path} (what the service already has is not sent again)")
        try:
            job = client.create_job(draft, validate_only=validate_only)
        except InvalidArgument as error:
            raise (source.located(error) if source else error) from None
        if json:
            print_json_line(to_plain(job.info))
        elif validate_only:
            print("valid: nothing was submitted")
        else:
            print(f"submitted {job.id}" + ("" if watch else f"\n  {command_line('watch', job.name, address=address)}"))
        if watch and not validate_only:
            raise typer.Exit(follow(job, as_json=json, address=address))


@with_options(JobFlags)
def plan(
    flags: JobFlags,
    file: SpecPath = None,
    *,
    sets: Overrides = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Show what a job would need; nothing runs."""
    from shardyard._convert import read, to_plain
    from shardyard.cli.output import print_json
    from shardyard.cli.plan_view import print_plan
    from shardyard.errors import InvalidArgument
    from shardyard.types import Plan

    source, draft = _draft(file, sets or [], flags, None, project)
    with open_client(address, project) as client:
        try:
            message = client.plan_message(draft)
        except InvalidArgument as error:
            raise (source.located(error) if source else error) from None
    if json:
        print_json(to_plain(message))
    else:
        print_plan(read(Plan, message))


def _draft(
    file: Path | None, sets: list[str], flags: JobFlags, job_id: str | None, project: str
) -> tuple[SpecFile | None, Draft]:
    """The job from file, flags and `--set`, in this order of precedence, the last winning.

    Raises: UsageError for errors found here, before anything is sent.
    """
    import dataclasses

    from shardyard._parse import draft_job
    from shardyard.cli.flags import UsageError
    from shardyard.errors import InvalidArgument
    from shardyard.specfile import read_spec_file

    given = flags.overrides()
    if file is None and not given and not sets:
        raise typer.BadParameter("give a spec file, or flags such as --task, --model and --train")
    try:
        source = read_spec_file(file) if file is not None else None
        data = _merged(source, flags, sets)
        source = source.with_data(data) if source else None
        draft = source.draft(project=project) if source else draft_job(data, base=Path.cwd(), project=project)
    except InvalidArgument as error:
        raise UsageError.of(error) from None
    return source, dataclasses.replace(draft, job_id=job_id) if job_id is not None else draft


def _merged(source: SpecFile | None, flags: JobFlags, sets: list[str]) -> dict[str, Any]:
    """The file's content, overridden by flags and `--set`.

    Raises: InvalidArgument, with the line if a value is in their way.
    """
    from shardyard.errors import InvalidArgument
    from shardyard.specfile import overridden

    try:
        data = flags.merged(source.data if source else {})
        for override in sets:
            data = overridden(data, override)
    except InvalidArgument as error:
        raise (source.located(error) if source else error) from None
    return data
