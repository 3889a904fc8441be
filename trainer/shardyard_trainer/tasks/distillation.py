"""The teacher that a spec names: the same task on the same data, prepared with another model.

So a teacher has inputs of its own, made by its own tokenizer or image settings from the samples that its student sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.errors import SpecError, listed
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import architectures
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.base import Prepared, Teachable, Teaching, build_module, has_head
from shardyard_trainer.tasks.ingredients import Ingredients, prepare
from shardyard_trainer.tasks.module import HuggingFaceModule

FIELD = "spec.distillation.teacher"
DEFAULT_TEMPERATURE = 2.0
DEFAULT_WEIGHT = 0.5
_LENGTHS = ("max_length", "sequence_length")
_COMPARED = 8
"""Samples of which both models' tokens are compared before the job is accepted."""


class Lesson(NamedTuple):
    """A teacher, and how its student learns from it; `spec` is that of the same task with the teacher as its model.

    `columns` are the teacher's outputs in the order of the student's; None: as they are.
    """

    spec: spec_pb2.JobSpec
    task: Prepared
    columns: tuple[int, ...] | None
    temperature: float
    weight: float

    def make_module(self) -> HuggingFaceModule:
        """The teacher's module, fp32 on the CPU, which computes as in evaluation and has no gradients."""
        return build_module(self.task, self.spec).eval().requires_grad_(False)


