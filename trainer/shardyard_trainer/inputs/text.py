"""Texts: from strings to token ids and tensors, by the same code in training and in answering.

Shape suffixes: B texts, T positions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.packed import causal_frame
from shardyard_trainer.inputs.tokenization import encode, encoding_fault, prepare, token_places
from shardyard_trainer.inputs.vocabularies import (
    build_tokenizer,
    encoding_raises,
    num_ids,
    too_many_ids,
    too_many_types,
)
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import Folder
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.fresh import SPECIAL_ROLES, check_token_ids, fit_config
from shardyard_trainer.models.generation import end_tokens
from shardyard_trainer.models.sentence import lower_case
from shardyard_trainer.models.sources import ModelChoice


@dataclass(frozen=True)
class EncodedText:
    """One text, or pair of texts, as token ids; `type_ids` distinguish the texts of a pair."""

    ids: list[int]
    type_ids: list[int]

    @property
    def num_positions(self) -> int:
        """The number of tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class TextInputs:
    """A tokenizer without padding or truncation of its own; `length` is the longest text in tokens."""

    tokenizer: Any
    length: int | None = None
    files: ClassVar[tuple[str, ...]] = ("tokenizer.json", "tokenizer_config.json")

    @classmethod
    def load(cls, source: Folder, described: ModelFolder) -> Self:
        """Loads the tokenizer of a model folder, as its authors use it. Raises FolderInvalid."""
        tokenizer = prepare(build_tokenizer(source))
        if described.sentence is not None and described.sentence.lower_case:
            lower_case(tokenizer)
        return cls(tokenizer)

    @staticmethod
    def refusal(config: Any) -> str:
        """Why a model of this configuration cannot read texts; empty if it can."""
        return architectures.refusal(config)

    def save(self, folder: Path, config: Any) -> None:
        """Writes the tokenizer's files into the folder."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.model_max_length = architectures.longest(config) or self.length
        names = list(tokenizer.model_input_names)
        if architectures.has_token_types(config) and "token_type_ids" not in names:
            # Else plain transformers would leave out what parts a pair of texts: the model was trained with it.
            tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = [*names, "token_type_ids"]
        tokenizer.save_pretrained(folder)

    def generation(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The given settings, with all tokens that end a text."""
        ends = end_tokens(config, settings, self.tokenizer)
        roles = {f"{role}_token_id": getattr(self.tokenizer, f"{role}_token_id") for role in ("bos", "pad")}
        found = {name: value for name, value in roles.items() if value is not None} | dict(settings)
        if ends:
            found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        return found

    def encode(
        self, texts: Sequence[tuple[str, str | None]], max_length: int, *, keeps_pairs: bool = False
    ) -> list[EncodedText]:
        """Texts and pairs as tokens; none is empty. Raises SpecError if the tokenizer fails on one.

        `keeps_pairs`: of a pair only the first text is cut, which has to be enough.
        """
        encoded: list[EncodedText | None] = [None] * len(texts)
        for paired in (False, True):
            indices = [index for index, (_, pair) in enumerate(texts) if (pair is not None) == paired]
            if not indices:
                continue
            pairs = [texts[index][1] or "" for index in indices] if paired else None
            firsts = [texts[index][0] for index in indices]
            found = encode(self.tokenizer, firsts, pairs, max_length, keeps_pairs=keeps_pairs)
            for index, row, kinds in zip(indices, found.ids, found.types, strict=True):
                encoded[index] = EncodedText(row, kinds)
        return [each for each in encoded if each is not None]

    def places(self, text: str, pair: str | None, max_length: int) -> list[tuple[int, int, int] | None]:
        """Where the tokens of a text or pair are in it, as `tokenization.token_places`. Raises SpecError."""
        return token_places(self.tokenizer, text, pair, max_length)

    def encode_prompts(self, texts: Sequence[str]) -> list[EncodedText]:
        """Encodes prompts: after the token that begins a document in training, and without an end token."""
        before = list(causal_frame(self.tokenizer).before)
        with encoding_raises(encoding_fault):
            found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # A model without a begin token still needs one token to continue from.
        prompts = [before + list(ids) or [self.tokenizer.pad_token_id or 0] for ids in found]
        return [EncodedText(prompt, [0] * len(prompt)) for prompt in prompts]

    def tensors(self, model: Any, encoded: Sequence[EncodedText]) -> dict[str, torch.Tensor]:
        """The inputs of a model: ids_BT, mask_BT, and type ids if the model has them; padded on the right."""
        longest = max(len(each.ids) for each in encoded)
        padding = self.tokenizer.pad_token_id or 0  # The mask hides these positions, so their value does not matter.
        inputs = {
            "input_ids": torch.tensor([each.ids + [padding] * (longest - len(each.ids)) for each in encoded]),
            "attention_mask": torch.tensor([[1] * len(each.ids) + [0] * (longest - len(each.ids)) for each in encoded]),
        }
        if architectures.has_token_types(model.config):
            types = [each.type_ids + [0] * (longest - len(each.ids)) for each in encoded]
            inputs["token_type_ids"] = torch.tensor(types)
        device = next(model.parameters()).device
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def adapt(choice: ModelChoice, tokenizer: Any, length: int) -> ModelChoice:
    """Fits a fresh model's configuration to its tokenizer and the longest sequence; checks that of a given model.

    Raises SpecError for a tokenizer that the model has no embeddings for.
    """
    config, size = choice.config, num_ids(tokenizer)
    if complaint := too_many_types(tokenizer, getattr(config, "type_vocab_size", None)):
        raise SpecError("spec.tokenizer", "MODEL_INVALID", complaint)
    if not choice.is_fresh:
        if complaint := too_many_ids(tokenizer, config.vocab_size):
            raise SpecError("spec.tokenizer", "MODEL_INVALID", complaint)
        return choice
    place = f"{choice.field}.overrides"
    wanted = choice.overrides.get("vocab_size", size)
    if wanted < size:
        raise SpecError(
            f"{place}.vocab_size",
            "SPEC_INVALID",
            f"{wanted:,} is less than the tokenizer's {size:,}; leave it out",
        )
    check_token_ids(choice.overrides, wanted, place)
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_ROLES}
    fit_config(config, choice.overrides, vocab_size=wanted, special=special, length=length, field=choice.field)
    return replace(choice, config=config)


def check_length(choice: ModelChoice, length: int, *, field: str) -> None:
    """Raises SpecError if the model cannot address this many tokens."""
    most = architectures.longest(choice.config)
    if most is not None and length > most:
        raise SpecError(
            field, "SPEC_INVALID", f"{length:,} is more than the {most:,} tokens that the model can address"
        )
