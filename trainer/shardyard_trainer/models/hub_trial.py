"""Tries a module on made-up pictures and token ids, to find what it reads and what it gives.

Shape suffixes: B samples, T positions, D width, C classes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.hub_code import HUBCONF, HubCodeFailed
from shardyard_trainer.models.hub_modules import logits_in, part_of
from shardyard_trainer.reading import reading

_SIDES = (224, 32, 28, 64, 96, 299)
"""Sides of pictures that are tried in turn if the repository has no preprocessor_config.json."""

_LARGEST_SIDE = 1024

PICTURE_SETTINGS = "preprocessor_config.json"
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_GREY = {"image_mean": [0.5], "image_std": [0.5]}

_LENGTHS = (8, 512, 1024, 2048)
_SAME = 1e-4
"""How far vectors of a text may be from those of the same text beside a longer one."""


class Pictures(NamedTuple):
    """A module that gives logits for pictures: the layer that gives them, how many, and what it takes."""

    head: str
    num_classes: int
    channels: int
    size: tuple[int, int]

    def settings(self) -> dict[str, Any]:
        """The preprocessor_config.json of a repository without one: the whole picture, with ImageNet's mean."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": dict(zip(("height", "width"), self.size, strict=True)),
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **(_IMAGENET if self.channels == 3 else _GREY),
        }


class Texts(NamedTuple):
    """A module that gives vectors for token ids; the fields are those of `hub_modules.TorchHubTextsConfig`."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int | None
    mask: str
    masks_padding: bool
    output: str


class _DoesNotFit(Exception):
    """Why a module is not one of this kind."""


@torch.no_grad()
def try_module(module: nn.Module, code: Path, entrypoint: str) -> Pictures | Texts:
    """What a module reads and gives. Raises HubCodeFailed for one that no task can use."""
    reading(f"what {entrypoint} of {HUBCONF} returns")
    complaints = []
    attempts: tuple[tuple[str, Callable[[], Pictures | Texts]], ...] = (
        ("pictures", lambda: _pictures(module, code)),
        ("token ids", lambda: _texts(module)),
    )
    for kind, attempt in attempts:
        try:
            return attempt()
        except _DoesNotFit as error:
            complaints.append(f"for {kind} {error}")
    raise HubCodeFailed(
        f"{entrypoint} of {HUBCONF} returns a {type(module).__name__} that gives neither logits [B, C] for pictures "
        f"nor vectors [B, T, D] for token ids: {'; '.join(complaints)}; return a module that does",
        part="entrypoint",
        file=HUBCONF,
    )


def _pictures(module: nn.Module, code: Path) -> Pictures:
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None and first.in_channels in (1, 3) else 3
    own = _given_size(code)
    complaints = []
    for size in [own] if own is not None else [(side, side) for side in _SIDES]:
        seen = torch.rand(2, channels, *size, generator=torch.Generator().manual_seed(0))
        try:
            head, num_classes = _head_of(module, seen)
        except _DoesNotFit as error:
            complaints.append(str(error))
        else:
            return Pictures(head, num_classes, channels, size)
    raise _DoesNotFit(complaints[0])


def _given_size(code: Path) -> tuple[int, int] | None:
    """Height and width in the repository's own settings, which are checked where they are used; None: it has none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        values = json.loads((code / PICTURE_SETTINGS).read_text(encoding="utf-8"))
        size = values.get("crop_size") or values.get("size")
        found = (size, size) if isinstance(size, int) else (size.get("height"), size.get("width"))
        if all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in found):
            return found
    return None


def _head_of(module: nn.Module, seen: torch.Tensor) -> tuple[str, int]:
    """The name of the linear layer that gives a module's logits, and their number."""
    names = {id(part): name for name, part in module.named_modules()}
    ran: list[tuple[str, nn.Linear]] = []

    def note(layer: nn.Module, _inputs: Any, _output: Any) -> None:
        if isinstance(layer, nn.Linear):
            ran.append((names[id(layer)], layer))

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Linear)]
    try:
        logits = logits_in(_called(module, seen))
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != len(seen):
        raise _DoesNotFit(f"it gives {_shape(logits)}")
    num_classes = logits.shape[1]
    name, last = next(((name, layer) for name, layer in reversed(ran) if layer.out_features == num_classes), ("", None))
    if last is None or not name:
        text = f"it gives {_shape(logits)}, but no nn.Linear with {num_classes} outputs in it, which could be replaced"
        raise _DoesNotFit(text)
    # With one class more: what comes after the layer must not depend on their number.
    module.set_submodule(name, nn.Linear(last.in_features, num_classes + 1, bias=last.bias is not None))
    try:
        replaced = logits_in(_called(module, seen))
    finally:
        module.set_submodule(name, last)
    if _shape(replaced) != _shape(torch.empty(len(seen), num_classes + 1)):
        raise _DoesNotFit(f"it gives {_shape(replaced)} if its last nn.Linear ({name}) has {num_classes + 1} outputs")
    return name, num_classes