def prepare_both(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[Prepared, Lesson | None]:
    """The task of a spec, and its teacher if it names one. Raises SpecError with all errors found."""
    student = prepare(spec, locations)
    return student, prepare_lesson(spec, locations, student)


def prepare_lesson(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, student: Prepared) -> Lesson | None:
    """Prepares the teacher of a spec, resolved or not; None if it names none. Raises SpecError.

    `student` is the task of the same spec.
    """
    if not spec.HasField("distillation"):
        return None
    teaching = _teaching(student)
    given = spec.distillation
    with _said_of_teacher():
        taught = _with_teacher(spec, student, teaching)
        job = Ingredients(taught, locations, model_field=FIELD)
        choice = job.choose()
        if choice.is_fresh:
            raise SpecError(FIELD, "SPEC_INVALID", "a new model has nothing to teach; name a trained one")
        _fit(job.wanted, choice, student, teaching)
        teacher = table.trained(taught).prepare(job)
        _check_head(teacher, student)
        if teaching.by_token:
            _check_tokens(teacher, student)
        elif (read := teacher.train.num_samples) != (wanted := student.train.num_samples):
            message = (
                f"the teacher can use {read:,} of the data's samples, the model {wanted:,}; both need the same ones"
            )
            raise SpecError(teacher.choice.field, "TASK_MISMATCH", message)
    return Lesson(
        taught,
        teacher,
        _columns(_labels(teacher), _labels(student)),
        given.temperature if given.HasField("temperature") else DEFAULT_TEMPERATURE,
        given.weight if given.HasField("weight") else DEFAULT_WEIGHT,
    )


def _teaching(student: Prepared) -> Teaching:
    task = student.task
    if isinstance(task, Teachable):
        return task.teaching
    able = [name for name in table.NAMES if isinstance(table.named(name), Teachable)]
    message = (
        f"a {task.name} model does not learn from a teacher; leave distillation out: it is for {listed(able, most=9)}"
    )
    raise SpecError("spec.distillation", "OBJECTIVE_UNSUPPORTED", message, {"supported": ",".join(able)})


def _with_teacher(spec: spec_pb2.JobSpec, student: Prepared, teaching: Teaching) -> spec_pb2.JobSpec:
    """The spec with the teacher in place of the student; what the student has found about the data is kept."""
    taught = spec_pb2.JobSpec()
    taught.CopyFrom(spec)
    taught.model.CopyFrom(spec.distillation.teacher)
    for name in ("tokenizer", "distillation"):
        taught.ClearField(name)
    if spec.HasField("fine_tuning"):
        for name in ("lora", "freeze"):
            taught.fine_tuning.ClearField(name)  # type: ignore[arg-type]
    wanted = table.message_of(taught)
    student.resolve(wanted)
    for name in (*teaching.own, "new_head"):
        if name in wanted.DESCRIPTOR.fields_by_name:
            wanted.ClearField(name)
    return taught


def _fit(wanted: Any, choice: ModelChoice, student: Prepared, teaching: Teaching) -> None:
    """Corrects the student's settings by what the teacher is: the order of its labels, and its longest text.

    Raises SpecError for a head that answers something else.
    """
    if choice.described is not None and has_head(choice, student.task):
        _check_answers(choice.described, choice.field, student)
        own = choice.described.labels
        if own and set(own) == set(_labels(student)):
            del wanted.labels[:]
            wanted.labels.extend(own)
    longest = architectures.longest(choice.config)
    for name in _LENGTHS:
        # A teacher that compares whole texts may see less of a long one.
        if not teaching.by_token and longest is not None and name in wanted.DESCRIPTOR.fields_by_name:
            setattr(wanted, name, min(getattr(wanted, name), longest))


def _check_answers(teacher: ModelFolder, field: str, student: Prepared) -> None:
    """Raises SpecError if a teacher's head has another problem, or labels that are not the student's."""
    own, ours, problem = teacher.labels, _labels(student), str(student.describe().get("problem") or "")
    if problem and teacher.problem and teacher.problem != problem:
        step = f"set problem to {teacher.problem}, or fine-tune the teacher on this data first"
        text = f"the teacher's head is {teacher.problem}, this job is {problem}; {step}"
        raise SpecError(field, "LABEL_MISMATCH", text)
    if not own or not ours or set(own) == set(ours):
        return
    if all(name.startswith("LABEL_") for name in own):
        if len(own) == len(ours):
            return  # By their places.
        knows, step = f"has {len(own):,} outputs without names", "fine-tune it on this data first"
    elif set(ours) < set(own):
        knows = f"knows the labels {listed(own, most=8)}"
        step = "give all of the teacher's as the task's `labels`, or fine-tune the teacher on this data first"
    else:
        knows = f"knows the labels {listed(own, most=8)}"
        step = "write them in the data as the teacher has them, or fine-tune the teacher on this data first"
    text = f"the teacher {knows}, the data has {listed(ours, most=8)}; {step}"
    raise SpecError(field, "LABEL_MISMATCH", text)


def _labels(task: Prepared) -> Sequence[str]:
    return tuple(task.describe().get("labels") or ())


def _columns(of_teacher: Sequence[str], of_student: Sequence[str]) -> tuple[int, ...] | None:
    return None if of_teacher == of_student else tuple(of_teacher.index(label) for label in of_student)


def _check_head(teacher: Prepared, student: Prepared) -> None:
    """A new head would teach at random."""
    if any(warning.reason == "NEW_HEAD" for warning in teacher.warnings):
        choice, ours = teacher.choice, listed(_labels(student), most=8) if _labels(student) else ""
        what = f"has no trained head for {student.task.name}{f' with the labels {ours}' * bool(ours)}"
        own = choice.described.labels if choice.described is not None and has_head(choice, student.task) else ()
        if own and all(name.startswith("LABEL_") for name in own):
            what = f"has outputs without names (LABEL_0 and so on), which are not known to be {ours}"
        raise SpecError(
            choice.field,
            "TASK_MISMATCH",
            f"the teacher {what}; fine-tune it on this data first, and name the model of that job",
        )


def _check_tokens(teacher: Prepared, student: Prepared) -> None:
    """Outputs are compared at each token, so both have to read the same ones."""
    mine, theirs = student.inputs, teacher.inputs
    assert isinstance(mine, TextInputs)
    assert isinstance(theirs, TextInputs)
    if (
        mine.tokenizer.get_vocab() != theirs.tokenizer.get_vocab()
        or teacher.train.num_samples != student.train.num_samples
        or not _read_alike(teacher, student)
    ):
        raise SpecError(
            teacher.choice.field,
            "TASK_MISMATCH",
            f"the teacher reads the data as other tokens than the model: {student.task.name} compares them one by one, "
            "so both need the same tokenizer, and the same chat template if there is one; use a teacher of the model's "
            "family, or give the model the teacher's tokenizer",
        )


def _read_alike(teacher: Prepared, student: Prepared) -> bool:
    step = max(student.train.num_samples // _COMPARED, 1)
    refs = [SampleRef(0, at) for at in range(0, student.train.num_samples, step)][:_COMPARED]
    return all(_are_alike(*(task.train.micro_batch([ref]).inputs for task in (teacher, student))) for ref in refs)


def _are_alike(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tokens are the same, and the same of them have a label, whatever its number."""
    marks = [inputs["labels"] >= 0 for inputs in (one, other) if "labels" in inputs]
    return torch.equal(one["input_ids"], other["input_ids"]) and all(torch.equal(marks[0], each) for each in marks)


@contextmanager
def _said_of_teacher() -> Iterator[None]:
    """Moves errors to the teacher: the student has been prepared from the same data and settings."""
    try:
        yield
    except SpecError as error:
        for each in error.all():
            if not each.field.startswith(FIELD):
                each.field, each.message = FIELD, f"as the teacher of this job: {each.message}"
        raise
