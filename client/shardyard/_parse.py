"""A job written as plain data (spec file, flags, typed spec) becomes its message, or a list of all its errors.

Read are: snake_case and camelCase names, short and prefixed enum values, durations such as `90s` and `2h`, numbers
written as text (YAML takes `1e-4` for text), and strings for a model, data or tokenizer (`_sources`). An
unknown name is refused with the nearest one: the service would ignore it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from shardyard._convert import MAX_DURATION_S, enum_prefix, is_map, is_repeated
from shardyard._messages import INT_RANGES
from shardyard._scalars import PlainScalar, is_null
from shardyard._sources import Kind, classify
from shardyard._text import escaped, is_utf8, not_utf8, shown
from shardyard.errors import Violation, invalid_fields
from shardyard.v1 import job_pb2, spec_pb2

MAX_DEPTH = 32
_UNITS_S = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SOURCES: dict[str, Kind] = {
    **{"ModelSource": "model", "DataSource": "data", "TokenizerSource": "tokenizer"},
    **{"AdapterFolder": "adapter", "BaseModel": "model"},
}


@dataclass(frozen=True)
class Upload:
    """A local path to upload before the job can be submitted; `message.member` then names the resource."""

    field: str
    path: Path
    collection: Literal["models", "datasets"]
    message: Message
    member: str


@dataclass(frozen=True)
class Draft:
    """A job that is ready except for its uploads."""

    job: job_pb2.Job
    job_id: str | None = None
    uploads: tuple[Upload, ...] = ()
    plan_etag: str = ""


@dataclass
class Reader:
    """Reads one job; violations are collected, not raised."""

    base: Path
    project: str
    violations: list[Violation] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)

    def fail(self, path: str, message: str, reason: str = "SPEC_INVALID") -> None:
        """Records a broken rule at a path."""
        self.violations.append(Violation(path, message, reason))

    def fill(self, message: Message, value: Any, path: str, depth: int = 0) -> None:
        """Write plain data into the message."""
        kind = _SOURCES.get(message.DESCRIPTOR.name)
        if depth > MAX_DEPTH:
            self.fail(path, f"nested deeper than {MAX_DEPTH} levels")
        elif isinstance(value, str) and not is_utf8(value):
            self.fail(path, not_utf8(value))
        elif kind is not None and isinstance(value, str):
            self._source(message, kind, value, path)
        elif isinstance(message, spec_pb2.HubModel) and isinstance(value, str):
            message.id, _, message.revision = str(value).partition("@")
        elif isinstance(message, spec_pb2.Architecture) and isinstance(value, str):
            message.model_type = str(value)
        elif isinstance(message, spec_pb2.TensorflowCheckpoint) and isinstance(value, str):
            self._checkpoint(message, value, path)
        elif not isinstance(value, Mapping):
            self.fail(path, f"{shown(value)} is given, but fields are needed: {', '.join(_names(message.DESCRIPTOR))}")
        else:
            self._fields(message, value, path, depth, kind)

    def _fields(self, message: Message, value: Mapping[Any, Any], path: str, depth: int, kind: Kind | None) -> None:
        chosen: dict[str, str] = {}
        for key, item in value.items():
            inner = f"{path}.{key}" if path else str(key)
            found = _field(message.DESCRIPTOR, str(key))
            if found is None:
                self._unknown(message.DESCRIPTOR, str(key), inner)
                continue
            inner = f"{path}.{found.name}" if path else found.name
            oneof = found.containing_oneof
            if oneof is not None and not oneof.name.startswith("_"):  # `_name` is what `optional` makes.
                if oneof.name in chosen:
                    self.fail(inner, f"`{chosen[oneof.name]}` is given as well; exactly one of them is wanted")
                    continue
                chosen[oneof.name] = found.name
            if item is None or is_null(item):
                continue
            is_place = kind is not None or isinstance(message, spec_pb2.TensorflowCheckpoint)
            if found.name == "uri" and is_place and isinstance(item, str):
                self.fill(message, item, inner, depth)
            else:
                self._field(message, found, item, inner, depth)

    def _unknown(self, descriptor: Any, key: str, path: str) -> None:
        names = _names(descriptor)
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(names)}"
        self.fail(path, f"unknown field `{key}`; {hint}", "FIELD_UNKNOWN")

    def _field(self, message: Message, found: FieldDescriptor, item: Any, path: str, depth: int) -> None:
        if is_map(found):
            self._map(message, found, item, path)
        elif is_repeated(found):
            if not isinstance(item, Sequence) or isinstance(item, str):
                self.fail(path, f"{shown(item)} is given, but a list is needed")
                return
            values = getattr(message, found.name)
            for index, entry in enumerate(item):
                if found.message_type is not None:
                    self.fill(values.add(), entry, f"{path}[{index}]", depth + 1)
                elif (scalar := self._scalar(found, entry, f"{path}[{index}]")) is not None:
                    values.append(scalar)
        elif found.message_type is not None:
            self._message(getattr(message, found.name), item, path, depth)
        elif (scalar := self._scalar(found, item, path)) is not None:
            setattr(message, found.name, scalar)

    def _message(self, target: Any, item: Any, path: str, depth: int) -> None:
        full_name = target.DESCRIPTOR.full_name
        if full_name == "google.protobuf.Duration":
            seconds = duration_s(item)
            if seconds is None:
                self.fail(path, f"{shown(item)} is not a duration; write `90s`, `30m`, `2h` or `1h30m`")
            elif abs(seconds) > MAX_DURATION_S:
                self.fail(path, f"{shown(item)} is longer than 10,000 years; write a shorter one")
            else:
                target.FromNanoseconds(round(seconds * 1e9))
        elif full_name == "google.protobuf.Timestamp":
            self.fail(path, "is set by the service, not by a spec")
        elif full_name == "google.protobuf.Struct":
            if not isinstance(item, Mapping):
                self.fail(path, f"{shown(item)} is given, but names and values are needed")
                return
            try:
                target.update(native(item))
            except UnicodeEncodeError as error:
                self.fail(path, not_utf8(error.object))
            except (ValueError, TypeError, OverflowError) as error:
                self.fail(path, str(error))
        else:
            target.SetInParent()  # An empty objective (`causal_lm: {}`) is a choice too.
            self.fill(target, item, path, depth + 1)

    def _map(self, message: Message, found: FieldDescriptor, item: Any, path: str) -> None:
        if not isinstance(item, Mapping):
            self.fail(path, f"{shown(item)} is given, but names and values are needed")
            return
        entry = found.message_type.fields_by_name
        for key, value in item.items():
            if value is None or is_null(value):
                continue
            name = self._scalar(entry["key"], key, path)
            scalar = self._scalar(entry["value"], value, f"{path}.{key}")
            if name is not None and scalar is not None:
                getattr(message, found.name)[name] = scalar

    def _scalar(self, found: FieldDescriptor, item: Any, path: str) -> Any:
        if found.enum_type is not None:
            return self._enum(found.enum_type, item, path)
        if found.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            truth = {"true": True, "false": False}.get(str(item).lower())
            return self._checked(truth, item, path, "true or false is wanted")
        if found.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            if isinstance(item, bool | Mapping | list | tuple):
                return self._checked(None, item, path, "text is wanted")
            return self._text(str(item), path)
        if found.cpp_type in INT_RANGES:
            return self._int(INT_RANGES[found.cpp_type], item, path)
        return self._checked(_float(item), item, path, "a number is wanted, at most 1.8e308")

    def _text(self, text: str, path: str) -> str | None:
        if is_utf8(text):
            return text
        self.fail(path, not_utf8(text))
        return None

    def _enum(self, descriptor: EnumDescriptor, item: Any, path: str) -> int | None:
        prefix = enum_prefix(descriptor)
        text = escaped(str(item)).strip().upper().replace("-", "_")  # protobuf cannot look up what is not UTF-8.
        value = descriptor.values_by_name.get(text) or descriptor.values_by_name.get(prefix + text)
        if value is not None:
            return int(value.number)
        names = [
            name.removeprefix(prefix).lower() for name in descriptor.values_by_name if not name.endswith("UNSPECIFIED")
        ]
        near = difflib.get_close_matches(str(item).lower(), names, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        self.fail(path, f"{shown(item)} is none of {', '.join(names)}{hint}")
        return None

    def _int(self, limits: tuple[int, int], item: Any, path: str) -> Any:
        number = _number(item)
        if number is None or (isinstance(number, float) and not number.is_integer()):
            return self._checked(None, item, path, "a whole number is wanted")
        whole = int(number)
        if not limits[0] <= whole <= limits[1]:
            return self._checked(None, item, path, f"{limits[0]} to {limits[1]} can be written")
        return whole

    def _checked(self, value: Any, item: Any, path: str, rule: str) -> Any:
        if value is None:
            self.fail(path, f"{shown(item)} is given, but {rule}")
        return value

    def _source(self, message: Any, kind: Kind, text: str, path: str) -> None:
        found = classify(kind, str(text), base=self.base, project=self.project)
        if isinstance(found, str):
            self.fail(path, found, "FILE_NOT_FOUND" if "no such" in found else "SPEC_INVALID")
        elif found.field == "local":
            member: Literal["model", "dataset"] = "model" if kind == "model" else "dataset"
            collection: Literal["models", "datasets"] = "models" if kind == "model" else "datasets"
            self.uploads.append(Upload(path, Path(found.value), collection, message, member))
        elif found.field == "hub":
            message.hub.id, _, message.hub.revision = found.value.partition("@")
        else:
            setattr(message, found.field, found.value)

    def _checkpoint(self, message: spec_pb2.TensorflowCheckpoint, text: str, path: str) -> None:
        """A checkpoint's path on the server, `server:` before it or not."""
        message.uri = str(text).removeprefix("server:")
        if not message.uri.startswith("/"):
            self.fail(path, f"{shown(text)} is given, but an absolute path on the server is needed: `server:/path`")


