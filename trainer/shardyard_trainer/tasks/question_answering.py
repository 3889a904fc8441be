"""Fine-tuning for question answering: finds the part of a context that answers, or that there is no answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import transformers

from shardyard.v1 import spec_pb2
from shardyard_trainer.data import bad_rows
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.question_rows import read_questions
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.inputs.contexts import ContextCutter
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.questions import (
    Questions,
    QuestionSamples,
    QuestionTexts,
    load_questions,
    split_questions,
)
from shardyard_trainer.inputs.text import TextInputs, adapt
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.answer_metrics import AnswerMetrics
from shardyard_trainer.tasks.answer_spans import AnswerModule, rest_place
from shardyard_trainer.tasks.answerer import DEFAULT_LONGEST, DEFAULT_OVERLAP, DEFAULT_WINDOW, QuestionAnswerer
from shardyard_trainer.tasks.base import Footprint, Graph, Output, TaskWarning, has_head
from shardyard_trainer.tasks.heads import load_with_labels
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.texts import (
    PreparedText,
    Splits,
    TrainingTexts,
    find_length,
    find_tokenizer,
    imagine_texts,
)

SHORTEST_WINDOW = 16
_OUTPUTS = ("LABEL_0", "LABEL_1")
"""The names that transformers gives to the outputs of such a head: first and last token."""

_MANY_CUT = 0.01


class QuestionAnswering:
    """The task `question_answering`."""

    name = "question_answering"
    output = Output.MODEL
    roles = ("question", "context", "answers", "answer_text", "answer_start", "id")
    auto = "AutoModelForQuestionAnswering"
    pipeline = "question-answering"
    example = ""
    # Transformers has no pipeline for it any more.
    usage = """import json
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

question, context = "Who wrote Faust?", "Goethe wrote Faust in Weimar."
settings = json.load(open("shardyard.json"))
tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
model = AutoModelForQuestionAnswering.from_pretrained(".").eval()
windows = tokenizer(
    question, context, truncation="only_second", max_length=settings["max_length"], stride=settings["overlap"],
    return_overflowing_tokens=True, return_offsets_mapping=True, padding=True, return_tensors="pt",
    return_token_type_ids=getattr(model.config, "type_vocab_size", 0) > 1,
)
offsets, _ = windows.pop("offset_mapping"), windows.pop("overflow_to_sample_mapping")
with torch.no_grad():
    outputs = model(**windows)
