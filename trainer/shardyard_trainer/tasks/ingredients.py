"""A spec's model and files, found and checked for any task; collects all errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.columns import check_roles
from shardyard_trainer.data.errors import SpecError, listed, raise_all
from shardyard_trainer.data.sources import DataFile, is_for_tests, resolve_source
from shardyard_trainer.models import architectures, sources
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.models.weight_heads import look
from shardyard_trainer.models.weights import spare_weights
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Prepared, TaskWarning

DEFAULT_HOLDOUT = 0.1

_T = TypeVar("_T")


def prepare(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> Prepared:
    """Prepares the task of a spec, resolved or not, and reads its data (once; then from the cache).

    Raises SpecError: the first thing that is wrong, with all others that were found beside it in `others`.
    """
    job = Ingredients(spec, locations)
    return table.trained(spec).prepare(job)


class Ingredients:
    """A spec, resolved or not, on its way to a task; `field` is the place of the task's own message in it.

    `only_evaluates`: nothing is going to be trained, so that data may be too little to train on. `model_field` is where
    the user has named the model.
    """

    def __init__(
        self,
        spec: spec_pb2.JobSpec,
        locations: worker_pb2.Locations,
        *,
        only_evaluates: bool = False,
        model_field: str = sources.FIELD,
    ) -> None:
        self.spec = spec
        self.locations = locations
        self.only_evaluates = only_evaluates
        self._model_field = model_field
        self.field = table.path_of(spec)
        self.wanted: Any = table.message_of(spec)
        self.cache_dir = Path(locations.cache_dir)
        self.warnings: list[TaskWarning] = []
        self.errors: list[SpecError] = []

    @property
    def seed(self) -> int:
        """The seed of all randomness."""
        return self.spec.optimization.seed

    @property
    def holdout(self) -> float:
        """The share of the training data held out for evaluation if no other data is given."""
        evaluation = self.spec.evaluation
        return evaluation.holdout if evaluation.HasField("holdout") else DEFAULT_HOLDOUT

    def attempt(self, look: Callable[[], _T]) -> _T | None:
        """Collects an error instead of raising it, so that the data is checked even if the model is invalid."""
        try:
            return look()
        except SpecError as error:
            self.errors.append(error)
            return None

    def warn(self, reason: str, message: str, field: str) -> None:
        """Records a warning, once."""
        warning = TaskWarning(reason, message, field)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def choose(self) -> ModelChoice:
        """The model that the spec means. Raises SpecError."""
        side = getattr(self.wanted, "image_size", 0)
        choice = sources.choose_model(self.spec.model, self.locations, field=self._model_field, image_size=side)
        if getattr(choice.config, "was_frozen", False):
            text = "the function of hubconf.py returns a module with all parameters frozen; all of them are trained"
            self.warn("PARAMETERS_UNFROZEN", f"{text}, unless freeze or lora says otherwise", choice.field)
        if choice.note:
            self.warn("MODEL_CONVERTED", choice.note, choice.field)
        try:
            if choice.described is not None:
                table.of_folder(choice.described)
        except FolderInvalid as error:
            raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
        return choice

    def files(self) -> tuple[list[DataFile] | None, list[DataFile] | None]:
        """The training files and the evaluation files; None if not found, or not given."""
        spec = self.spec
        roles, name = table.of(spec).roles, self.field.rpartition(".")[2]
        for source, field in ((spec.train_data, "spec.train_data"), (spec.eval_data, "spec.eval_data")):
            self.errors.extend(check_roles(source, roles, task=name, field=field))
        train = self.attempt(lambda: resolve_source(spec.train_data, self.locations))
        for_tests = [file.name for file in train or () if is_for_tests(file.name)]
        if train and 0 < len(for_tests) < len(train):
            message = f"all {len(train)} files are trained on, {listed(for_tests)} too; name one with path if not meant"
            self.warn("TEST_DATA_TRAINED_ON", message, "spec.train_data.path")
        if not spec.HasField("eval_data"):
            return train, None
        held_out = self.attempt(lambda: resolve_source(spec.eval_data, self.locations, field="spec.eval_data"))
        if train and held_out and {file.path for file in train} & {file.path for file in held_out}:
            message = "the training data has files of the evaluation data, which then says little about new data"
            self.warn("SAME_DATA", message, "spec.eval_data")
        return train, held_out

    @contextmanager
    def looking_on(
        self,
        train_files: list[DataFile] | None,
        eval_files: list[DataFile] | None,
        read: Callable[[list[DataFile], spec_pb2.DataSource, str], None],
    ) -> Iterator[None]:
        """On an error, also has `read` scan the data not read yet, so that all problems are reported together."""
        try:
            yield
        except SpecError as error:
            spec, reported = self.spec, {each.field.rpartition(".columns")[0] or each.field for each in error.all()}
            for files, source, field in (
                (train_files, spec.train_data, "spec.train_data"),
                (eval_files, spec.eval_data, "spec.eval_data"),
            ):
                if files and field not in reported:
                    self.attempt(lambda files=files, source=source, field=field: read(files, source, field))  # type: ignore[misc]
            raise_all([error, *self.errors])

    def accept_weights(self, choice: ModelChoice, auto: str) -> ModelChoice:
        """The choice corrected by its actual weights; warns if they differ from config.json.

        `auto` names the class that reads them, empty for the backbone alone. Raises SpecError for weights of another
        model.
        """
        if choice.folder is None:
            return choice
        try:
            report = look(choice.folder, auto)
        except FolderInvalid as error:
            raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
        if report.lacking:
            name = self.field.rpartition(".")[2]
            found = report.reshaped or f"the weights lack {listed(report.lacking, most=2)} of the {name} head"
            self.warn("NEW_HEAD", f"{found}: a new head is started", choice.field)
        if message := spare_weights(choice.folder):
            self.warn("WEIGHTS_TWICE", message, choice.field)
        if report.unread:
            message = f"{len(report.unread)} tensors of the weights are not read: {listed(report.unread, most=3)}"
            self.warn("UNREAD_TENSORS", message, choice.field)
        if report.untied and architectures.is_seq2seq(choice.config):
            # Its embeddings are tied by the same setting, and stay so beside an output layer of its own.
            return replace(choice, separate=report.untied)
        if report.untied:
            message = (
                "config.json ties the output layer to the embeddings, but the weights have another one: it is kept"
            )
            self.warn("OUTPUT_LAYER_UNTIED", message, choice.field)
            return sources.untied(choice)
        return choice


def why_not_pretrained(config: Any) -> str:
    """Why a model would see the tokens that it is to predict, by its direction of reading; empty if it does not."""
    if not architectures.is_turned(config):
        return ""
    if architectures.is_causal(config.model_type):
        return f"this {config.model_type} reads in both directions: it would see the tokens that it is to predict"
    return f"is_decoder makes this {config.model_type} read from left to right only; set is_decoder to false"