def draft_job(value: Mapping[str, Any], *, base: Path, project: str) -> Draft:
    """`{job_id?, job: {…}}` as a message; paths are relative to `base`.

    Raises: InvalidArgument with all violations, each with its field path.
    """
    reader = Reader(base, project)
    job = job_pb2.Job()
    for key in value:
        if key not in ("job_id", "jobId", "job"):
            under = (
                f"write it under `job:` (as `job.{key}`)"
                if _field(job.DESCRIPTOR, str(key))
                else "there are job_id and job"
            )
            reader.fail(str(key), f"unknown field `{key}`; {under}", "FIELD_UNKNOWN")
    if value.get("job") is None:
        reader.fail("job", "required: the job, with at least its `spec`")
    else:
        reader.fill(job, value["job"], "job")
    job_id = value.get("job_id", value.get("jobId"))
    if isinstance(job_id, str) and not is_utf8(job_id):
        reader.fail("job_id", not_utf8(job_id))
    if reader.violations:
        raise invalid_fields(reader.violations)
    return Draft(job, None if job_id is None or is_null(job_id) else str(job_id), tuple(reader.uploads))


def duration_s(item: Any) -> float | None:
    """Seconds of `90s`, `1h30m`, a number of seconds or a timedelta; None if it is none of them."""
    if isinstance(item, timedelta):
        return item.total_seconds()
    if (seconds := _float(item)) is not None:
        return seconds if math.isfinite(seconds) else None
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", str(item))
    if not parts or "".join(number + unit for number, unit in parts) != str(item).replace(" ", ""):
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def native(value: Any) -> Any:
    """Plain data with unquoted YAML scalars read as YAML means them: for fields without a type of their own."""
    if isinstance(value, Mapping):
        return {str(key): native(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [native(item) for item in value]
    if not isinstance(value, PlainScalar):
        return value
    if is_null(value):
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    number = _number(value)
    return str(value) if number is None else number


def _number(item: Any) -> int | float | None:
    if isinstance(item, bool):
        return None
    if isinstance(item, int | float):
        return item
    convert: Callable[[str], int | float]
    for convert in (int, float):
        try:
            return convert(str(item))
        except ValueError:
            continue
    return None


def _float(item: Any) -> float | None:
    """The value as a float; None if it is not a number that a float can hold."""
    number = _number(item)
    try:
        return None if number is None else float(number)
    except OverflowError:
        return None


def _field(descriptor: Any, key: str) -> FieldDescriptor | None:
    key = escaped(key)
    found: FieldDescriptor | None = descriptor.fields_by_name.get(key) or descriptor.fields_by_camelcase_name.get(key)
    return found


def _names(descriptor: Any) -> list[str]:
    return [str(item.name) for item in descriptor.fields]
