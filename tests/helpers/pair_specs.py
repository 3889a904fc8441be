"""Specs, data and tiny folders of encoder-decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from google.protobuf import json_format

from helpers.plan_requests import filled
from helpers.small_specs import locations, sentences
from helpers.tiny_folders import bert_tokenizer
from shardyard.v1 import spec_pb2
from shardyard_trainer.tasks.ingredients import prepare

TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
FRESH = {"architecture": {"modelType": "t5", "overrides": TINY}}


def filled_with_pairs(root: Path) -> Path:
    """A data root with pairs of texts in `pairs.jsonl`, and a tiny T5 in `t5`."""
    filled(root)
    rows = [{"source": text, "target": " ".join(reversed(text.split()))} for text in sentences(80)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    t5_folder(root / "t5")
    return root


def t5_folder(folder: Path, kind: str = "T5ForConditionalGeneration") -> Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, **TINY
    )
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OF_BART: dict[str, Any] = {"decoder_start_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
OF_T5: dict[str, Any] = {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0}


def sure_folder(folder: Path, kind: str, head: str, *, std: float, **settings: Any) -> Path:
    """A folder of T5 or of a BART-like `kind` that is sure of its answers: of wide random weights."""
    tokenizer = bert_tokenizer()
    sizes = {**OF_T5, **TINY} if kind == "T5" else {**OF_BART, **TINY_BART, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes, **settings)
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}{head}")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    tokenizer.model_input_names, tokenizer.model_max_length = ["input_ids", "attention_mask"], 64
    tokenizer.save_pretrained(folder)
    return folder


def translation(model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "fine_tuning": {"translation": {}},
        "model": model or FRESH,
        "tokenizer": {"train": {"vocabSize": 300}},
        "train_data": {"uri": "ROOT/pairs.jsonl"},
        "optimization": {"max_steps": 10},
    }
    return spec | changes


def prepared(root: Path, spec: dict[str, Any]) -> Any:
    text = json.dumps(spec).replace("ROOT", str(root))
    return prepare(json_format.Parse(text, spec_pb2.JobSpec()), locations(root))
