"""Rules of a JobSpec that the protos cannot express: fields that belong together, and the text of sources.

The planner checks the arithmetic, and whether model and data fit.
"""

from __future__ import annotations

from typing import Any, Final

from google.protobuf import struct_pb2
from google.protobuf.message import Message

from shardyard.task_paths import leaf_of
from shardyard.v1 import spec_pb2
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve.validation import sources
from shardyard_coordinator.serve.validation.text import control_complaint, show

MAX_SPEC_BYTES: Final = 256 * 1024
MAX_OVERRIDES_BYTES: Final = 64 * 1024
MAX_OVERRIDES_DEPTH: Final = 16
_TEN_YEARS_S: Final = 10 * 366 * 86_400

Found = list[FieldViolation]


def violations(spec: spec_pb2.JobSpec, path: str = "job.spec") -> Found:
    """The violations of the spec, beyond the rules in the protos."""
    found: Found = []
    trains = _check_task(spec, path, found)
    _check_model(spec, "model", path, found)
    if spec.HasField("distillation"):
        _check_model(spec.distillation, "teacher", f"{path}.distillation", found)
    if spec.HasField("tokenizer"):
        _check_tokenizer(spec.tokenizer, f"{path}.tokenizer", found)
    _check_optimization(spec, path, found, trains=trains)
    check_run_time(spec, path, found)
    return found


def check_run_time(spec: spec_pb2.JobSpec, path: str, found: Found) -> None:
    """Adds a violation if the longest run time is none, or too long."""
    if spec.HasField("max_run_time"):
        seconds = spec.max_run_time.seconds + spec.max_run_time.nanos / 1e9
        if not 0 < seconds <= _TEN_YEARS_S:
            text = f"`{seconds:g} s` is not over 0 and at most 10 years; give such a time, or leave it out for none"
            found.append(FieldViolation(f"{path}.max_run_time", text))


def data_violations(owner: Any, name: str) -> Found:
    """The violations of a data source that a request has under this name."""
    found: Found = []
    _check_data(owner, name, "", found, required=True)
    return found


def _missing_oneof(message: Message, oneof: str, path: str, found: Found) -> bool:
    """Adds a violation if none of the oneof's fields is set."""
    if message.WhichOneof(oneof) is not None:
        return False
    members = ", ".join(field.name for field in message.DESCRIPTOR.oneofs_by_name[oneof].fields)
    text = f"is missing; exactly one is required; set one of {members} in {path.removeprefix('job.')}"
    found.append(FieldViolation(f"{path}.{oneof}", text))
    return True


def _check_task(spec: spec_pb2.JobSpec, path: str, found: Found) -> bool:
    """Checks that a task is given, and the data that it needs. Returns whether it trains."""
    leaf = leaf_of(spec)
    here = ".".join((path, *leaf.members))
    if leaf.missing:
        _missing_oneof(leaf.message, leaf.missing, here, found)
    if isinstance(leaf.message, spec_pb2.ModelCopy):
        found += sources.check_target(f"{here}.uri", leaf.message.uri)
    elif leaf.missing or not _has_own_data(leaf.message):
        trains = bool(leaf.members)
        _check_data(spec, "train_data", path, found, required=trains)
        _check_data(spec, "eval_data", path, found, required=False)
        return trains
    else:
        _check_data(leaf.message, "data", here, found, required=True)
    for name in ("train_data", "eval_data"):
        if spec.HasField(name):
            task = leaf.members[-1].replace("_", " ")
            step = f"put its data into {here}.data" if _has_own_data(leaf.message) else "leave it out"
            text = f"is set, but {task} trains on nothing; {step}"
            found.append(FieldViolation(f"{path}.{name}", text))
    return False


def _has_own_data(task: Message) -> bool:
    field = task.DESCRIPTOR.fields_by_name.get("data")
    return field is not None and field.message_type is spec_pb2.DataSource.DESCRIPTOR


def _check_data(owner: Any, name: str, path: str, found: Found, *, required: bool) -> None:
    here = f"{path}.{name}" if path else name
    if not owner.HasField(name):
        if required:
            found.append(FieldViolation(here, "is missing; it is required; give a uri or an uploaded dataset"))
        return
    data: spec_pb2.DataSource = getattr(owner, name)
    if not _missing_oneof(data, "source", here, found):
        if data.WhichOneof("source") == "uri":
            found += sources.check_uri(f"{here}.uri", data.uri)
        else:
            found += sources.check_name(f"{here}.dataset", "dataset", data.dataset)
    if data.path and (complaint := sources.relative_path_complaint(data.path)):
        found.append(FieldViolation(f"{here}.path", complaint))
    if data.delimiter in ('"', "\n", "\r"):
        found.append(FieldViolation(f"{here}.delimiter", f"{data.delimiter!r} cannot part columns; use another"))
    columns: dict[str, str] = {}
    for part, column in sorted(data.columns.items()):
        if column and column in columns:
            text = f"{show(column)} is mapped to {columns[column]} too; each column has one use; map another"
            found.append(FieldViolation(f"{here}.columns.{part}", text))
        columns.setdefault(column, part)


