"""Modules of PyTorch Hub in the form of transformers' models: a configuration that says how to make one, and a model.

A configuration names the function and its arguments; the code is beside the weights, in the folder `torch_hub`. What
the function returns is called as it is. In a module for pictures, the layer that gives the classes is held by the model
beside it, so that it can be replaced, trained and frozen as the head of any other model; in files its tensors have the
names that the module itself gives them. A module that gives vectors, of pictures or
of tokens, gets a head beside it. Registered with transformers' auto classes by importing this module.

Shape suffixes: B samples, T positions, D width, C classes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)

from shardyard_trainer.models.door import CODE, Folder, FolderInvalid
from shardyard_trainer.models.folder import (
    OWN_HEAD,
    TORCH_HUB_PICTURE_VECTORS,
    TORCH_HUB_PICTURES,
    TORCH_HUB_TEXTS,
    check_may_run,
)
from shardyard_trainer.models.hub_code import run_entrypoint
from shardyard_trainer.models.hub_heads import HEADS, HeldElsewhere, names_of, num_outputs, put, with_outputs

_WITH_HEAD = (("head.", OWN_HEAD), ("model.network.", ""))
_IN_MEMORY = ("_code", "use_cache")


class TorchHubConfig(PreTrainedConfig):  # type: ignore[misc]
    """How a module is made: the repository and its revision, the function of its `hubconf.py`, and its arguments.

    `is_compiled` and `was_frozen` are those of `hub_code.Made`; `has_cache` says that files which the code reads out of
    torch's cache are beside it.
    """

    repo: str = ""
    revision: str = ""
    entrypoint: str = ""
    arguments: dict[str, Any] | None = None
    num_hidden_layers: int = 1
    is_compiled: bool = False
    was_frozen: bool = False
    has_cache: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The settings that are saved: where the code is belongs to this process."""
        return {name: value for name, value in super().to_dict().items() if name not in _IN_MEMORY}


class TorchHubPicturesConfig(TorchHubConfig):
    """Of a module that gives logits [B, C] for pictures; `head` is the name of the layer that gives them.

    `head_kind` is the layer's class, one of `HEADS`.
    """

    model_type = TORCH_HUB_PICTURES
    head: str = ""
    head_kind: str = "Linear"
    num_channels: int = 3


class TorchHubPictureVectorsConfig(TorchHubConfig):
    """Of a module that gives a vector [B, D] for each picture."""

    model_type = TORCH_HUB_PICTURE_VECTORS
    hidden_size: int = 1
    num_channels: int = 3


class TorchHubTextsConfig(TorchHubConfig):
    """Of a module that gives vectors [B, T, D] for token ids.

    `mask` is its parameter for the attention mask, empty if it has none; `masks_padding` says that true marks padding
    in it, not tokens. `output` is the key or index of the vectors in what it returns; empty: it returns them alone.
    """

    model_type = TORCH_HUB_TEXTS
    vocab_size: int = 1
    hidden_size: int = 1
    max_position_embeddings: int | None = None
    pad_token_id: int | None = None
    mask: str = ""
    masks_padding: bool = False
    output: str = ""


