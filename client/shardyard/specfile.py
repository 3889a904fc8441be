"""Spec files: `{job_id?, job: {…}}` in proto JSON written as YAML; `--set path=value` on top.

Scalars keep their text until the field's type is known: `labels: [no, yes]` are two words, not two truth values, and
`1e-4` is a number. Aliases, tags and repeated keys are refused or bounded: a spec file comes from anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shardyard._parse import Draft, draft_job
from shardyard._scalars import PlainScalar, is_empty
from shardyard.errors import InvalidArgument, Violation, invalid, invalid_fields

MAX_BYTES = 2**20
MAX_NODES = 20_000
MAX_DEPTH = 64
# Fields that may be written as a string, and the keys that name a source in the mapping that the string abbreviates.
_SOURCES = ("train_data", "eval_data", "data", "model", "teacher", "tokenizer")
_SOURCE_KEYS = ("uri", "hub", "model", "dataset", "architecture", "torch_hub", "checkpoint", "adapter", "train")
_CORE_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class SpecFile:
    """A spec file's content as plain data, and the line of each field."""

    path: Path
    data: dict[str, Any]
    lines: dict[str, int]
    changed: Collection[str] = frozenset()

    def draft(self, *, project: str, overrides: Sequence[str] = ()) -> Draft:
        """The job, with `path=value` overrides applied; paths in it are relative to the file.

        Raises: InvalidArgument with everything that is wrong, each with field path and line.
        """
        source = self
        for override in overrides:
            source = source.with_data(overridden(source.data, override))
        try:
            return draft_job(source.data, base=self.path.parent, project=project)
        except InvalidArgument as error:
            raise source.located(error) from None

    def with_data(self, data: dict[str, Any]) -> SpecFile:
        """The same file with changed data: fields that differ have no line any more."""
        changed = set(_differences(self.data, data, ""))
        return SpecFile(
            self.path, data, {path: line for path, line in self.lines.items() if path not in changed}, changed
        )

    def located(self, error: InvalidArgument) -> InvalidArgument:
        """The error with the line of each field that is in the file; also for errors from the service."""
        violations = [
            Violation(violation.field, f"{violation.message}{self._place(violation.field)}", violation.reason)
            for violation in error.violations
        ]
        made = invalid_fields(violations) if violations else InvalidArgument(error.message)
        made.reason, made.metadata, made.retry_after = error.reason, error.metadata, error.retry_after
        return made

    def _place(self, field: str) -> str:
        """` (file.yaml:12)`: the line of the field, or of the nearest field above it."""
        path = _snake(field)
        while path:
            if path in self.changed:
                return " (from the command line)"
            if path in self.lines:
                return f" ({self.path.name}:{self.lines[path]})"
            path = re.sub(r"(\.[^.\[]*|\[[^\]]*\])$", "", path) if re.search(r"[.\[]", path) else ""
        return ""


def read_spec_file(path: Path) -> SpecFile:
    """Read a spec file.

    Raises: InvalidArgument if it cannot be read or is not YAML of the form wanted, with the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise invalid("file", f"`{path}` cannot be read: {error.strerror}", reason="FILE_NOT_FOUND") from None
    if len(raw) > MAX_BYTES:
        raise invalid("file", f"`{path}` has {len(raw):,} bytes; a spec file has at most {MAX_BYTES:,}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid("file", f"`{path}` is not UTF-8: byte {error.start}") from None
    return parse_spec(text, path)


def parse_spec(text: str, path: Path) -> SpecFile:
    """Read the text of a spec file.

    Raises: InvalidArgument.
    """
    try:
        node = _composed(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise invalid("file", f"`{path}` is not YAML: {_yaml_words(error)}") from None
    if not isinstance(node, yaml.MappingNode):
        raise invalid("file", f"`{path}` must hold `job:` with a `spec:` below it")
    reader = _NodeReader(path)
    data = reader.plain(node, "", 0)
    if reader.violations:
        raise invalid_fields(reader.violations)
    return SpecFile(path, data, reader.lines)


def overridden(data: dict[str, Any], override: str) -> dict[str, Any]:
    """The data with one `path=value` on top; the path is relative to the job, such as `spec.optimization.max_steps`.

    Raises: InvalidArgument if it is not of that form.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().removeprefix("job.").split(".")
    if not equals or not all(keys):
        raise invalid("set", f"`{override}`: write a path and a value, as in `spec.optimization.max_steps=100`")
    try:
        node = _composed(text) or yaml.ScalarNode(f"{_CORE_TAG}null", "")
    except (yaml.YAMLError, RecursionError) as error:
        raise invalid("set", f"`{override}`: the value is not YAML: {_yaml_words(error)}") from None
    value = _NodeReader(Path("--set")).plain(node, "", 0)
    if keys == ["job_id"]:
        return {**data, "job_id": value}
    return {**data, "job": _with(data.get("job"), keys, value)}


