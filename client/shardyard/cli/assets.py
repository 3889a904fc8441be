"""Models and data sets: `models`, `datasets`, `upload`, `download`, `delete`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, Json, Project, a_path, open_client

if TYPE_CHECKING:
    from shardyard._sync.client import Client

Uploading = Annotated[bool, typer.Option("--uploading", help="Also unfinished uploads.")]


def models(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="Show this one [list all].")] = None,
    *,
    uploading: Uploading = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List models, or show one with its files."""
    from shardyard._lines import metrics_line, size
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        if name is not None:
            _show(client.model(name).info, json=json)
            return
        found = [(model.id, model.info) for model in client.models(show_uploading=uploading)]
    if json:
        print_json([to_plain(info) for _, info in found])
        return
    rows = [
        (name, i.model_type, i.task, f"{i.num_parameters:,}", size(i.size_bytes), metrics_line(i.metrics), i.state)
        for name, i in found
    ]
    columns = ("MODEL", "TYPE", "TASK", "PARAMETERS", "SIZE", "METRICS", "STATE")
    print_table(*_shown(columns, rows, uploading=uploading), empty="no models")


def datasets(
    name: Annotated[str | None, typer.Argument(metavar="DATASET", help="Show this one [list all].")] = None,
    *,
    uploading: Uploading = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """List data sets, or show one with its files."""
    from shardyard._lines import moment, size
    from shardyard.cli.output import print_json, print_table
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        if name is not None:
            _show(client.dataset(name).info, json=json)
            return
        found = [(data_set.id, data_set.info) for data_set in client.datasets(show_uploading=uploading)]
    if json:
        print_json([to_plain(info) for _, info in found])
        return
    rows = [
        (name, i.display_name, size(i.size_bytes), moment(i.create_time), i.source_job, i.state) for name, i in found
    ]
    columns = ("DATASET", "NAME", "SIZE", "CREATED", "WRITTEN BY", "STATE")
    print_table(*_shown(columns, rows, uploading=uploading), empty="no data sets")


def _shown(
    columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, uploading: bool
) -> tuple[tuple[str, ...], Sequence[tuple[str, ...]]]:
    """The last column, the state, is shown only if there is more than one."""
    return (columns, rows) if uploading else (columns[:-1], [row[:-1] for row in rows])


def upload(
    path: Annotated[Path, typer.Argument(metavar="PATH", parser=a_path, help="A file or folder.")],
    model: Annotated[bool, typer.Option("--model", help="PATH is a Hugging Face folder.")] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Upload data, or with --model a model.

    What the service already has is not sent again.
    """
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        resource: Any = client.upload_model(path) if model else client.upload_dataset(path)
    if json:
        print_json(to_plain(resource.info))
    else:
        print(resource.name)


def download(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model, or dataset:ID.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", parser=a_path, help="The target folder.")],
    *,
    format: Annotated[
        str | None, typer.Option("--format", help="A further format of a model, such as onnx-int8.")
    ] = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Download a model or data set.

    Checked, complete or absent; a broken download continues where it stopped.
    """
    from shardyard.cli.output import print_json

    with open_client(address, project) as client:
        resource = _resource(client, name)
        if format is not None and "/datasets/" in resource.name:
            raise typer.BadParameter("a data set has no further formats; leave --format out")
        written = resource.download(folder) if format is None else resource.download(folder, format=format)
    if json:
        print_json({"name": resource.name, "folder": str(written)})
    else:
        print(written)


def delete(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A job that has ended, model:ID, or dataset:ID.")],
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Delete a job that has ended, a model, or a data set."""
    from shardyard.cli.output import print_json

    with open_client(address, project) as client:
        is_asset = name.startswith(("model:", "dataset:")) or "/models/" in name or "/datasets/" in name
        resource: Any = _resource(client, name) if is_asset else client.job(name)
        resource.delete()
    if json:
        print_json({"deleted": resource.name})
    else:
        print(f"deleted {resource.name}")


def _resource(client: Client, name: str) -> Any:
    scheme, colon, rest = name.partition(":")
    if "/datasets/" in name or (colon and scheme == "dataset"):
        return client.dataset(rest if colon else name)
    return client.model(rest if colon and scheme == "model" else name)


def _show(info: Any, *, json: bool) -> None:
    """A model or data set with its files."""
    from shardyard._lines import metrics_line, size
    from shardyard.cli.exporting import print_exports
    from shardyard.cli.output import print_json, print_pairs
    from shardyard.cli.plain import to_plain

    if json:
        print_json(to_plain(info))
        return
    rows = []
    for key, value in to_plain(info).items():
        if key in ("files", "exports", "create_time", "size_bytes", "uid") or not value:
            continue
        words = (
            metrics_line(value) if isinstance(value, dict) else ", ".join(value) if isinstance(value, list) else value
        )
        rows.append(
            (key.replace("_", " ").removeprefix("num "), f"{words:,}" if isinstance(words, int) else str(words))
        )
    print_pairs(rows)
    exports = getattr(info, "exports", ())
    if exports:
        print_exports(exports)
    for file in info.files:
        print(f"  {size(file.size_bytes):>10}  {file.path}")
