"""Text for messages: values shown safely, and precise errors about ids."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

ID: Final = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
UUID4: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE)
UID: Final = re.compile(r"[0-9a-f]{32}")


def show(value: object) -> str:
    """A value in backticks, control characters as U+…, cut at 80 characters."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    else:
        text = str(value)
    if len(text) > 80:
        text = text[:79] + "…"
    return "`" + "".join(code_point(each) if is_control(each) else each for each in text) + "`"


def is_control(character: str) -> bool:
    """Whether the character is invisible, or controls terminals or text direction."""
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")


def code_point(character: str) -> str:
    """A character as its code point, such as U+0000."""
    return f"U+{ord(character):04X}"


def control_complaint(value: str) -> str | None:
    """The error in a text that may have no control characters; None if it is valid."""
    if value.isprintable():  # Nearly all texts are, and checking 4 MiB is fast.
        return None
    wrong = {each for each in set(value) if is_control(each)}
    for at, each in enumerate(value if wrong else ""):
        if each in wrong:
            return f"{show(value)} has the control character {code_point(each)} at {at}; leave it out"
    return None


def id_complaint(value: str) -> str | None:
    """The error in an id that a user chose; None if it is valid."""
    if ID.fullmatch(value):
        return None
    rule = "an id has 1 to 63 of a-z, 0-9 and -, begins with a letter and ends with a letter or digit"
    if not value:
        return f"an empty id; {rule}; choose one"
    for each in value:
        if "A" <= each <= "Z":
            return f"{show(value)} has the upper case {each}; {rule}; use {show(value.lower()[:63])}"
        if not (each.isascii() and (each.isalnum() or each == "-")):
            shown = "" if is_control(each) else f" ({each})"
            return f"{show(value)} has {code_point(each)}{shown}; {rule}; leave that character out"
    if len(value) > 63:
        return f"{show(value)} has {len(value)} characters; an id has at most 63; shorten it"
    if value[0] == "-" or value[-1] == "-":
        return f"{show(value)} has - first or last; {rule}; use {show(value.strip('-') or 'job')}"
    return f"{show(value)} begins with {value[0]}; {rule}; put a letter first"


def request_id_complaint(value: str, *, required: bool) -> str | None:
    """The error in a request id; None if it is valid."""
    if UUID4.fullmatch(value) or (not value and not required):
        return None
    if not value:
        return "an empty request id; it must be a UUID version 4 that makes the call safe to repeat; make one"
    return f"{show(value)} is not a UUID version 4; make one, such as Python's uuid.uuid4()"
