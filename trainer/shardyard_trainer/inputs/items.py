"""Items: the catalogue of a model, and histories as its tokens; token 0 is the padding, the first item is 1."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import MAX_VOCABULARY_BYTES, Folder, FolderInvalid
from shardyard_trainer.models.folder import ModelFolder

ITEMS_FILE = "items.json"
PADDING = 0


@dataclass(frozen=True)
class EncodedHistory:
    """A history as tokens: `ids` for the model, `seen` all of them, `unknown` the items without a token."""

    ids: list[int]
    seen: list[int]
    unknown: list[str]

    @property
    def num_positions(self) -> int:
        """The number of items that the model sees."""
        return len(self.ids)


@dataclass(frozen=True)
class ItemInputs:
    """The catalogue in the order of its tokens, and the number of latest items that the model sees.

    `masks`: the token after the last item is the mask.
    """

    items: tuple[str, ...]
    max_history: int
    masks: bool = False
    files: ClassVar[tuple[str, ...]] = (ITEMS_FILE,)

    @property
    def num_tokens(self) -> int:
        """The padding, all items, and the mask if there is one."""
        return len(self.items) + 1 + self.masks

    @classmethod
    def load(cls, source: Folder, described: ModelFolder) -> Self:
        """Reads the catalogue of a model folder. Raises FolderInvalid."""
        if not source.has(ITEMS_FILE):
            raise FolderInvalid(f"the folder has no {ITEMS_FILE}, the catalogue of its items", file=ITEMS_FILE)
        found = source.read_json(ITEMS_FILE, most_bytes=MAX_VOCABULARY_BYTES)
        if not isinstance(found, dict) or found.get("format") != 1:
            raise _wrong("is not an object of format 1")
        items, longest = found.get("items"), found.get("max_history")
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
            raise _wrong("has items that are not a list of ids")
        if len({*items}) < len(items):
            doubled = next(item for at, item in enumerate(items) if item in items[:at])
            raise _wrong(f"has the item {shorten(doubled)!r} twice")
        if type(longest) is not int or longest < 1:
            raise _wrong(f"has max_history {shorten(str(longest))!r}, which is not a number from 1 on")
        mask = found.get("mask")
        if mask not in (None, len(items) + 1):
            raise _wrong(f"has the mask {shorten(str(mask))}, which is not the token after the last item")
        made = cls(tuple(items), longest, mask is not None)
        if (size := described.config.get("vocab_size")) != made.num_tokens:
            shown = shorten(str(size))
            raise _wrong(f"has {len(items):,} items, so the model needs {made.num_tokens:,} tokens, but it has {shown}")
        return made

    @staticmethod
    def refusal(config: Any) -> str:
        """Why a model of this configuration cannot read histories; empty if it can."""
        return architectures.refusal(config)

    def save(self, folder: Path, config: Any) -> None:
        """Writes the catalogue as items.json."""
        mask = {"mask": len(self.items) + 1} if self.masks else {}
        content = {"format": 1, "max_history": self.max_history, **mask, "items": list(self.items)}
        (folder / ITEMS_FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")

    def generation(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Empty: no token ends a history."""
        return {"pad_token_id": PADDING}

    def encode(self, history: Sequence[str]) -> EncodedHistory:
        """Encodes a history, the latest item last; items outside the catalogue are skipped."""
        tokens = [token for item in history if (token := self._tokens.get(item)) is not None]
        unknown = dict.fromkeys(item for item in history if item not in self._tokens)
        return EncodedHistory(tokens[-self.max_history :], sorted({*tokens}), list(unknown))

    @cached_property
    def _tokens(self) -> dict[str, int]:
        return {item: token for token, item in enumerate(self.items, start=1)}


def _wrong(what: str) -> FolderInvalid:
    return FolderInvalid(f"{ITEMS_FILE} {what}; take the folder as exported", file=ITEMS_FILE)
