"""Fine-tuning for vectors of texts: from pairs, triplets, or two texts and a score."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.bad_rows import REASON
from shardyard_trainer.data.errors import DataError, SpecError, raise_all
from shardyard_trainer.data.sentence_rows import PAIRS, SCORED, ScoreRange, read_sentences
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.holdout import split_by_lot
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.sentences import AllTexts, SentenceInputs, Sentences, SentenceSamples, load_sentences
from shardyard_trainer.inputs.text import EncodedText, TextInputs, adapt
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.answers import TextPredictor
from shardyard_trainer.tasks.base import Footprint, Graph, Metrics, Output, Parts, TaskWarning, at_once, violation
from shardyard_trainer.tasks.embedder import VECTORS, PairLoss, TextEmbedder
from shardyard_trainer.tasks.heads import without_pooler
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.texts import (
    DEFAULT_MAX_LENGTH,
    PreparedText,
    Splits,
    TrainingTexts,
    choose_reader,
    find_length,
    find_tokenizer,
    imagine_texts,
)
from shardyard_trainer.tasks.vector_metrics import PairMetrics, ScoreMetrics
from shardyard_trainer.tasks.vectors import POOLING_VALUES, POOLINGS, TextVectors

DEFAULT_TEMPERATURE = 0.05
_REPEATED = 0.1
"""The share of pairs that repeat an earlier one, over which a plan warns."""


class SentenceEmbedding:
    """The task `sentence_embedding`."""

    name = "sentence_embedding"
    output = Output.MODEL
    roles = tuple(role.name for role in (*PAIRS, *SCORED))
    auto = "AutoModel"
    pipeline = "sentence-similarity"
    example = '"Hello, my dog is cute"'
    usage = ""
    cuts = True
    holds_out_by_lot = True
    inputs = TextInputs
    graph = Graph({VECTORS: ("batch",)})

    def prepare(self, job: Ingredients) -> PreparedEmbedding:
        """Finds and checks model and data. Raises SpecError."""
        return _prepare(job)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedEmbedding:
        """With pairs of texts that belong together. Raises SpecError."""
        choice = choose_reader(job)
        inputs, splits = imagine_texts(job, choice, data, "max_length", DEFAULT_MAX_LENGTH, times=2)
        pooling = architectures.default_pooling(choice.config, choice.described)
        read = SentenceInputs(inputs.tokenizer, inputs.length, pooling)
        return PreparedEmbedding(choice, read, splits, job.warnings, wanted=job.wanted)

    def open(self, loaded: Loaded, inputs: TextInputs) -> PairPredictor:
        """What compares two texts; their vectors are made by `Embed`."""
        return PairPredictor(self.name, loaded, inputs)


TASK = SentenceEmbedding()


def _prepare(job: Ingredients) -> PreparedEmbedding:
    wanted = job.wanted
    choice = job.attempt(lambda: choose_reader(job))
    train_files, eval_files = job.files()
    scores = job.attempt(lambda: _score_range(job))
    raise_all(job.errors)
    assert choice is not None and train_files is not None and scores is not None

    def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
        deque(read_sentences(files, source, scores, field=field), maxlen=0)

    with job.looking_on(train_files, eval_files, look_through):
        published = choice.described.sentence.max_length if choice.described and choice.described.sentence else None
        length = find_length(job, choice, "max_length", published or DEFAULT_MAX_LENGTH)
        texts = AllTexts(train_files, job.spec.train_data, scores, field="spec.train_data")
        tokenizer = find_tokenizer(job, choice, train_files, texts=TrainingTexts(texts, repr((job.field, scores))))
        choice = adapt(choice, tokenizer, length)
    pooling = POOLINGS.get(wanted.pooling) or architectures.default_pooling(choice.config, choice.described)
    inputs = SentenceInputs(tokenizer, length, pooling)

    def load(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> Sentences:
        found = load_sentences(
            files, source, scores, tokenizer, max_length=length, cache_dir=job.cache_dir, field=field
        )
        if found.store.meta["bad_rows"]:
            job.warn(REASON, found.store.meta["bad_rows"], field)
        return found

    with job.looking_on(None, eval_files, look_through):
        train = load(train_files, job.spec.train_data, "spec.train_data")
    held_out = load(eval_files, job.spec.eval_data, "spec.eval_data") if eval_files is not None else None
    splits = _samples(job, choice, inputs, train, held_out)
    _check(job, splits)
    choice = job.accept_weights(choice, "")
    return PreparedEmbedding(choice, inputs, splits, job.warnings, wanted=wanted)


def _score_range(job: Ingredients) -> ScoreRange:
    wanted = job.wanted
    given = [name for name in ("lowest_score", "highest_score") if wanted.HasField(name)]
    if not given:
        # A job that only measures has no field for the range, and its model may have learnt from pairs.
        return ScoreRange(is_open=job.only_evaluates)
    if len(given) == 1:
        missing = "highest_score" if given == ["lowest_score"] else "lowest_score"
        raise SpecError(f"{job.field}.{missing}", "SPEC_INVALID", f"{given[0]} is given alone; give {missing} too")
    if wanted.lowest_score >= wanted.highest_score:
        message = (
            f"{wanted.lowest_score:g} is not less than the highest_score of {wanted.highest_score:g}; give a lower one"
        )
        raise SpecError(f"{job.field}.lowest_score", "SPEC_INVALID", message)
    return ScoreRange(wanted.lowest_score, wanted.highest_score)


def _samples(
    job: Ingredients, choice: ModelChoice, inputs: SentenceInputs, train: Sentences, held_out: Sentences | None
) -> Splits[SentenceSamples]:
    with_types = architectures.has_token_types(choice.config)
    padding = int(inputs.tokenizer.pad_token_id or 0)

    def samples(data: Sentences, index: np.ndarray) -> SentenceSamples:
        return SentenceSamples(data, index, with_types=with_types, padding=padding)

    if held_out is not None:
        return samples(train, np.arange(train.num_samples)), samples(held_out, np.arange(held_out.num_samples))
    train_index, eval_index = split_by_lot(train.num_samples, job.holdout, job.seed)
    return samples(train, train_index), samples(train, eval_index) if len(eval_index) else None


def _check(job: Ingredients, splits: Splits[SentenceSamples]) -> None:
    """Raises SpecError for settings of the other kind of data, and for pairs that teach nothing."""
    train = splits[0]
    if job.only_evaluates:
        return
    kinds = {samples.is_scored for samples in splits if samples is not None}
    wanted = job.wanted
    if wanted.HasField("temperature") and False not in kinds:
        message = f"{wanted.temperature:g} is for pairs without scores, and all pairs have one; leave it out"
        job.errors.append(SpecError(f"{job.field}.temperature", "SPEC_INVALID", message))
    if wanted.HasField("lowest_score") and True not in kinds:
        message = "the data has no scores; leave lowest_score and highest_score out, or map columns.score"
        job.errors.append(SpecError(f"{job.field}.lowest_score", "SPEC_INVALID", message))
    raise_all(job.errors)
    if train.is_scored:
        return
    keys = train.keys
    if not train.has_negatives and len(np.unique(keys[:, 1])) == 1:
        message = (
            f"all {len(keys):,} positives are the same text, so no anchor has a wrong one to learn from; give "
            "different pairs, or a column of negatives"
        )
        raise DataError(message, field="spec.train_data")
    repeated = len(keys) - len(np.unique(keys, axis=0))
    if repeated > _REPEATED * len(keys):
        message = (
            f"{repeated:,} of {len(keys):,} samples repeat an earlier one, and count again; remove them if you do not "
            "want that"
        )
        job.warn("REPEATED_PAIRS", message, "spec.train_data")


class PreparedEmbedding(PreparedText[SentenceSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "sample"
    inputs: SentenceInputs

    def __init__(
        self,
        choice: ModelChoice,
        inputs: SentenceInputs,
        splits: Splits[SentenceSamples],
        warnings: Sequence[TaskWarning],
        *,
        wanted: spec_pb2.SentenceEmbedding,
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self._temperature = wanted.temperature if wanted.HasField("temperature") else DEFAULT_TEMPERATURE
        ends = {"lowest_score": wanted.lowest_score, "highest_score": wanted.highest_score}
        self._range = ends if wanted.HasField("lowest_score") else {}
        # A triplet has a wrong answer of its own, a pair only those of others.
        self.smallest_batch = 1 if self.train.is_scored or self.train.has_negatives else 2
        self._has_pairs = any(not samples.is_scored for samples in (self.train, self.eval) if samples is not None)

    def make_module(self, *, meta: bool) -> TextEmbedder:
        """Transformers' backbone, without a pooler that nothing would read."""
        options = without_pooler(self.choice.config)
        model, _ = loading.load(transformers.AutoModel, self.choice, meta=meta, **options)
        loading.ensure_pad_id(model, self.inputs.tokenizer)
        return TextEmbedder(
            model,
            pooling=self.inputs.pooling,
            temperature=self._temperature,
            learns_pairs=not self.train.is_scored,
        )

    def metrics(self) -> Metrics:
        """A new, empty collector of metrics, for the kind of the evaluation data."""
        samples = self.eval if self.eval is not None else self.train
        return ScoreMetrics() if samples.is_scored else PairMetrics(PairLoss(self._temperature))

    def resolve(self, message: Any) -> None:
        """Fills in length, pooling and temperature."""
        message.max_length = self.length
        message.pooling = POOLING_VALUES[self.inputs.pooling]
        if self._has_pairs:
            message.temperature = self._temperature

    def footprint(self) -> Footprint:
        """No logits over a vocabulary."""
        return Footprint(0, 0)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`; `normalize` makes `Embed` give vectors of length 1."""
        settings = {"pooling": self.inputs.pooling, "max_length": self.length, "normalize": True, **self._range}
        temperature = {"temperature": self._temperature} if self._has_pairs else {}
        return {"task": TASK.name, **settings, **temperature}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if cosines have nothing to do with the scores."""
        if metrics.get("pearson", 1.0) > 0:
            return None
        message = "pearson is not over 0: the cosines do not follow the scores; train for more epochs, or check that a"
        return TaskWarning("UNRELATED_VECTORS", f"{message} higher score means more alike")


@dataclass(frozen=True)
class EncodedPair:
    """Two texts that are compared."""

    one: EncodedText
    other: EncodedText

    @property
    def num_positions(self) -> int:
        """The positions of both."""
        return 2 * max(self.one.num_positions, self.other.num_positions)


class PairPredictor(TextPredictor):
    """Says how alike two texts are: the cosine of the vectors that `Embed` gives."""

    takes = ("pair",)

    def __init__(self, task: str, loaded: Loaded, inputs: TextInputs) -> None:
        super().__init__(task, loaded, inputs)
        self._vectors = TextVectors(loaded, inputs)
        self._wish = self._vectors.wish(model_service_pb2.EmbedRequest())

    def refuse(self, request: model_service_pb2.PredictRequest) -> list[worker_pb2.Violation]:
        """Refuses parameters, and anything but pairs."""
        found = super().refuse(request)
        message = f"a {self.task} model compares two texts; send `pair`, or get the vector of one text with Embed"
        return [
            violation(each.field, each.reason, message) if each.field.startswith("instances[") else each
            for each in found
        ]

    def read(self, instances: Sequence[model_service_pb2.Instance]) -> list[Any]:
        """Encodes the two texts of each pair, cut as in training. Raises SpecError."""
        texts = [text for each in instances for text in (each.pair.text, each.pair.text_pair)]
        found = self.inputs.encode([(text, None) for text in texts], self._wish.length)
        return [EncodedPair(*both) for both in zip(found[::2], found[1::2], strict=True)]

    def most_bytes(self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedPair]) -> list[int]:
        """The size of a number."""
        return [16] * len(encoded)

    def answer(
        self, _request: model_service_pb2.PredictRequest, encoded: Sequence[EncodedPair], _places: Sequence[int]
    ) -> Parts:
        """The cosine of each pair."""
        return at_once(lambda: [self._compared(vectors) for vectors in self._both(encoded)])

    def _both(self, encoded: Sequence[EncodedPair]) -> list[torch.Tensor]:
        texts = [text for each in encoded for text in (each.one, each.other)]
        found = self._vectors.compute(texts, self._wish)
        return [torch.stack(found[at : at + 2]) for at in range(0, len(found), 2)]

    @staticmethod
    def _compared(vectors: torch.Tensor) -> model_service_pb2.Prediction:
        prediction = model_service_pb2.Prediction()
        prediction.regression.value = float(vectors[0].double() @ vectors[1].double())
        return prediction

    @torch.no_grad()
    def compare(self, live: HuggingFaceModule, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors of both models for all texts of the batch."""
        device = next(live.parameters()).device
        inputs = {name: tensor.to(device) for name, tensor in batch.inputs.items()}
        outputs = live(**inputs, return_outputs=True).outputs or {}
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        rows = zip(batch.inputs["input_ids"].tolist(), lengths, strict=True)
        encoded = [EncodedText(ids[:length], [0] * length) for ids, length in rows]
        return outputs["vectors"].flatten(0, 1).float().cpu(), torch.stack(self._vectors.compute(encoded, self._wish))
