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

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from shardyard_trainer.models import hub_modules
from shardyard_trainer.models.door import CODE, FolderInvalid
from shardyard_trainer.models.hub_code import HUBCONF, HubCodeFailed, run_entrypoint
from shardyard_trainer.models.hub_trial import PICTURE_SETTINGS, Pictures, try_module
from shardyard_trainer.models.loading import LOADING_ERRORS
from shardyard_trainer.plain_words import in_plain_words

_BESIDE = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
    *("generation_config.json", PICTURE_SETTINGS),
)
"""Files of a repository that say how a model's inputs are read."""


class Wanted(NamedTuple):
    """What to run, and where it is from: a repository at a revision, a function of it, and its arguments."""

    repo: str
    revision: str
    entrypoint: str
    arguments: Mapping[str, Any]


def write_folder(folder: Path, wanted: Wanted) -> None:
    """Runs the code in `folder` and writes the model that it returns beside it. Raises FolderInvalid."""
    code = folder / CODE
    module = run_entrypoint(code, wanted.entrypoint, wanted.arguments)
    beside = [name for name in _BESIDE if (code / name).is_file()]
    for name in beside:
        shutil.copyfile(code / name, folder / name)
    if _is_of_transformers(module):
        _save_as_it_is(module, folder, beside)
    else:
        _save_with_code(module, folder, wanted)


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
    shutil.rmtree(folder / CODE)  # Nobody needs it to load the model again.


def _save_with_code(module: nn.Module, folder: Path, wanted: Wanted) -> None:
    made_by = {**wanted._asdict(), "arguments": dict(wanted.arguments)}
    found = try_module(module, folder / CODE, wanted.entrypoint)
    config: Any
    kind: Any
    if isinstance(found, Pictures):
        config = hub_modules.TorchHubPicturesConfig(
            **made_by, head=found.head, num_channels=found.channels, num_labels=found.num_classes
        )
        kind = hub_modules.TorchHubForImageClassification
        if not (folder / PICTURE_SETTINGS).is_file():
            text = json.dumps(found.settings(), indent=2)
            (folder / PICTURE_SETTINGS).write_text(text + "\n", encoding="utf-8")
    else:
        config = hub_modules.TorchHubTextsConfig(**made_by, **found._asdict())
        kind = hub_modules.TorchHubModel
    config._code = folder / CODE
    config.num_hidden_layers = max(
        (len(part) for part in module.modules() if isinstance(part, nn.ModuleList)), default=1
    )
    try:
        kind(config, module).save_pretrained(folder)
    except LOADING_ERRORS as error:
        text = f"the {type(module).__name__} that it returns cannot be saved: {in_plain_words(error)}"
        raise HubCodeFailed(text, part="entrypoint", file=HUBCONF) from None
