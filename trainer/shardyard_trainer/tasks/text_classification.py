"""Fine-tuning for texts, or pairs of them: one class of several, any of several, or a number."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError, listed
from shardyard_trainer.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelSchema
from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.inputs.labelled import Examples
from shardyard_trainer.models import architectures, loading, sources
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.models.weights import read_tensors
from shardyard_trainer.tasks.base import MicroBatch, ModuleOutput, SampleRef
from shardyard_trainer.tasks.modules import TextClassifier
from shardyard_trainer.tasks.parts import LossSum, TaskWarning, accept_weights

_PROBLEMS = {SINGLE_LABEL: "single_label", MULTI_LABEL: "multi_label", REGRESSION: "regression"}
_TRANSFORMERS_PROBLEMS = {
    SINGLE_LABEL: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}
_FIELD = "spec.fine_tuning.text_classification"


class ClassificationSamples:
    """Texts of one split, padded on the right to the longest of a micro batch."""

    def __init__(self, examples: Examples, index: np.ndarray, *, with_types: bool, padding: int) -> None:
        self._examples = examples
        self._index = index
        self._with_types = with_types
        self._padding = padding
        self._lengths: np.ndarray = examples.store.lengths()[index]
        self.num_samples = len(index)
        self.num_tokens = int(self._lengths.sum())

    def lengths(self) -> np.ndarray:
        """Tokens of each text, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """What they hold."""
        return self._examples.stats(self._index)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `attention_mask`, `labels`, and for models that tell texts of a pair apart `token_type_ids`."""
        store = self._examples.store
        rows = self._index[[sample.sample for sample in samples]]
        lengths = self._lengths[[sample.sample for sample in samples]]
        shape = (len(rows), int(lengths.max()))
        ids, mask, types = np.full(shape, self._padding), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            part = slice(store.offsets[row], store.offsets[row] + length)
            ids[i, :length] = store.tokens[part]
            types[i, :length] = store.arrays["types"][part]
            mask[i, :length] = 1
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(self._labels(rows)),
        }
        if self._with_types:
            inputs["token_type_ids"] = torch.from_numpy(types)
        return MicroBatch(inputs, len(rows), int(lengths.sum()), ids.size)

    def _labels(self, rows: np.ndarray) -> np.ndarray:
        labels: np.ndarray = self._examples.store.arrays["labels"]
        schema = self._examples.schema
        if schema.problem == MULTI_LABEL:
            return np.asarray(labels.reshape(-1, len(schema.labels))[rows], np.float32)
        return np.asarray(labels[rows], np.float32 if schema.problem == REGRESSION else np.int64)


class ClassificationMetrics(LossSum):
    """`loss`, and by problem: `accuracy`, `f1_macro`, `mcc`; `f1_micro`, `f1_macro`; `pearson`, `spearman`, `mse`."""

    def __init__(self, schema: LabelSchema) -> None:
        super().__init__()
        self._schema = schema
        self._outputs: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._outputs.append(output.outputs["logits"].detach().float())
        self._labels.append(batch.inputs["labels"])

    def part(self) -> Any:
        """Sums of loss and texts, the outputs [texts, C] and the labels."""
        outputs = torch.cat(self._outputs).cpu().numpy() if self._outputs else None
        labels = torch.cat(self._labels).cpu().numpy() if self._labels else None
        return *super().part(), outputs, labels

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        full = [part for part in parts if part[2] is not None]
        outputs = np.concatenate([part[2] for part in full])
        labels = np.concatenate([part[3] for part in full])
        measure = {REGRESSION: _correlations, MULTI_LABEL: _multi_label, SINGLE_LABEL: _single_label}
        return {"loss": self.mean(parts), **measure[self._schema.problem](outputs, labels)}


class TextClassificationTask:
    """The task `text_classification`. Raises SpecError LABEL_MISMATCH where the model's head has other labels."""

    name = "text_classification"
    unit = "sample"

    def __init__(
        self,
        choice: ModelChoice,
        tokenizer: Any,
        train: ClassificationSamples,
        evaluation: ClassificationSamples | None,
        *,
        schema: LabelSchema,
        wanted: spec_pb2.TextClassification,
        pooling: str,
        length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.eval = evaluation
        self.schema = schema
        self.labels = schema.labels
        self.pooling = pooling
        self.length = length
        self._label_smoothing = wanted.label_smoothing
        self._is_native = architectures.native_pooling(choice.config, choice.described) == pooling
        self._keeps_head = _keeps_head(choice, schema, pooling, new_head=wanted.new_head)
        reads_head = self._is_native and self._keeps_head
        self.choice, self.warnings = accept_weights(choice, self.name if reads_head else "")
        if not choice.is_fresh and not self._keeps_head:
            reshaped = choice.described.reshaped if choice.described is not None else ""
            without = reshaped or "the model has no head for this task"
            message = "the model's head is put aside" if sources.has_head(choice) else without
            self.warnings.append(TaskWarning("NEW_HEAD", f"{message}: a new one is started", choice.field))

    def make_module(self, *, meta: bool) -> TextClassifier:
        """Transformers' own model with a head where it has one that reads what `pooling` says, else a linear layer."""
        choice = self._with_labels()
        options = {} if self._is_native else _without_pooler(choice.config)
        auto = transformers.AutoModelForSequenceClassification if self._is_native else transformers.AutoModel
        if self._is_native and not self._keeps_head:
            # Another number of labels is another shape, and the head in the folder is put aside below.
            options["ignore_mismatched_sizes"] = True
        if choice.is_fresh or meta:
            options.pop("ignore_mismatched_sizes", None)
        model, lacking = loading.load(auto, choice, meta=meta, **options)
        if lacking and self._keeps_head:
            message = f"the weights lack {lacking[0]} of their own head; set new_head for a new one"
            raise SpecError(choice.field, "MODEL_INVALID", message)
        loading.ensure_pad_id(model, self.tokenizer)
        head = None if self._is_native else self._own_head(model.config, meta=meta)
        if self._is_native and not choice.is_fresh and not self._keeps_head and not meta:
            _start_afresh(model)
        return TextClassifier(
            model,
            head,
            pooling=self.pooling,
            problem=self.schema.problem,
            dropout=_head_dropout(model.config),
            label_smoothing=self._label_smoothing,
        )

    def metrics(self) -> ClassificationMetrics:
        """A fresh gatherer."""
        return ClassificationMetrics(self.schema)

    def export_config(self) -> Mapping[str, Any]:
        """What `shardyard.json` says."""
        return {
            "task": self.name,
            "problem": _PROBLEMS[self.schema.problem],
            "labels": list(self.labels),
            "pooling": self.pooling,
            "max_length": self.length,
            "head": {"type": "transformers" if self._is_native else "linear", "outputs": self.schema.num_outputs},
        }

    def _with_labels(self) -> ModelChoice:
        config = copy.deepcopy(self.choice.config)
        names = self.labels or ("score",)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: i for i, name in enumerate(names)}
        config.problem_type = _TRANSFORMERS_PROBLEMS[self.schema.problem]
        return dataclasses.replace(self.choice, config=config)

    def _own_head(self, config: Any, *, meta: bool) -> nn.Linear:
        head = nn.Linear(architectures.width(config), self.schema.num_outputs)
        if self._keeps_head and not meta:
            assert self.choice.folder is not None
            head.load_state_dict(read_tensors(self.choice.folder, "head.safetensors"))
        else:
            _draw(head, config)
        return head


