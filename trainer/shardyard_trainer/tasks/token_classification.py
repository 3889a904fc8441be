"""Fine-tuning for words of texts: a tag for each word, and the entities that the tags mark."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.errors import SpecError, listed, raise_all
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.tagged_rows import read_tagged
from shardyard_trainer.data.tags import BIO, BIOES, IOB1, PLAIN, are_bare_marks, parts
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.tagged import (
    IGNORED,
    TaggedSamples,
    TaggedTexts,
    TaggedWords,
    TagWish,
    load_tagged,
    split_texts,
)
from shardyard_trainer.inputs.text import TextInputs, adapt
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import Footprint, Graph, Output, TaskWarning, Teaching, has_head
from shardyard_trainer.tasks.class_weights import as_tensor, find_weights
from shardyard_trainer.tasks.distances import of_classes
from shardyard_trainer.tasks.heads import load_with_labels
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.module import HuggingFaceModule, ModuleOutput, Scores
from shardyard_trainer.tasks.tag_metrics import TagMetrics
from shardyard_trainer.tasks.tagger import DEFAULT_OVERLAP, Tagger
from shardyard_trainer.tasks.texts import (
    PreparedText,
    Splits,
    TrainingTexts,
    find_length,
    find_tokenizer,
    imagine_texts,
)

DEFAULT_WINDOW = 256
_SCHEMES = spec_pb2.TokenClassification
_NAMES: Mapping[int, str] = {
    _SCHEMES.SCHEME_BIO: BIO,
    _SCHEMES.SCHEME_IOB1: IOB1,
    _SCHEMES.SCHEME_BIOES: BIOES,
    _SCHEMES.SCHEME_PLAIN: PLAIN,
}


class TokenClassification:
    """The task `token_classification`."""

    name = "token_classification"
    output = Output.MODEL
    roles = ("tokens", "tags", "text_id", "text", "spans")
    auto = "AutoModelForTokenClassification"
    pipeline = "token-classification"
    example = '"My name is Clara and I live in Berkeley"'
    usage = ""
    cuts = True
    holds_out_by_lot = True
    inputs = TextInputs
    explains = "words"
    graph = Graph({"logits": ("batch", "length")})
    teaching = Teaching(by_token=True)

    def prepare(self, job: Ingredients) -> PreparedTags:
        """Finds and checks model and data. Raises SpecError."""
        wanted = job.wanted
        choice = job.attempt(lambda: _choose(job))
        train_files, eval_files = job.files()
        raise_all(job.errors)
        assert choice is not None and train_files is not None

        def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
            deque(read_tagged(files, source, names=wanted.labels, field=field), maxlen=0)

        with job.looking_on(train_files, eval_files, look_through):
            length = find_length(job, choice, "max_length", DEFAULT_WINDOW, shortest=8)
            texts = TrainingTexts(
                TaggedWords(train_files, job.spec.train_data, wanted.labels),
                key=repr(("token_classification", list(wanted.labels))),
            )
            tokenizer = find_tokenizer(job, choice, train_files, texts=texts)
            choice = adapt(choice, tokenizer, length)
        inputs = TextInputs(tokenizer, length)
        wish = TagWish(_NAMES.get(wanted.scheme, ""), tuple(wanted.labels))
        with job.looking_on(None, eval_files, look_through):
            train = _load(job, inputs, train_files, "train_data", wish)
            # If the head's labels are those of the data, its order is used: its outputs keep their meaning.
            own = _head_labels(choice)
            if set(own) == set(train.labels) and own != train.labels and not wanted.labels and not wanted.new_head:
                train = _load(job, inputs, train_files, "train_data", TagWish(wish.scheme, own))
        held_out = None
        if eval_files is not None:
            like = TagWish(train.scheme, wish.labels or train.labels)
            held_out = _load(job, inputs, eval_files, "eval_data", like)
        return _assemble(job, choice, inputs, _split(job, choice, inputs, train, held_out), train)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedTags:
        """With the labels of one kind of entity, or those of the model's own head. Raises SpecError."""
        choice = _choose(job)
        inputs, splits = imagine_texts(job, choice, data, "max_length", DEFAULT_WINDOW)
        own = _head_labels(choice)
        return PreparedTags(
            choice,
            inputs,
            splits,
            job.warnings,
            labels=own or ("O", "B-NAME", "I-NAME"),
            scheme=BIO,
            overlap=_overlap(job),
            label_smoothing=0.0,
            keeps_head=bool(own),
        )

    def open(self, loaded: Loaded, inputs: TextInputs) -> Tagger:
        """A predictor of tags. Raises FolderInvalid if the head's outputs and the labels differ in number."""
        labels = loaded.folder.labels
        if loaded.num_outputs != len(labels):
            text = f"the head has {loaded.num_outputs} outputs for {len(labels)} labels"
            raise FolderInvalid(text, file="config.json")
        return Tagger(self.name, loaded, inputs)


