"""Asking models: `predict` and `embed`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, Json, ModelName, Project, a_path, an_option, open_client, with_options
from shardyard.cli.texts import read_embedded, read_instances

if TYPE_CHECKING:
    from shardyard.types import ModelInfo, Prediction

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
Pairs = Annotated[bool, typer.Option("--pairs", help="Pairs: two arguments, or two columns separated by a tab.")]


@dataclass(frozen=True)
class Parameters:
    """The flags of `predict` that are parameters of the request, each for the models of some tasks."""

    threshold: Annotated[
        float | None,
        an_option("--threshold", help="Multi label: least probability; questions: margin of no answer."),
    ] = None
    labels: Annotated[
        list[str] | None,
        an_option("--label", help="Zero-shot: a class to sort texts into; give several."),
    ] = None
    hypothesis_template: Annotated[
        str | None, an_option("--hypothesis-template", help="Zero-shot: a sentence for a class [This example is {}.].")
    ] = None
    multi_label: Annotated[bool | None, an_option("--multi-label", help="Zero-shot: judge each class by itself.")] = (
        None
    )
    max_answer_length: Annotated[
        int | None, an_option("--max-answer-length", help="Questions: most tokens of an answer.")
    ] = None
    max_new_tokens: Annotated[int | None, an_option("--max-new-tokens", help="Writing: most new tokens.")] = None
    temperature: Annotated[
        float | None, an_option("--temperature", help="Writing: 0 for the likeliest text, more for variety.")
    ] = None
    top_p: Annotated[float | None, an_option("--top-p", help="Writing: nucleus sampling.")] = None
    seed: Annotated[int | None, an_option("--seed", help="Writing: seeds the sampling.")] = None
    num_beams: Annotated[int | None, an_option("--num-beams", help="Encoder-decoders: beams.")] = None
    length_penalty: Annotated[
        float | None, an_option("--length-penalty", help="With beams: more favours longer texts.")
    ] = None
    top_k: Annotated[int | None, an_option("--top-k", help="Candidates per mask or answer; items to recommend.")] = None
    exclude_seen: Annotated[
        bool | None,
        an_option("--exclude-seen/--include-seen", help="Whether to leave out items of the history [as in training]."),
    ] = None


@with_options(Parameters)
def predict(
    parameters: Parameters,
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
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Get predictions from a model.

    Its task decides what they are: classes, numbers, entities, answers, written texts, candidates for masks, or items.
    A picture model takes paths of files or folders instead of texts. A question answering model takes --question and
    --context, or a question and its context as texts, or lines of JSON with both. An instruction model answers texts,
    lines of JSON with the messages of a conversation, or --message "user: Hello". An entailment model (NLI) sorts
    texts into the classes that --label names.
    """
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        asked = client.model(model)
        info = asked.info
        inputs = read_instances(info.inputs, texts, file, pairs=pairs, asked=(question, context), messages=message)
        answers = asked.predict(inputs, **dataclasses.asdict(parameters))
    if json:
        print_json([to_plain(answer) for answer in answers])
        return
    for item, answer in zip(inputs, answers, strict=True):
        print(_with_its_input(item, answer, info))


def _with_its_input(item: Any, answer: Prediction, info: ModelInfo) -> str:
    """An answer with what it answers: a continuation after its prompt, a conversation's alone, others before it."""
    from shardyard._lines import printable

    line = answer_line(answer)
    is_chat = isinstance(item, list) or info.inputs[:1] == ("messages",)
    if answer.text is not None and is_chat:
        return line
    shown = printable(_shown_input(item))
    return shown + line if answer.text is not None and info.task in CONTINUING else f"{line}\t{shown}"


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

    A picture model takes paths of files or folders instead of texts.
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


def _shown_input(item: Any) -> str:
    if isinstance(item, str | Path):
        return str(item)
    if hasattr(item, "question"):
        return str(item.question)
    if isinstance(item, list):
        return " | ".join(str(message.get("content", "")) for message in item)
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
