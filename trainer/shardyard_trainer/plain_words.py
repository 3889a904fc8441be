"""Errors of other libraries about a bad file, in words for its user.

Their messages come with native addresses, paths of this machine, links and advice to install something: none of that
is the user's. A panic of a Rust extension is not an `Exception`; it becomes one here, the fault of the input that
caused it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LONGEST = 300
_ADVICE = re.compile(
    r"pip3? install|conda install|https?://|huggingface\.co|\bgithub\b|site-packages|Traceback|environment", re.I
)
_ADDRESS = re.compile(r"\s*(?:at\s+)?0x[0-9a-fA-F]{4,}")
# The prefix of transformers' own checks of a configuration.
_CHECKED = re.compile(r"^(?:Class v|V)alidation error for (?:field|validator) '\w+':\s*(?:\w+(?:Error|Exception):\s*)?")
_KIND = re.compile(r"^Field '(\w+)' expected (.+?), got (\w+) \(value: (.*)\)$")
_OBJECT = re.compile(r"<(?:class|module|function|built-in function|bound method) '?([\w.]+)[^>]*>")
_PATH = re.compile(r"(?<![\w.<>/])/(?:[^\s'\"`:,;()<>]+/)*([^\s'\"`:,;()<>/]+)/?")
# A sentence ends before a capital letter, so that `1.5 is` and `config.json` stay in one piece.
_SENTENCES = re.compile(r"(?<=[.!?])\s+(?=[A-Z`'\"(])|\n+")


def in_plain_words(error: BaseException) -> str:
    """The message of an error in one line, without addresses, paths and advice; its type if nothing is left."""
    sentences = [" ".join(part.split()) for part in _SENTENCES.split(str(error))]
    text = " ".join(part for part in sentences if part and not _ADVICE.search(part))
    text = _KIND.sub(r"\1 is \4, but must be \2; correct it, or leave it out", _CHECKED.sub("", text))
    text = _OBJECT.sub(lambda match: match[1].rpartition(".")[2], text)
    text = _PATH.sub(lambda match: match[1], _ADDRESS.sub("", text))
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) or type(error).__name__
    # Some begin with a whole module and end with the error.
    return text if len(text) <= _LONGEST else f"{text[:140]} … {text[-150:]}"


def is_panic(error: BaseException) -> bool:
    """Whether a Rust extension panicked: its exception has a class of its own that nothing exports."""
    return type(error).__name__ == "PanicException"


@contextmanager
def panics_raise(fault: Callable[[str], Exception]) -> Iterator[None]:
    """A panic inside becomes `fault` of a plain sentence; everything else passes.

    What the panic says is of the library's own code (slices, buffers, map keys), and of no help to who gave the file.
    """
    try:
        yield
    except BaseException as error:  # edge: a panic derives from BaseException, and would end the process
        if not is_panic(error):
            raise
        raise fault("the library that reads it gives up") from None