def _texts(module: nn.Module) -> Texts:
    ids_BT = torch.ones(2, _LENGTHS[0], dtype=torch.long)
    tables: list[nn.Embedding] = []

    def note(table: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if isinstance(table, nn.Embedding) and inputs and inputs[0] is ids_BT:
            tables.append(table)

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Embedding)]
    try:
        found = _called(module, ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    output, vectors = _vectors_in(found, ids_BT)
    if not tables:
        raise _DoesNotFit("no nn.Embedding of it looks the ids up, so the size of its vocabulary is not known")
    vocab_size = tables[0].num_embeddings
    mask, masks_padding = _mask_of(module, vocab_size, output)
    return Texts(vocab_size, vectors.shape[-1], _longest(module), mask, masks_padding, output)


def _vectors_in(found: Any, ids_BT: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Where the vectors are in what a module returns, and the vectors."""
    places: list[str] = [""]
    if hasattr(found, "keys"):
        places = [str(key) for key in found.keys()]  # noqa: SIM118 - outputs of transformers iterate over values
    elif isinstance(found, tuple | list):
        places = [str(index) for index in range(len(found))]
    for place in sorted(places, key=lambda name: name != "last_hidden_state"):
        value = part_of(found, place)
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.shape[:2] == ids_BT.shape:
            return place, value
    raise _DoesNotFit(f"it gives {_shape(found)}")


def _mask_of(module: nn.Module, vocab_size: int, output: str) -> tuple[str, bool]:
    """The parameter that takes the attention mask, and whether true in it marks padding.

    Found by trying: the vectors of a text must not depend on the texts beside it.
    """
    draw = torch.Generator().manual_seed(0)
    long_T, short_T = (torch.randint(1, max(vocab_size, 2), (length,), generator=draw) for length in (8, 5))
    ids_BT = torch.stack([long_T, torch.cat([short_T, torch.zeros(3, dtype=torch.long)])])
    keep_BT = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    alone_TD = part_of(_called(module, short_T[None]), output)[0]
    names = [name for name in inspect.signature(module.forward).parameters if "mask" in name]
    ways = [(name, pads) for name in names for pads in (False, True)]
    for name, pads in (*ways, ("", False)):
        masks = {name: keep_BT == 0 if pads else keep_BT} if name else {}
        with contextlib.suppress(_DoesNotFit, IndexError, TypeError):
            beside_TD = part_of(_called(module, ids_BT, **masks), output)[1, :5]
            if beside_TD.shape == alone_TD.shape and float((beside_TD - alone_TD).abs().max()) <= _SAME:
                return name, pads
    tried = (
        f"its parameters {listed(names)} do not prevent that" if names else "its forward has no parameter for a mask"
    )
    raise _DoesNotFit(f"the vectors of a text depend on the padding beside it, and {tried} (such as attention_mask)")


def _longest(module: nn.Module) -> int | None:
    """The number of positions that a module takes; None if it takes all that are tried."""

    def fits(length: int) -> bool:
        try:
            _called(module, torch.ones(1, length, dtype=torch.long))
        except _DoesNotFit:
            return False
        return True

    low = 8
    for length in _LENGTHS[1:]:
        if not fits(length + 1):
            return _last_that(fits, low, length + 1)
        low = length + 1
    return None


def _last_that(fits: Callable[[int], bool], low: int, high: int) -> int:
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _called(module: nn.Module, *inputs: torch.Tensor, **more: torch.Tensor) -> Any:
    try:
        return module(*inputs, **more)
    except MemoryError:
        raise
    except Exception as error:  # edge: code of others may raise anything.
        raise _DoesNotFit(f"it raises {type(error).__name__}: {shorten(str(error))}") from None


def _shape(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return f"a tensor of the shape {list(found.shape)}"
    return f"a {type(found).__name__}"
