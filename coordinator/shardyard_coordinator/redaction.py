"""Texts without secrets and on one line: for the log, for traces, and for errors that repeat a setting."""

from __future__ import annotations

import re
from typing import Final

_SECRETS: Final = re.compile(
    r"(?i)\b(?:sy|hf|ghp|gho|github_pat|glpat|xox[abp]|sk)[_-][A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"
    r"|(?<=bearer )\S+|(?<=basic )[A-Za-z0-9+/=]{8,}|(?<=://)[^/\s@]+:[^/\s@]+(?=@)"
    r"|(?<=token=)[^&\s\"']+|(?<=password=)[^&\s\"']+|(?<=secret=)[^&\s\"']+|(?<=signature=)[^&\s\"']+"
)
_KEYS: Final = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


def redacted(text: str) -> str:
    """The text without what looks like a secret: tokens, keys, passwords in URLs."""
    return _SECRETS.sub("…", _KEYS.sub("…", text))


def one_line(text: str) -> str:
    """The text on one line: every control character, and every separator of lines, is shown as its code."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
