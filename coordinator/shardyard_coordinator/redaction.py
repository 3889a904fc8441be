"""Texts without secrets and on one line: for the log, for traces, and for errors on their way to a caller."""

from __future__ import annotations

import re
from typing import Final

# Of known forms and lengths, so that names such as `hf-internal-testing/tiny-random-bert` and `sk-learn` stay readable.
_TOKENS: Final = (
    r"sy_[a-z2-7]{12}_[A-Za-z0-9_-]{4,}"  # This service's; four letters, because an error may have cut it.
    r"|hf_[A-Za-z0-9]{30,}"
    r"|sk-(?=[A-Za-z]*[0-9])[A-Za-z0-9]{32,}|sk-(?:proj|svcacct|admin)-[A-Za-z0-9_-]{40,}"
    r"|sk-ant-[a-z]+[0-9]{2}-[A-Za-z0-9_-]{80,}|sk-or-v1-[0-9a-f]{64}|[rs]k_(?:live|test)_[A-Za-z0-9]{24,}"
    r"|gh[opsur]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,}|glpat-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[A-Za-z0-9_-]{35}"
    r"|eyJ[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]*){0,2}"  # A JWT, or what is left of one.
)
# Settings of tokenizers, and of lists.
_PLAIN: Final = "".join(f"(?<!{name}_token=)" for name in ("bos", "cls", "eos", "mask", "pad", "page", "sep", "unk"))
_SECRETS: Final = re.compile(
    rf"(?<![A-Za-z0-9])(?:{_TOKENS})"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{16,}|(?<=[Bb]asic )(?=[a-z+/]*[A-Z0-9=])[A-Za-z0-9+/=]{8,}"
    rf"|(?i:(?<=token=){_PLAIN}|(?<=password=)|(?<=secret=)|(?<=signature=))[^&\s\"'`]+"
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
