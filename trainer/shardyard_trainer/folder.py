"""What a Hugging Face folder says it is: `config.json`, and beside it `shardyard.json` where it was trained here.

Nothing is loaded and no code of the folder is run.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 4 * 1024 * 1024

_TASKS = {
    "ForSequenceClassification": "text_classification",
    "ForMaskedLM": "masked_lm",
    "ForPreTraining": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}
_PROBLEMS = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


class FolderInvalid(ValueError):
    """A folder is not a model that loads; `reason` is one of the contract's, `metadata` names file or tensor."""

    def __init__(self, message: str, *, reason: str = "MODEL_INVALID", **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.metadata = {key: value[:400] for key, value in metadata.items() if value}


@dataclass(frozen=True)
class ModelFolder:
    """A folder's own description. `task` is empty for a bare backbone; `trained` is the content of shardyard.json."""

    path: Path
    config: Mapping[str, Any]
    model_type: str
    task: str
    problem: str
    labels: tuple[str, ...]
    trained: Mapping[str, Any] = field(default_factory=dict)

    @property
    def max_length(self) -> int | None:
        """Tokens that texts were cut to in training."""
        return self.trained.get("max_length")

    @property
    def pooling(self) -> str:
        """`mean`, `cls`, `last`, or empty where nothing says so."""
        return str(self.trained.get("pooling") or "")


def read_folder(path: Path) -> ModelFolder:
    """Reads what the folder says. Raises FolderInvalid."""
    config = read_json(path / "config.json", what="a Hugging Face model folder has one")
    for name in ("config.json", "tokenizer_config.json"):
        if (path / name).is_file() and "auto_map" in read_json(path / name):
            raise FolderInvalid(
                f"{name} has an auto_map: the model needs Python code from its own folder, which is never run; "
                "use a model whose architecture transformers has",
                reason="CUSTOM_CODE_REFUSED",
                file=name,
            )
    model_type = known_model_type(config.get("model_type"))
    if (path / "shardyard.json").is_file():
        return _trained_here(path, config, model_type, read_json(path / "shardyard.json"))
    task = _task_of(config)
    labels = _labels_of(config) if task == "text_classification" else ()
    return ModelFolder(path, config, model_type, task, _problem_of(config, labels) if labels else "", labels)


def _trained_here(path: Path, config: Mapping[str, Any], model_type: str, trained: Mapping[str, Any]) -> ModelFolder:
    labels, length = trained.get("labels") or [], trained.get("max_length")
    problem, pooling = trained.get("problem") or "", trained.get("pooling") or ""
    rules = {
        "format": trained.get("format") == 1,
        "task": trained.get("task") in set(_TASKS.values()),
        "labels": isinstance(labels, list) and all(isinstance(label, str) for label in labels),
        "problem": problem in {"", *_PROBLEMS.values()},
        "pooling": pooling in {"", "mean", "cls", "last"},
        "max_length": length is None or (type(length) is int and length >= 1),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        value = str(trained.get(wrong[0]))[:100]
        raise FolderInvalid(f"shardyard.json has a {wrong[0]} that is none: {value!r}", file="shardyard.json")
    return ModelFolder(path, config, model_type, trained["task"], problem, tuple(labels), trained)


def read_json(path: Path, *, what: str = "") -> dict[str, Any]:
    """A JSON object from a regular file of bounded size. Raises FolderInvalid."""
    if not path.is_file():
        raise FolderInvalid(f"the folder has no {path.name}" + (f"; {what}" if what else ""), file=path.name)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise FolderInvalid(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes", file=path.name)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FolderInvalid(f"{path.name} is not JSON: {str(error)[:200]}", file=path.name) from error
    if not isinstance(value, dict):
        raise FolderInvalid(f"{path.name} is not a JSON object", file=path.name)
    return value


def known_model_type(model_type: object) -> str:
    """The type if transformers has it. Raises FolderInvalid naming the nearest."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        return model_type
    near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=1)
    raise FolderInvalid(
        f"config.json names the model_type {str(model_type)[:100]!r}, which transformers does not have"
        + (f"; the nearest is {near[0]!r}" if near else ""),
        file="config.json",
    )


def signature(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Changes whenever a file of the folder does: (name, inode, size, mtime) of each, sorted."""
    found = []
    for directory, _, names in os.walk(path):
        for name in names:
            full = Path(directory, name)
            stat = full.lstat()
            found.append((str(full.relative_to(path)), stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(sorted(found))


def _task_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return ""
    return next((task for ending, task in _TASKS.items() if str(architectures[0]).endswith(ending)), "")


def _labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if not isinstance(names, dict):
        return ("LABEL_0", "LABEL_1")  # transformers' own default
    try:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    except ValueError as error:
        raise FolderInvalid("config.json has an id2label whose keys are not numbers", file="config.json") from error


def _problem_of(config: Mapping[str, Any], labels: tuple[str, ...]) -> str:
    named = _PROBLEMS.get(str(config.get("problem_type")))
    return named or ("regression" if len(labels) == 1 else "single_label")
