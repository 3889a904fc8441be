"""The service's answers, as frozen dataclasses.

Field names are those of the protos; enums are short lower-case words (`running`, `mean`), times are aware `datetime`s,
durations `timedelta`s; what is unset is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from shardyard.access_types import *  # noqa: F403 - one name for users, six files.
from shardyard.choosing_types import *  # noqa: F403
from shardyard.job_types import *  # noqa: F403
from shardyard.plan_types import *  # noqa: F403
from shardyard.webhook_types import *  # noqa: F403


@dataclass(frozen=True)
class LogLine:
    """A line that a rank wrote; `stream` is stdout or stderr, `level` debug, info, warning or error."""

    attempt: int
    rank: int
    stream: str
    level: str
    time: datetime | None
    text: str


@dataclass(frozen=True)
class MetricPoint:
    """One number at one step."""

    attempt: int
    step: int
    time: datetime | None
    value: float


@dataclass(frozen=True)
class MetricSeries:
    """One metric's points in the order of their steps; `total_points` before downsampling."""

    metric: str
    points: tuple[MetricPoint, ...]
    total_points: int


@dataclass(frozen=True)
class StoredFile:
    """A file of a model or data set."""

    path: str
    size_bytes: int
    sha256: str
    committed_bytes: int


@dataclass(frozen=True)
class ExportedFormat:
    """A further format of a model, and how it compares with the model on the same data; `drop` is how much worse.

    Latencies are seconds for one sample on one thread of a CPU.
    """

    format: str
    prefix: str
    size_bytes: int
    size_ratio: float
    latency_s: float
    original_latency_s: float
    metrics: Mapping[str, float]
    original_metrics: Mapping[str, float]
    metric: str
    drop: float
    num_samples: int
    difference: float
    source_job: str
    create_time: datetime | None
    max_drop: float | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A model in the form of a Hugging Face folder; `files` is empty in lists."""

    name: str
    uid: str
    state: str
    files: tuple[StoredFile, ...]
    size_bytes: int
    display_name: str
    source_job: str
    path: str
    model_type: str
    task: str
    labels: tuple[str, ...]
    inputs: tuple[str, ...]
    parameters: str
    num_parameters: int
    metrics: Mapping[str, float]
    creator: str
    create_time: datetime | None
    exports: tuple[ExportedFormat, ...] = ()


@dataclass(frozen=True)
class DatasetInfo:
    """Uploaded data, or data that a job wrote; `files` is empty in lists."""

    name: str
    uid: str
    state: str
    files: tuple[StoredFile, ...]
    size_bytes: int
    display_name: str
    source_job: str
    creator: str
    create_time: datetime | None


@dataclass(frozen=True)
class ClusterInfo:
    """The state of the cluster."""

    state: str
    launcher: str
    address: str
    slots: int
    free_slots: int
    gpus: int
    nodes: int
    message: str


@dataclass(frozen=True)
class StorageInfo:
    """The state of the storage: `available`, `unavailable` or `full`; `message` has the problem."""

    state: str
    free_bytes: int
    message: str


@dataclass(frozen=True)
class ServerInfo:
    """A service's version, tasks, cluster and storage."""

    version: str
    store_id: str
    limits: Mapping[str, int]
    tasks: tuple[str, ...]
    model_families: tuple[str, ...]
    event_retention_days: int
    cluster: ClusterInfo | None
    start_time: datetime | None
    warnings: tuple[str, ...]
    data_roots: tuple[str, ...]
    confinement: Mapping[str, str] = field(default_factory=dict)
    storage: StorageInfo | None = None


@dataclass(frozen=True)
class TokenCandidate:
    """A candidate for a mask, with its probability."""

    token: str
    token_id: int
    score: float


@dataclass(frozen=True)
class Words:
    """A text as its words, for a model that tags words."""

    words: tuple[str, ...] | list[str]


@dataclass(frozen=True)
class Items:
    """A history of items, the latest last, for a model that recommends."""

    items: tuple[str | int, ...] | list[str] | list[int]


@dataclass(frozen=True)
class RankedItem:
    """An item, and its probability among all items."""

    item: str
    score: float


@dataclass(frozen=True)
class Question:
    """A question and the text that may have its answer, for a model that answers questions."""

    question: str
    context: str


@dataclass(frozen=True)
class AnswerCandidate:
    """A part of a context that may be the answer, at `start` to `end` in its characters."""

    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Answer:
    """The answer to a question, at `start` to `end` in characters of its context; an empty text means no answer.

    `score` is its probability, `no_answer_score` the probability of no answer (None: the model always gives one).
    """

    text: str
    start: int
    end: int
    score: float
    no_answer_score: float | None
    candidates: tuple[AnswerCandidate, ...]


