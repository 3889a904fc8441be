"""The tokenizer of a GGUF file: that of the files beside it, else the one that the file describes, if it is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.conversion import COPIED
from shardyard_trainer.models.door import MAX_VOCABULARY_BYTES, Folder
from shardyard_trainer.models.gguf_header import Header

_PIECES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", *_PIECES)
_BESIDE = (*COPIED, *_PIECES, "chat_template.jinja", "generation_config.json")

_OF_GPT2 = frozenset({"gpt-2", "mpt", "olmo", "jais", "trillion"})
_OF_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""As llama.cpp groups them: as GPT-2, after every digit was split off."""

_UNNAMED = frozenset({"", "default"})


def beside(folder: Folder) -> tuple[str, ...]:
    """The files beside a GGUF file that are read as those of its model."""
    return tuple(name for name in _BESIDE if folder.has(name))


def write_tokenizer(folder: Folder, links: Path, header: Header, target: Path, name: str) -> tuple[str, str]:
    """Writes a tokenizer, and the other files beside the GGUF file.

    Returns why there is none, and what was assumed of it; both may be empty.
    """
    files = beside(folder)
    lacks, note = ("", "") if set(files) & set(_VOCABULARIES) else _write_own(links, header, target, name)
    for each in files:
        (target / each).write_bytes(folder.read(each, most_bytes=MAX_VOCABULARY_BYTES))
    return lacks, note


def _write_own(links: Path, header: Header, target: Path, name: str) -> tuple[str, str]:
    """Writes the tokenizer that the file describes."""
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    from shardyard_trainer.models.loading import LOADING_ERRORS, quiet

    step = "put the tokenizer.json of its model beside it, or give a `tokenizer`"
    kind, split = (str(header.settings.get(f"tokenizer.ggml.{key}") or "") for key in ("model", "pre"))
    if "tokenizer.ggml.tokens" not in header.settings:
        return f"{name} has no vocabulary: {step}", ""
    if kind == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_OF_GPT2, *_OF_DIGITS, *_UNNAMED}:
        return f"how the tokenizer of {name} splits texts ({shorten(split)!r}) is not known: {step}", ""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(links, gguf_file="model.gguf", local_files_only=True)
            if kind == "gpt2" and split in _OF_DIGITS:
                _split_off_digits(tokenizer)
            tokenizer.save_pretrained(target)
    except LOADING_ERRORS:
        return f"the tokenizer of {name} ({shorten(kind)!r}) cannot be read: {step}", ""
    is_assumed = kind == "gpt2" and split in _UNNAMED
    return "", "it does not say how its tokenizer splits texts: as that of GPT-2 is assumed" * is_assumed


def _split_off_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
