"""`export` and `copy`: a model in another format, how formats compare with their model, and models on object stores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from shardyard.cli.options import Address, Json, ModelName, Project, command_line, open_client

if TYPE_CHECKING:
    from shardyard.types import ExportedFormat


def export(
    model: ModelName,
    *,
    format: Annotated[str, typer.Option("--format", help="onnx, onnx-int8, or bf16.")],
    data: Annotated[
        str | None, typer.Option("--data", help="What both are measured on [the evaluation data of its training].")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", help="How much worse the metric may be, such as 0.01 [any].")
    ] = None,
    metric: Annotated[str, typer.Option("--metric", help="The metric compared [the first after the loss].")] = "",
    job_id: Annotated[str | None, typer.Option("--job-id", "--name", help="The job's id [made from the task].")] = None,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Follow the job, or return at once.")] = True,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Write a model in another format, measure both, and add it to the model.

    Ctrl-C stops watching, never the job.
    """
    from shardyard.cli.output import print_json_line
    from shardyard.cli.plain import to_plain
    from shardyard.cli.watching import follow

    with open_client(address, project) as client:
        wanted = client.model(model)
        job = wanted.export(format, data=data, max_drop=max_drop, metric=metric, job_id=job_id)
        if json:
            print_json_line(to_plain(job.info))
        else:
            then = "" if watch else f"\n  {command_line('watch', job.name, address=address)}"
            print(f"submitted {job.id}{then}")
        if not watch:
            return
        code = follow(job, as_json=json, address=address)
        if code == 0:
            made = job.export()
            if json:
                print_json_line(to_plain(made))
            else:
                print_exports([made])
                word = made.format.replace("_", "-")
                place = f"./{wanted.id}-{word}"
                print(f"  {command_line('download', wanted.name, place, '--format', word, address=address)}")
        raise typer.Exit(code)


def copy(
    model: ModelName,
    to: Annotated[str, typer.Argument(metavar="URI", help="s3://bucket/prefix.", show_default=False)],
    *,
    format: Annotated[
        str | None, typer.Option("--format", help="A further format: onnx, onnx-int8, or bf16 [the model itself].")
    ] = None,
    job_id: Annotated[str | None, typer.Option("--job-id", "--name", help="The job's id [made from the task].")] = None,
    watch: Annotated[bool, typer.Option("--watch/--detach", help="Follow the job, or return at once.")] = True,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Copy a model to an address of an object store that the operator allows.

    Nothing that is there is replaced; again, it continues. Ctrl-C stops watching, never the job.
    """
    from shardyard.cli.output import print_json_line
    from shardyard.cli.plain import to_plain
    from shardyard.cli.watching import follow

    with open_client(address, project) as client:
        job = client.model(model).copy(to, format=format, job_id=job_id)
        if json:
            print_json_line(to_plain(job.info))
        else:
            then = "" if watch else f"\n  {command_line('watch', job.name, address=address)}"
            print(f"submitted {job.id}{then}")
        if not watch:
            return
        code = follow(job, as_json=json, address=address)
        if code == 0 and not json:
            print(f"  {model} is at {to}")
        raise typer.Exit(code)


def print_exports(exports: Sequence[ExportedFormat]) -> None:
    """A row for each format: its size and speed beside the model's, and the metric that was compared."""
    from shardyard._lines import size
    from shardyard.cli.output import print_table

    columns = ("FORMAT", "SIZE", "OF THE MODEL", "A SAMPLE", "THE MODEL'S", "METRIC", "VALUE", "THE MODEL'S", "SAMPLES")
    rows = [
        (
            each.format.replace("_", "-"),
            size(each.size_bytes),
            f"{each.size_ratio:.2f}",
            f"{each.latency_s * 1e3:.3g} ms",
            f"{each.original_latency_s * 1e3:.3g} ms",
            each.metric,
            f"{each.metrics.get(each.metric, float('nan')):.4g}",
            f"{each.original_metrics.get(each.metric, float('nan')):.4g}",
            f"{each.num_samples:,}",
        )
        for each in exports
    ]
    print_table(columns, rows, empty="no further formats")