@dataclass(frozen=True)
class Image:
    """A picture for a model that reads pictures: the path of its file, or the bytes of one."""

    source: str | Path | bytes


@dataclass(frozen=True)
class Tag:
    """The tag of a word, at `start` to `end` in characters of its text."""

    start: int
    end: int
    tag: str
    score: float


@dataclass(frozen=True)
class Entity:
    """Words that are one thing, such as a name, at `start` to `end` in characters of their text."""

    label: str
    text: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Prediction:
    """An answer to one instance; which fields are set depends on the model's task.

    Single label: `label` and `scores`; multi label: `labels` and `scores`; regression: `value`; causal language models:
    `text`; masked ones: `masks`, the likeliest candidates of each mask; token classification: `tags` of the words, and
    the `entities` that they mean; recommendation: `items`, the likeliest first, and the `unknown_items` of the history,
    which the model does not know; question answering: `answer`. `logits` are the head's raw outputs.
    """

    label: str | None = None
    labels: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    value: float | None = None
    text: str | None = None
    masks: tuple[tuple[TokenCandidate, ...], ...] = ()
    tags: tuple[Tag, ...] = ()
    entities: tuple[Entity, ...] = ()
    items: tuple[RankedItem, ...] = ()
    unknown_items: tuple[str, ...] = ()
    answer: Answer | None = None
    logits: tuple[float, ...] = ()

    @property
    def score(self) -> float | None:
        """The probability of `label`."""
        return None if self.label is None else self.scores.get(self.label)


@dataclass(frozen=True)
class Embedding:
    """One vector (shape [width]) or one per token (shape [tokens, width]); `values` row by row."""

    shape: tuple[int, ...]
    values: tuple[float, ...]

    def rows(self) -> tuple[tuple[float, ...], ...]:
        """The vectors, each as a tuple of floats."""
        width = self.shape[-1]
        return tuple(self.values[start : start + width] for start in range(0, len(self.values), width))


@dataclass(frozen=True)
class Attribution:
    """What a word, sign or item adds to an output (under 0: it lowers it), at `start` to `end` in characters.

    `part` is what it is of: `text`, `text_pair`, `question`, `context`, `words`, or `items`, where `start` is a place.
    `unread`: the model did not read this item, because it does not know it or because the history is too long.
    """

    part: str
    text: str
    start: int
    end: int
    score: float
    unread: bool


@dataclass(frozen=True)
class Regions:
    """What the regions of a picture add to an output: a grid over the part that the model sees, `values` row by row.

    `left`, `top`, `right` and `bottom` are that part in pixels of the picture, which has `width` by `height`; it may be
    larger than the picture, if the model sees a border around it.
    """

    rows: int
    columns: int
    values: tuple[float, ...]
    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int


@dataclass(frozen=True)
class Explanation:
    """What an answer comes from: the shares of words, items or regions of a picture in one output of the model.

    The scores of all `attributions` (or the `values` of the `regions`) and `rest` add up to `output` less
    `baseline_output`, the same output for the `baseline`, up to `completeness_error` of this difference; `is_complete`
    if that is at most 0.02. `target` is the class, tag, item or answer that is explained, `word` the word whose tag it
    is, counted from 0; `steps` are the gradients that were needed.
    """

    prediction: Prediction
    target: str
    word: int | None
    output: float
    baseline_output: float
    baseline: str
    completeness_error: float
    is_complete: bool
    steps: int
    attributions: tuple[Attribution, ...]
    regions: Regions | None
    rest: float

    def top(self, count: int = 10) -> tuple[Attribution, ...]:
        """The words or items with the largest shares, in either direction, the largest first."""
        return tuple(sorted(self.attributions, key=lambda each: -abs(each.score))[:count])

    def to_html(self, picture: str | Path | bytes | None = None) -> str:
        """A page of its own with the shares as colours; for a picture, give its file or bytes to see it below them.

        Whatever the texts contain, they are shown as they are written. Raises: InvalidArgument for a file that cannot
        be read.
        """
        from shardyard._explained import html_page

        return html_page(self, picture)

    def overlay(self, picture: str | Path | bytes) -> bytes:
        """The picture, by its file or bytes, with the shares of its regions as colours on it: a PNG file.

        Raises: InvalidArgument for a file that is not the picture, without regions, and without Pillow.
        """
        from shardyard._explained import overlay_png

        return overlay_png(self, picture)