TASK = TokenClassification()


def _choose(job: Ingredients) -> ModelChoice:
    choice = job.choose()
    if not architectures.reads_text(choice.config) or type(choice.config) not in _known_models():
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            f"transformers has no head that tags words for {choice.config.model_type}; use one such as bert, roberta, "
            "distilbert, gpt2 or llama",
            {"supported": "bert,roberta,distilbert,electra,gpt2,llama"},
        )
    return choice


def _known_models() -> Mapping[Any, Any]:
    known: Mapping[Any, Any] = transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    return known


def _overlap(job: Ingredients) -> int:
    return int(job.wanted.overlap) if job.wanted.HasField("overlap") else DEFAULT_OVERLAP


def _load(job: Ingredients, inputs: TextInputs, files: list[DataFile], name: str, wish: TagWish) -> TaggedTexts:
    source: spec_pb2.DataSource = getattr(job.spec, name)
    found = load_tagged(
        files,
        source,
        inputs.tokenizer,
        length=inputs.length or 0,
        overlap=_overlap(job),
        wish=wish,
        cache_dir=job.cache_dir,
        field=f"spec.{name}",
    )
    if found.store.meta["bad_rows"]:
        job.warn(bad_rows.REASON, found.store.meta["bad_rows"], f"spec.{name}")
    return found


def _head_labels(choice: ModelChoice) -> tuple[str, ...]:
    return choice.described.labels if choice.described is not None and has_head(choice, TASK) else ()


def _split(
    job: Ingredients, choice: ModelChoice, inputs: TextInputs, train: TaggedTexts, held_out: TaggedTexts | None
) -> Splits[TaggedSamples]:
    with_types = architectures.has_token_types(choice.config)
    padding = int(inputs.tokenizer.pad_token_id or 0)

    def samples(data: TaggedTexts, texts: np.ndarray) -> TaggedSamples:
        return TaggedSamples(data, texts, with_types=with_types, padding=padding)

    if held_out is not None:
        return samples(train, np.arange(train.num_texts)), samples(held_out, np.arange(held_out.num_texts))
    train_texts, eval_texts = split_texts(train, job.holdout, job.seed)
    return samples(train, train_texts), samples(train, eval_texts) if len(eval_texts) else None


def _assemble(
    job: Ingredients, choice: ModelChoice, inputs: TextInputs, splits: Splits[TaggedSamples], data: TaggedTexts
) -> PreparedTags:
    own = _head_labels(choice)
    keeps = bool(own) and not job.wanted.new_head and tuple(own) == data.labels
    choice = job.accept_weights(choice, TASK.auto if keeps else "")
    if not choice.is_fresh and not keeps:
        what = "the model has no head for this task"
        if own:
            has_others = set(own) != set(data.labels)
            what = (
                f"the model's head has other labels ({listed(own)})" if has_others else "the model's head is put aside"
            )
        job.warn("NEW_HEAD", f"{what}: a new one is started", choice.field)
    if data.scheme == PLAIN and are_bare_marks(data.labels):
        message = (
            f"the tags {listed(data.labels)} name no kind of entity, so each is learnt as a label of its own and no "
            "entities are found; write the kind after each mark, such as B-NAME and I-NAME, to find entities"
        )
        job.warn("BARE_TAGS", message, "spec.train_data")
    train = splits[0]
    if job.wanted.label_all_pieces:
        # The later tokens of an entity's first word are inside the entity.
        names = [f"I-{parts(label)[1]}" if parts(label)[0] == "B" else label for label in data.labels]
        train.inside = np.asarray(
            [
                data.labels.index(name if name in data.labels else label)
                for name, label in zip(names, data.labels, strict=True)
            ]
        )
    train.weights = find_weights(job, data.labels, train.counts)
    return PreparedTags(
        choice,
        inputs,
        splits,
        job.warnings,
        labels=data.labels,
        scheme=data.scheme,
        overlap=_overlap(job),
        label_smoothing=job.wanted.label_smoothing,
        keeps_head=keeps,
    )


