"""The tasks of a specification that pretrain on unlabelled data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shardyard.spec_sources import set_fields as _set

Split = Literal["leave_one_out", "time", "leave_two_out"]


@dataclass(frozen=True)
class CausalLm:
    """Pretraining: predict the next token."""

    sequence_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"pretraining": {"causal_lm": _set(self)}}


@dataclass(frozen=True)
class MaskedLm:
    """Pretraining: predict masked tokens."""

    mask_probability: float | None = None
    whole_word: bool | None = None
    sequence_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"pretraining": {"masked_lm": _set(self)}}


@dataclass(frozen=True)
class MaskedImage:
    """Pretraining: predict the masked parts of pictures, which need no labels."""

    image_size: int | None = None
    mask_patch: int | None = None
    mask_ratio: float | None = None
    crop_scale: float | None = None
    flip: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"pretraining": {"masked_image": _set(self)}}


@dataclass(frozen=True)
class MaskedItem:
    """Pretraining: predict masked items of users' histories. The data is that of `Recommendation`."""

    mask_probability: float | None = None
    max_history: int | None = None
    min_user_interactions: int | None = None
    min_item_interactions: int | None = None
    min_rating: float | None = None
    split: Split | None = None
    exclude_seen: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"pretraining": {"masked_item": _set(self)}}


@dataclass(frozen=True)
class SpanCorruption:
    """Pretraining of an encoder-decoder: write the spans that are missing in a text, as T5 was trained."""

    density: float | None = None
    mean_span_length: float | None = None
    sequence_length: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """In the form of a spec file."""
        return {"pretraining": {"span_corruption": _set(self)}}
