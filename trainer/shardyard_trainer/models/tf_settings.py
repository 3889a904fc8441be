"""The settings that lie beside a TensorFlow checkpoint: `bert_config.json`, or `params.yaml` of Model Garden."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import MAX_CONFIG_BYTES, Folder, FolderInvalid

BERT = "bert_config.json"
PARAMS = "params.yaml"
FILES = (BERT, PARAMS)

_OF_OTHERS = frozenset({"tokenizer_config.json", "generation_config.json"})
_OF_GARDEN = {
    "num_layers": "num_hidden_layers",
    "hidden_activation": "hidden_act",
    "dropout_rate": "hidden_dropout_prob",
    "attention_dropout_rate": "attention_probs_dropout_prob",
    **{
        name: name
        for name in (
            *("hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings", "vocab_size"),
            *("type_vocab_size", "initializer_range"),
        )
    },
}
"""Settings of an encoder in params.yaml, and what bert_config.json calls them."""


@dataclass(frozen=True)
class Settings:
    """What a file says, and its name; without a file there are no values, and the name is the one to ask for.

    `others` are JSON files that lie there in its place.
    """

    file: str
    values: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def inner(self, name: str) -> Settings:
        """The settings inside of one; none if it has none."""
        return Settings(self.file, _inner(self.values.get(name)))

    def count(self, name: str) -> int | None:
        """A setting that is a count; None if it is not there. Raises FolderInvalid for another value."""
        value = self.values.get(name)
        if value is None:
            return None
        if type(value) is not int or value < 1:
            raise self.wrong(name, "is not a whole number over 0")
        return value

    def number(self, name: str, default: float) -> float:
        """A setting that is a number. Raises FolderInvalid for another value."""
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "is not a number")
        return float(value)

    def word(self, name: str, default: str, known: Mapping[str, str]) -> str:
        """What `known` makes of a setting that is a word. Raises FolderInvalid for another one."""
        value = self.values.get(name, default)
        if not isinstance(value, str) or value.lower() not in known:
            raise self.wrong(name, f"is not one of {', '.join(known)}")
        return known[value.lower()]

    def check_same(self, found: Mapping[str, int]) -> None:
        """Raises FolderInvalid for a count that is not the one that the checkpoint's shapes have."""
        for name, of_shapes in found.items():
            said = self.count(name)
            if said is not None and said != of_shapes:
                raise self.wrong(
                    name, f"is not {of_shapes:,}, as the tensors have; put the {self.file} of this checkpoint beside it"
                )

    def wrong(self, name: str, what: str) -> FolderInvalid:
        """The error of a setting's value."""
        return FolderInvalid(
            f"{self.file} has {name}: {shorten(str(self.values.get(name)))!r}, which {what}", file=self.file
        )


def bert_settings(folder: Folder) -> Settings:
    """Of a BERT, by the names of bert_config.json: from that file, else from params.yaml. Raises FolderInvalid."""
    if folder.has(BERT):
        return Settings(BERT, folder.read_object(BERT))
    model = garden_settings(folder).values
    encoder = _inner(model.get("encoder"))
    own = next((_inner(encoder.get(name)) for name in ("bert", "bert_v2") if name in encoder), {})
    if own.get("norm_first"):
        raise FolderInvalid(
            f"{PARAMS} has norm_first: true, but the encoder of BERT in transformers normalises afterwards; it cannot "
            "be converted",
            file=PARAMS,
        )
    values = {name: own[key] for key, name in _OF_GARDEN.items() if key in own}
    if "mlm_activation" in model:
        values["mlm_activation"] = model["mlm_activation"]
    others = [name for name in folder.names() if name.endswith("config.json") or re.match(r"bert.*\.json$", name)]
    others = sorted(name for name in others if "/" not in name and name not in _OF_OTHERS)
    return Settings(PARAMS if values else BERT, values, tuple(others))


def garden_settings(folder: Folder) -> Settings:
    """`task.model` of Model Garden's params.yaml; empty if there is none. Raises FolderInvalid."""
    if not folder.has(PARAMS):
        return Settings(PARAMS)
    text = folder.read_text(PARAMS, most_bytes=MAX_CONFIG_BYTES)
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise FolderInvalid(
            f"{PARAMS} is not YAML of plain values; take the file that Model Garden wrote", file=PARAMS
        ) from None
    return Settings(PARAMS, _inner(_inner(_inner(value).get("task")).get("model")))


def _inner(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
