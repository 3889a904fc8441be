"""`jobs`, `get`, `logs`, `metrics`, `cancel`, `pause`, `resume`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Annotated

import typer

from shardyard.cli.options import Address, JobName, Json, Project, command_line, open_client

if TYPE_CHECKING:
    from shardyard.types import JobInfo


def list_jobs(
    *,
    filter: Annotated[str, typer.Option("--filter", help="Such as 'state = running AND labels.team = nlp'.")] = "",
    order_by: Annotated[str, typer.Option("--order-by", help="Such as 'create_time desc' [that].")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of jobs.")] = 50,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List jobs, the newest first."""
    from shardyard._lines import moment
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        found = client.jobs(filter=filter, order_by=order_by, page_size=min(limit, 1000))
        infos = [job.info for job in itertools.islice(found, limit)]
    if json:
        print_json([to_plain(info) for info in infos])
        return
    rows = [
        (info.id, info.state, _step(info), _loss(info), _numbers(info), moment(info.create_time), info.display_name)
        for info in infos
    ]
    print_table(("JOB", "STATE", "STEP", "LOSS", "EVALUATION", "CREATED", "NAME"), rows, empty="no jobs")


def get(job: JobName, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Show a job: its settings, progress and results."""
    from shardyard._lines import printable, sentences
    from shardyard.cli.output import print_json, print_pairs
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        info = client.job(job).info
    if json:
        print_json(to_plain(info))
        return
    failure = info.failure
    print_pairs(
        [
            ("job", info.name),
            ("uid", info.uid),
            ("name", info.display_name),
            ("state", info.state),
            ("waits", info.pending.message if info.pending else ""),
            ("step", _step(info)),
            ("loss", _loss(info)),
            ("evaluation", _numbers(info)),
            ("failure", f"{failure.reason}: {sentences(failure.message, failure.next_step)}" if failure else ""),
            ("attempts", str(info.attempt_count)),
            ("checkpoint", info.latest_checkpoint),
            ("model", info.model),
            ("data set", info.output_dataset),
            ("priority", info.priority),
            ("creator", info.creator),
            ("created", str(info.create_time or "")),
            ("ended", str(info.end_time or "")),
        ]
    )
    for condition in info.conditions:
        print(f"{condition.type}: {printable(condition.message)}")


def logs(
    job: JobName,
    *,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Continue until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Only this rank.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="Only this attempt.")] = None,
    level: Annotated[str | None, typer.Option("--level", help="At least debug, info, warning, or error.")] = None,
    tail: Annotated[int, typer.Option("--tail", "-n", min=0, help="Only this many last lines of each rank.")] = 0,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Print what the ranks of a job wrote."""
    from shardyard._lines import printable
    from shardyard.cli.output import print_json_line
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        lines = client.job(job).logs(follow=follow, rank=rank, attempt=attempt, level=level, tail=tail)
        for line in lines:
            if json:
                print_json_line(to_plain(line))
            else:
                print(f"[{line.attempt}/{line.rank}] {printable(line.text)}", flush=follow)


def metrics(
    job: JobName,
    names: Annotated[list[str] | None, typer.Argument(metavar="METRIC...", help="Such as loss [all].")] = None,
    *,
    max_points: Annotated[int, typer.Option("--max-points", min=3, help="Points per metric.")] = 1000,
    all_attempts: Annotated[bool, typer.Option("--all-attempts", help="Include points of lost attempts.")] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Show the metrics of a job, and their curves.

    With --json every point.
    """
    from shardyard._lines import curve
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        found = client.job(job).metrics(*(names or ()), max_points=max_points, all_attempts=all_attempts)
    if json:
        print_json([to_plain(series) for series in found.values()])
        return
    rows = []
    for name, series in found.items():
        values = [point.value for point in series.points]
        if values:
            numbers = (f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))
            rows.append((name, f"{series.total_points:,}", *numbers, curve(values)))
    print_table(("METRIC", "POINTS", "FIRST", "LAST", "LEAST", "MOST", "CURVE"), rows, empty="no metrics yet")


def cancel(
    names: Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids or full names of jobs.")],
    *,
    lost: Annotated[
        bool, typer.Option("--lost", help="Its gang is gone, but the cluster does not answer: end the job at once.")
    ] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Ask a job to end, or several: all of them, or none."""
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    if lost and len(names) > 1:
        raise typer.BadParameter("--lost is about one job; name that one alone")
    with open_client(address, project) as client:
        if len(names) == 1:
            _print_state(client.job(names[0]).cancel(lost=lost), as_json=json)
            return
        infos = client.cancel_all(names)
    if json:
        print_json([to_plain(info) for info in infos])
        return
    for info in infos:
        _print_state(info, as_json=False)


def pause(job: JobName, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Ask a job to make a checkpoint and free its slots."""
    with open_client(address, project) as client:
        info = client.job(job).pause()
    _print_state(info, as_json=json)
    if not json:
        print(f"  {command_line('resume', info.name, address=address)}")


def resume(job: JobName, address: Address = None, project: Project = "default", json: Json = False) -> None:
    """Continue a paused job from its newest checkpoint."""
    with open_client(address, project) as client:
        info = client.job(job).resume()
    _print_state(info, as_json=json)
    if not json:
        print(f"  {command_line('watch', info.name, '--after', str(info.last_event_sequence), address=address)}")


def _print_state(info: JobInfo, *, as_json: bool) -> None:
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    if as_json:
        print_json(to_plain(info))
    else:
        print(f"{info.id} is {info.state}")


def _step(info: JobInfo) -> str:
    return f"{info.progress.step:,}/{info.progress.total_steps:,}" if info.progress else ""


def _loss(info: JobInfo) -> str:
    return f"{info.progress.loss:.4g}" if info.progress else ""


def _numbers(info: JobInfo) -> str:
    from shardyard._lines import metrics_line

    return metrics_line(info.evaluation.metrics) if info.evaluation else ""
