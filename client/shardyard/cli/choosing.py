"""`recommend`: which model to train for a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.flags import TASKS
from shardyard.cli.options import Address, Json, Project, an_option, open_client, with_options

if TYPE_CHECKING:
    from shardyard.types import ModelRecommendation, RecommendedModels


@dataclass(frozen=True)
class Choosing:
    """The flags of `recommend` that are fields of the request."""

    languages: Annotated[
        list[str] | None, an_option("--language", help="A language of the texts, such as en; repeatable.")
    ] = None
    rows: Annotated[int | None, an_option("--rows", help="Rows of the training data.")] = None
    tokens_per_row: Annotated[int | None, an_option("--tokens-per-row", help="Tokens of the longest row.")] = None
    memory: Annotated[str | None, an_option("--memory", help="Of one worker, such as 4GiB [what the cluster has].")] = (
        None
    )
    max_latency: Annotated[str | None, an_option("--max-latency", help="To read one input, such as 50ms.")] = None
    max_time: Annotated[str | None, an_option("--max-time", help="Of the training, such as 2h.")] = None
    max_cost: Annotated[float | None, an_option("--max-cost", help="Of the training, in the service's currency.")] = (
        None
    )
    licences: Annotated[
        list[str] | None, an_option("--licence", help="An acceptable licence, such as apache-2.0; repeatable.")
    ] = None
    commercial_use: Annotated[
        bool | None, an_option("--commercial-use", help="Only licences that allow commercial use.")
    ] = None
    max_results: Annotated[int | None, an_option("--limit", help="How many to show [5].")] = None

    def given(self) -> dict[str, Any]:
        """The flags that were given, as the SDK takes them."""
        return {name: value for name, value in vars(self).items() if value is not None and value != []}


@with_options(Choosing)
def recommend(
    flags: Choosing,
    *,
    task: Annotated[str, typer.Option("--task", help=f"One of {', '.join(TASKS)}.", show_default=False)],
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Recommend models to train for a task, with the command that starts the first one.

    The project's own models are candidates too; docs/choosing.md says how they are ranked.
    """
    from shardyard._convert import read, to_plain
    from shardyard.cli.output import print_json
    from shardyard.types import RecommendedModels

    with open_client(address, project) as client:
        message = client.recommend_models_message(task, flags.given())  # type: ignore[arg-type]
    if json:
        print_json(to_plain(message))
    else:
        print_recommended(read(RecommendedModels, message))


def print_recommended(found: RecommendedModels) -> None:
    """Prints recommendations for people: a table, the reasons for the first, and what was left out."""
    from shardyard._lines import printable
    from shardyard.cli.output import print_table

    columns = ("MODEL", "PARAMETERS", "MEMORY", "TIME", "READS ONE IN", "LICENCE", "POINTS")
    print_table(columns, map(_row, found.recommendations), empty="no model meets all of this")
    for at, each in enumerate(found.recommendations[:3]):
        print(f"\n{at + 1}. {printable(each.name)}" + (f": {printable(each.note)}" if each.note else ""))
        if each.licence_source:
            print(f"   licence {printable(each.licence)}, read at {printable(each.licence_source)}")
        for sign, reasons in (("+", each.pros), ("-", each.cons)):
            for reason in reasons:
                print(f"   {sign} {printable(reason)}")
    print()
    for note in (_assumed(found), *(one.message for one in found.left_out), *found.notes):
        print(printable(note))
    if found.recommendations:
        print(
            f"\nto train the first, with a file, a folder or dataset:ID in place of DATA:\n  "
            f"{printable(found.recommendations[0].command)}"
        )


def _row(each: ModelRecommendation) -> tuple[str, ...]:
    from shardyard._lines import size
    from shardyard.cli.plan_view import span

    latency = each.latency.total_seconds() if each.latency is not None else 0.0
    return (
        each.name,
        f"{each.num_parameters:,}",
        size(each.memory.total_bytes) if each.memory is not None else "",
        f"about {span(each.time.expected)}" if each.time is not None else "",
        f"{1000 * latency:,.0f} ms" if latency < 10 else f"{latency:,.0f} s",
        _licence(each),
        f"{sum(one.points for one in each.points):.1f}",
    )


def _licence(each: ModelRecommendation) -> str:
    """`apache-2.0`, `apache-2.0 (unchecked)`, or `not on record`."""
    return f"{each.licence} (unchecked)" if "licence" in each.unchecked else each.licence or "not on record"


def _assumed(found: RecommendedModels) -> str:
    """`43 candidates, for 2,000 rows of up to 128 tokens, 3 epochs, a worker with 4.0 GiB`."""
    from shardyard._lines import size

    assumed = found.assumptions
    if assumed is None:
        return f"{found.num_candidates:,} candidates"
    parts = [
        f"{assumed.rows:,} rows" if assumed.rows else "",
        f"up to {assumed.tokens_per_row:,} positions a row" if assumed.tokens_per_row else "",
        f"{assumed.epochs:g} epochs" if assumed.epochs else "",
        f"a worker with {size(assumed.memory_bytes)}" if assumed.memory_bytes else "",
    ]
    return f"{found.num_candidates:,} candidates, for {', '.join(filter(None, parts))}"