class _HubModel(PreTrainedModel):  # type: ignore[misc]
    """Loading and saving of a module, whose tensors keep their own names in files."""

    config_class: Any = TorchHubConfig
    _supports_sdpa = True  # Its attention is its own code's, whatever the setting says.

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        """What names of tensors begin with here, and in files; the first that fits counts."""
        return ()

    def _other_names(self) -> dict[str, str]:
        """What further names of tensors begin with in files → what their first names begin with."""
        return {}

    @classmethod
    def from_pretrained(
        cls,
        _path: None,
        *,
        config: Any,
        state_dict: Mapping[str, Any],
        ignore_mismatched_sizes: bool = False,
        **_options: Any,
    ) -> tuple[Self, dict[str, Any]]:
        """A module with these tensors, and what of them was missing, not read, or of another shape."""
        with torch.device("cpu"):
            model = cls(config)
        own, others = model.state_dict(), model._other_names()
        given = {
            _exchanged(name, model._renamed(), at=1): tensor
            for name, tensor in state_dict.items()
            if not name.startswith(tuple(others))
        }
        fitting, mismatched = {}, []
        for name, tensor in own.items():
            if name not in given:
                continue
            if tuple(given[name].get_shape()) == tuple(tensor.shape):
                fitting[name] = given[name][...]
            else:
                mismatched.append((name, tuple(given[name].get_shape()), tuple(tensor.shape)))
        if mismatched and not ignore_mismatched_sizes:
            name, found, wanted = mismatched[0]
            raise RuntimeError(f"{name} of the weights has the shape {list(found)}, the module {list(wanted)}")
        model.load_state_dict(fitting, strict=False)
        return model, {
            "missing_keys": [name for name in own if name not in given],
            "unexpected_keys": [name for name in given if name not in own],
            "mismatched_keys": mismatched,
        }

    def save_pretrained(self, folder: Path, **_options: Any) -> None:
        """Writes config.json, the tensors by the module's own names, and the code beside them."""
        values = {**self.config.to_dict(), "architectures": [type(self).__name__], "dtype": "float32"}
        text = json.dumps(values, indent=2, sort_keys=True)
        (Path(folder) / "config.json").write_text(text + "\n", encoding="utf-8")
        tensors = {_exchanged(name, self._renamed(), at=0): tensor for name, tensor in self.state_dict().items()}
        for other, first in self._other_names().items():
            again = {name: tensor for name, tensor in tensors.items() if name.startswith(first)}
            tensors |= {f"{other}{name.removeprefix(first)}": tensor for name, tensor in again.items()}
        # Tensors that share memory are written apart: they are equal, and the module shares them again.
        apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file(apart, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        if self.config._code != Path(folder) / CODE:
            shutil.copytree(self.config._code, Path(folder) / CODE)

    def get_output_embeddings(self) -> None:
        """None: it writes no texts."""

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the module's own code has drawn its weights."""


class TorchHubForImageClassification(_HubModel):
    """A module that gives logits for pictures."""

    config_class = TorchHubPicturesConfig
    base_model_prefix = "network"
    main_input_name = "pixel_values"

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        super().__init__(config)
        self.network = network if network is not None else make_network(config)
        last = self.network.get_submodule(config.head)
        assert isinstance(last, HEADS)
        self._names = names_of(self.network, last)
        if num_outputs(last) != config.num_labels:
            last = with_outputs(last, config.num_labels)
        self.head = last.requires_grad_(True)
        put(self.network, self._names, HeldElsewhere(last))

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> ImageClassifierOutput:
        """Logits [B, C]."""
        return ImageClassifierOutput(logits=logits_in(self.network(pixel_values)))

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return ("head.", f"{self.config.head}."), ("network.", "")

    def _other_names(self) -> dict[str, str]:
        return {f"{name}.": f"{self.config.head}." for name in self._names if name != self.config.head}


class TorchHubPictureVectors(_HubModel):
    """A module that gives a vector for each picture."""

    config_class = TorchHubPictureVectorsConfig
    base_model_prefix = "model"  # As in `TorchHubModel`.
    main_input_name = "pixel_values"

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        super().__init__(config)
        self.network = network if network is not None else make_network(config)

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> BaseModelOutputWithPooling:
        """Vectors [B, D], which are also those of the only place [B, 1, D]."""
        vectors_BD = self.network(pixel_values)
        return BaseModelOutputWithPooling(last_hidden_state=vectors_BD[:, None], pooler_output=vectors_BD)

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return (("network.", ""),)


class TorchHubVectorsForImageClassification(_HubModel):
    """The same with a linear layer of this service that gives logits."""

    config_class = TorchHubPictureVectorsConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TorchHubPictureVectors(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, pixel_values: torch.Tensor, **_options: Any) -> ImageClassifierOutput:
        """Logits [B, C]."""
        return ImageClassifierOutput(logits=self.head(self.model(pixel_values).pooler_output))

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return _WITH_HEAD


class TorchHubModel(_HubModel):
    """A module that gives a vector for each token."""

    config_class = TorchHubTextsConfig
    base_model_prefix = "model"  # There is none inside: the model itself gives the vectors.

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        super().__init__(config)
        self.network = network if network is not None else make_network(config)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_options: Any
    ) -> BaseModelOutput:
        """Vectors [B, T, D]. `attention_mask` is 1 for tokens and 0 for padding."""
        masks: dict[str, torch.Tensor] = {}
        if attention_mask is not None and self.config.mask:
            masks[self.config.mask] = attention_mask == 0 if self.config.masks_padding else attention_mask
        return BaseModelOutput(last_hidden_state=part_of(self.network(input_ids, **masks), self.config.output))

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return (("network.", ""),)


