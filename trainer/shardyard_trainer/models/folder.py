"""What a Hugging Face folder says it is: `config.json`, and beside it `shardyard.json` if it was trained here.

Nothing is loaded and no code of the folder is run.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.bounds import too_large
from shardyard_trainer.models.door import CODE, Folder, FolderInvalid
from shardyard_trainer.models.other_formats import other_than_folder
from shardyard_trainer.models.sentence import SentenceSettings, read_sentence

TORCH_HUB_PICTURES = "torch_hub_pictures"
TORCH_HUB_PICTURE_VECTORS = "torch_hub_picture_vectors"
TORCH_HUB_TEXTS = "torch_hub_texts"
TORCH_HUB_TYPES = (TORCH_HUB_PICTURES, TORCH_HUB_PICTURE_VECTORS, TORCH_HUB_TEXTS)
"""Model types of folders whose model is made by code in them, from a repository of PyTorch Hub."""

OWN_HEAD = "shardyard_head."
"""The beginning of the names of a head's tensors in such a folder, if the head is not the module's own."""

_HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForMaskedLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForQuestionAnsweringSimple": "AutoModelForQuestionAnswering",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
}
"""Transformers' class for a head, by how the class that saved the folder ends."""

OWN_TYPES: Mapping[str, str] = {
    name: f"shardyard_trainer.models.{name}" for name in ("garden_resnet", "garden_transformer")
}
"""Models that transformers does not have: their model types, and the modules that make and register them."""

_LABELLED = frozenset(
    {"AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForImageClassification"}
)
"""Classes whose outputs have names in config.json."""

_OF_PICTURES = "AutoModelForImageClassification"

_PROBLEMS = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder's own description.

    `auto` is transformers' class for its head, such as `AutoModelForMaskedLM`; empty for a bare backbone. `task` is
    what it was trained for here, else empty; `trained` is the content of shardyard.json.
    """

    source: Folder
    config: Mapping[str, Any]
    model_type: str
    auto: str
    task: str
    problem: str
    labels: tuple[str, ...]
    trained: Mapping[str, Any] = field(default_factory=dict)
    sentence: SentenceSettings | None = None
    reshaped: str = ""
    """Why a head that config.json names is not this folder's: both shapes. Empty: it is, or its weights lack it."""

    @property
    def max_length(self) -> int | None:
        """Tokens that texts were cut to in training."""
        return self.sentence.max_length if self.sentence else self.trained.get("max_length")

    @property
    def pooling(self) -> str:
        """`mean`, `cls`, `max`, `last`, or empty if the folder does not say."""
        return self.sentence.pooling if self.sentence else str(self.trained.get("pooling") or "")

    @property
    def normalize(self) -> bool:
        """Whether its authors scale pooled vectors to length 1."""
        return self.sentence.normalize if self.sentence is not None else self.trained.get("normalize") is True


def save_code(folder: Path, model_type: str) -> None:
    """Puts the code of a model that transformers does not have beside its weights, for others to load it with."""
    if home := OWN_TYPES.get(model_type):
        source = Path(str(importlib.import_module(home).__file__))
        (folder / source.name).write_bytes(source.read_bytes())


def read_folder(folder: Folder) -> ModelFolder:
    """Reads what the folder says. Raises FolderInvalid."""
    if "adapter_config.json" in folder.names():
        # Passed over, the model would be another one than its author means.
        raise FolderInvalid(
            "the folder has an adapter (adapter_config.json), not a whole model; give it as the `adapter` of a job's "
            "model, with the model that it was trained beside as `base`",
            file="adapter_config.json",
        )
    if not folder.has("config.json"):
        read_sentence(folder)  # It says where such a folder has its transformer.
    config = folder.read_object("config.json", what="" if folder.has("config.json") else other_than_folder(folder))
    refuse_code(folder, "config.json", config)
    if folder.has("tokenizer_config.json"):
        refuse_code(folder, "tokenizer_config.json", folder.read_object("tokenizer_config.json"))
    if "pretrained_cfg" in config and "model_type" not in config:
        raise FolderInvalid(
            "config.json is one of timm (pretrained_cfg), whose models are not read from a folder; use the same "
            "architecture as transformers has it, or a function of a hubconf.py that makes it (torch_hub)",
            file="config.json",
        )
    model_type = known_model_type(config.get("model_type"))
    if model_type in TORCH_HUB_TYPES:
        check_may_run(folder, config)
    if folder.has("shardyard.json"):
        return _trained_here(folder, config, model_type, folder.read_object("shardyard.json"))
    auto = _auto_of(config)
    labels = _labels_of(config) if auto in _LABELLED else ()
    if auto == _OF_PICTURES:
        labels = _told_apart(labels)
    _check_different(labels)
    problem = _problem_of(config, labels) if labels else ""
    return ModelFolder(folder, config, model_type, auto, "", problem, labels, sentence=read_sentence(folder))


def refuse_code(folder: Folder, name: str, values: Mapping[str, Any]) -> None:
    """Raises FolderInvalid CUSTOM_CODE_REFUSED for a file of settings that asks for Python code of its own folder."""
    if values.get("auto_map"):
        raise FolderInvalid(
            f"{name} has an auto_map: the model needs Python code from its own folder, which is never run; "
            "use a model whose architecture transformers has",
            reason="CUSTOM_CODE_REFUSED",
            file=name,
        )