class PreparedTags(PreparedText[TaggedSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "token"
    answers_with_labels = True

    def __init__(
        self,
        choice: ModelChoice,
        inputs: TextInputs,
        splits: Splits[TaggedSamples],
        warnings: list[TaskWarning],
        *,
        labels: tuple[str, ...],
        scheme: str,
        overlap: int,
        label_smoothing: float,
        keeps_head: bool,
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self.labels = labels
        self.scheme = scheme
        self._overlap = overlap
        self._label_smoothing = label_smoothing
        self._keeps_head = keeps_head

    def make_module(self, *, meta: bool) -> TokenClassifierModule:
        """Transformers' own model with its head."""
        auto = transformers.AutoModelForTokenClassification
        tokenizer = self.inputs.tokenizer
        model = load_with_labels(auto, self.choice, tokenizer, self.labels, keeps_head=self._keeps_head, meta=meta)
        return TokenClassifierModule(model, self.train.weights, label_smoothing=self._label_smoothing)

    def metrics(self) -> TagMetrics:
        """A new, empty collector of metrics."""
        return TagMetrics(self.labels, self.scheme, self.eval or self.train)

    def resolve(self, message: Any) -> None:
        """Fills in window, scheme and labels."""
        message.max_length, message.overlap = self.length, self._overlap
        message.label_smoothing = self._label_smoothing
        if not message.scheme:
            message.scheme = next(value for value, name in _NAMES.items() if name == self.scheme)
        if not message.labels:
            message.labels.extend(self.labels)

    def footprint(self) -> Footprint:
        """A score for each label at each position."""
        return Footprint(len(self.labels), 0)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        scheme = PLAIN if self.scheme == PLAIN else BIO
        about = {"task": TASK.name, "labels": list(self.labels), "scheme": scheme}
        return {**about, "max_length": self.length, "overlap": self._overlap}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if no entity was found."""
        if metrics.get("f1") != 0:
            return None
        message = "f1 is 0: the model finds no entity of the data exactly"
        return TaskWarning("ONE_ANSWER", f"{message}; more epochs or a higher learning_rate may help")


class TokenClassifierModule(HuggingFaceModule):
    """Tags words; the loss is summed over the tokens with a label, in training weighted by label."""

    def __init__(self, model: Any, class_weights: np.ndarray | None, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.own_head = None
        self._class_weights = class_weights
        self._label_smoothing = label_smoothing

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        *,
        return_outputs: bool = False,
        return_scores: bool = False,
    ) -> ModuleOutput:
        """`labels` [B, T] are classes at the first tokens of words (in training possibly at all), IGNORED elsewhere."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        logits_BTC = self.model(**inputs).logits
        weights_C = as_tensor(self._class_weights, logits_BTC) if self.training else None
        logits_NC, labels_N = logits_BTC.flatten(0, 1).float(), labels.flatten()
        smoothing = self._label_smoothing if self.training else 0.0
        loss = F.cross_entropy(
            logits_NC, labels_N, weight=weights_C, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        # Predicted labels, not scores: the scores of a large evaluation would not fit in memory.
        outputs = {"answers": logits_BTC.argmax(-1)} if return_outputs else None
        if not return_scores:
            return ModuleOutput(loss, outputs)
        is_labelled_N = labels_N != IGNORED
        weights = None if weights_C is None else weights_C[labels_N[is_labelled_N]]
        return ModuleOutput(loss, outputs, scores=Scores(logits_NC[is_labelled_N], of_classes, weights))
