"""Transformers' models, loaded without running code of their folders, and the errors that it ends in.

Whatever transformers raises for a folder or a configuration is the fault of that folder or configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from shardyard_trainer.data.errors import SpecError, nearest, shorten
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.weight_report import judge
from shardyard_trainer.models.weights import load_pretrained
from shardyard_trainer.plain_words import in_plain_words

if TYPE_CHECKING:
    from shardyard_trainer.models.sources import ModelChoice

LOADING_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    OSError,
    ImportError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
    SafetensorError,
)


FIXED_SETTINGS: Mapping[str, bool | int] = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,
}
"""Settings that only change what calls return and in how many parts they compute; this code needs these."""


def load(
    auto_class: Any,
    choice: ModelChoice,
    *,
    meta: bool,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A transformers model of the choice, and the names of its head's tensors that the weights lack.

    Raises SpecError MODEL_INVALID, also for whatever `weight_report` refuses.
    """
    config = prepare_config(copy.deepcopy(choice.config))
    own_names = _use_faster_gelu(config)
    try:
        if choice.folder is None or meta:
            model, info = auto_class.from_config(config, dtype=torch.float32, **options), None
            _separate(model, choice.separate)
        else:
            model, info = load_pretrained(auto_class, choice.folder, config, **options)
    except LOADING_ERRORS as error:
        raise SpecError(
            choice.field, "MODEL_INVALID", f"the model does not load: {what_failed(error, config)[1]}"
        ) from error
    for name in own_names:
        setattr(model.config, name, "gelu_new")
    # Keys and values are kept only for generation, which asks for it; the export has the setting again.
    model.config.use_cache = False
    if info is None:
        return model, []
    try:
        report = judge(model, info)
    except FolderInvalid as error:
        raise SpecError(choice.field, error.reason, str(error), error.metadata) from None
    _check_finite(model, choice)
    return model, list(report.lacking)


def prepare_config(config: Any) -> Any:
    """The configuration with the settings that this code needs, and the attention that packing was tested with."""
    for name, value in FIXED_SETTINGS.items():
        setattr(config, name, value)
    # Eager attention would add a boolean mask as a number: transformers takes sdpa for every class that has it.
    config._attn_implementation = None
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers and its progress bars: the task's warnings say what matters."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def number_parameter(model: Any) -> torch.Tensor:
    """The first parameter of numbers: its device and type are those that a model computes with.

    Before it may be tables of whole numbers, such as an order of channels.
    """
    found: torch.Tensor = next(each for each in model.parameters() if each.is_floating_point())
    return found


def ensure_pad_id(model: Any, tokenizer: Any) -> None:
    """Gives a model that knows no padding token the tokenizer's."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def what_failed(error: BaseException, config: Any) -> tuple[str, str]:
    """The setting whose value transformers does not know (empty: another error), and the message about it."""
    if "Padding_idx must be within" in str(error):
        return "pad_token_id", (
            f"pad_token_id is {config.pad_token_id:,}, which is not an id of the {config.vocab_size:,} of vocab_size; "
            "correct it, or leave it out"
        )
    value = error.args[0] if isinstance(error, KeyError) and error.args else None
    if not isinstance(value, str):
        return "", in_plain_words(error)
    name = next((name for name, known in config.to_dict().items() if known == value), "")
    hint = nearest(value, ACT2FN) or "; it has gelu, relu, silu and others" if "act" in name else ""
    return name, f"transformers has no {name or 'value'} {shorten(value)!r}{hint}"


def _check_finite(model: Any, choice: ModelChoice) -> None:
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise SpecError(
                choice.field, "MODEL_INVALID", f"the tensor {name} has values that are not finite", {"tensor": name}
            )


def _separate(model: Any, names: Sequence[str]) -> None:
    """Gives weights that a new model ties parameters of their own, as the choice's folder has them."""
    for name in names:
        place, _, last = name.rpartition(".")
        own = torch.empty_like(model.get_parameter(name))
        setattr(model.get_submodule(place), last, torch.nn.Parameter(own))


def _use_faster_gelu(config: Any) -> list[str]:
    """Computes the tanh approximation of GELU by one kernel instead of seven: the same formula by another name.

    Returns the settings that are to have their own name again in what is exported.
    """
    names = [name for name in ("activation_function", "hidden_act") if getattr(config, name, None) == "gelu_new"]
    for name in names:
        setattr(config, name, "gelu_pytorch_tanh")
    return names