class TorchHubForTokenClassification(_HubModel):
    """A module that gives a vector for each token, and a linear layer of this service that gives its logits."""

    config_class = TorchHubTextsConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TorchHubModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> TokenClassifierOutput:
        """Logits [B, T, C]."""
        return TokenClassifierOutput(logits=self.head(self.model(input_ids, **inputs).last_hidden_state))

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return _WITH_HEAD


class TorchHubForQuestionAnswering(_HubModel):
    """The same with two outputs: where an answer starts, and where it ends."""

    config_class = TorchHubTextsConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = TorchHubModel(config)
        self.head = nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> QuestionAnsweringModelOutput:
        """Logits [B, T] of the start and of the end."""
        start_BT, end_BT = self.head(self.model(input_ids, **inputs).last_hidden_state).unbind(-1)
        return QuestionAnsweringModelOutput(start_logits=start_BT, end_logits=end_BT)

    def _renamed(self) -> tuple[tuple[str, str], ...]:
        return _WITH_HEAD


def _exchanged(name: str, renamed: tuple[tuple[str, str], ...], *, at: int) -> str:
    """A name with the other beginning of a pair than the one at 0 (here) or 1 (in files) that it has."""
    pair = next((pair for pair in renamed if name.startswith(pair[at])), ("", ""))
    return pair[1 - at] + name.removeprefix(pair[at])


def make_network(config: Any) -> nn.Module:
    """The module of a configuration, on the meta device if that is the current one. Raises FolderInvalid."""
    code = getattr(config, "_code", None)
    if code is None:
        raise FolderInvalid("the model's code is not beside it", reason="CUSTOM_CODE_REFUSED", file="config.json")
    network = run_entrypoint(code, config.entrypoint, config.arguments or {}).module
    return _without_memory(network) if torch.empty(0).is_meta else network


def allow_code(config: Any, folder: Folder, values: Mapping[str, Any]) -> None:
    """Tells a configuration where its code is. Raises FolderInvalid if the code of this folder may not run."""
    check_may_run(folder, values)
    config._code = folder.path / CODE


def logits_in(found: Any) -> Any:
    """The logits in what a module returns: all of it, or its `logits`, `out`, or first part."""
    if isinstance(found, Mapping):
        return next((found[name] for name in ("logits", "out") if name in found), None)
    if not isinstance(found, torch.Tensor) and hasattr(found, "logits"):
        return found.logits
    return found[0] if isinstance(found, tuple | list) and found else found


def part_of(found: Any, output: str) -> Any:
    """The part of what a module returns that a key or an index names; empty: all of it."""
    if not output:
        return found
    return found[int(output)] if output.isdigit() else found[output]


def _without_memory(network: nn.Module) -> nn.Module:
    """Moves tensors to the meta device; those that are shared stay shared, so that they are counted once."""
    moved: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def move(tables: dict[str, Any], make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for name, tensor in tables.items():
            if tensor is not None:
                # The tensor is kept beside its copy: the id of one that is gone would be another's.
                _, tables[name] = moved.setdefault(id(tensor), (tensor, make(tensor)))

    for module in network.modules():
        move(module._parameters, lambda tensor: nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad))
        move(module._buffers, lambda tensor: tensor.to("meta"))
    return network


for _config, _model in (
    (TorchHubPicturesConfig, TorchHubForImageClassification),
    (TorchHubPictureVectorsConfig, TorchHubPictureVectors),
    (TorchHubTextsConfig, TorchHubModel),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _model)
AutoModelForImageClassification.register(TorchHubPicturesConfig, TorchHubForImageClassification)
AutoModelForImageClassification.register(TorchHubPictureVectorsConfig, TorchHubVectorsForImageClassification)
AutoModelForTokenClassification.register(TorchHubTextsConfig, TorchHubForTokenClassification)
AutoModelForQuestionAnswering.register(TorchHubTextsConfig, TorchHubForQuestionAnswering)
