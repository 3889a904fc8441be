"""The one rule of what a text may consist of: what no tokenizer and no other program can read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unreadable(value: Any) -> str:
    """What a text, or any text in nested lists and objects, has that cannot be read, and the next step; else empty."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            if fault := _fault(each):
                return fault
        elif isinstance(each, Mapping):
            left += [*each.values(), *each]
        elif isinstance(each, list | tuple):
            left += each
    return ""


def _fault(text: str) -> str:
    if "\0" in text:
        return "a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair; write the whole character"
    return ""
