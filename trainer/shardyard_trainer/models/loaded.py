"""A model folder, loaded to be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel  # Its import takes seconds: a process is warm only once it has it.

from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.folder import ModelFolder
from shardyard_trainer.models.generation import generation_settings
from shardyard_trainer.models.loading import LOADING_ERRORS, prepare_config, quiet
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.weight_heads import auto_class
from shardyard_trainer.models.weight_report import judge
from shardyard_trainer.models.weights import load_pretrained, read_tensors
from shardyard_trainer.plain_words import in_plain_words


@dataclass(frozen=True)
class Loaded:
    """A model in memory, fp32 on the CPU, without gradients.

    `model` is an `AutoModelFor…` if transformers has the task's head, else the backbone; `head` [C, D] is then applied
    to what `folder.pooling` makes of the last hidden state. `longest` is how many tokens the model can address;
    `strangers` are tensors of the folder that the model has no place for; `generation` is generation_config.json.
    """

    folder: ModelFolder
    model: PreTrainedModel
    head: nn.Linear | None
    longest: int | None
    size_bytes: int
    strangers: tuple[str, ...]
    generation: Mapping[str, Any]

    @property
    def backbone(self) -> nn.Module:
        """The part that gives `last_hidden_state`: of an encoder-decoder the encoder."""
        is_both = architectures.is_seq2seq(self.model.config)
        backbone: nn.Module = self.model.get_encoder() if is_both else architectures.backbone_of(self.model)
        return backbone

    @property
    def width(self) -> int:
        """Numbers in one token's vector."""
        return architectures.width(self.model.config)

    @property
    def num_outputs(self) -> int:
        """Outputs of the head that classifies."""
        return self.head.out_features if self.head is not None else int(self.model.config.num_labels)


def load_model(folder: ModelFolder, auto: str) -> Loaded:
    """Loads a folder by transformers' class `auto` (empty: the backbone), or with a head of our own if it has one.

    Raises FolderInvalid.
    """
    source = folder.source
    has_own_head = source.has("head.safetensors")
    model, lacking, strangers = _load_model(source, "" if has_own_head else auto)
    if lacking:
        raise FolderInvalid(f"the weights lack {lacking[0]!r}, which would be drawn at random", tensor=lacking[0])
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    return Loaded(
        folder=folder,
        model=model,
        head=_read_head(source) if has_own_head else None,
        longest=architectures.longest(model.config),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        strangers=tuple(strangers),
        generation=generation_settings(source),
    )


def _load_model(source: Folder, auto: str) -> tuple[Any, list[str], list[str]]:
    """The model by transformers, the names of weights that the folder lacks (a missing pooler is left out), and of
    those that it has too many.
    """
    try:
        with quiet():
            model, info = load_pretrained(auto_class(auto), source, prepare_config(model_config(source)))
        report = judge(model, info)
    except LOADING_ERRORS as error:
        if isinstance(error, FolderInvalid):
            raise
        raise FolderInvalid(f"the model does not load: {in_plain_words(error)}") from None
    if any("pooler" in name for name in info["missing_keys"]):
        model.base_model.pooler = None
    return model, list(report.lacking), sorted(info["unexpected_keys"])


def _read_head(source: Folder) -> nn.Linear:
    """The head of a folder whose architecture transformers has no head for."""
    try:
        tensors = read_tensors(source, "head.safetensors")
        head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
        head.load_state_dict(tensors)
    except LOADING_ERRORS as error:
        raise FolderInvalid(f"the head does not load: {in_plain_words(error)}", file="head.safetensors") from None
    return head.eval().requires_grad_(False)
