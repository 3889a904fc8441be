"""Models and data sets: `models`, `predict`, `embed`, `datasets`, `upload`, `download`, `delete`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, Json, ModelName, Project, a_path, open_client
from shardyard.cli.texts import read_embedded, read_instances

if TYPE_CHECKING:
    from shardyard._sync.client import Client
    from shardyard.types import Prediction

CONTINUING = ("causal_lm",)
"""Tasks whose models continue a text instead of writing another one."""

Texts = Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; none: one per line of stdin.")]
Asked = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TEXT...", help="Texts, or the items of one history; none: one text or history per line of stdin."
    ),
]
File = Annotated[
    Path | None, typer.Option("--file", metavar="<path>", parser=a_path, help="A file with one text per line.")
]
Uploading = Annotated[bool, typer.Option("--uploading", help="Also unfinished uploads.")]
Pairs = Annotated[bool, typer.Option("--pairs", help="Pairs: two arguments, or two columns separated by a tab.")]


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


def predict(
    model: ModelName,
    texts: Asked = None,
    *,
    file: File = None,
    pairs: Pairs = False,
    question: Annotated[str | None, typer.Option("--question", help="A question about --context.")] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text to answer from; @FILE: a file.")] = None,
    message: Annotated[
        list[str] | None,
        typer.Option("--message", metavar="<role: text>", help="A message; several are one conversation."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Multi label: least probability; questions: margin of no answer."),
    ] = None,
    max_answer_length: Annotated[
        int | None, typer.Option("--max-answer-length", help="Questions: most tokens of an answer.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="Writing: most new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="Writing: 0: the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Writing: nucleus sampling.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Writing: seeds the sampling.")] = None,
    num_beams: Annotated[int | None, typer.Option("--num-beams", help="Encoder-decoders: beams.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option("--length-penalty", help="With beams: more favours longer texts.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="Candidates per mask or answer; items to recommend.")
    ] = None,
    exclude_seen: Annotated[
        bool | None,
        typer.Option("--exclude-seen/--include-seen", help="Recommend what the history has [as in training]."),
    ] = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Get predictions from a model.

    By its task the answers are classes, numbers, continuations, candidates for masks, or items. A model of
    pictures takes paths of files, or of folders of them, in place of texts. One that answers questions takes
    --question and --context, or as texts a question and its context, or lines of JSON with both. An instruction model
    answers texts, lines of JSON with the messages of a conversation, or --message "user: Hello".
    """
    from shardyard._lines import printable
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        asked = client.model(model)
        inputs = read_instances(
            asked.info.inputs, texts, file, pairs=pairs, asked=(question, context), messages=message
        )
        answers = asked.predict(
            inputs,
            threshold=threshold,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            num_beams=num_beams,
            length_penalty=length_penalty,
            top_k=top_k,
            exclude_seen=exclude_seen,
            max_answer_length=max_answer_length,
        )
    if json:
        print_json([to_plain(answer) for answer in answers])
        return
    for item, answer in zip(inputs, answers, strict=True):
        if answer.text is not None and (message or asked.info.inputs[:1] == ("messages",)):
            print(answer_line(answer))
            continue
        shown = _shown_input(item)
        # A continuation is printed after its prompt; other answers have one length, and come first.
        print(
            printable(shown) + answer_line(answer)
            if answer.text is not None and asked.info.task in CONTINUING
            else f"{answer_line(answer)}\t{printable(shown)}"
        )


def embed(
    model: ModelName,
    texts: Texts = None,
    *,
    file: File = None,
    pairs: Pairs = False,
    output: Annotated[str | None, typer.Option("--output", help="pooled or last-hidden-state.")] = None,
    pooling: Annotated[str | None, typer.Option("--pooling", help="mean, cls, last, or max.")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, help="Longest text in tokens.")] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale vectors to length 1.")] = False,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Turn texts or pictures into vectors; with --json, print all numbers.

    A model of pictures takes paths of files, or of folders of them, in place of texts.
    """
    from shardyard._lines import printable
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        asked = client.model(model)
        inputs = read_embedded(asked.info.inputs, texts, file, pairs=pairs)
        options: Any = {"output": output, "pooling": pooling}  # The service checks them, with its own messages.
        vectors = asked.embed(inputs, max_length=max_length, normalize=normalize, **options)
    if json:
        print_json([to_plain(vector) for vector in vectors])
        return
    for item, vector in zip(inputs, vectors, strict=True):
        shown = _shown_input(item)
        first = ", ".join(f"{value:.4f}" for value in vector.values[:4])
        print(f"{list(vector.shape)}\t[{first}, …]\t{printable(shown)}")


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
        written = resource.download(folder)
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


def _shown_input(item: Any) -> str:
    if isinstance(item, str | Path):
        return str(item)
    if hasattr(item, "question"):
        return str(item.question)
    return " | ".join(item) if isinstance(item, tuple) else " ".join(map(str, item.items))


def answer_line(answer: Prediction) -> str:
    """`good 0.982`, `3.14`, `… and so on`: a prediction as text."""
    from shardyard._lines import printable

    if answer.label is not None:
        return f"{printable(answer.label)} {answer.score or 0.0:.3f}"
    if answer.answer is not None:
        return f"{printable(answer.answer.text) or '(no answer)'} {answer.answer.score:.3f}"
    if answer.tags:
        found = (f"{printable(each.text)} {printable(each.label)} {each.score:.3f}" for each in answer.entities)
        plain = (printable(each.tag) for each in answer.tags)
        return "; ".join(found) or " ".join(plain)
    if answer.items or answer.unknown_items:
        found = (f"{printable(each.item)} {each.score:.3f}" for each in answer.items)
        unknown = ", ".join(map(printable, answer.unknown_items))
        return (", ".join(found) or "(no item)") + (f" (unknown: {unknown})" if unknown else "")
    if answer.value is not None:
        return f"{answer.value:.4f}"
    if answer.text is not None:
        return printable(answer.text)
    if answer.masks:
        return "; ".join(
            ", ".join(f"{printable(candidate.token)} {candidate.score:.3f}" for candidate in mask)
            for mask in answer.masks
        )
    return ", ".join(f"{printable(label)} {answer.scores[label]:.3f}" for label in answer.labels) or "(no label)"


def _resource(client: Client, name: str) -> Any:
    scheme, colon, rest = name.partition(":")
    if "/datasets/" in name or (colon and scheme == "dataset"):
        return client.dataset(rest if colon else name)
    return client.model(rest if colon and scheme == "model" else name)


def _show(info: Any, *, json: bool) -> None:
    """A model or data set with its files."""
    from shardyard._lines import metrics_line, size
    from shardyard.cli.output import print_json, print_pairs
    from shardyard.cli.plain import to_plain

    if json:
        print_json(to_plain(info))
        return
    rows = []
    for key, value in to_plain(info).items():
        if key in ("files", "create_time", "size_bytes", "uid") or not value:
            continue
        words = (
            metrics_line(value) if isinstance(value, dict) else ", ".join(value) if isinstance(value, list) else value
        )
        rows.append(
            (key.replace("_", " ").removeprefix("num "), f"{words:,}" if isinstance(words, int) else str(words))
        )
    print_pairs(rows)
    for file in info.files:
        print(f"  {size(file.size_bytes):>10}  {file.path}")
