"""The last check of a text before it is sent: it must reveal nothing about this machine.

Our own messages reveal nothing. But some include a sentence of a library, which may name an address in memory, a file
of the installation, or a package to install: nothing that a caller could use, and more than a caller should know.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from shardyard_coordinator.redaction import redacted

log = logging.getLogger(__name__)

_LIBRARY: Final = "a library"
_INSTEAD: Final = "the service's log has the details"
_TRACES: Final = re.compile(r"Traceback|File \"|0x[0-9a-fA-F]{6}|-packages/|lib/python|\.so\b|\b(?:install|add)\b")
_TRACEBACK: Final = re.compile(r"Traceback \(most recent call last\):.*", re.DOTALL)
_FRAME: Final = re.compile(r"File \"[^\"]*\", line \d+(?:, in [\w.<>]+)?")
_OBJECT: Final = re.compile(r" at 0x[0-9a-fA-F]{6,16}\b")
_ADDRESS: Final = re.compile(r"\b0x[0-9a-fA-F]{8,16}\b")
_WORD: Final = re.compile(r"[^\s'\"`(),;:]+(?::\d+\b)?")
_INSTALLED: Final = re.compile(r"/(?:site|dist)-packages/|/lib/python[0-9.]+/")
_SHARED_OBJECT: Final = re.compile(r"\.so(?:\.\d+)*(?::\d+)?$")
_SENTENCE: Final = re.compile(r"(?<=[.;\n])\s+")
# Advice to install one of our own extras stays.
_ADVICE: Final = re.compile(
    r"\b(?:pip3?|conda|mamba|apt|apt-get|brew|uv)\s+(?:pip\s+)?(?:install|add)\b(?!\s*['\"`]?shardyard)"
)


def scrub(text: str) -> str:
    """The text without secrets, and without addresses, paths of libraries, tracebacks and advice to install packages,
    which the log keeps.
    """
    text = redacted(text)
    if not _TRACES.search(text):
        return text
    cleaned = _TRACEBACK.sub(_INSTEAD, text)
    cleaned = _OBJECT.sub("", _FRAME.sub(_LIBRARY, cleaned))
    cleaned = _ADDRESS.sub("an address", cleaned)
    cleaned = _WORD.sub(lambda word: _LIBRARY if _is_of_a_library(word[0]) else word[0], cleaned)
    if _ADVICE.search(cleaned):
        cleaned = " ".join(each for each in _SENTENCE.split(cleaned) if not _ADVICE.search(each))
    if cleaned == text:
        return text
    log.warning("a message was cleaned before it left: %r", text[:2000])
    return cleaned.strip() or _INSTEAD


def _is_of_a_library(word: str) -> bool:
    """Two searches: one for a slash and a later `.so` would take quadratic time on a word full of slashes."""
    if _INSTALLED.search(word):
        return True
    found = _SHARED_OBJECT.search(word)
    return found is not None and "/" in word[: found.start()]