in_context = torch.tensor([[part == 1 for part in windows.sequence_ids(w)] for w in range(len(offsets))])
first, last = (scores.masked_fill(~in_context, -torch.inf) for scores in (outputs.start_logits, outputs.end_logits))
is_short = torch.ones(first.shape[1], first.shape[1]).triu().tril(settings["max_answer_length"] - 1)
logits = (first[:, :, None] + last[:, None]).masked_fill(is_short == 0, -torch.inf)  # of all answers in all windows
window, start, end = (int(place) for place in torch.unravel_index(logits.argmax(), logits.shape))
answer = context[offsets[window, start, 0] : offsets[window, end, 1]].strip()
"""
    cuts = True
    holds_out_by_lot = True
    inputs = TextInputs
    explains = "words"
    graph = Graph({"start_logits": ("batch", "length"), "end_logits": ("batch", "length")})

    def prepare(self, job: Ingredients) -> PreparedQuestions:
        """Finds and checks model and data. Raises SpecError."""
        choice = job.attempt(lambda: _choose(job))
        train_files, eval_files = job.files()
        raise_all(job.errors)
        assert choice is not None and train_files is not None

        def look_through(files: list[DataFile], source: spec_pb2.DataSource, field: str) -> None:
            deque(read_questions(files, source, field=field), maxlen=0)

        with job.looking_on(train_files, eval_files, look_through):
            length = find_length(job, choice, "max_length", DEFAULT_WINDOW, shortest=SHORTEST_WINDOW)
            overlap = _overlap(job, length)
            texts = TrainingTexts(QuestionTexts(train_files, job.spec.train_data), key="question_answering")
            tokenizer = find_tokenizer(job, choice, train_files, texts=texts)
            choice = adapt(choice, tokenizer, length)
        inputs = TextInputs(tokenizer, length)
        with job.looking_on(None, eval_files, look_through):
            train = _load(job, inputs, overlap, train_files, "train_data")
        held_out = _load(job, inputs, overlap, eval_files, "eval_data") if eval_files is not None else None
        rest = rest_place(choice.config, ContextCutter(tokenizer, length, overlap))
        may_abstain = _may_abstain(job, choice, train, held_out, rest)
        with_types = architectures.has_token_types(choice.config)
        samples = partial(QuestionSamples, rest=rest, with_types=with_types, padding=int(tokenizer.pad_token_id or 0))
        splits = _split(job, samples, train, held_out)
        choice, keeps = _choose_head(job, choice)
        return PreparedQuestions(
            choice, inputs, splits, job.warnings, overlap=overlap, wanted=job.wanted, abstains=may_abstain, keeps=keeps
        )

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedQuestions:
        """With questions that all have an answer, each in one window. Raises SpecError."""
        choice = _choose(job)
        inputs, splits = imagine_texts(job, choice, data, "max_length", DEFAULT_WINDOW)
        overlap, keeps = _overlap(job, inputs.length or 0), has_head(choice, TASK)
        return PreparedQuestions(
            choice, inputs, splits, job.warnings, overlap=overlap, wanted=job.wanted, abstains=False, keeps=keeps
        )

    def open(self, loaded: Loaded, inputs: TextInputs) -> QuestionAnswerer:
        """A predictor of answers. Raises FolderInvalid for a head that does not score first and last tokens."""
        if loaded.model.config.num_labels != len(_OUTPUTS):
            text = f"the head has {loaded.model.config.num_labels} outputs; one that finds answers has 2"
            raise FolderInvalid(text, file="config.json")
        return QuestionAnswerer(self.name, loaded, inputs)


TASK = QuestionAnswering()


def _choose(job: Ingredients) -> ModelChoice:
    choice = job.choose()
    if not architectures.reads_text(choice.config) or type(choice.config) not in _known_models():
        raise SpecError(
            job.field,
            "OBJECTIVE_UNSUPPORTED",
            f"transformers has no head that finds answers for {choice.config.model_type}; use one such as bert, "
            "roberta, distilbert, electra or gpt2",
            {"supported": "bert,roberta,distilbert,electra,gpt2"},
        )
    return choice


def _choose_head(job: Ingredients, choice: ModelChoice) -> tuple[ModelChoice, bool]:
    """The choice corrected by its weights, and whether its own head is kept. Raises SpecError."""
    has_own = has_head(choice, TASK)
    keeps = has_own and not job.wanted.new_head
    choice = job.accept_weights(choice, TASK.auto if keeps else "")
    if not choice.is_fresh and not keeps:
        what = "the model's head is put aside" if has_own else "the model has no head for this task"
        job.warn("NEW_HEAD", f"{what}: a new one is started", choice.field)
    return choice, keeps


def _known_models() -> Mapping[Any, Any]:
    known: Mapping[Any, Any] = transformers.MODEL_FOR_QUESTION_ANSWERING_MAPPING
    return known


def _overlap(job: Ingredients, length: int) -> int:
    if not job.wanted.HasField("overlap"):
        return min(DEFAULT_OVERLAP, length // 3)
    overlap = int(job.wanted.overlap)
    if overlap >= length:
        message = (
            f"windows of {length:,} tokens cannot share {overlap:,}: each would begin where the one before it begins; "
            f"give less than max_length, such as {length // 3:,}"
        )
        raise SpecError(f"{job.field}.overlap", "SPEC_INVALID", message)
    return overlap


def _load(job: Ingredients, inputs: TextInputs, overlap: int, files: list[DataFile], name: str) -> Questions:
    source: spec_pb2.DataSource = getattr(job.spec, name)
    found = load_questions(
        files,
        source,
        inputs.tokenizer,
        length=inputs.length or 0,
        overlap=overlap,
        cache_dir=job.cache_dir,
        field=f"spec.{name}",
    )
    if found.store.meta["bad_rows"]:
        job.warn(bad_rows.REASON, found.store.meta["bad_rows"], f"spec.{name}")
    return found


def _may_abstain(
    job: Ingredients, choice: ModelChoice, train: Questions, held_out: Questions | None, rest: int | None
) -> bool:
    """Whether the model may give no answer. Raises SpecError if the data or the model does not allow it."""
    field, wanted = f"{job.field}.allow_no_answer", job.wanted
    unanswered, first = train.num_unanswered, train.store.meta["first_unanswered"]
    is_refused = wanted.HasField("allow_no_answer") and not wanted.allow_no_answer and not job.only_evaluates
    if is_refused and unanswered:
        message = f"{unanswered:,} questions have no answer, the first in {first}; set it, or leave them out"
        raise SpecError(field, "SPEC_INVALID", message)
    allowed = wanted.allow_no_answer if wanted.HasField("allow_no_answer") else unanswered > 0
    if job.only_evaluates and rest is None:
        allowed = False
    if allowed and rest is None:
        message = (
            f"{choice.config.model_type} has no token that sees the whole text and can say that there is no answer, as "
            "[CLS] of bert does; use such a model, or leave questions without an answer out"
            + (f" ({unanswered:,}, the first in {first})" if unanswered else "")
        )
        raise SpecError(field, "OBJECTIVE_UNSUPPORTED", message, {"supported": "bert,roberta,distilbert,electra"})
    if not allowed and held_out is not None and held_out.num_unanswered:
        message = (
            f"{held_out.num_unanswered:,} questions of the evaluation data have no answer, the first in "
            f"{held_out.store.meta['first_unanswered']}: the model always gives one, and it counts as wrong; "
            "train on such questions too"
        )
        job.warn("NEVER_ABSTAINS", message, "spec.eval_data")
    return bool(allowed)


def _split(
    job: Ingredients,
    samples: Callable[[Questions, np.ndarray], QuestionSamples],
    train: Questions,
    held_out: Questions | None,
) -> Splits[QuestionSamples]:
    """The training and evaluation samples; a question whose whole answer is in no window is only evaluated."""
    if held_out is None:
        learnt, evaluated = split_questions(train, job.holdout, job.seed)
        on = samples(train, evaluated) if len(evaluated) else None
    else:
        learnt = np.arange(train.num_questions)
        on = samples(held_out, np.arange(held_out.num_questions))
    lost = train.lost(learnt)
    left = np.setdiff1d(learnt, lost)
    if not len(left) and not job.only_evaluates:
        message = f"none of {len(learnt):,} answers is in a window as a whole; raise overlap, or max_length"
        raise SpecError("spec.train_data", "DATA_INVALID", message)
    if len(lost) and not job.only_evaluates:
        message = (
            f"{len(lost):,} of {len(learnt):,} answers are in no window as a whole, so their questions are not learnt; "
            "raise overlap to the tokens of the longest answer"
        )
        job.warn("ANSWERS_LOST", message, f"{job.field}.overlap")
    found = samples(train, left)
    if (cut := found.stats().num_cut) > _MANY_CUT * len(left):
        message = f"{cut:,} of {len(left):,} questions take more than half of a window, and are cut; raise max_length"
        job.warn("QUESTIONS_CUT", message, f"{job.field}.max_length")
    return found, on


class PreparedQuestions(PreparedText[QuestionSamples]):
    """The task with its model and data."""

    task = TASK
    unit = "sample"

    def __init__(
        self,
        choice: ModelChoice,
        inputs: TextInputs,
        splits: Splits[QuestionSamples],
        warnings: list[TaskWarning],
        *,
        overlap: int,
        wanted: spec_pb2.QuestionAnswering,
        abstains: bool,
        keeps: bool,
    ) -> None:
        super().__init__(choice, inputs, splits, warnings)
        self._overlap = overlap
        self._longest = wanted.max_answer_length if wanted.HasField("max_answer_length") else DEFAULT_LONGEST
        self._abstains = abstains
        self._keeps_head = keeps

    def make_module(self, *, meta: bool) -> AnswerModule:
        """Transformers' own model with its head."""
        auto = transformers.AutoModelForQuestionAnswering
        tokenizer = self.inputs.tokenizer
        model = load_with_labels(auto, self.choice, tokenizer, _OUTPUTS, keeps_head=self._keeps_head, meta=meta)
        return AnswerModule(model, self._longest)

    def metrics(self) -> AnswerMetrics:
        """A new, empty collector of metrics."""
        return AnswerMetrics(self.eval or self.train, may_abstain=self._abstains)

    def resolve(self, message: Any) -> None:
        """Fills in window, longest answer, and whether no answer is allowed."""
        message.max_length, message.overlap = self.length, self._overlap
        message.max_answer_length, message.allow_no_answer = self._longest, self._abstains

    def footprint(self) -> Footprint:
        """Two scores for each position."""
        return Footprint(len(_OUTPUTS), 0)

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`."""
        about = {"task": TASK.name, "max_length": self.length, "overlap": self._overlap}
        return {**about, "max_answer_length": self._longest, "allow_no_answer": self._abstains}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if no answer was found."""
        if metrics.get("has_answer_f1", metrics.get("f1")) != 0:
            return None
        message = "no answer of the evaluation data is found, in part or as a whole"
        return TaskWarning("ONE_ANSWER", f"{message}; more epochs or a higher learning_rate may help")
