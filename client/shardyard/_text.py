"""Users' text: what can be sent, and how it is shown if it is refused."""

from __future__ import annotations

import re
from typing import Any

# Python keeps bytes that are not UTF-8 (arguments, file names) as U+DC80 to U+DCFF; no encoding has any of these.
_LONE = re.compile("[\ud800-\udfff]")


def is_utf8(text: str) -> bool:
    """Whether the text can be written as UTF-8, as every message is."""
    return _LONE.search(text) is None


def not_utf8(text: str, next_step: str = "write it in UTF-8") -> str:
    """The sentence about a text that is not UTF-8."""
    return f"{shown(text)} is not UTF-8; {next_step}"


def shown(item: Any) -> str:
    """A value for an error message, shortened if it is long."""
    text = escaped(str(item) if isinstance(item, str) else repr(item))
    return f"`{text if len(text) <= 80 else text[:77] + '…'}`"


def escaped(text: str) -> str:
    r"""The text with bytes that are not UTF-8 as `\xff`: a message must be printable anywhere."""
    return _LONE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