def _keeps_head(choice: ModelChoice, schema: LabelSchema, pooling: str, *, new_head: bool) -> bool:
    described = choice.described
    if described is None or new_head or not sources.has_head(choice):
        return False
    own, ours = described.labels, schema.labels
    generic = all(name.startswith("LABEL_") for name in own) and len(own) == schema.num_outputs
    if described.problem != _PROBLEMS[schema.problem] or not (own == ours or generic or not ours):
        raise SpecError(
            f"{_FIELD}.new_head",
            "LABEL_MISMATCH",
            f"the model's head is {described.problem} with {len(own)} labels ({listed(own, most=8)}), the data "
            f"{_PROBLEMS[schema.problem]} with {len(ours)} ({listed(ours, most=8)}); {_next_step(own, ours)}",
        )
    # A head that was trained on another vector of the text is of no use.
    return architectures.default_pooling(choice.config, choice.described) == pooling and _is_loadable(choice, pooling)


def _next_step(own: Sequence[str], ours: Sequence[str]) -> str:
    if set(ours) == set(own):
        return "leave labels out to keep the head in its own order, or set new_head for a new one"
    if set(ours) < set(own):
        return f"set labels to {list(own)!r} to keep it, or set new_head for a new one"
    if {label.casefold() for label in ours} <= {label.casefold() for label in own}:
        return "write the data's labels as the head has them to keep it, or set new_head for a new one"
    return "set new_head for a new one"


def _is_loadable(choice: ModelChoice, pooling: str) -> bool:
    # Neither transformers' own head that reads this vector nor ours: a head inside of a class that is not used here.
    is_native = architectures.native_pooling(choice.config, choice.described) == pooling
    return is_native or (choice.folder is not None and choice.folder.has("head.safetensors"))


def _without_pooler(config: Any) -> dict[str, Any]:
    # A pooler that nothing reads would be trained by nothing: left out where the class allows it.
    import inspect

    kind = transformers.MODEL_MAPPING[type(config)]
    kind = kind[0] if isinstance(kind, tuple) else kind
    return {"add_pooling_layer": False} if "add_pooling_layer" in inspect.signature(kind.__init__).parameters else {}


def _head_dropout(config: Any) -> float:
    for name in ("classifier_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout"):
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            return float(value)
    return 0.0


def _start_afresh(model: Any) -> None:
    for child in model.children():
        if child is not model.base_model:
            for module in child.modules():
                if isinstance(module, nn.Linear):
                    _draw(module, model.config)


def _draw(layer: nn.Linear, config: Any) -> None:
    nn.init.normal_(layer.weight, std=getattr(config, "initializer_range", None) or 0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _single_label(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn import metrics  # Half a second that only an evaluation pays for.

    predicted = outputs.argmax(-1)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(labels, predicted)),
    }


def _multi_label(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    # A logit over 0 is a probability over one half. F1 is that of the labels that are there, whatever their number:
    # scikit-learn reads a single column as two classes, and its micro average is then the accuracy.
    predicted, truth = outputs > 0, labels > 0.5
    right, wrong = (predicted & truth).sum(0), (predicted ^ truth).sum(0)
    return {
        "f1_micro": float(_f1(right.sum(), wrong.sum())),
        "f1_macro": float(np.mean(_f1(right, wrong))),
    }


def _f1(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """2 TP / (2 TP + FP + FN), from TP and FP + FN; 0 for a label that neither data nor model ever says."""
    return np.asarray(2 * right / np.maximum(2 * right + wrong, 1))


def _correlations(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy import stats

    predicted = outputs[:, 0]
    # One number, or equal ones, correlate with nothing: 0 instead of a NaN that no comparison survives.
    has_spread = len(labels) > 1 and np.ptp(predicted) > 0 and np.ptp(labels) > 0
    return {
        "pearson": float(stats.pearsonr(predicted, labels).statistic) if has_spread else 0.0,
        "spearman": float(stats.spearmanr(predicted, labels).statistic) if has_spread else 0.0,
        "mse": float(np.mean((predicted - labels) ** 2)),
    }
