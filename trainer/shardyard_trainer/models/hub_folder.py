"""The model folder of what a function of PyTorch Hub returns.

A model of transformers is saved as it is. Any other module is tried on inputs made up here: one that gives logits
[B, C] for pictures is kept for classification, one that gives vectors [B, T, D] for token ids for tasks on texts.
Beside it come the repository's own tokenizer or image processor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from shardyard_trainer.models import hub_modules
from shardyard_trainer.models.door import CODE, FolderInvalid
from shardyard_trainer.models.hub_code import Made, run_entrypoint
from shardyard_trainer.models.hub_faults import HUBCONF, HubCodeFailed
from shardyard_trainer.models.hub_process import CACHE, CHECKPOINTS, files_read
from shardyard_trainer.models.hub_trial import PICTURE_SETTINGS, SIDES, Pictures, default_settings, try_module
from shardyard_trainer.models.loading import LOADING_ERRORS
from shardyard_trainer.plain_words import in_plain_words

_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("generation_config.json", PICTURE_SETTINGS),
)
"""Files of a repository that say how a model's inputs are read."""


class Wanted(NamedTuple):
    """What to run, and where it is from: a repository at a revision, a function of it, and its arguments.

    `side` is that of the pictures in the spec; 0: it gives none.
    """

    repo: str
    revision: str
    entrypoint: str
    arguments: Mapping[str, Any]
    side: int = 0


def write_folder(folder: Path, wanted: Wanted) -> None:
    """Runs the code in `folder` and writes the model that it returns beside it. Raises FolderInvalid."""
    code, cache = folder / CODE, Path(torch.hub.get_dir()) / CHECKPOINTS
    with files_read(cache) as read:
        made = run_entrypoint(code, wanted.entrypoint, wanted.arguments)
    beside = [name for name in _BESIDE if (code / name).is_file()]
    for name in beside:
        shutil.copyfile(code / name, folder / name)
    if _is_of_transformers(made.module):
        _save_as_it_is(made.module, folder, beside)
        return
    for path in read:
        copy = code / CACHE / CHECKPOINTS / path.relative_to(cache)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    _save_with_code(made, folder, wanted)


def _is_of_transformers(module: nn.Module) -> bool:
    """Whether transformers alone can load it again: a class of a repository's own needs its code."""
    is_own = type(module).__module__.startswith("transformers.")
    return is_own and isinstance(module, PreTrainedModel) and module.config.model_type in CONFIG_MAPPING


def _save_as_it_is(module: Any, folder: Path, beside: list[str]) -> None:
    kept = {name: (folder / name).read_bytes() for name in beside}
    try:
        module.save_pretrained(folder)
    except LOADING_ERRORS as error:
        text = f"the {type(module).__name__} that it returns cannot be saved: {in_plain_words(error)}"
        raise FolderInvalid(text, file=HUBCONF) from None
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    if module.main_input_name == "pixel_values" and PICTURE_SETTINGS not in beside:
        side = getattr(module.config, "image_size", None) or SIDES[0]
        size = (side, side) if isinstance(side, int) else tuple(side)
        _write_settings(folder, default_settings(size, getattr(module.config, "num_channels", 3)))
    shutil.rmtree(folder / CODE)  # Nobody needs it to load the model again.


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / PICTURE_SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _save_with_code(made: Made, folder: Path, wanted: Wanted) -> None:
    module = made.module
    made_by = {
        **{name: value for name, value in wanted._asdict().items() if name != "side"},
        "arguments": dict(wanted.arguments),
        "is_compiled": made.is_compiled,
        "was_frozen": made.was_frozen,
        "has_cache": (folder / CODE / CACHE).is_dir(),
    }
    found = try_module(module, folder / CODE, wanted.entrypoint, side=wanted.side)
    config: Any
    kind: Any
    if not isinstance(found, Pictures):
        config = hub_modules.TorchHubTextsConfig(**made_by, **found._asdict())
        kind = hub_modules.TorchHubModel
    elif found.head:
        given = {"head": found.head, "head_kind": found.head_kind, "num_labels": found.outputs}
        config = hub_modules.TorchHubPicturesConfig(**made_by, **given, num_channels=found.channels)
        kind = hub_modules.TorchHubForImageClassification
    else:
        given = {"hidden_size": found.outputs, "num_channels": found.channels}
        config = hub_modules.TorchHubPictureVectorsConfig(**made_by, **given)
        kind = hub_modules.TorchHubPictureVectors
    if isinstance(found, Pictures) and not (folder / PICTURE_SETTINGS).is_file():
        _write_settings(folder, default_settings(found.size, found.channels))
    config._code = folder / CODE
    config.num_hidden_layers = max(
        (len(part) for part in module.modules() if isinstance(part, nn.ModuleList)), default=1
    )
    try:
        kind(config, module).save_pretrained(folder)
    except LOADING_ERRORS as error:
        text = f"the {type(module).__name__} that it returns cannot be saved: {in_plain_words(error)}"
        raise HubCodeFailed(text, part="entrypoint", file=HUBCONF) from None
