"""A job from flags, without a spec file: each flag is a field of the spec, and overrides a file's."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, get_args

from shardyard._scalars import is_empty
from shardyard._sources import expanded
from shardyard.cli.options import an_option
from shardyard.errors import InvalidArgument, invalid
from shardyard.specs import Task

# Their names as flags: `text-classification`, …
TASKS = tuple(re.sub(r"(?<!^)(?=[A-Z])", "-", kind.__name__).lower() for kind in get_args(Task))
# The flags that are fields of the task, and the fields' names.
TASK_FIELDS = {
    "problem": "problem",
    "pooling": "pooling",
    "label_column": "label_columns",
    "label_separator": "label_separator",
    "max_length": "max_length",
    "sequence_length": "sequence_length",
    "image_size": "image_size",
    "crop_scale": "crop_scale",
    "flip": "flip",
}
# Where each flag's value goes, below `job.spec`; those of the task's own fields are in `TASK_FIELDS`.
PATHS = {
    "epochs": ("optimization", "epochs"),
    "max_steps": ("optimization", "max_steps"),
    "batch_size": ("optimization", "global_batch_size"),
    "learning_rate": ("optimization", "learning_rate"),
    "precision": ("optimization", "precision"),
    "seed": ("optimization", "seed"),
    "workers": ("resources", "workers"),
    "gpus_per_worker": ("resources", "gpus_per_worker"),
    "cpus_per_worker": ("resources", "cpus_per_worker"),
    "zero_stage": ("parallelism", "zero_stage"),
    "checkpoint_every": ("checkpoints", "every"),
    "eval_every": ("evaluation", "every"),
    "max_run_time": ("max_run_time",),
    "export": ("export", "formats"),
    "max_drop": ("export", "max_drop"),
}


class UsageError(InvalidArgument):
    """An error in the command or its file; nothing was sent."""

    @classmethod
    def of(cls, error: InvalidArgument) -> Self:
        """The same error as a usage error."""
        return cls(error.message, reason=error.reason, metadata=error.metadata, violations=error.violations)


@dataclass(frozen=True)
class JobFlags:
    """The flags of `submit` and `plan`."""

    task: Annotated[str | None, an_option("--task", help=f"One of {', '.join(TASKS)}.")] = None
    model: Annotated[str | None, an_option("--model", help="A folder, hub:owner/name, model:ID, or server:/path.")] = (
        None
    )
    adapter: Annotated[str | None, an_option("--adapter", help="A LoRA adapter for --model: a folder, hub:…, …")] = None
    teacher: Annotated[str | None, an_option("--teacher", help="Learn from this model too: as --model.")] = None
    architecture: Annotated[str | None, an_option("--architecture", help="Instead of --model: a new gpt2, bert, …")] = (
        None
    )
    tokenizer: Annotated[str | None, an_option("--tokenizer", help="A folder, hub:owner/name, or model:ID.")] = None
    train: Annotated[str | None, an_option("--train", help="Training data: a file or folder, or dataset:ID.")] = None
    eval: Annotated[str | None, an_option("--eval", help="Evaluation data [a tenth of the training data].")] = None
    data: Annotated[str | None, an_option("--data", help="Feature extraction, evaluation, export: the data.")] = None
    text: Annotated[str | None, an_option("--text", help="The column with the text.")] = None
    text_pair: Annotated[str | None, an_option("--text-pair", help="The column with the second text.")] = None
    label: Annotated[str | None, an_option("--label", help="The column with the label.")] = None
    label_column: Annotated[
        list[str] | None,
        an_option("--label-column", help="multi-label: a column of 0 and 1, one per class; repeatable."),
    ] = None
    label_separator: Annotated[str | None, an_option("--label-separator", help="multi-label: the separator.")] = None
    problem: Annotated[str | None, an_option("--problem", help="single-label, multi-label, or regression.")] = None
    pooling: Annotated[str | None, an_option("--pooling", help="mean, cls, last, or max.")] = None
    max_length: Annotated[int | None, an_option("--max-length", help="Longest text in tokens.")] = None
    sequence_length: Annotated[
        int | None, an_option("--sequence-length", help="Pretraining: tokens in a sequence.")
    ] = None
    image_size: Annotated[int | None, an_option("--image-size", help="Pictures: height and width in pixels.")] = None
    crop_scale: Annotated[float | None, an_option("--crop-scale", help="Pictures: least part of one to train on.")] = (
        None
    )
    flip: Annotated[float | None, an_option("--flip", help="Pictures: how often to mirror one, 0 to 1.")] = None
    epochs: Annotated[float | None, an_option("--epochs", help="Passes over the training data.")] = None
    max_steps: Annotated[int | None, an_option("--max-steps", help="Optimizer steps, instead of --epochs.")] = None
    batch_size: Annotated[int | None, an_option("--batch-size", help="Samples in a step, over all workers.")] = None
    learning_rate: Annotated[float | None, an_option("--learning-rate", "--lr", help="The peak learning rate.")] = None
    precision: Annotated[str | None, an_option("--precision", help="fp32 or bf16.")] = None
    seed: Annotated[int | None, an_option("--seed", help="Seeds everything random.")] = None
    workers: Annotated[int | None, an_option("--workers", help="How many workers.")] = None
    gpus_per_worker: Annotated[int | None, an_option("--gpus-per-worker", help="GPUs of a worker.")] = None
    cpus_per_worker: Annotated[int | None, an_option("--cpus-per-worker", help="CPU cores of a worker.")] = None
    zero_stage: Annotated[int | None, an_option("--zero-stage", help="DeepSpeed ZeRO stage, 0 to 3.")] = None
    checkpoint_every: Annotated[int | None, an_option("--checkpoint-every", help="Steps between checkpoints.")] = None
    eval_every: Annotated[int | None, an_option("--eval-every", help="Steps between evaluations.")] = None
    max_run_time: Annotated[str | None, an_option("--max-run-time", help="Such as 2h.")] = None
    export: Annotated[
        list[str] | None, an_option("--export", help="Also export as onnx, onnx-int8 or bf16; repeatable.")
    ] = None
    max_drop: Annotated[float | None, an_option("--max-drop", help="--export: how much worse it may be.")] = None
    priority: Annotated[str | None, an_option("--priority", help="best-effort, normal, high, or critical.")] = None
    display_name: Annotated[str | None, an_option("--display-name", help="For people.")] = None

    def overrides(self) -> dict[str, Any]:
        """The flags that were given."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            # A repeatable flag that is not given is an empty list.
            if (value := getattr(self, field.name)) is not None and value != []
        }

    def merged(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """A spec file's content, overridden by the flags.

        Raises: UsageError for a task that does not exist, or flags without the task that they belong to;
        InvalidArgument if the file has a value instead of the fields that a flag sets.
        """
        made: dict[str, Any] = _copy(data)
        given = self.overrides()
        if not given:
            return made
        job = _below(made, "job")
        for name in ("priority", "display_name"):
            if (value := getattr(self, name)) is not None:
                job[_written(job, name)] = value
        spec = _below(job, "spec", "job")
        for name, path in PATHS.items():
            if name in given:
                _put(spec, path, given[name])
        self._sources(spec)
        self._task_fields(spec)
        return made

    def _sources(self, spec: dict[str, Any]) -> None:
        """Model, tokenizer and data; paths in flags are relative to the current folder, not to the file."""
        if self.model is not None:
            dropout = {"dropout": spec["model"]["dropout"]} if _has(spec.get("model"), "dropout") else {}
            base = {"uri": _here(self.model)}
            adapted = {"adapter": {"folder": {"uri": _here(self.adapter)}, "base": base}} if self.adapter else base
            spec["model"] = {**adapted, **dropout}
        elif self.adapter is not None:
            raise UsageError("--adapter changes the model that --model names; give both")
        if self.architecture is not None:
            spec["model"] = {"architecture": {"model_type": self.architecture}}
        if self.teacher is not None:
            taught = _below(spec, "distillation", "job.spec")
            taught["teacher"] = _here(self.teacher)
        if self.tokenizer is not None:
            spec["tokenizer"] = _here(self.tokenizer)
        columns = self._columns()
        for field, value in (("train_data", self.train), ("eval_data", self.eval)):
            name = _written(spec, field)
            if value is not None:
                spec[name] = _with_source(spec.get(name), _here(value))
            if columns and name in spec:
                spec[name] = _with_columns(spec[name], columns, f"job.spec.{field}")

    def _task_fields(self, spec: dict[str, Any]) -> None:
        """The task, and the flags that are fields of it."""
        if self.task is not None and self.task.replace("_", "-") not in TASKS:
            raise UsageError(f"--task: `{self.task}` is none of {', '.join(TASKS)}", reason="USAGE")
        given = self.overrides()
        if not given.keys() & {"task", "data", *TASK_FIELDS}:
            return
        path = _given_task(spec) if self.task is None else _task_paths()[self.task.replace("_", "-")]
        fields, here = spec, "job.spec"
        for name in path:
            fields, here = _below(fields, name, here), f"{here}.{name}"
        for flag in given.keys() & TASK_FIELDS.keys():
            fields[_written(fields, TASK_FIELDS[flag])] = given[flag]
        if self.data is not None:
            source = _with_source(fields.get("data"), _here(self.data))
            fields["data"] = _with_columns(source, self._columns(), f"{here}.data")

    def _columns(self) -> dict[str, str]:
        """The columns that flags give, by their roles."""
        roles = {"text": self.text, "text_pair": self.text_pair, "label": self.label}
        return {role: column for role, column in roles.items() if column is not None}


def _task_paths() -> dict[str, tuple[str, ...]]:
    """The path of each task below `job.spec`, by its name as a flag."""
    from shardyard.task_paths import task_paths  # Imported here: a help text does not need protobuf.

    return {path[-1].replace("_", "-"): path for path in task_paths()}


def _given_task(spec: dict[str, Any]) -> tuple[str, ...]:
    """The path of the task that the spec already has.

    Raises: UsageError if it has none.
    """
    for path in _task_paths().values():
        fields, here = spec, "job.spec"
        for name in path:
            if _written(fields, name) not in fields:
                break
            fields, here = _below(fields, name, here), f"{here}.{name}"
        else:
            return path
    raise UsageError("give --task as well", reason="USAGE")


def _with_columns(source: Any, columns: Mapping[str, Any], path: str) -> Any:
    if not columns:
        return source
    whole = dict(source) if isinstance(source, Mapping) else {"uri": source}
    _below(whole, "columns", path).update(columns)
    return whole


def _with_source(written: Any, value: str) -> Any:
    """Data that replaces the file's; columns, format and the like are kept."""
    if not isinstance(written, Mapping):
        return value
    return {**{key: item for key, item in written.items() if key not in ("uri", "dataset")}, "uri": value}


def _has(value: Any, key: str) -> bool:
    return isinstance(value, Mapping) and key in value


def _here(text: str) -> str:
    """An existing path, made absolute: the spec file may be in another folder. An empty text is refused later."""
    path = expanded(text)
    return str(path.resolve()) if text.strip() and path.exists() else text


def _put(spec: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    here = "job.spec"
    for name in path[:-1]:
        spec, here = _below(spec, name, here), f"{here}.{name}"
    spec[_written(spec, path[-1])] = value


def _below(parent: dict[str, Any], name: str, path: str = "") -> dict[str, Any]:
    """The fields under a name of the mapping at `path`, made if there are none.

    Raises: InvalidArgument if there is a value instead.
    """
    written = _written(parent, name)
    value = {} if is_empty(parent.get(written)) else parent[written]
    if not isinstance(value, dict):
        field = f"{path}.{name}" if path else name
        raise invalid(
            field, f"`{value}` is given, but fields are needed; write them below it, or give no flag for one of them"
        )
    parent[written] = value
    return value


def _written(spec: Mapping[str, Any], name: str) -> str:
    """The name as the spec already spells it."""
    return next((known for known in spec if known in (name, _camel(name))), name)


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _copy(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _copy(item) for key, item in data.items()}
    return list(map(_copy, data)) if isinstance(data, list) else data
