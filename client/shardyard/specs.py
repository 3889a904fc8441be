"""Typed specifications of jobs. The service chooses what is left out and shows it in `Job.info.resolved_spec`.

    spec = JobSpec(
        TextClassification(pooling="mean"),
        model="./bert",
        train_data=Data("reviews.csv", text="review", label="sentiment"),
        optimization=Optimization(epochs=2, learning_rate=1e-4),
        resources=Resources(workers=2),
    )

A model is written as the path of a Hugging Face folder here (uploaded once), `hub:owner/name` or
`hub:owner/name@revision`, `model:ID` or `projects/p/models/m` (trained or uploaded before), or `server:/absolute/path`
(on the server, under an allowed root). A bare `owner/name` is a path if it exists here, else a model of the Hub. Data
is the path of a file or folder here, `dataset:ID`, `projects/p/datasets/d`, or `server:/absolute/path`. A model or data
set that a client returned (`client.upload_dataset(...)`, `job.model()`) can be given itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from shardyard.spec_pretraining import CausalLm, MaskedImage, MaskedItem, MaskedLm, SpanCorruption, Split
from shardyard.spec_settings import (
    Checkpoints,
    EvaluationPolicy,
    ExportFormat,
    ExportPolicy,
    Freeze,
    Lora,
    Optimization,
    Parallelism,
    Resources,
    Retry,
)
from shardyard.spec_sources import AnyModel, Data, Distillation, Resource, TrainedTokenizer
from shardyard.spec_sources import set_fields as _set

Pooling = Literal["mean", "cls", "last", "max"]
Problem = Literal["single_label", "multi_label", "regression"]
Scheme = Literal["bio", "iob1", "bioes", "plain"]
Output = Literal["pooled", "last_hidden_state"]
ClassWeights = Literal["balanced"] | Mapping[str, float]
"""How much each label counts in the loss: a weight for each name, or `balanced`: rarer labels count more."""

Priority = Literal["best_effort", "normal", "high", "critical"]

_ADAPTATION = ("lora", "freeze")


@dataclass(frozen=True)
class TextClassification:
    """Fine-tuning: classify or score texts or pairs of texts (`problem="regression"`).

    With several labels per text (`problem="multi_label"`), `label_separator` is the text between them, or
    `label_columns` names one column per class, with 0 or 1 in it. `class_weights` need a single label per text.
    """

    problem: Problem | None = None
    labels: tuple[str, ...] | list[str] | None = None
    pooling: Pooling | None = None
    label_smoothing: float | None = None
    new_head: bool | None = None
    max_length: int | None = None
    label_separator: str | None = None
    label_columns: tuple[str, ...] | list[str] | None = None
    class_weights: ClassWeights | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"text_classification": {**_set(self), **_weights(self.class_weights)}}}


@dataclass(frozen=True)
class FeatureExtraction:
    """Turn the texts or pictures of `data` into vectors, written as Parquet."""

    data: Data | str | Path | Resource
    output: Output | None = None
    pooling: Pooling | None = None
    max_length: int | None = None
    normalize: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"feature_extraction": _set(self)}


@dataclass(frozen=True)
class ModelEvaluation:
    """Measure a model on `data`; the result is the metrics in `job.info.evaluation`."""

    data: Data | str | Path | Resource

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"model_evaluation": _set(self)}


@dataclass(frozen=True)
class ModelExport:
    """Write a stored model as `onnx`, `onnx-int8` or `bf16`, measured beside the model on `data` (`Model.export`).

    If `metric` is worse than the model's own by more than `max_drop`, the job fails and the model stays as it was.
    """

    data: Data | str | Path | Resource
    format: ExportFormat = "onnx"
    max_drop: float | None = None
    metric: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"model_export": _set(self)}


@dataclass(frozen=True)
class ModelCopy:
    """Copy a stored model, or its further `format`, to `s3://bucket/prefix` (`Model.copy`)."""

    uri: str
    format: ExportFormat | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"model_copy": _set(self)}


@dataclass(frozen=True)
class TokenClassification:
    """Fine-tuning: tag words, such as names and places in a text.

    `labels` are the tags by their numbers, if the data has numbers; `class_weights` say how much each tag counts.
    """

    scheme: Scheme | None = None
    labels: tuple[str, ...] | list[str] | None = None
    max_length: int | None = None
    overlap: int | None = None
    new_head: bool | None = None
    label_all_pieces: bool | None = None
    class_weights: ClassWeights | None = None
    label_smoothing: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"token_classification": {**_set(self), **_weights(self.class_weights)}}}


@dataclass(frozen=True)
class Recommendation:
    """Fine-tuning: recommend the items that come next in a user's history.

    The data has the columns `user` and `item`, a `time` unless its rows are in the order of time, and a `rating` if
    `min_rating` is given.
    """

    max_history: int | None = None
    min_user_interactions: int | None = None
    min_item_interactions: int | None = None
    min_rating: float | None = None
    split: Split | None = None
    exclude_seen: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"recommendation": _set(self)}}


@dataclass(frozen=True)
class QuestionAnswering:
    """Fine-tuning: find the answer to a question in a text, its context.

    A context longer than a window (`max_length` tokens) is read in windows that share `overlap` tokens. With
    `allow_no_answer` the model may say that a context has no answer.
    """

    max_length: int | None = None
    overlap: int | None = None
    max_answer_length: int | None = None
    allow_no_answer: bool | None = None
    new_head: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"question_answering": _set(self)}}


@dataclass(frozen=True)
class Instruction:
    """Fine-tuning: follow instructions and hold conversations; the assistant's messages are learnt.

    The data has `messages` (a list of {role, content}), `conversations`, `instruction` and `output`, `prompt` and
    `completion` (each optionally with `system` and `tools`), or plain `text`. `chat_template` is a Jinja template, as
    in transformers.
    """

    max_length: int | None = None
    chat_template: str | None = None
    last_turn_only: bool | None = None
    packing: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"instruction": _set(self)}}


@dataclass(frozen=True)
class Preference:
    """Fine-tuning: answer as people prefer, by direct preference optimisation (DPO).

    The data has `prompt`, `chosen` and `rejected`, each a text or a list of {role, content}; the prompt may also be
    what `chosen` and `rejected` begin with. `beta` keeps the model near what it was before. `label_smoothing` is the
    probability that a pair is the wrong way round.
    """

    max_length: int | None = None
    chat_template: str | None = None
    beta: float | None = None
    label_smoothing: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"preference": _set(self)}}


@dataclass(frozen=True)
class SentenceEmbedding:
    """Fine-tuning: learn vectors of texts, so that those that belong together are near.

    The data has an `anchor`, a `positive` and optionally a `negative`; or a `text`, a `text_pair` and a `score`, from
    `lowest_score` (nothing in common) to `highest_score` (the same meaning). `temperature` is for pairs without scores.
    """

    pooling: Pooling | None = None
    max_length: int | None = None
    temperature: float | None = None
    lowest_score: float | None = None
    highest_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"sentence_embedding": _set(self)}}


@dataclass(frozen=True)
class Reranking:
    """Fine-tuning: score how relevant passages are to queries, with a cross-encoder such as a BERT.

    The data has `query`, `passage` and `label` (0 or 1, or grades), or `query` with lists: `positives` and `negatives`,
    or `passages` and `labels`. `graded` decides how labels are learnt; unset, the data does.
    """

    max_length: int | None = None
    graded: bool | None = None
    new_head: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"reranking": _set(self)}}


@dataclass(frozen=True)
class Translation:
    """Fine-tuning: translate texts with an encoder-decoder, such as a T5.

    The languages are named as in the data: by columns, keys of a `translation`, or the endings of two files.
    `source_prefix` is added before each source, by `predict` too. Beam search uses `num_beams`; scores are divided by
    the length to the power of `length_penalty`. `source_token` and `target_token` are for models that mark languages
    with tokens, such as `en_XX`.
    """

    source_language: str | None = None
    target_language: str | None = None
    source_prefix: str | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    label_smoothing: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    source_token: str | None = None
    target_token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"translation": _set(self)}}


@dataclass(frozen=True)
class Summarization:
    """Fine-tuning: write summaries with an encoder-decoder, such as a T5; the settings are those of `Translation`."""

    source_prefix: str | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None
    label_smoothing: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    source_token: str | None = None
    target_token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"summarization": _set(self)}}


@dataclass(frozen=True)
class ImageClassification:
    """Fine-tuning: classify pictures.

    Training sees a random part of each picture, of at least `crop_scale` of its area, mirrored with the probability
    `flip`. `labels` are the classes by their numbers, if the data has numbers.
    """

    problem: Literal["single_label", "multi_label"] | None = None
    labels: tuple[str, ...] | list[str] | None = None
    image_size: int | None = None
    crop_scale: float | None = None
    flip: float | None = None
    label_smoothing: float | None = None
    new_head: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"fine_tuning": {"image_classification": _set(self)}}


Task = (
    TextClassification
    | TokenClassification
    | ImageClassification
    | Recommendation
    | QuestionAnswering
    | Instruction
    | Preference
    | SentenceEmbedding
    | Reranking
    | Translation
    | Summarization
    | CausalLm
    | MaskedLm
    | MaskedImage
    | MaskedItem
    | SpanCorruption
    | FeatureExtraction
    | ModelEvaluation
    | ModelExport
    | ModelCopy
)


@dataclass(frozen=True)
class JobSpec:
    """The specification of a job: its task, model, data and settings."""

    task: Task
    model: AnyModel | None = None
    train_data: str | Path | Resource | Data | None = None
    eval_data: str | Path | Resource | Data | None = None
    tokenizer: str | Path | Resource | TrainedTokenizer | None = None
    optimization: Optimization | None = None
    parallelism: Parallelism | None = None
    resources: Resources | None = None
    checkpoints: Checkpoints | None = None
    evaluation: EvaluationPolicy | None = None
    retry: Retry | None = None
    max_run_time: timedelta | str | None = None
    lora: Lora | None = None
    freeze: Freeze | None = None
    distillation: Distillation | None = None
    export: ExportPolicy | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file: the content of `job.spec`."""
        # They are fields of the family: only fine-tuning has them, and the service refuses them elsewhere.
        ((family, task),) = self.task.to_dict().items()
        adaptation = {name: _set(value) for name in _ADAPTATION if (value := getattr(self, name)) is not None}
        return {family: {**task, **adaptation}, **_set(self, without=("task", *_ADAPTATION))}


def _weights(given: ClassWeights | None) -> dict[str, Any]:
    if given is None:
        return {}
    return {"class_weights": {"balanced": True} if given == "balanced" else {"weights": dict(given)}}
