"""Tiny SentencePiece models, written without the sentencepiece library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.utils import sentencepiece_model_pb2_new as schema

WORDS = ["▁the", "▁dog", "▁cat", "▁is", "▁cute", "▁sleeps", "s", "▁"]
CONTROL, UNKNOWN, ORDINARY = 3, 2, 1


def write_pieces(path: Path, *, first: list[str] | None = None, pairs: bool = False, **normalizer: Any) -> Path:
    """A model whose first pieces are `first` (`<unk>` is the unknown one, the others are control pieces)."""
    proto = schema.ModelProto()
    for piece in first or ["<unk>", "<s>", "</s>"]:
        proto.pieces.add(piece=piece, score=0.0, type=UNKNOWN if piece in {"<unk>", "[UNK]"} else CONTROL)
    words = [*sorted({c for word in WORDS for c in word}), *_stems(), *WORDS] if pairs else WORDS
    for number, piece in enumerate(dict.fromkeys(words)):
        proto.pieces.add(piece=piece, score=-1.0 - number / 10, type=ORDINARY)
    proto.trainer_spec.model_type = 2 if pairs else 1
    proto.trainer_spec.unk_id = next(index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    names = [piece.piece for piece in proto.pieces]
    proto.trainer_spec.bos_id = names.index("<s>") if "<s>" in names else -1
    proto.trainer_spec.eos_id = names.index("</s>") if "</s>" in names else -1
    proto.trainer_spec.pad_id = names.index("<pad>") if "<pad>" in names else -1
    for name, value in normalizer.items():
        setattr(proto.normalizer_spec, name, value)
    path.write_bytes(proto.SerializeToString())
    return path


def _stems() -> list[str]:
    # Byte pairs reach a word through its beginnings.
    return [word[:end] for end in range(2, 8) for word in WORDS if len(word) > end]
