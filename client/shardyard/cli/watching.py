"""`watch`: a live view on a terminal, plain lines elsewhere; Ctrl-C leaves the job alone and says how to continue."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardyard.cli.options import Address, JobName, Json, Project, command_line, open_client

if TYPE_CHECKING:
    from shardyard._sync.job import Job
    from shardyard.types import Event

_EXAMPLES = {
    "text": ("some text",),
    "messages": ("some question",),
    "image": ("./picture.jpg",),
    "items": ("ITEM", "ITEM"),
    "question": ("some question", "a text with the answer"),
    "pair": ("some text", "another text"),
}
"""Arguments of `predict` that show how to ask a model whose usual input is of this kind."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def watch(
    job: JobName,
    after: Annotated[int, typer.Option("--after", min=0, help="Continue after this event.")] = 0,
    address: Address = None,
    project: Project = "default",
    json: Json = False,
) -> None:
    """Follow a job until it has ended, through its pauses. Ctrl-C stops watching, never the job."""
    with open_client(address, project) as client:
        raise typer.Exit(follow(client.job(job), after=after, as_json=json, address=address))


def follow(job: Job, *, after: int = 0, as_json: bool = False, address: str | None = None) -> int:
    """Print a job's events until it has ended; the exit code: 0 if it succeeded.

    `address` is what the command was given; the commands that are printed repeat it.
    """
    view: Any = _JsonView() if as_json else _LiveView(job) if sys.stdout.isatty() else _LineView()
    last = after
    try:
        with view:
            for event in job.watch(after=after, min_interval=0.25):
                view.show(event)
                last = event.sequence
                if event.state == "paused":
                    view.say(f"paused; to continue: {command_line('resume', job.name, address=address)}")
    except KeyboardInterrupt:
        if not as_json:
            again = command_line("watch", job.name, "--after", str(last), address=address)
            print(f"\nThe job continues. To watch again from here:\n  {again}")
        return EXIT_INTERRUPTED
    info = job.refresh()
    if not as_json:
        _print_end(job, address)
    return 0 if info.state == "succeeded" else EXIT_FAILED


class _JsonView:
    """One event per line."""

    def __enter__(self) -> _JsonView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, event: Event) -> None:
        """Print it."""
        from shardyard.cli.output import print_json_line
        from shardyard.cli.plain import event_to_plain

        print_json_line(event_to_plain(event))

    def say(self, text: str) -> None:
        """Messages for people beside the events."""


class _LineView(_JsonView):
    """One event per line, for people."""

    def show(self, event: Event) -> None:
        """Print it."""
        from shardyard._lines import printable

        print(printable(str(event)), flush=True)

    def say(self, text: str) -> None:
        """Print it."""
        print(f"  {text}", flush=True)


class _LiveView:
    """Events scroll by; below them state, step, loss, speed, time left and the loss curve, kept up to date."""

    def __init__(self, job: Job) -> None:
        from rich.console import Console
        from rich.live import Live

        self._job = job
        self._state = job.state
        self._progress: Any = None
        self._losses: list[float] = []
        self._evaluation: Any = None
        self._phase = ""
        self._live = Live(console=Console(highlight=False), refresh_per_second=4, get_renderable=self._render)

    def __enter__(self) -> _LiveView:
        self._live.__enter__()
        return self

    def __exit__(self, *details: Any) -> None:
        self._live.__exit__(*details)

    def show(self, event: Event) -> None:
        """Take the event into the view; what is not progress is printed above it."""
        from rich.text import Text

        from shardyard._lines import printable
        from shardyard.types import PhaseStarted

        self._phase = ""
        if event.progress is not None:
            self._progress = event.progress
            self._losses.append(event.progress.loss)
            return
        if isinstance(event.data, PhaseStarted):
            self._phase = event.data.phase
            return
        self._state = event.state or self._state
        self._evaluation = event.evaluation or self._evaluation
        self._live.console.print(Text(printable(str(event))))

    def say(self, text: str) -> None:
        """Print it above the view."""
        self._live.console.print(f"  {text}", markup=False)

    def _render(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        from shardyard._lines import curve, metrics_line, span

        table = Table.grid(padding=(0, 2))
        phase = f" · {self._phase}" if self._phase else ""
        table.add_row(Text(self._job.id, style="bold"), Text(f"{self._state}{phase}", style="cyan"))
        progress = self._progress
        if progress is None:
            return table
        bar = ProgressBar(total=max(progress.total_steps, 1), completed=progress.step, width=30)
        table.add_row(f"step {progress.step:,}/{progress.total_steps:,}", bar)
        eta = "" if progress.eta is None else f"   ETA {span(progress.eta)}"
        table.add_row(f"loss {progress.loss:.4g}", f"{progress.tokens_per_s:,.0f} tokens/s{eta}")
        table.add_row("", Text(curve(self._losses), style="green"))
        if self._evaluation is not None:
            table.add_row(f"eval @{self._evaluation.step:,}", metrics_line(self._evaluation.metrics))
        return table


def _print_end(job: Job, address: str | None) -> None:
    """Its result, or why it failed, and the next command."""
    from shardyard._lines import metrics_line, printable
    from shardyard._names import last_part

    info = job.info
    if info.state == "succeeded":
        numbers = f": {metrics_line(info.evaluation.metrics)}" if info.evaluation is not None else ""
        print(printable(f"{info.id} succeeded{numbers}"))
        if info.model:
            _print_predict(job, address)
        for made in filter(None, (info.model, info.output_dataset)):
            print(f"  {command_line('download', made, f'./{last_part(made)}', address=address)}")
        return
    failure = info.failure
    print(f"{info.id} {info.state}" + (f": {failure.reason}: {printable(failure.message)}" if failure else ""))
    if failure and failure.next_step:
        print(f"  {printable(failure.next_step)}")
    if failure and failure.log_tail:
        print("  the last lines of the failing rank:")
        for line in failure.log_tail.splitlines()[-20:]:
            print(f"    {printable(line)}")
    if info.state == "failed":
        print(f"  {command_line('logs', info.name, address=address)}")


def _print_predict(job: Job, address: str | None) -> None:
    """A command that asks the new model; none if it predicts nothing, or cannot be read."""
    from shardyard.errors import RequestError

    try:
        model = job.model().info
    except RequestError:
        return
    if model.inputs:
        print(f"  {command_line('predict', model.name, *_EXAMPLES.get(model.inputs[0], ()), address=address)}")
