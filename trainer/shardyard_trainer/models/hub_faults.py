"""What the code of a repository of PyTorch Hub fails at, in words for the person who named it."""

from __future__ import annotations

import contextlib
import re
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import FolderInvalid

HUBCONF = "hubconf.py"

_ADVICE = "correct it there, or give other arguments"
_LONGEST = 300
_PATH = re.compile(r"(?<![\w:/.])/(?:[^\s'\"/]+/)+")
_DOWNLOADERS = re.compile(r"/(?:urllib|urllib3|requests|httpx|huggingface_hub|gdown|wget)(?:/|\.py$)")


class HubCodeFailed(FolderInvalid):
    """The code of a repository gives no model; `part` is the field of the source that it is about."""

    def __init__(self, message: str, *, part: str, **metadata: str) -> None:
        super().__init__(message, **metadata)
        self.part = part


@contextlib.contextmanager
def said_of(code: Path, part: str, doing: str) -> Iterator[None]:
    """Whatever the code in `code` raises becomes HubCodeFailed, with what it was `doing` and where it is."""
    try:
        yield
    except (MemoryError, FolderInvalid):
        raise
    except (Exception, SystemExit) as error:  # edge: code of others may raise anything.
        raise HubCodeFailed(
            f"{doing} raises {type(error).__name__}: {_words(error, code) or 'without a word'}{_place(error, code)}; "
            f"{_advice(error, code)}",
            part=part,
            file=HUBCONF,
        ) from None


def _words(error: BaseException, code: Path) -> str:
    """The message with files named as the repository has them, and others without their folders."""
    text = " ".join(_PATH.sub("", str(error).replace(f"{code}/", "")).split())
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:_LONGEST])


def _place(error: BaseException, code: Path) -> str:
    """The last line of the repository's own code on the way to an error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(code):
            return f" ({path.relative_to(code)}, line {frame.lineno})"
    return ""


def _advice(error: BaseException, code: Path) -> str:
    """What to do about an error: one on the way to a download asks for the file."""
    below = _below(error, code)
    of_hub = {name: values for file, name, values in below if file.endswith("/torch/hub.py")}
    if "load_state_dict_from_url" in of_hub or "download_url_to_file" in of_hub:
        if any(file.endswith("/torch/serialization.py") for file, _, _ in below):
            return "the file is there but cannot be read so: have the operator fetch it again, or correct the code"
        named = of_hub.get("load_state_dict_from_url", {}).get("filename")
        name = named or Path(str(of_hub.get("download_url_to_file", {}).get("dst", "the file"))).name
        return (
            f"nothing is downloaded here: have the operator put {shorten(str(name))} into torch's cache "
            "(hub/checkpoints), then submit again"
        )
    if "load" in of_hub:
        other = shorten(str(of_hub["load"].get("repo_or_dir")))
        return f"nothing is downloaded here, {other} neither: put its code into this repository, and call it there"
    if isinstance(error, URLError | ConnectionError | socket.gaierror) or any(
        _DOWNLOADERS.search(file) for file, _, _ in below
    ):
        return (
            "nothing is downloaded here: have the operator put the file into torch's cache (hub/checkpoints), and the "
            "code load it from there (torch.hub.load_state_dict_from_url)"
        )
    return _ADVICE


def _below(error: BaseException, code: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """File, function and variables of the calls that the repository's own code made on the way to an error."""
    frames = [
        (frame.f_code.co_filename, frame.f_code.co_name, frame.f_locals)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    own = [index for index, (file, _, _) in enumerate(frames) if Path(file).is_relative_to(code)]
    return frames[own[0] + 1 :] if own else []