def _check_model(owner: spec_pb2.JobSpec | spec_pb2.Distillation, name: str, path: str, found: Found) -> None:
    """The model that a spec starts from, or the teacher that it names."""
    here = f"{path}.{name}"
    if not owner.HasField(name):  # type: ignore[arg-type]
        sources_ = ", ".join(each.name for each in spec_pb2.ModelSource.DESCRIPTOR.oneofs_by_name["source"].fields)
        found.append(FieldViolation(here, f"is missing; it is required; set one of {sources_}"))
        return
    model: spec_pb2.ModelSource = getattr(owner, name)
    if _missing_oneof(model, "source", here, found):
        return
    match model.WhichOneof("source"):
        case "hub" | "uri" | "model":
            _check_place(model, here, found)
        case "adapter":
            for part in ("folder", "base"):
                _check_part(model.adapter, part, f"{here}.adapter.{part}", found)
        case "checkpoint":
            found += sources.check_uri(f"{here}.checkpoint.uri", model.checkpoint.uri, objects=False)
        case "architecture":
            _check_overrides(model.architecture, f"{here}.architecture", found)
        case "torch_hub":
            _check_torch_hub(model.torch_hub, f"{here}.torch_hub", found)


def _check_part(adapted: spec_pb2.AdaptedModel, name: str, path: str, found: Found) -> None:
    part: spec_pb2.AdapterFolder | spec_pb2.BaseModel = getattr(adapted, name)
    if not adapted.HasField(name):  # type: ignore[arg-type]
        found.append(FieldViolation(path, "is missing; it is required; name the adapter's folder and its base model"))
    elif not _missing_oneof(part, "source", path, found):
        _check_place(part, path, found)


def _check_place(
    source: spec_pb2.ModelSource | spec_pb2.TokenizerSource | spec_pb2.AdapterFolder | spec_pb2.BaseModel,
    path: str,
    found: Found,
) -> None:
    """A folder on the Hub, on the server, or among the uploaded models and data sets."""
    kind = source.WhichOneof("source")
    assert kind is not None
    value = getattr(source, kind)
    if kind == "hub":
        found += sources.check_hub(f"{path}.hub", value.id, value.revision, value.token)
    elif kind == "uri":
        found += sources.check_uri(f"{path}.uri", value)
    else:
        found += sources.check_name(f"{path}.{kind}", kind, value)


def _check_overrides(architecture: spec_pb2.Architecture, path: str, found: Found) -> None:
    if complaint := control_complaint(architecture.model_type):
        found.append(FieldViolation(f"{path}.model_type", complaint))
    _check_struct(architecture.overrides, f"{path}.overrides", found)


def _check_torch_hub(model: spec_pb2.TorchHubModel, path: str, found: Found) -> None:
    if model.repo:
        found += sources.check_torch_hub(path, model.repo, model.revision)
    # torch.hub takes every attribute of hubconf.py, such as `transformer.wmt16.en-de`.
    if complaint := control_complaint(model.entrypoint):
        found.append(FieldViolation(f"{path}.entrypoint", complaint))
    elif model.entrypoint.startswith("_"):
        text = f"{show(model.entrypoint)} begins with _, as functions do that torch.hub does not load; give another one"
        found.append(FieldViolation(f"{path}.entrypoint", text))
    _check_struct(model.arguments, f"{path}.arguments", found)


def _check_struct(struct: struct_pb2.Struct, here: str, found: Found) -> None:
    if (size := struct.ByteSize()) > MAX_OVERRIDES_BYTES:
        text = f"{size:,} bytes; at most {MAX_OVERRIDES_BYTES:,} are allowed; leave out what is not needed"
        found.append(FieldViolation(here, text))
    elif (depth := _depth(struct)) > MAX_OVERRIDES_DEPTH:
        text = f"{depth} levels; at most {MAX_OVERRIDES_DEPTH} are allowed; nest less"
        found.append(FieldViolation(here, text))


def _depth(value: Any) -> int:
    """The number of levels in a Struct, ListValue or Value."""
    kind = value.DESCRIPTOR.name
    if kind == "Struct":
        return 1 + max((_depth(each) for each in value.fields.values()), default=0)
    if kind == "ListValue":
        return 1 + max((_depth(each) for each in value.values), default=0)
    which = value.WhichOneof("kind")
    return _depth(getattr(value, which)) if which in ("struct_value", "list_value") else 0


def _check_tokenizer(tokenizer: spec_pb2.TokenizerSource, path: str, found: Found) -> None:
    if _missing_oneof(tokenizer, "source", path, found):
        return
    if tokenizer.WhichOneof("source") == "train":
        _check_trained(tokenizer.train, f"{path}.train.vocab_size", found)
    else:
        _check_place(tokenizer, path, found)


def _check_trained(train: spec_pb2.TrainedTokenizer, field: str, found: Found) -> None:
    if not train.HasField("vocab_size"):
        return
    kinds = spec_pb2.TrainedTokenizer
    size = show(train.vocab_size)
    if train.algorithm == kinds.ALGORITHM_CHARACTERS:
        found.append(
            FieldViolation(field, f"{size}: a tokenizer of characters takes what the corpus has; leave it out")
        )
    elif train.algorithm in (kinds.ALGORITHM_UNSPECIFIED, kinds.ALGORITHM_BYTE_BPE) and 64 <= train.vocab_size < 259:
        text = f"{size} is under 259, the 256 bytes and special tokens of byte-level BPE; give 259 or more"
        found.append(FieldViolation(field, text))


def _check_optimization(spec: spec_pb2.JobSpec, path: str, found: Found, *, trains: bool) -> None:
    here = f"{path}.optimization"
    if trains:
        _missing_oneof(spec.optimization, "duration", here, found)
    if spec.optimization.precision == spec_pb2.PRECISION_FP16:
        found.append(
            FieldViolation(
                f"{here}.precision",
                "`PRECISION_FP16` is not supported: its loss scaling makes runs hang on overflows; use bf16 or fp32",
                Reason.PRECISION_UNSUPPORTED,
            )
        )
