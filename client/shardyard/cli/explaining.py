"""Asking models why: `explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.asking import Asked, File, Pairs, answer_line
from shardyard.cli.options import Address, Json, ModelName, Project, a_path, an_option, open_client
from shardyard.cli.texts import read_instances

if TYPE_CHECKING:
    from shardyard.types import Attribution, Explanation, Regions

_LEVELS = 9
"""Shares of regions are printed as -9 to 9, as parts of the largest."""


def explain(
    model: ModelName,
    texts: Asked = None,
    *,
    file: File = None,
    pairs: Pairs = False,
    question: Annotated[str | None, typer.Option("--question", help="A question about --context.")] = None,
    context: Annotated[str | None, typer.Option("--context", help="The text to answer from; @FILE: a file.")] = None,
    target: Annotated[
        str | None, an_option("--target", help="The class, tag or item to explain [what the model answers].")
    ] = None,
    word: Annotated[
        int | None, an_option("--word", help="The word whose tag to explain, counted from 0 [the surest].")
    ] = None,
    max_steps: Annotated[int | None, an_option("--max-steps", help="Most gradients, 16 to 2,048 [256].")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="<path>", parser=a_path, help="Also write a page with colours.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(
            "--overlay", metavar="<path>", parser=a_path, help="Pictures: also write a PNG with colours on it."
        ),
    ] = None,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Show which words, items or regions of a picture an answer comes from.

    Takes one input, as `predict` does: a text, a pair with --pairs, a question with --context, the items of a history,
    or the path of a picture. What raises the explained output is blue or has a plus, what lowers it orange or a minus.
    """
    from shardyard.cli.output import print_json
    from shardyard.cli.plain import to_plain

    with open_client(address, project) as client:
        asked = client.model(model)
        inputs = read_instances(asked.info.inputs, texts, file, pairs=pairs, asked=(question, context))
        if len(inputs) != 1:
            raise typer.BadParameter(f"one input is explained at a time, and {len(inputs)} are given; give one")
        picture = inputs[0] if isinstance(inputs[0], Path) else None
        if overlay is not None and picture is None:
            raise typer.BadParameter("--overlay draws on a picture, and the input is not one; leave it out")
        found = asked.explain(inputs[0], target=target, word=word, max_steps=max_steps)
    if html is not None:
        html.write_text(found.to_html(picture), encoding="utf-8")
    if overlay is not None and picture is not None:
        overlay.write_bytes(found.overlay(picture))
    if json:
        print_json(to_plain(found))
        return
    _print(found)


def _print(found: Explanation) -> None:
    """The answer, what is explained, and the shares; with colours in a terminal."""
    from rich.console import Console
    from rich.text import Text

    from shardyard._explained import footnote, headline
    from shardyard._lines import printable

    console = Console(highlight=False, soft_wrap=True)
    print(answer_line(found.prediction))
    print(f"Explained: {printable(headline(found))}")
    for part, words in groupby(found.attributions, key=lambda each: each.part):
        print(f"{printable(part)}:")
        some = list(words)
        if part == "items":
            print("\n".join(_item_lines(some)))
        else:
            console.print(Text.assemble(*_words(found, some, colours=console.is_terminal and not console.no_color)))
    if found.regions is not None:
        print("\n".join(_grid(found.regions)))
    print(printable(footnote(found)))
    if not found.is_complete:
        print("warning: the shares are not complete; try more with --max-steps", file=sys.stderr)


def _words(found: Explanation, words: list[Attribution], *, colours: bool) -> Iterator[Any]:
    """The words of a part as parts of a rich text: coloured, or each with its number."""
    from shardyard._explained import colour, largest, pieces, strength
    from shardyard._lines import printable

    most = largest(found)
    for before, word in pieces(words):
        yield before
        if colours:
            shade = (round(255 - strength(word.score, most) * (255 - part)) for part in colour(word.score))
            yield printable(word.text), f"black on rgb({','.join(map(str, shade))})"
        else:
            yield f"{printable(word.text)}[{word.score:+.3g}]"


def _item_lines(items: Iterable[Attribution]) -> Iterator[str]:
    from shardyard._lines import printable

    for item in items:
        yield f"{'(not read)' if item.unread else f'{item.score:+.4f}':>10}  {printable(item.text)}"


def _grid(regions: Regions) -> Iterator[str]:
    """The regions as numbers from -9 to 9, in lines as in the picture; a dot is 0."""
    most = max((abs(value) for value in regions.values), default=0.0) or 1.0
    for row in range(regions.rows):
        values = regions.values[row * regions.columns : (row + 1) * regions.columns]
        levels = (round(_LEVELS * value / most) for value in values)
        yield "".join(f"{level:+3d}" if level else "  ." for level in levels)
