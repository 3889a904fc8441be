"""Folders with a GGUF file as models: dequantised once through transformers into a Hugging Face folder in the cache."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shardyard_trainer.data.errors import listed
from shardyard_trainer.models.conversion import converted_folder, write_note
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.gguf_header import Header, HeaderInvalid, read_header
from shardyard_trainer.models.known_files import digest

_ALSO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.gguf")
_PART = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf$")
_LEFT_FREE_BYTES = 1024**3


def gguf_in(folder: Folder) -> Folder | None:
    """The folder as one whose GGUF file may be opened, if that is what it has for weights; None: it is another."""
    names = folder.names()
    if folder.weight_names() or not any(_ALSO.fullmatch(name) for name in names):
        return None
    return replace(folder, also=_ALSO)


def gguf_name(folder: Folder) -> str:
    """The name of a folder's only GGUF file. Raises FolderInvalid for several."""
    names = sorted(name for name in folder.names() if _ALSO.fullmatch(name))
    if len(names) == 1 and not _PART.search(names[0]):
        return names[0]
    if any(_PART.search(name) for name in names):
        raise FolderInvalid(
            f"{names[0]} is one part of a model; join the parts with `llama-gguf-split --merge`, and give the "
            "folder of the whole file",
            file=names[0],
        )
    raise FolderInvalid(
        f"the folder has {len(names)} GGUF files: {listed(names, most=4)}; keep the one that is meant", file=names[0]
    )


def dequantise(folder: Folder, cache_dir: Path) -> Folder:
    """A folder of `gguf_in` as a Hugging Face folder in the cache. Raises FolderInvalid."""
    name = gguf_name(folder)
    return converted_folder(cache_dir, {"gguf": digest(folder, name)}, lambda target: _build(folder, name, target))


def _build(folder: Folder, name: str, target: Path) -> None:
    with folder.open(name) as file:
        try:
            header = read_header(file, _blocks(name))
        except HeaderInvalid as error:
            raise FolderInvalid(f"{name} is not a GGUF model: {error}; copy it again", file=name) from None
        _check_room(name, header, target)
        # transformers takes a folder and a name: a link to the open file, whatever the name leads to by now.
        links = target / "links"
        links.mkdir()
        (links / "model.gguf").symlink_to(f"/proc/self/fd/{file.fileno()}")
        try:
            has_tokenizer = _convert(links, target, name)
        finally:
            shutil.rmtree(links)
    notes = () if has_tokenizer else ("its tokenizer could not be read: give a `tokenizer`",)
    write_note(target, f"converted from GGUF ({header.architecture}): {header.num_weights:,} weights", notes)


def _blocks(name: str) -> Mapping[int, tuple[int, int]]:
    """The weights in a block and its bytes, by the numbers of the kinds."""
    if importlib.util.find_spec("gguf") is None:
        raise FolderInvalid(
            f"{name} is a GGUF file, which this service cannot read: the library gguf is not installed "
            "(`pip install 'shardyard[gguf]'`); ask the operator, or give the model as safetensors",
            file=name,
        )
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}


def _check_room(name: str, header: Header, target: Path) -> None:
    """Raises FolderInvalid for weights that the disk has no room for in 32 bits."""
    need, free = 4 * header.num_weights, shutil.disk_usage(target).free - _LEFT_FREE_BYTES
    if need > free:
        raise FolderInvalid(
            f"{name} has {header.num_weights:,} weights, {need:,} bytes in 32 bits, but the service's cache has room "
            f"for {max(free, 0):,}; use a smaller model, or ask the operator to make space",
            reason="STORAGE_FULL",
            file=name,
        )


def _convert(links: Path, target: Path, name: str) -> bool:
    """Writes model and tokenizer; False: the tokenizer is of a kind that transformers does not make of GGUF."""
    # Heavy imports come where weights are really read.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
    from shardyard_trainer.plain_words import in_plain_words

    given: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(links, **given)
            is_both = type(config) in AutoModelForSeq2SeqLM._model_mapping
            kind = AutoModelForSeq2SeqLM if is_both else AutoModelForCausalLM
            model = kind.from_pretrained(links, **given, dtype=torch.float32)
            # The weights are ordinary ones now; what says that they are quantised would refuse to save them.
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(target)
    except LOADING_ERRORS as error:
        raise FolderInvalid(
            f"{name} cannot be converted: {in_plain_words(error)}; give the model that it was made from, as "
            "safetensors",
            file=name,
        ) from None
    try:
        with quiet():
            AutoTokenizer.from_pretrained(links, **given).save_pretrained(target)
    except LOADING_ERRORS:
        return False
    return True
