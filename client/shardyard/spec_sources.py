"""The sources in a job's spec: data, models and tokenizers; and how typed specs become plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

Algorithm = Literal["byte_bpe", "wordpiece", "unigram", "characters"]
Format = Literal["text", "jsonl", "csv", "tsv", "parquet", "conll", "images", "idx", "interactions"]
Document = Literal["line", "file"]

_COLUMNS = ("text", "text_pair", "label")


class Resource(Protocol):
    """A model or data set of the service, as a client returns it."""

    @property
    def name(self) -> str:
        """`projects/{project}/models/{model}`, or the same of a data set."""


@dataclass(frozen=True)
class Data:
    """Data to train, evaluate or extract on; `path` is one file or folder inside a folder.

    `columns` maps any role of the task to a column, as `{"tokens": "words"}`; roles that are left out are found. Of
    all rows, `max_bad_rows_share` may be left out because they cannot be used; the plan lists them.
    """

    source: str | Path | Resource
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    path: str | None = None
    format: Format | None = None
    header: bool | None = None
    delimiter: str | None = None
    document: Document | None = None
    columns: Mapping[str, str] | None = None
    max_bad_rows_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        rest = set_fields(self, without=("source", "columns", *_COLUMNS))
        named = {role: value for role in _COLUMNS if (value := getattr(self, role)) is not None}
        columns = {**(self.columns or {}), **named}
        return {"uri": _text_of(self.source), **({"columns": columns} if columns else {}), **rest}


@dataclass(frozen=True)
class Pretrained:
    """A model to start from, with every dropout probability set to `dropout` if that is given.

    A private model of the Hub needs a `token`: `secret://NAME`, the name of a secret of the service.
    """

    source: str | Path | Resource
    dropout: float | None = None
    token: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        rest = set_fields(self, without=("source", "token"))
        if self.token is None:
            return {"uri": _text_of(self.source), **rest}
        name, _, revision = _text_of(self.source).removeprefix("hub:").partition("@")
        return {"hub": {"id": name, "revision": revision, "token": self.token}, **rest}


@dataclass(frozen=True)
class Architecture:
    """A new model: a transformers model type, and values of its configuration that differ from the defaults."""

    model_type: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dropout: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        architecture = {"model_type": self.model_type, "overrides": dict(self.overrides)}
        return {"architecture": architecture, **set_fields(self, without=("model_type", "overrides"))}


@dataclass(frozen=True)
class TorchHub:
    """What a function of a `hubconf.py` returns for the arguments; code that runs only if the operator allows it.

    `repo` is the absolute path of a folder on the server, or `owner/name:commit`.
    """

    repo: str | Path
    entrypoint: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    dropout: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        torch_hub = {"repo": str(self.repo), **set_fields(self, without=("repo", "arguments", "dropout"))}
        return {
            "torch_hub": {**torch_hub, "arguments": dict(self.arguments)},
            **set_fields(self, without=("repo", "entrypoint", "arguments", "revision")),
        }


@dataclass(frozen=True)
class TensorflowCheckpoint:
    """A TensorFlow checkpoint on the server; `uri` is its path as TensorFlow names it, or that of its folder."""

    uri: str
    dropout: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"checkpoint": {"uri": self.uri}, **set_fields(self, without=("uri",))}


@dataclass(frozen=True)
class Adapter:
    """A model with a LoRA adapter of peft: a folder, as peft saves it, and the model that it was trained beside.

    The changes of the adapter are added to the model's weights, which are then trained like any others.
    """

    folder: str | Path | Resource
    base: str | Path | Resource
    dropout: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        adapter = {"folder": {"uri": _text_of(self.folder)}, "base": {"uri": _text_of(self.base)}}
        return {"adapter": adapter, **set_fields(self, without=("folder", "base"))}


AnyModel = str | Path | Resource | Pretrained | Architecture | TorchHub | TensorflowCheckpoint | Adapter
"""A folder, the name of a model, or one of the sources above."""


@dataclass(frozen=True)
class Distillation:
    """Learn from a trained model as well as from the data: a smaller model that answers almost like a large one.

    `weight` is the teacher's part of the loss, over 0 to 1 [0.5]; `temperature` [2] makes its probabilities softer.
    """

    teacher: AnyModel
    temperature: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class TrainedTokenizer:
    """A tokenizer trained on the training data."""

    algorithm: Algorithm | None = None
    vocab_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"train": set_fields(self)}


def set_fields(spec: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a dataclass that are not None, nested ones in their own form."""
    values = {}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.name not in without and value is not None:
            values[item.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return set_fields(value)
    if isinstance(value, Path) or _is_resource(value):
        return _text_of(value)
    return list(value) if isinstance(value, tuple) else value


def _text_of(source: str | Path | Resource) -> str:
    return source.name if _is_resource(source) else str(source)


def _is_resource(value: Any) -> TypeGuard[Resource]:
    # A path has a `name` too, and so have open files.
    name = getattr(value, "name", None)
    return not isinstance(value, str | Path) and isinstance(name, str) and name.startswith("projects/")
