"""Fine-tuning for reranking: a cross-encoder reads a query with a passage, and scores how relevant the passage is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.errors import DataError, SpecError, raise_all
from shardyard_trainer.data.relevance_rows import ROLES, read_relevance
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.store import TokenStore
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.relevance import (
    BINARY,
    GRADED,
    RelevanceSamples,
    is_graded,
    load_relevance,
    split_queries,
)
from shardyard_trainer.inputs.text import TextInputs, adapt
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.answers import refuse_kinds, refuse_parameters
from shardyard_trainer.tasks.base import Footprint, Graph, Output, TaskWarning, has_head
from shardyard_trainer.tasks.heads import TextClassifier, load_with_labels
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.list_metrics import ListMetrics
from shardyard_trainer.tasks.text_classifier import Classifier
from shardyard_trainer.tasks.texts import (
    PreparedText,
    Splits,
    TrainingTexts,
    find_length,
    find_tokenizer,
    imagine_texts,
)

DEFAULT_LENGTH = 256
_LABEL = "relevance"


class Reranking:
    """The task `reranking`."""

    name = "reranking"
    output = Output.MODEL
    roles = ROLES
    auto = "AutoModelForSequenceClassification"
    pipeline = "text-ranking"
    example = '"How many moons has Mars?", "Mars has two moons, Phobos and Deimos."'
    usage = ""
    cuts = True
    holds_out_by_lot = True
    inputs = TextInputs
    explains = "words"
    graph = Graph({"logits": ("batch",)})

    def prepare(self, job: Ingredients) -> PreparedReranking:
        """Finds and checks model and data. Raises SpecError."""
        choice = job.attempt(lambda: _choose(job))
        train_files, eval_files = job.files()
        raise_all(job.errors)
        assert choice is not None and train_files is not None
        with job.looking_on(train_files, eval_files, _look_through):
            length = find_length(job, choice, "max_length", DEFAULT_LENGTH, shortest=8)
            texts = TrainingTexts(_Texts(train_files, job.spec.train_data), key=self.name)
            tokenizer = find_tokenizer(job, choice, train_files, texts=texts)
            choice = adapt(choice, tokenizer, length)
        inputs = TextInputs(tokenizer, length)
        with job.looking_on(None, eval_files, _look_through):
            train = _load(job, inputs, train_files, "train_data")
        held_out = _load(job, inputs, eval_files, "eval_data") if eval_files is not None else None
        graded = _find_graded(job, train, held_out)
        return _assemble(job, choice, inputs, _split(job, choice, inputs, (train, held_out), graded=graded), graded)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedReranking:
        """With labels from 0 to 1. Raises SpecError."""
        choice = _choose(job)
        inputs, splits = imagine_texts(job, choice, data, "max_length", DEFAULT_LENGTH)
        return _assemble(job, choice, inputs, splits, graded=False)

    def open(self, loaded: Loaded, inputs: TextInputs) -> Reranker:
        """A predictor of scores. Raises FolderInvalid for a head with more than one output."""
        if loaded.num_outputs != 1:
            raise FolderInvalid(f"the head has {loaded.num_outputs} outputs, but a score is one", file="config.json")
        return Reranker(self.name, loaded, inputs)


TASK = Reranking()


class _Texts:
    """The texts for training a tokenizer."""

    def __init__(self, files: Sequence[DataFile], source: spec_pb2.DataSource) -> None:
        self._files = files
        self._source = source

    def __iter__(self) -> Iterator[str]:
        for row in read_relevance(self._files, self._source, field="spec.train_data"):
            yield row.query
            yield from row.passages


def _choose(job: Ingredients) -> ModelChoice:
    choice = job.choose()
    if not architectures.reads_text(choice.config) or not architectures.native_pooling(choice.config):
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            f"transformers has no head that scores pairs of texts for {choice.config.model_type}; use one such as "
            "bert, roberta, distilbert, xlm-roberta or deberta-v2",
            {"supported": "bert,roberta,distilbert,electra,xlm-roberta,deberta-v2"},
        )
    return choice


def _look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
    deque(read_relevance(files, source, field=field), maxlen=0)


def _load(job: Ingredients, inputs: TextInputs, files: list[DataFile], name: str) -> TokenStore:
    source: spec_pb2.DataSource = getattr(job.spec, name)
    field = f"spec.{name}"
    found = load_relevance(
        files, source, inputs.tokenizer, length=inputs.length or 0, cache_dir=job.cache_dir, field=field
    )
    if found.meta["bad_rows"]:
        job.warn(bad_rows.REASON, found.meta["bad_rows"], field)
    return found


def _find_graded(job: Ingredients, train: TokenStore, held_out: TokenStore | None) -> bool:
    """Whether labels are grades, as given or by the training data. Raises SpecError for data that does not fit."""
    wanted = job.wanted
    graded = wanted.graded if wanted.HasField("graded") else is_graded(train)
    for store, field in ((train, "spec.train_data"), (held_out, "spec.eval_data")):
        if store is not None and not graded and is_graded(store):
            what = "graded is false" if wanted.HasField("graded") else "those of the training data are at most 1"
            message = f"a label is over 1, but {what}; set graded to true, or write labels from 0 to 1"
            raise DataError(message, field=field)
    labels = train.arrays["labels"]
    if not job.only_evaluates and (labels == labels[0]).all():
        message = f"all {len(labels):,} labels are {labels[0]:g}, so there is nothing to tell apart; add passages"
        raise DataError(f"{message} that are {'not ' if labels[0] else ''}relevant", field="spec.train_data")
    return graded


def _split(
    job: Ingredients,
    choice: ModelChoice,
    inputs: TextInputs,
    stores: tuple[TokenStore, TokenStore | None],
    *,
    graded: bool,
) -> Splits[RelevanceSamples]:
    with_types = architectures.has_token_types(choice.config)
    padding = int(inputs.tokenizer.pad_token_id or 0)
    train, held_out = stores

    def samples(store: TokenStore, index: np.ndarray, of: str, field: str) -> RelevanceSamples:
        found = RelevanceSamples(store, index, graded=graded, with_types=with_types, padding=padding)
        total, all_relevant, none_relevant = found.num_one_sided()
        if all_relevant or none_relevant:
            message = (
                f"of {total:,} {of} queries, {all_relevant:,} have relevant passages only and {none_relevant:,} none: "
                "nothing is ranked in them, and MRR and NDCG leave them out"
            )
            job.warn("QUERIES_ONE_SIDED", message, field)
        return found

    if held_out is not None:
        everything = np.arange(held_out.num_sequences)
        evaluated = samples(held_out, everything, "evaluation", "spec.eval_data")
        return samples(train, np.arange(train.num_sequences), "training", "spec.train_data"), evaluated
    trained, kept = split_queries(train, job.holdout, job.seed)
    first = samples(train, trained, "training", "spec.train_data")
    return first, samples(train, kept, "held-out", "spec.train_data") if len(kept) else None


def _assemble(
    job: Ingredients, choice: ModelChoice, inputs: TextInputs, splits: Splits[RelevanceSamples], graded: bool
) -> PreparedReranking:
    described = choice.described
    # A head with one output that config.json gives no meaning is that of a published cross-encoder.
    keeps = described is not None and has_head(choice, TASK) and len(described.labels) in {0, 1}
    keeps = keeps and not job.wanted.new_head
    choice = job.accept_weights(choice, TASK.auto if keeps else "")
    if not choice.is_fresh and not keeps:
        what = "the model's head is put aside" if has_head(choice, TASK) else "the model has no head for this task"
        job.warn("NEW_HEAD", f"{what}: a new one is started", choice.field)
    return PreparedReranking(choice, inputs, splits, job.warnings, graded=graded, keeps_head=keeps)


class PreparedReranking(PreparedText[RelevanceSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "sample"

    def __init__(
        self,
        choice: ModelChoice,
        inputs: TextInputs,
        splits: Splits[RelevanceSamples],
        warnings: list[TaskWarning],
        *,
        graded: bool,
        keeps_head: bool,
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self._graded = graded
        self._keeps_head = keeps_head

    def make_module(self, *, meta: bool) -> TextClassifier:
        """Transformers' own model with a head of one output."""
        auto, tokenizer = transformers.AutoModelForSequenceClassification, self.inputs.tokenizer
        keeps = self._keeps_head
        model = load_with_labels(
            auto, self.choice, tokenizer, (_LABEL,), keeps_head=keeps, meta=meta, problem_type="regression"
        )
        problem = (GRADED if self._graded else BINARY).problem
        pooling = architectures.native_pooling(self.choice.config)
        return TextClassifier(model, None, pooling=pooling, problem=problem, dropout=0.0, label_smoothing=0.0)

    def metrics(self) -> ListMetrics:
        """A new, empty collector of metrics."""
        return ListMetrics(self.eval or self.train)

    def resolve(self, message: Any) -> None:
        """Fills in the length, and what the labels are."""
        message.max_length, message.graded = self.length, self._graded

    def footprint(self) -> Footprint:
        """One output a pair."""
        return Footprint(0, 0)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        return {"task": TASK.name, "graded": self._graded, "max_length": self.length}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if a random order is as good."""
        if not metrics.get("ndcg_10") or metrics["ndcg_10"] > metrics["random_ndcg_10"]:
            return None
        message = f"ndcg_10 is {metrics['ndcg_10']:.3g}, and {metrics['random_ndcg_10']:.3g} in a random order"
        return TaskWarning("NO_BETTER_THAN_RANDOM", f"{message}; more epochs or a higher learning_rate may help")


class Reranker(Classifier):
    """Scores pairs of a query and a passage: a probability if the labels were 0 and 1, else a grade."""

    parameters = ""
    takes: tuple[str, ...] = ("pair",)

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters, and instances other than pairs."""
        message = f"a {self.task} model takes pairs of a query and a passage; send `pair`"
        found = refuse_parameters(request, self.task, self.parameters)
        return found + refuse_kinds(request.instances, self.takes, message)

    def _classify(self, logits_C: torch.Tensor, _threshold: float) -> model_service_pb2.Prediction:
        score = logits_C[0] if self.loaded.folder.trained.get("graded") else logits_C[0].sigmoid()
        prediction = model_service_pb2.Prediction(logits=logits_C.tolist())
        prediction.regression.value = float(score)
        return prediction
