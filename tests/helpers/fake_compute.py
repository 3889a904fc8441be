"""Functions for compute workers: they answer, fail, take long or much, or die; and questions to a model's process."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from shardyard_trainer.answering.serving import Answerer, Steps, Work
from shardyard_trainer.inputs.text import EncodedText as Encoded
from shardyard_trainer.reading import about, reading
from shardyard_trainer.tasks.base import Parts, at_once


def echo(request: bytes) -> bytes:
    return request


def pid(request: bytes) -> bytes:
    return str(os.getpid()).encode()


def environment(request: bytes) -> bytes:
    """The names of all variables, and of those that the process was started with."""
    started = Path("/proc/self/environ").read_bytes().split(b"\0")
    return b" ".join([*map(os.fsencode, os.environ), *(each.partition(b"=")[0] for each in started)])


def fail(request: bytes) -> bytes:
    raise ValueError(request.decode())


def fail_of_the_system(request: bytes) -> bytes:
    raise OSError(28, "No space left on device")


def fail_of_the_system_in_rust(request: bytes) -> bytes:
    # As tokenizers has it when it saves to a full disk.
    raise Exception("No space left on device (os error 28)")


def sleep(request: bytes) -> bytes:
    time.sleep(float(request))
    return b"awake"


def die(request: bytes) -> bytes:
    about("train_data", "DATA_INVALID")
    reading(request.decode() or "nothing")
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def stop(request: bytes) -> bytes:
    os.kill(os.getpid(), signal.SIGSTOP)
    return b"went on"


def grow(request: bytes) -> bytes:
    block = os.urandom(1024) * (int(request) * 1024)
    time.sleep(30)
    return block[:1]


def spin(request: bytes) -> bytes:
    until = time.monotonic() + float(request or 3600)
    while time.monotonic() < until:
        pass
    return b"tired"


def read(request: bytes) -> bytes:
    """The file of a path, or why it cannot be read."""
    try:
        return Path(request.decode()).read_bytes()
    except PermissionError:
        return b"not allowed"


def write(request: bytes) -> bytes:
    """Writes the file of a path; why it cannot."""
    try:
        Path(request.decode()).write_bytes(b"written")
    except PermissionError:
        return b"not allowed"
    return b"written"


def connect(request: bytes) -> bytes:
    """Connects to a port of this machine."""
    try:
        socket.create_connection(("127.0.0.1", int(request)), timeout=5).close()
    except PermissionError:
        return b"not allowed"
    except ConnectionRefusedError:
        return b"refused"
    return b"connected"


def signal_parent_of_parent(request: bytes) -> bytes:
    """Whether the coordinator's process can be sent a signal."""
    try:
        os.kill(int(request), 0)
    except PermissionError:
        return b"not allowed"
    return b"sent"


def answerer(_settings: bytes) -> Answerer:
    """Questions are words: `size` answers with how many texts were computed together; what the others do, they do to
    all that are computed with them.
    """
    return Answerer({"fake:ask": _ask})


_WORDS = ("size", "die", "fail", "spin", "stop")


def _ask(request: bytes) -> Steps:
    word, _, count = request.decode().partition(" ")
    if word == "pid":
        return str(os.getpid()).encode()
    texts = [Encoded([_WORDS.index(word), 2], [0, 0])] * int(count or 1)
    found = yield Work("size", _turn, texts, range(len(texts)))
    return str(found[0]).encode()


def _turn(some: Sequence[Encoded], _: Sequence[int]) -> Parts:
    return at_once(lambda: _compute(some))


def _compute(some: Sequence[Encoded]) -> list[int]:
    time.sleep(0.02)
    words = {_WORDS[each.ids[0]] for each in some}
    if "die" in words:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stop" in words:
        stop(b"")
    if "fail" in words:
        raise ValueError("no")
    if "spin" in words:
        spin(b"")
    return [len(some)] * len(some)