def check_may_run(folder: Folder, config: Mapping[str, Any]) -> None:
    """Raises FolderInvalid CUSTOM_CODE_REFUSED for a folder whose model needs code of its own that may not run."""
    repo = config.get("repo")
    if not isinstance(repo, str) or repo not in folder.runs:
        raise FolderInvalid(
            f"the model needs the code in its folder {CODE}, from {shorten(str(repo))}, which may not run here: code "
            "runs only from a repository that the operator allows (--torch-hub-repo), named as the model (torch_hub) "
            "or in a model that was trained from it here, never from an upload or a data root",
            reason="CUSTOM_CODE_REFUSED",
            file="config.json",
        )


def _trained_here(
    folder: Folder, config: Mapping[str, Any], model_type: str, trained: Mapping[str, Any]
) -> ModelFolder:
    labels, length = trained.get("labels") or [], trained.get("max_length")
    problem, pooling = trained.get("problem") or "", trained.get("pooling") or ""
    rules = {
        "format": trained.get("format") == 1,
        "task": isinstance(trained.get("task"), str) and bool(trained["task"]),
        "labels": isinstance(labels, list) and all(isinstance(label, str) for label in labels),
        "problem": problem in ["", *_PROBLEMS.values()],
        "pooling": pooling in ["", "mean", "cls", "max", "last"],
        "max_length": length is None or (type(length) is int and length >= 1),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        value = str(trained.get(wrong[0]))[:100]
        raise FolderInvalid(
            f"shardyard.json has the {wrong[0]} {value!r}, which is not a known one; take the folder as exported",
            file="shardyard.json",
        )
    return ModelFolder(folder, config, model_type, _auto_of(config), trained["task"], problem, tuple(labels), trained)


def known_model_type(model_type: object) -> str:
    """The type if transformers has it. Raises FolderInvalid naming the nearest."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if isinstance(model_type, str) and model_type in {*CONFIG_MAPPING_NAMES, *OWN_TYPES, *TORCH_HUB_TYPES}:
        return model_type
    if model_type is None:
        raise FolderInvalid(
            'config.json has no model_type; add the name of its architecture, such as "bert", or save the model again '
            "with save_pretrained of transformers",
            file="config.json",
        )
    near = difflib.get_close_matches(str(model_type), CONFIG_MAPPING_NAMES, n=1)
    raise FolderInvalid(
        f"config.json names the model_type {str(model_type)[:100]!r}, which transformers does not have"
        + (f"; the nearest is {near[0]!r}" if near else ""),
        file="config.json",
    )


def _auto_of(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return ""
    return next((auto for ending, auto in _HEADS.items() if str(architectures[0]).endswith(ending)), "")


def _labels_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    names, number = config.get("id2label"), config.get("num_labels")
    if not isinstance(names, dict) or not names:
        if type(number) is int and (over := too_large({"num_labels": number})) is not None:
            raise FolderInvalid(f"config.json cannot be built: {over.message}", file="config.json")
        # transformers' own names; it has two of them if nothing says how many.
        return tuple(f"LABEL_{index}" for index in range(number if type(number) is int else 2))
    try:
        by_output = {int(key): str(name) for key, name in names.items()}
    except ValueError:
        raise FolderInvalid("config.json has an id2label whose keys are not numbers", file="config.json") from None
    labels = tuple(by_output[key] for key in sorted(by_output))
    if sorted(by_output) != list(range(len(names))):
        raise FolderInvalid(
            f"config.json has an id2label with the keys {shorten(', '.join(names))}; number the head's outputs from 0",
            file="config.json",
        )
    if type(number) is int and number != len(labels):
        raise FolderInvalid(
            f"config.json has num_labels {number}, but {len(labels)} names in id2label; correct one of them",
            file="config.json",
        )
    return labels


def _told_apart(labels: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a head for pictures, each a different one: ImageNet has a crane that flies and one that lifts."""
    known: set[str] = set()
    found = []
    for index, label in enumerate(labels):
        found.append(f"{label} ({index})" if label.casefold() in known else label)
        known.add(label.casefold())
    return tuple(found)


def _check_different(labels: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        if (other := seen.setdefault(label.casefold(), label)) is not label:
            how = "twice" if other == label else f"beside {other!r}, from which only its case differs"
            raise FolderInvalid(
                f"config.json has the label {shorten(label)!r} {how}; give each output a name of its own in id2label",
                file="config.json",
            )


def _problem_of(config: Mapping[str, Any], labels: tuple[str, ...]) -> str:
    named = config.get("problem_type")
    if named is not None and str(named) not in _PROBLEMS:
        raise FolderInvalid(
            f"config.json has problem_type: {shorten(str(named))!r}, which is not {', '.join(_PROBLEMS)}; correct it, "
            "or leave it out",
            file="config.json",
        )
    return _PROBLEMS.get(str(named)) or ("regression" if len(labels) == 1 else "single_label")
