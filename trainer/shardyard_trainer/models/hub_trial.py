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
from shardyard_trainer.models.hub_faults import HUBCONF, HubCodeFailed
from shardyard_trainer.models.hub_heads import HEADS, names_of, num_outputs, put, with_outputs
from shardyard_trainer.models.hub_modules import logits_in, part_of
from shardyard_trainer.reading import reading

SIDES = (224, 32, 28, 64, 96, 299, 256, 384, 448, 512, 518, 128, 48, 160, 240)
"""Sides of pictures that are tried in turn if neither the spec nor the repository says one."""

_LARGEST_SIDE = 1024

PICTURE_SETTINGS = "preprocessor_config.json"
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_GREY = {"image_mean": [0.5], "image_std": [0.5]}

_LENGTHS = (8, 512, 1024, 2048)
_SQUASHED = "it gives probabilities (or other numbers within -1 to 1), not logits: return what is before its softmax"
_SAME = 1e-4
"""How far vectors of a text may be from those of the same text beside a longer one."""


_LARGE = 1e4
"""A logit that nothing but a squashing function makes small."""


class Pictures(NamedTuple):
    """A module that gives logits for pictures: the layer that gives them, how many, and what it takes.

    Without a `head` it gives vectors of `outputs` numbers.
    """

    head: str
    head_kind: str
    outputs: int
    channels: int
    size: tuple[int, int]


def default_settings(size: tuple[int, int], channels: int) -> dict[str, Any]:
    """The preprocessor_config.json of a repository without one: the whole picture, with ImageNet's mean."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": dict(zip(("height", "width"), size, strict=True)),
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **(_IMAGENET if channels == 3 else _GREY),
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


class _Raises(_DoesNotFit):
    """It raises when it is called so."""


@torch.no_grad()
def try_module(module: nn.Module, code: Path, entrypoint: str, *, side: int = 0) -> Pictures | Texts:
    """What a module reads and gives; `side` is that of the spec's pictures, 0: it gives none.

    Raises HubCodeFailed for one that no task can use.
    """
    reading(f"what {entrypoint} of {HUBCONF} returns")
    complaints = []
    attempts: tuple[tuple[str, Callable[[], Pictures | Texts]], ...] = (
        ("pictures", lambda: _pictures(module, code, side)),
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


def _pictures(module: nn.Module, code: Path, side: int) -> Pictures:
    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    # Without a convolution nothing says whether pictures are in colours.
    channels = (3, 1) if first is None else (first.in_channels,) if first.in_channels in (1, 3) else (3,)
    own = _given_size(code)
    sizes = [(side, side)] if side else []
    sizes += [own] if own is not None else [(each, each) for each in SIDES if each != side]
    complaint = ""
    for size in sizes:
        for number in channels:
            seen = torch.rand(2, number, *size, generator=torch.Generator().manual_seed(0))
            try:
                return _outputs_of(module, seen)
            except _Raises as error:
                complaint = complaint or str(error)
    tried = ", ".join(str(height) if height == width else f"{height} × {width}" for height, width in sizes)
    other = f"image_size, or a {PICTURE_SETTINGS} in the repository, says another size"
    raise _DoesNotFit(f"{complaint} (pictures of {tried} pixels were tried; {other})")


def _given_size(code: Path) -> tuple[int, int] | None:
    """Height and width in the repository's own settings, which are checked where they are used; None: it has none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        values = json.loads((code / PICTURE_SETTINGS).read_text(encoding="utf-8"))
        size = values.get("crop_size") or values.get("size")
        found = (size, size) if isinstance(size, int) else (size.get("height"), size.get("width"))
        if all(isinstance(side, int) and 0 < side <= _LARGEST_SIDE for side in found):
            return found
    return None


def _outputs_of(module: nn.Module, seen: torch.Tensor) -> Pictures:
    """Whether a module gives logits, by which layer, or vectors; and how many numbers."""
    channels, size = seen.shape[1], (seen.shape[2], seen.shape[3])
    ran: list[nn.Module] = []
    hooks = [
        part.register_forward_hook(lambda layer, _inputs, _output: ran.append(layer))
        for part in module.modules()
        if isinstance(part, HEADS) and part is not module
    ]
    try:
        with torch.enable_grad():
            found = _called(module, seen)
    finally:
        for hook in hooks:
            hook.remove()
    values = logits_in(found)
    if not isinstance(values, torch.Tensor) or values.ndim != 2 or len(values) != len(seen):
        raise _DoesNotFit(f"it gives {_shape(found)}")
    _check_trains(module, seen, found)
    number = values.shape[1]
    last = next((layer for layer in reversed(ran) if _gives(layer, number)), None)
    if last is not None and _is_head(module, last, seen):
        kind = "Conv2d" if isinstance(last, nn.Conv2d) else "Linear"
        return Pictures(names_of(module, last)[0], kind, number, channels, size)
    if not isinstance(found, torch.Tensor):
        what = f"no layer with {number} outputs in it, which could be replaced, gives the first of them"
        raise _DoesNotFit(f"it gives {_shape(found)}, and {what}; return the logits alone")
    if number > 1 and bool((values >= 0).all()) and float((values.sum(1) - 1).abs().max()) <= _SAME:
        raise _DoesNotFit(_SQUASHED)
    return Pictures("", "", number, channels, size)


