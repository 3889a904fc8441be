"""From a JobSpec to its task: model, tokenizer and data found, read and checked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.columns import layout_key, read_rows
from shardyard_trainer.data.errors import DataError, SpecError, listed, raise_all
from shardyard_trainer.data.label_canon import LOOKALIKE
from shardyard_trainer.data.label_column import wanted_labels
from shardyard_trainer.data.labels import MULTI_LABEL, SINGLE_LABEL, check_labels
from shardyard_trainer.data.sources import DataFile, is_for_tests, resolve_source
from shardyard_trainer.data.store import files_fingerprint
from shardyard_trainer.inputs import packed as corpora
from shardyard_trainer.inputs import tokenization
from shardyard_trainer.inputs.labelled import Examples, load_examples
from shardyard_trainer.models import architectures, sources
from shardyard_trainer.models.sentence import lower_case
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.causal_lm import CausalLmTask, CausalSamples
from shardyard_trainer.tasks.masked_lm import MaskedLmTask, MaskedSamples
from shardyard_trainer.tasks.modules import POOLINGS
from shardyard_trainer.tasks.parts import TaskWarning, TrainableTask
from shardyard_trainer.tasks.text_classification import (
    ClassificationSamples,
    TextClassificationTask,
)

DEFAULT_SEQUENCE_LENGTH = 512
DEFAULT_MAX_LENGTH = 128
DEFAULT_HOLDOUT = 0.1
DEFAULT_MASK_PROBABILITY = 0.15
SHORTEST_SEQUENCE = 8

_T = TypeVar("_T")


def build_task(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> TrainableTask:
    """The task of a spec, resolved or not, with its data tokenised (once; then from the cache).

    Raises SpecError: the first thing that is wrong, with all others that were found beside it in `others`.
    """
    kind = spec.WhichOneof("task")
    if kind == "pretraining" and spec.pretraining.WhichOneof("objective"):
        return _Builder(spec, locations).pretraining()
    if kind == "fine_tuning" and spec.fine_tuning.WhichOneof("task"):
        return _Builder(spec, locations).text_classification()
    field = f"spec.{kind}" if kind else "spec.task"
    raise SpecError(field, "SPEC_INVALID", "no training task: give pretraining or fine_tuning, and what to train for")


class _Builder:
    def __init__(self, spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> None:
        self._spec = spec
        self._locations = locations
        self._cache_dir = Path(locations.cache_dir)
        self._warnings: list[TaskWarning] = []
        self._errors: list[SpecError] = []

    def pretraining(self) -> TrainableTask:
        wanted = self._spec.pretraining
        objective = wanted.WhichOneof("objective")
        choice = self._try(lambda: self._choose(objective))
        train_files, eval_files = self._files()
        raise_all(self._errors)
        assert choice is not None and train_files is not None
        with self._looking_on(train_files, eval_files, with_label=False):
            length = self._length(choice, wanted, "sequence_length", DEFAULT_SEQUENCE_LENGTH, "spec.pretraining")
            tokenizer = self._tokenizer(choice, train_files, is_causal=objective == "causal_lm")
            choice = sources.adapt(choice, tokenizer, length)
        frame = corpora.causal_frame(tokenizer) if objective == "causal_lm" else corpora.masked_frame(tokenizer)
        with self._looking_on(train_files, eval_files, with_label=False):
            train, evaluation = self._corpora(train_files, eval_files, tokenizer, frame)
        if objective == "causal_lm":
            return self._causal_lm(choice, tokenizer, train, evaluation, length)
        return self._masked_lm(choice, tokenizer, train, evaluation, length)

    def _causal_lm(
        self, choice: ModelChoice, tokenizer: Any, train: corpora.Corpus, evaluation: corpora.Corpus | None, length: int
    ) -> TrainableTask:
        def samples(corpus: corpora.Corpus, *, is_train: bool) -> CausalSamples:
            seed = self._spec.optimization.seed
            found = CausalSamples(corpus, length, seed=seed, is_train=is_train, choice=choice, tokenizer=tokenizer)
            self._check_enough(found.blocks, corpus, is_train=is_train)
            return found

        task = CausalLmTask(
            choice,
            tokenizer,
            samples(train, is_train=True),
            samples(evaluation, is_train=False) if evaluation else None,
            length,
        )
        return self._done(task)

    def _masked_lm(
        self, choice: ModelChoice, tokenizer: Any, train: corpora.Corpus, evaluation: corpora.Corpus | None, length: int
    ) -> TrainableTask:
        wanted = self._spec.pretraining.masked_lm
        probability = wanted.mask_probability if wanted.HasField("mask_probability") else DEFAULT_MASK_PROBABILITY

        def samples(corpus: corpora.Corpus, *, is_train: bool) -> MaskedSamples:
            found = MaskedSamples(
                corpus,
                length,
                seed=self._spec.optimization.seed,
                is_train=is_train,
                choice=choice,
                tokenizer=tokenizer,
                probability=probability,
            )
            self._check_enough(found.blocks, corpus, is_train=is_train)
            return found

        task = MaskedLmTask(
            choice,
            tokenizer,
            samples(train, is_train=True),
            samples(evaluation, is_train=False) if evaluation else None,
            length,
        )
        return self._done(task)

    def text_classification(self) -> TrainableTask:
        fine_tuning = self._spec.fine_tuning
        wanted = fine_tuning.text_classification
        problem = wanted.problem or SINGLE_LABEL
        choice = self._try(self._choose_classifier)
        train_files, eval_files = self._files()
        if wanted.labels:
            self._try(lambda: check_labels(wanted.labels, problem))
        if wanted.label_separator and problem != MULTI_LABEL:
            place = "spec.fine_tuning.text_classification.label_separator"
            message = (
                f"{wanted.label_separator!r}: for several labels only; set problem to multi_label, or leave it out"
            )
            self._errors.append(SpecError(place, "SPEC_INVALID", message))
        if wanted.label_smoothing and problem != SINGLE_LABEL:
            place = "spec.fine_tuning.text_classification.label_smoothing"
            self._errors.append(SpecError(place, "SPEC_INVALID", f"{wanted.label_smoothing:g}: for single labels only"))
        raise_all(self._errors)
        assert choice is not None and train_files is not None
        with self._looking_on(train_files, eval_files, with_label=True):
            published = choice.described.sentence.max_length if choice.described and choice.described.sentence else None
            default = published or DEFAULT_MAX_LENGTH
            length = self._length(choice, fine_tuning, "max_length", default, "spec.fine_tuning")
            is_causal = architectures.is_causal(choice.config.model_type)
            tokenizer = self._tokenizer(choice, train_files, is_causal=is_causal)
            choice = sources.adapt(choice, tokenizer, length)

        def examples(
            files: list[DataFile], source: spec_pb2.DataSource, labels: Iterable[str], field: str, like: str = ""
        ) -> Examples:
            found = load_examples(
                files,
                source,
                tokenizer,
                max_length=length,
                wanted=wanted_labels(wanted, tuple(labels), like=like),
                cache_dir=self._cache_dir,
                field=field,
            )
            # Of the evaluation data only what concerns its own spelling.
            notes = [note for note in found.label_notes if not like or note[0] == LOOKALIKE]
            self._warnings += [TaskWarning(reason, message, field) for reason, message in notes]
            return found

        with self._looking_on(None, eval_files, with_label=True):
            train = examples(train_files, self._spec.train_data, wanted.labels, "spec.train_data")
            # The head's own order is taken if its labels are the data's: its outputs keep their meaning.
            order = () if wanted.labels or wanted.new_head else sources.head_order(choice, train.schema.labels)
            if order:
                train = examples(train_files, self._spec.train_data, order, "spec.train_data")
        held_out = None
        if eval_files is not None:
            source = self._spec.eval_data
            held_out = examples(eval_files, source, train.schema.labels, "spec.eval_data", train.label_way)
        return self._classification_task(choice, tokenizer, train, held_out, length)

    def _classification_task(
        self, choice: ModelChoice, tokenizer: Any, train: Examples, held_out: Examples | None, length: int
    ) -> TrainableTask:
        wanted = self._spec.fine_tuning.text_classification
        with_types = getattr(choice.config, "type_vocab_size", 0) > 1

        def samples(examples: Examples, index: np.ndarray) -> ClassificationSamples:
            padding = int(tokenizer.pad_token_id or 0)
            return ClassificationSamples(examples, index, with_types=with_types, padding=padding)

        if held_out is not None and held_out.has_pairs != train.has_pairs:
            raise DataError("training data and evaluation data differ in having a second text", field="spec.eval_data")
        evaluation: ClassificationSamples | None
        if held_out is not None:
            train_index = np.arange(train.store.num_sequences)
            evaluation = samples(held_out, np.arange(held_out.store.num_sequences))
        else:
            train_index, eval_index = self._split(train)
            evaluation = samples(train, eval_index) if len(eval_index) else None
        task = TextClassificationTask(
            choice,
            tokenizer,
            samples(train, train_index),
            evaluation,
            schema=train.schema,
            wanted=wanted,
            pooling=POOLINGS.get(wanted.pooling) or architectures.default_pooling(choice.config, choice.described),
            length=length,
        )
        return self._done(task)

    def _split(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        num_samples, holdout = examples.store.num_sequences, self._holdout()
        # By lot, not the last ones: labelled data often comes sorted by label.
        order = np.random.default_rng([self._spec.optimization.seed, 0x401D]).permutation(num_samples)
        held = round(num_samples * holdout) or int(holdout > 0)
        if num_samples - held < 1:
            raise DataError(f"{num_samples} row: nothing would be left to train on; give eval_data, or holdout 0")
        train, held_out = order[held:], order[:held]
        if examples.schema.problem == SINGLE_LABEL:
            train, held_out = self._keep_classes(train, held_out, examples)
        return np.sort(train), np.sort(held_out)

    def _keep_classes(
        self, train: np.ndarray, held_out: np.ndarray, examples: Examples
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gives one text back to training for each class of which the lot held out all."""
        labels: np.ndarray = examples.store.arrays["labels"]
        lost = np.setdiff1d(labels[held_out], labels[train])
        if not len(lost):
            return train, held_out
        back = np.asarray([held_out[labels[held_out] == label][0] for label in lost])
        left = np.setdiff1d(held_out, back)
        names = [examples.schema.labels[label] for label in lost]
        message = f"{len(back)} texts stay in training, as no other has their labels: {listed(names, most=8)}"
        if not len(left):
            message += "; nothing is left to evaluate on: give more data, or eval_data"
        self._warnings.append(TaskWarning("RARE_LABELS", message, "spec.train_data"))
        return np.concatenate([train, back]), left

    def _choose_classifier(self) -> ModelChoice:
        choice = sources.choose_model(self._spec.model, self._locations)
        if not architectures.reads_text(choice.config):
            raise SpecError(
                "spec.fine_tuning.text_classification",
                "OBJECTIVE_UNSUPPORTED",
                f"{choice.config.model_type} is no model that reads a text into one vector a token; "
                f"it can be trained for: {', '.join(architectures.objectives(choice.config)) or 'none'}",
                {"supported": ",".join(architectures.objectives(choice.config))},
            )
        return choice

    def _choose(self, objective: str | None) -> ModelChoice:
        choice = sources.choose_model(self._spec.model, self._locations)
        supported = architectures.objectives(choice.config)
        if objective not in supported:
            raise SpecError(
                f"spec.pretraining.{objective}",
                "OBJECTIVE_UNSUPPORTED",
                _why_not(choice.config)
                or f"{choice.config.model_type} cannot be trained for it, but for: "
                f"{', '.join(supported) or 'nothing that this service trains; use another model'}",
                {"supported": ",".join(supported)},
            )
        return choice

    def _files(self) -> tuple[list[DataFile] | None, list[DataFile] | None]:
        spec = self._spec
        train = self._try(lambda: resolve_source(spec.train_data, self._locations))
        for_tests = [file.name for file in train or () if is_for_tests(file.name)]
        if train and 0 < len(for_tests) < len(train):
            message = f"all {len(train)} files are trained on, {listed(for_tests)} too; name one with path if not meant"
            self._warnings.append(TaskWarning("TEST_DATA_TRAINED_ON", message, "spec.train_data.path"))
        if not spec.HasField("eval_data"):
            return train, None
        held_out = self._try(lambda: resolve_source(spec.eval_data, self._locations, field="spec.eval_data"))
        if train and held_out and {file.path for file in train} & {file.path for file in held_out}:
            message = "the training data has files of the evaluation data, which then says little about new data"
            self._warnings.append(TaskWarning("SAME_DATA", message, "spec.eval_data"))
        return train, held_out

    def _length(self, choice: ModelChoice, message: Any, name: str, default: int, field: str) -> int:
        most = None if choice.is_fresh and not _sets_positions(choice) else architectures.longest(choice.config)
        if message.HasField(name):
            length: int = getattr(message, name)
            if length < (SHORTEST_SEQUENCE if name == "sequence_length" else 1):
                raise SpecError(f"{field}.{name}", "SPEC_INVALID", f"{length} is too small")
            if most is not None:
                sources.check_length(choice, length, field=f"{field}.{name}")
            return length
        return min(default, most or default)

    def _tokenizer(self, choice: ModelChoice, files: list[DataFile], *, is_causal: bool) -> Any:
        source = self._spec.tokenizer
        kind = source.WhichOneof("source")
        if kind == "train" or (kind is None and choice.is_fresh):
            if not choice.is_fresh:
                message = "a pretrained model knows its own tokens only; leave the tokenizer out"
                raise SpecError("spec.tokenizer.train", "SPEC_INVALID", message)
            if kind is None:
                message = (
                    "a fresh model has no tokenizer; set tokenizer, for example to one trained on the data (train)"
                )
                raise SpecError("spec.tokenizer", "TOKENIZER_MISSING", message)
            tokenizer = self._trained_tokenizer(choice, files, is_causal=is_causal)
        elif kind is None:
            assert choice.folder is not None
            tokenizer = tokenization.load_tokenizer(choice.folder, field="spec.tokenizer")
            if choice.described is not None and choice.described.sentence and choice.described.sentence.lower_case:
                lower_case(tokenizer)
        else:
            folder, _ = sources.find_folder(source, self._locations, field="spec.tokenizer")
            tokenizer = tokenization.load_tokenizer(folder, field=f"spec.tokenizer.{kind}")
        if warning := tokenization.ensure_pad(tokenizer):
            self._warnings.append(TaskWarning("PAD_TOKEN", warning, "spec.tokenizer"))
        needs_mask = self._spec.HasField("pretraining") and not is_causal
        if needs_mask and tokenizer.mask_token_id is None:
            raise SpecError(
                "spec.tokenizer",
                "OBJECTIVE_UNSUPPORTED",
                "masked_lm needs a tokenizer with a mask token; use one that has it, or name one of its tokens as "
                "mask_token (`tokenizer.mask_token = ...`) and save it anew",
            )
        return tokenizer

    def _trained_tokenizer(self, choice: ModelChoice, files: list[DataFile], *, is_causal: bool) -> Any:
        if is_causal:
            special = tokenization.CAUSAL
        elif choice.config.model_type in architectures.POSITIONS_AFTER_PADDING:
            special = tokenization.ROBERTA
        else:
            special = tokenization.BERT
        source = self._spec.train_data
        texts = corpora.Texts(files, source, field="spec.train_data")
        wanted = self._spec.tokenizer.train
        key = f"{files_fingerprint(files, field='spec.train_data')}:{layout_key(source)}"
        return tokenization.cached_tokenizer(wanted, texts, special, data_fingerprint=key, cache_dir=self._cache_dir)

    def _corpora(
        self, train_files: list[DataFile], eval_files: list[DataFile] | None, tokenizer: Any, frame: corpora.Frame
    ) -> tuple[corpora.Corpus, corpora.Corpus | None]:
        whole_words = self._spec.pretraining.masked_lm.whole_word

        def load(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> Any:
            return corpora.load_corpus(
                files, source, tokenizer, frame, whole_words=whole_words, cache_dir=self._cache_dir, field=field
            )

        train = load(train_files, self._spec.train_data, "spec.train_data")
        if eval_files is None:
            return corpora.split(train, self._holdout())
        return corpora.whole(train), corpora.whole(load(eval_files, self._spec.eval_data, "spec.eval_data"))

    def _check_enough(self, blocks: corpora.Blocks, corpus: corpora.Corpus, *, is_train: bool) -> None:
        has_eval = self._spec.HasField("eval_data")
        corpora.check_enough(corpus, blocks, field="spec.train_data" if is_train or not has_eval else "spec.eval_data")

    def _holdout(self) -> float:
        evaluation = self._spec.evaluation
        return evaluation.holdout if evaluation.HasField("holdout") else DEFAULT_HOLDOUT

    @contextmanager
    def _looking_on(
        self, train_files: list[DataFile] | None, eval_files: list[DataFile] | None, *, with_label: bool
    ) -> Iterator[None]:
        """Where something is wrong, looks through the data that was not read yet: it is all said at once."""
        try:
            yield
        except SpecError as error:
            spec, told = self._spec, {each.field.rpartition(".columns")[0] or each.field for each in error.all()}
            for files, source, field in (
                (train_files, spec.train_data, "spec.train_data"),
                (eval_files, spec.eval_data, "spec.eval_data"),
            ):
                if files and field not in told:
                    several = spec.fine_tuning.text_classification.problem == MULTI_LABEL
                    rows = read_rows(files, source, with_label=with_label, several_labels=several, field=field)
                    self._try(lambda rows=rows: deque(rows, maxlen=0))  # type: ignore[misc]
            raise_all([error, *self._errors])

    def _done(self, task: Any) -> TrainableTask:
        task.warnings[:0] = self._warnings
        return task  # type: ignore[no-any-return]

    def _try(self, look: Callable[[], _T]) -> _T | None:
        """Gathers what is wrong, so that the data is looked into even where the model is not one."""
        try:
            return look()
        except SpecError as error:
            self._errors.append(error)
            return None


def _why_not(config: Any) -> str:
    if not architectures.is_turned(config):
        return ""
    if architectures.is_causal(config.model_type):
        return f"this {config.model_type} reads in both directions: it would see the tokens that it is to predict"
    return f"is_decoder makes this {config.model_type} read from left to right only; set is_decoder to false"


def _sets_positions(choice: ModelChoice) -> bool:
    alias = {"max_position_embeddings", choice.config.attribute_map.get("max_position_embeddings", "")}
    return bool(alias & set(choice.overrides))