def _with(data: Any, keys: Sequence[str], value: Any, path: str = "job") -> dict[str, Any]:
    """A copy of the mapping at `path` with one value set, however the names on the path are spelled."""
    here = _opened(data, path, keys[0])
    key = next((known for known in here if _snake(known) == _snake(keys[0])), keys[0])
    here[key] = value if len(keys) == 1 else _with(here.get(key), keys[1:], value, f"{path}.{_snake(key)}")
    return here


def _opened(data: Any, path: str, key: str) -> dict[str, Any]:
    """The mapping at `path`, into which `key` can be put.

    Raises: InvalidArgument if a value without fields is there.
    """
    if isinstance(data, dict):
        return dict(data)
    if is_empty(data):
        return {}
    if not isinstance(data, str) or path.rsplit(".", 1)[-1] not in _SOURCES:
        raise invalid(path, f"its value is `{data}`, which has no field `{key}`; set it as a whole: `--set {path}=…`")
    return {} if _snake(key) in _SOURCE_KEYS else {"uri": data}


def _differences(before: Any, after: Any, path: str) -> Iterator[str]:
    """Paths of the fields that are new or different in `after`."""
    for key, value in after.items():
        inner = f"{path}.{_snake(key)}" if path else _snake(key)
        whole = before if key == "uri" else None  # A source may have been written as a string.
        old = before.get(key) if isinstance(before, dict) else whole
        if isinstance(value, dict):
            yield from _differences(old, value, inner)
        elif value != old:
            yield inner


class _NodeReader:
    """YAML nodes as plain data, scalars as their text; bounded in size and depth."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._nodes = 0
        self.lines: dict[str, int] = {}
        self.violations: list[Violation] = []

    def plain(self, node: yaml.Node, path: str, depth: int) -> Any:
        """The node's data; its errors are added to `violations`."""
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            raise invalid("file", f"`{self._path}` is too large or too deeply nested for a spec")
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        if not node.tag.startswith(_CORE_TAG) or "python/" in node.tag:
            self._fail(path, f"the tag `{node.tag}` means nothing here", line)
            return None
        if isinstance(node, yaml.MappingNode):
            return dict(self._items(node, path, depth))
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return PlainScalar(node.value) if is_plain else str(node.value)

    def _items(self, node: yaml.MappingNode, path: str, depth: int) -> Iterator[tuple[str, Any]]:
        seen: dict[str, int] = {}
        for key, item in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self._fail(path, "a name is wanted before the colon", line)
                continue
            name = str(key.value)
            inner = f"{path}.{_snake(name)}" if path else _snake(name)
            if name in seen:
                self._fail(inner, f"given twice, first on line {seen[name]}", line)
                continue
            seen[name] = line
            self.lines[inner] = line
            yield name, self.plain(item, inner, depth + 1)

    def _fail(self, path: str, message: str, line: int) -> None:
        self.violations.append(Violation(path, f"{message} ({self._path.name}:{line})"))


def _composed(text: str) -> yaml.Node | None:
    """The document's tree, with nothing constructed; None if it is empty."""
    loader = yaml.SafeLoader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _yaml_words(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" on line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return f"{getattr(error, 'problem', None) or str(error).splitlines()[0]}{place}"


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])([A-Z])", lambda match: "_" + match[1].lower(), name)