def _gives(layer: nn.Module, number: int) -> bool:
    """Whether logits of this number may come from a layer."""
    is_whole = not isinstance(layer, nn.Conv2d) or (layer.kernel_size == (1, 1) and layer.groups == 1)
    return is_whole and num_outputs(layer) == number


def _is_head(module: nn.Module, last: nn.Module, seen: torch.Tensor) -> bool:
    """Whether a layer gives a module's logits: with one output more, there is one more of them.

    Raises _DoesNotFit if something squashes them, as a softmax does, which training would have twice.
    """
    number = num_outputs(last) + 1
    other, names = with_outputs(last, number, bias=True), names_of(module, last)
    signs = torch.tensor([1.0 if index % 2 else -1.0 for index in range(number)])
    other.bias.copy_(signs * _LARGE)  # type: ignore[operator]
    put(module, names, other)
    try:
        values = logits_in(_called(module, seen))
    except _Raises:
        return False
    finally:
        put(module, names, last)
    if not isinstance(values, torch.Tensor) or tuple(values.shape) != (len(seen), number):
        return False
    if float(values.abs().max()) <= 1:
        raise _DoesNotFit(_SQUASHED)
    return True


def _check_trains(module: nn.Module, inputs: torch.Tensor, found: Any) -> None:
    """Raises _DoesNotFit for a module that gives no gradients, in evaluation, as it `found`, nor in training."""
    if _has_gradient(found):
        return
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train()
    try:
        with torch.enable_grad():
            found = _called(module, inputs)
    finally:
        module.eval()
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers.get(name, buffer))
    if not _has_gradient(found):
        text = "it computes without gradients (torch.no_grad, inference_mode or detach), so it cannot be trained"
        raise _DoesNotFit(f"{text}: leave that out of its forward")


def _has_gradient(found: Any) -> bool:
    if isinstance(found, torch.Tensor):
        return found.requires_grad
    parts = found.values() if hasattr(found, "keys") else found if isinstance(found, tuple | list) else [found]
    return any(isinstance(part, torch.Tensor) and part.requires_grad for part in parts)


def _texts(module: nn.Module) -> Texts:
    ids_BT = torch.ones(2, _LENGTHS[0], dtype=torch.long)
    tables: list[nn.Embedding] = []

    def note(table: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        if isinstance(table, nn.Embedding) and inputs and inputs[0] is ids_BT:
            tables.append(table)

    hooks = [part.register_forward_hook(note) for part in module.modules() if isinstance(part, nn.Embedding)]
    try:
        with torch.enable_grad():
            found = _called(module, ids_BT)
    finally:
        for hook in hooks:
            hook.remove()
    output, vectors = _vectors_in(found, ids_BT)
    _check_trains(module, ids_BT, found)
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
    if _mixes(module, vocab_size, output):
        text = "the vectors of a text depend on the texts beside it, as if the first dimension were the positions"
        raise _DoesNotFit(f"{text}: make its layers with batch_first=True")
    tried = (
        f"its parameters {listed(names)} do not prevent that" if names else "its forward has no parameter for a mask"
    )
    raise _DoesNotFit(f"the vectors of a text depend on the padding beside it, and {tried} (such as attention_mask)")


def _mixes(module: nn.Module, vocab_size: int, output: str) -> bool:
    """Whether the vectors of a text depend on another one of the same length, without any padding."""
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(1, max(vocab_size, 2), (3, 5), generator=draw)
    together, other = (part_of(_called(module, ids_BT[rows]), output)[0] for rows in ([0, 1], [0, 2]))
    return together.shape != other.shape or float((together - other).abs().max()) > _SAME


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
        raise _Raises(f"it raises {type(error).__name__}: {shorten(str(error))}") from None


def _shape(found: Any) -> str:
    if isinstance(found, torch.Tensor):
        return f"a tensor of the shape {list(found.shape)}"
    if hasattr(found, "keys"):
        parts = [f"{key} {_brief(found[key])}" for key in found.keys()]  # noqa: SIM118 - as in `_vectors_in`
    elif isinstance(found, tuple | list):
        parts = [_brief(part) for part in found]
    else:
        return f"a {type(found).__name__}"
    return f"a {type(found).__name__} of {listed(parts, most=6)}"


def _brief(part: Any) -> str:
    return str(list(part.shape)) if isinstance(part, torch.Tensor) else type(part).__name__
