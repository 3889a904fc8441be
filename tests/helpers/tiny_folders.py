"""Tiny Hugging Face folders, made in milliseconds, for tests of what is done with models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

WORDS = [
    *("the", "a", "dog", "cat", "is", "cute", "bad", "good", "film", "my", "hello", ",", "."),
    *("runs", "sleeps", "eats", "very", "not", "this", "that"),
]


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, framed by [CLS] and [SEP]."""
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    )  # fmt: skip


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one end token; none to pad with."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def bert_config(**changes: Any) -> BertConfig:
    """Two layers, width 16, 32 positions."""
    values: dict[str, Any] = {
        "vocab_size": 5 + len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.5,
    }  # fmt: skip
    return BertConfig(**{**values, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    """Two layers, width 16, 32 positions."""
    values: dict[str, Any] = {
        "vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "initializer_range": 0.5,
        "bos_token_id": 256, "eos_token_id": 256,
    }  # fmt: skip
    return GPT2Config(**{**values, **changes})


def save_folder(folder: Path, kind: str, **changes: Any) -> Path:
    """A folder of a transformers class such as `BertForMaskedLM`, with random weights of a fixed seed."""
    torch.manual_seed(0)
    is_bert = kind.startswith("Bert")
    config = bert_config(**changes) if is_bert else gpt2_config(**changes)
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    (bert_tokenizer() if is_bert else gpt2_tokenizer()).save_pretrained(folder)
    return folder
