"""Code shared by the tasks on items: a catalogue, histories, and a named split for the evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.errors import DataError, SpecError, raise_all
from shardyard_trainer.data.interactions import Clock, read_interactions
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.histories import Filters, Histories, Source, load_histories
from shardyard_trainer.inputs.imagined import NUM_ITEMS, Imagined, token_tensors
from shardyard_trainer.inputs.items import PADDING, ItemInputs
from shardyard_trainer.inputs.next_items import HELD_OUT_FROM, Held, HistorySamples, TargetSamples, targets_of
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.fresh import fit_config
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, TaskWarning, TrainingTask, has_head
from shardyard_trainer.tasks.ingredients import Ingredients, why_not_pretrained
from shardyard_trainer.tasks.losses import LOSS_CHUNK
from shardyard_trainer.tasks.ranking import RankingMetrics, is_no_better_than_popular
from shardyard_trainer.tasks.texts import find_length

ROLES = ("user", "item", "time", "rating")
DEFAULT_HISTORY = 50
SHORTEST_HISTORY = 2
_MOST_CUT = 0.05
_SPLITS = {
    Held.LAST: spec_pb2.Recommendation.SPLIT_LEAVE_ONE_OUT,
    Held.LATEST: spec_pb2.Recommendation.SPLIT_TIME,
    Held.TWO: spec_pb2.Recommendation.SPLIT_LEAVE_TWO_OUT,
}


class Reads(NamedTuple):
    """The models that can read a task's histories: those trained for an objective; with examples.

    `masks`: they read a mask in place of what they predict, which takes a token and a position.
    """

    objective: str
    such_as: str
    masks: bool = False


class Ready(NamedTuple):
    """The prepared model and data of a task on items."""

    choice: ModelChoice
    inputs: ItemInputs
    train: HistorySamples
    eval: TargetSamples | None
    held: Held
    holdout: float
    exclude_seen: bool
    filters: Filters
    warnings: Sequence[TaskWarning]


def prepare_items(
    job: Ingredients,
    task: TrainingTask,
    reads: Reads,
    make_samples: Callable[[Histories, np.ndarray, int], HistorySamples],
    make_targets: Callable[..., TargetSamples] = TargetSamples,
) -> Ready:
    """Prepares model and data for a task on items. Raises SpecError with all errors at once.

    `make_targets` takes the same as `make_samples`, and `exclude_seen`.
    """
    choice = job.attempt(lambda: _choose(job, task, reads))
    train_files, eval_files = job.files()
    job.attempt(lambda: _check_settings(job))
    raise_all(job.errors)
    assert choice is not None and train_files is not None
    wanted = job.wanted
    rated = wanted.HasField("min_rating")
    excludes = wanted.exclude_seen if wanted.HasField("exclude_seen") else True

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        deque(read_interactions(files, source, Clock(), rated=rated, field=field), maxlen=0)

    spec = job.spec
    with job.looking_on(train_files, eval_files, look_through):
        length = find_length(job, choice, "max_history", DEFAULT_HISTORY, shortest=SHORTEST_HISTORY, beside=reads.masks)
        catalogue = _catalogue_of(choice)
        filters = Filters(
            max(wanted.min_user_interactions, 1),
            max(wanted.min_item_interactions, 1),
            wanted.min_rating if rated else None,
            catalogue,
        )
        train = Source(train_files, spec.train_data, "spec.train_data")
        held_out = Source(eval_files, spec.eval_data, "spec.eval_data") if eval_files is not None else None
        histories = load_histories(train, held_out, filters, job.cache_dir)
        held = _held(job, histories)
        is_target = targets_of(histories, held, job.holdout)
        samples, targets = make_samples(histories, is_target, length), None
        if held is not Held.NOTHING:
            targets = make_targets(histories, is_target, length, exclude_seen=excludes)
        _check_enough(samples, targets, held, is_trained=not job.only_evaluates)
        inputs = ItemInputs(histories.items, length, reads.masks)
        choice = _fitted(choice, inputs)
    choice = job.accept_weights(choice, task.auto)
    _warn(job, histories, samples, targets, held)
    return Ready(choice, inputs, samples, targets, held, job.holdout, excludes, filters, job.warnings)


def imagine_items(job: Ingredients, task: TrainingTask, reads: Reads, data: Imagined) -> Ready:
    """The model, and full histories that are imagined, of its catalogue or one of NUM_ITEMS. Raises SpecError."""
    choice = _choose(job, task, reads)
    length = find_length(job, choice, "max_history", DEFAULT_HISTORY, shortest=SHORTEST_HISTORY, beside=reads.masks)
    items = _catalogue_of(choice) or tuple(map(str, range(NUM_ITEMS)))
    inputs = ItemInputs(items, length, reads.masks)
    splits = data.splits(length + reads.masks, token_tensors(length + reads.masks, names=("input_ids", "labels")))
    return Ready(
        _fitted(choice, inputs), inputs, *splits, Held.LAST, job.holdout, True, Filters(1, 1, None, ()), job.warnings
    )


def _choose(job: Ingredients, task: TrainingTask, reads: Reads) -> ModelChoice:
    choice = job.choose()
    supported = architectures.objectives(choice.config)
    if reads.objective not in supported:
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            why_not_pretrained(choice.config)
            or f"{choice.config.model_type} is not an architecture for {task.name}; use one such as {reads.such_as}",
        )
    if not choice.is_fresh and not (
        choice.described is not None and choice.described.trained and has_head(choice, task)
    ):
        message = (
            f"the model has no catalogue of items; give a fresh one (architecture), or one trained for {task.name} here"
        )
        raise SpecError(choice.field, "OBJECTIVE_UNSUPPORTED", message)
    return choice


def _check_settings(job: Ingredients) -> None:
    if job.spec.HasField("tokenizer"):
        raise SpecError("spec.tokenizer", "SPEC_INVALID", "items have no tokenizer; leave it out")
    if job.wanted.split and job.spec.HasField("eval_data"):
        message = "with eval_data, all of it is evaluated and nothing is held out; remove one of the two"
        raise SpecError(f"{job.field}.split", "SPEC_INVALID", message)


def _catalogue_of(choice: ModelChoice) -> tuple[str, ...]:
    """The items that a trained model knows; empty for a fresh one. Raises SpecError."""
    if choice.folder is None or choice.described is None:
        return ()
    try:
        return ItemInputs.load(choice.folder, choice.described).items
    except FolderInvalid as error:
        raise SpecError(choice.field, error.reason, str(error), error.metadata) from None


def _fitted(choice: ModelChoice, inputs: ItemInputs) -> ModelChoice:
    """A fresh configuration with a token for each item, the padding and the mask. Raises SpecError."""
    size = inputs.num_tokens
    if not choice.is_fresh:
        return choice
    if (wanted := choice.overrides.get("vocab_size", size)) != size:
        others = "the padding and the mask are two more" if inputs.masks else "the padding is one more"
        message = f"{wanted:,}, but the catalogue has {len(inputs.items):,} items, and {others}; leave it out"
        raise SpecError(f"{choice.field}.overrides.vocab_size", "SPEC_INVALID", message)
    fit_config(
        choice.config,
        choice.overrides,
        vocab_size=size,
        special={"pad": PADDING},
        length=inputs.max_history + inputs.masks,
        field=choice.field,
    )
    return choice


def _held(job: Ingredients, histories: Histories) -> Held:
    """Chooses the evaluated interactions. Raises SpecError for a split by time of data without times."""
    if job.spec.HasField("eval_data"):
        return Held.DATA
    if job.holdout == 0:
        return Held.NOTHING
    if job.wanted.split == spec_pb2.Recommendation.SPLIT_TIME:
        if not histories.has_times:
            message = "the data has no column `time`; map one in columns, as time: NAME, or leave the split out"
            raise SpecError(f"{job.field}.split", "SPEC_INVALID", message)
        return Held.LATEST
    return Held.TWO if job.wanted.split == spec_pb2.Recommendation.SPLIT_LEAVE_TWO_OUT else Held.LAST


def _check_enough(train: HistorySamples, targets: TargetSamples | None, held: Held, *, is_trained: bool) -> None:
    """Raises DataError if there is nothing to train on, or nothing to evaluate."""
    is_too_little = is_trained and not train.num_samples
    if is_too_little and held is Held.LATEST:
        message = "the split by time leaves no user with two interactions to learn from"
        raise DataError(f"{message}; lower evaluation.holdout, or leave the split out", field="spec.train_data")
    if is_too_little and held is Held.TWO:
        message = "leave_two_out leaves no user with two interactions to learn from"
        raise DataError(f"{message}; give users with four or more, or leave the split out", field="spec.train_data")
    if is_too_little:
        message = (
            f"none of {train.num_short:,} users has two interactions to learn from; are the columns right, and is each "
            "user's id the same in all rows?"
        )
        raise DataError(message, field="spec.train_data")
    if targets is not None and not targets.num_samples:
        field, message = "spec.train_data", "nothing can be held out; set evaluation.holdout to 0, or give eval_data"
        if held in (Held.LAST, Held.TWO):
            message = f"no user has {HELD_OUT_FROM} interactions, so {message}"
        elif held is Held.DATA:
            field = "spec.eval_data"
            message = (
                f"none of it can be predicted: {targets.num_unknown:,} are of items that the training data does not "
                f"have, and {targets.num_first:,} are their user's first; are the ids those of the training data?"
            )
        raise DataError(message, field=field)


def _warn(
    job: Ingredients, histories: Histories, train: HistorySamples, targets: TargetSamples | None, held: Held
) -> None:
    data = "spec.train_data"
    for field, message in histories.bad_rows.items():
        job.warn(bad_rows.REASON, message, field)
    if not histories.has_times:
        message = "no column `time` was found: the rows of each user are taken to be in the order of time"
        job.warn("NO_TIMES", f"{message}; if a column says when, map it in columns, as time: NAME", data)
    if doubled := histories.count("doubled"):
        job.warn("DUPLICATE_ROWS", f"{doubled:,} duplicate rows (same user, item and time): each counts once", data)
    if train.num_short:
        message = f"{train.num_short:,} users have one interaction to learn from, and so nothing that comes next"
        job.warn("SHORT_HISTORIES", f"{message}: they are left out", data)
    if train.num_cut > _MOST_CUT * train.num_samples:
        message = (
            f"{train.num_cut:,} of {train.num_samples:,} users have more than max_history items: only their latest are "
            "learnt; raise it if memory allows"
        )
        job.warn("HISTORIES_CUT", message, f"{job.field}.max_history")
    if targets is None:
        return
    place = "spec.eval_data" if held is Held.DATA else data
    if targets.num_unknown:
        message = f"{targets.num_unknown:,} interactions are of items that the training data does not have"
        job.warn("UNKNOWN_ITEMS", f"{message}: they count as missed", place)
    if targets.exclude_seen and targets.num_repeated:
        message = (
            f"{targets.num_repeated:,} of {targets.num_samples:,} evaluated interactions are of items that the user "
            "had before, and so count as missed; if items are had again, set exclude_seen to false"
        )
        job.warn("REPEATED_ITEMS", message, f"{job.field}.exclude_seen")


class PreparedItems:
    """A task on items with its model and data."""

    unit = "token"
    learning_rate: float | None = None
    smallest_batch = 1
    task: TrainingTask

    def __init__(self, ready: Ready) -> None:
        self.choice, self.inputs = ready.choice, ready.inputs
        self.train, self.eval = ready.train, ready.eval
        self.warnings = ready.warnings
        self.held, self.exclude_seen = ready.held, ready.exclude_seen
        self._holdout = ready.holdout
        self._filters = ready.filters
        self.length = ready.inputs.max_history

    @cached_property
    def _popular_ranks(self) -> np.ndarray:
        assert self.eval is not None
        return self.eval.ranks_by(self.train.popularity(len(self.inputs.items)))

    def metrics(self) -> RankingMetrics:
        """A new, empty collector of metrics."""
        assert self.eval is not None
        is_test = self.eval.is_last if self.held is Held.TWO else None
        return RankingMetrics(self.eval, lambda: self._popular_ranks, is_test=is_test)

    def resolve(self, message: Any) -> None:
        """Fills in the defaults that were used."""
        message.max_history = self.length
        message.min_user_interactions = max(message.min_user_interactions, 1)
        message.min_item_interactions = max(message.min_item_interactions, 1)
        message.exclude_seen = self.exclude_seen
        if self.held in _SPLITS:
            message.split = _SPLITS[self.held]

    def footprint(self) -> Footprint:
        """A score for each item, for a chunk of positions at a time."""
        return Footprint(len(self.inputs.items) + 1, LOSS_CHUNK)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {
            "task": self.task.name,
            "max_history": self.length,
            "split": self.held.value,
            **({"holdout": self._holdout} if self.held is Held.LATEST else {}),
            "exclude_seen": self.exclude_seen,
            "ranked": "all items",
            "min_user_interactions": self._filters.min_user,
            "min_item_interactions": self._filters.min_item,
            **({"min_rating": self._filters.min_rating} if self._filters.min_rating is not None else {}),
        }

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if the model is not better than one list for all users."""
        if not is_no_better_than_popular(metrics):
            return None
        message = (
            f"hr_10 is {metrics['hr_10']:.4g}, and {metrics['popular_hr_10']:.4g} for a list of the most frequent "
            "items that is the same for all"
        )
        return TaskWarning("NO_BETTER_THAN_POPULAR", f"{message}; more epochs or a higher learning_rate may help")
