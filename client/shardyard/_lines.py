"""Events, logs and numbers as lines for people."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from shardyard import types

_BLOCKS = "▁▂▃▄▅▆▇█"
_FEW_METRICS = 12
_TALLEST = 1e300  # Beyond it a sum or a difference may be infinite.


def event_line(event: types.Event) -> str:
    """One line: sequence, time of day, and what happened."""
    return f"{event.sequence:>5}  {clock(event.time)}  {describe(event)}"


def describe(event: types.Event) -> str:
    """An event in words, without its time."""
    data = event.data
    match data:
        case types.StateChanged():
            return _state(data)
        case types.Progress():
            return progress_line(data)
        case types.Evaluation():
            kind = "final evaluation" if data.is_final else "evaluation"
            some = f" on {data.num_samples:,} samples only" if data.is_partial else ""
            return f"{kind} at step {data.step:,}{some}: {metrics_line(data.metrics)}"
        case types.CheckpointChanged():
            words = f": {data.message}" if data.message else ""
            return f"checkpoint of step {data.step:,} {data.change} ({size(data.size_bytes)}){words}"
        case types.AttemptChanged():
            return "attempt" if data.attempt is None else _attempt(data.attempt)
        case types.PendingInfo():
            return f"waits: {data.message or data.constraint}"
        case types.PhaseStarted():
            return f"{data.phase}{': ' + data.message if data.message else ''}"
        case types.Condition():
            return f"{data.type} {'began' if data.active else 'ended'}{': ' + data.message if data.message else ''}"
        case types.Warning():
            return f"warning {data.reason}: {data.message}{f' ({data.field})' if data.field else ''}"
        case types.ModelRegistered():
            return f"model {data.model}"
        case types.DatasetRegistered():
            return f"data set {data.dataset}"
        case types.CanaryPassed():
            return f"canary passed ({data.duration_s:.3g} s): checkpoint, evaluation and export work"
        case types.JobUpdated():
            return f"updated by {data.principal}: {', '.join(data.fields)}"
        case types.JobDeleted():
            return f"deleted by {data.principal}"
    return f"({event.kind})"


def progress_line(progress: types.Progress) -> str:
    """`step 40/200  loss 0.412  lr 1.0e-04  812 tokens/s  ETA 1:20`; without loss and rate if nothing is trained."""
    eta = "" if progress.eta is None else f"  ETA {span(progress.eta)}"
    trains = progress.loss or progress.learning_rate or progress.grad_norm
    loss = f"loss {progress.loss:.4g}  lr {progress.learning_rate:.1e}  " if trains else ""
    return f"step {progress.step:,}/{progress.total_steps:,}  {loss}{progress.tokens_per_s:,.0f} tokens/s{eta}"


def metrics_line(metrics: Mapping[str, float]) -> str:
    """`accuracy 0.8946  loss 0.3012`; of many, those of single classes (`f1_LOC` beside `f1`) are only counted."""
    shown = sorted(metrics)
    if len(shown) > _FEW_METRICS:
        shown = [name for name in shown if not any(name.startswith(f"{other}_") for other in metrics)]
    parts = [f"{name} {metrics[name]:.4g}" for name in shown]
    if len(shown) < len(metrics):
        parts.append(f"and {len(metrics) - len(shown)} more")
    return "  ".join(parts)


def curve(values: list[float], width: int = 40) -> str:
    """The numbers as a row of blocks, the last `width` buckets; one bucket is the mean of its numbers.

    NaN and infinity have no height and are left out.
    """
    values = [value for value in values if abs(value) < _TALLEST]
    if not values:
        return ""
    count = min(width, len(values))
    buckets = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(bucket) / len(bucket) for bucket in buckets]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def clock(time: datetime | None) -> str:
    """The local time of day."""
    return "--:--:--" if time is None else time.astimezone().strftime("%H:%M:%S")


def moment(time: datetime | None, *, now: datetime | None = None) -> str:
    """The local time, after its date if that is not today; `now` says when it is [now]."""
    is_today = time is None or time.astimezone().date() == (now or datetime.now(UTC)).astimezone().date()
    return clock(time) if is_today or time is None else f"{time.astimezone():%Y-%m-%d} {clock(time)}"


def span(duration: timedelta | float) -> str:
    """A duration for people, such as `0:42` or `1:02:03`."""
    seconds = round(duration.total_seconds() if isinstance(duration, timedelta) else duration)
    hours, rest = divmod(max(seconds, 0), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    """A number of bytes for people, such as `12 B` or `3.4 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def printable(text: str) -> str:
    """Foreign text made safe for a terminal: control characters are shown as escapes."""
    return "".join(
        character if character.isprintable() or character == "\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def _state(data: types.StateChanged) -> str:
    before = "" if data.from_state == "unspecified" else f"{data.from_state} → "
    words = f": {data.message}" if data.message else ""
    return f"{before}{data.to}{words}{_why(data.failure)}"


def _attempt(attempt: types.Attempt) -> str:
    number = attempt.name.rsplit("/", 1)[-1]
    workers = f"{attempt.workers} worker{'s' * (attempt.workers != 1)}"
    resumed = f", from step {attempt.resumed_from_step:,}" if attempt.resumed_from_step else ""
    return f"attempt {number} {attempt.state} on {workers}{resumed}{_why(attempt.failure)}"


def _why(failure: types.FailureReport | None) -> str:
    if failure is None:
        return ""
    rank = "" if failure.rank is None else f" on rank {failure.rank}"
    step = "" if failure.step is None else f" at step {failure.step:,}"
    return f" ({failure.reason}{rank}{step}: {sentences(failure.message, failure.next_step)})"


def sentences(*parts: str) -> str:
    """Joins the parts that are not empty: a part that does not end like a sentence is separated from the next."""
    made = ""
    for part in filter(None, parts):
        made += part if not made else f" {part}" if made.endswith((".", "!", "?")) else f"; {part}"
    return made
