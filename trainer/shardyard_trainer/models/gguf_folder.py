"""Folders with a GGUF file as models: dequantised once through transformers into a Hugging Face folder in the cache."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from shardyard_trainer.data.errors import listed, shorten
from shardyard_trainer.models.conversion import (
    check_complete,
    check_room,
    converted_folder,
    refuse_unmatched,
    write_note,
)
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.gguf_header import Header, HeaderInvalid, read_header
from shardyard_trainer.models.gguf_settings import configuration
from shardyard_trainer.models.gguf_tokenizer import beside, write_tokenizer
from shardyard_trainer.models.known_files import digest

# Any name that a file has on people's disks; it is only ever opened in the folder, and checked when it is open.
_ALSO = re.compile(r"[^./\x00-\x1f][^/\x00-\x1f]*\.gguf", re.IGNORECASE)
_PART = re.compile(r"-[0-9]{5}-of-[0-9]{5}\.gguf$", re.IGNORECASE)
_KINDS = {
    "adapter": "an adapter (LoRA); merge it into its model with `llama-export-lora`, and give the file of that",
    "mmproj": "the part of a model that reads pictures; give the file of the model itself",
    "imatrix": "a table of importances for quantising; give the file of the model itself",
}
"""What a file is by its general.type, if it is not a model."""
_AS_SAFETENSORS = "give the model that it was made from, as safetensors"


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


def gguf_files(folder: Folder) -> tuple[str, ...]:
    """The files of a folder of `gguf_in` that its model is made of. Raises FolderInvalid for several GGUF files."""
    return (gguf_name(folder), *beside(folder))


def dequantise(folder: Folder, cache_dir: Path) -> Folder:
    """A folder of `gguf_in` as a Hugging Face folder in the cache. Raises FolderInvalid."""
    name, *others = gguf_files(folder)
    # With its name, which messages about the converted folder have.
    key = {"gguf": digest(folder, name), "name": name, "beside": {other: digest(folder, other) for other in others}}
    return converted_folder(cache_dir, key, lambda target: _build(folder, name, target))


def _build(folder: Folder, name: str, target: Path) -> None:
    with folder.open(name) as file:
        try:
            header = read_header(file, _blocks(name))
        except HeaderInvalid as error:
            raise FolderInvalid(f"{name} is not a GGUF model: {error}; copy it again", file=name) from None
        _refuse_kind(name, header)
        check_room(name, header.num_weights, target, file=name)
        # transformers takes a folder and a name: a link to the open file, whatever the name leads to by now.
        links = target / "links"
        links.mkdir()
        (links / "model.gguf").symlink_to(f"/proc/self/fd/{file.fileno()}")
        try:
            notes = _convert(links, target, header, file, name)
            lacks, assumed = write_tokenizer(folder, links, header, target, name)
        finally:
            shutil.rmtree(links)
    if folder.has("config.json"):
        notes = (*notes, "the config.json beside it was not read: the file's own settings were")
    said = [*notes, assumed, lacks]
    write_note(
        target,
        f"converted from GGUF ({header.architecture}): {header.num_weights:,} weights",
        filter(None, said),
        no_tokenizer=lacks,
    )


def _refuse_kind(name: str, header: Header) -> None:
    """Raises FolderInvalid for a file that is not a model."""
    kind = header.settings.get("general.type", "model")
    if kind == "model" and any(key.startswith("adapter.") for key in header.settings):
        kind = "adapter"
    if kind != "model":
        what = _KINDS.get(str(kind), f"of the type {shorten(str(kind))!r}; give the file of a model")
        raise FolderInvalid(f"{name} is not a model, but {what}", file=name)
    if not header.tensors:
        raise FolderInvalid(
            f"{name} has no tensors: it is not a model, but a vocabulary alone; give the file of the model", file=name
        )


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


def _convert(links: Path, target: Path, header: Header, file: BinaryIO, name: str) -> tuple[str, ...]:
    """Writes the model; returns what has to be said about it."""
    # Heavy imports come where weights are really read.
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
    from shardyard_trainer.plain_words import in_plain_words

    given: dict[str, Any] = {"gguf_file": "model.gguf", "local_files_only": True}
    # Without them transformers makes up what a file lacks, and says so to nobody.
    given |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet():
            read = configuration(links, header, file, name)
            is_both = type(read.config) in AutoModelForSeq2SeqLM._model_mapping
            kind = AutoModelForSeq2SeqLM if is_both else AutoModelForCausalLM
            model, info = kind.from_pretrained(links, config=read.config, **given, dtype=torch.float32)
            check_complete(
                info, f"a {read.config.model_type} of its settings", name, f"convert again, or {_AS_SAFETENSORS}"
            )
            refuse_unmatched(
                _unread(model, info, header, read.tensors), f"a {read.config.model_type}", name, _AS_SAFETENSORS
            )
            # The weights are ordinary ones now; what says that they are quantised would refuse to save them.
            model.hf_quantizer, model.is_quantized = None, False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(target)
    except FolderInvalid:
        raise
    except LOADING_ERRORS as error:
        raise FolderInvalid(
            f"{name} cannot be converted: {in_plain_words(error)}; {_AS_SAFETENSORS}",
            file=name,
        ) from None
    return read.notes


def _unread(model: Any, info: Mapping[str, Any], header: Header, read: Iterable[str]) -> set[str]:
    """The tensors of the file that are not in the model: the reader of most architectures drops them unsaid."""
    from transformers.integrations.gguf import GGUF_ARCHS
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    if header.architecture in GGUF_ARCHS:
        return set(info["unexpected_keys"])
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    # The experts of a layer are one parameter, which is called without an ending.
    dropped = {name for name in header.tensors if not {name, name.removesuffix(".weight")} & places.keys()}
    return {*info["unexpected_keys"], *dropped} - set(read)
