"""The processes of a Compute: `python -m ...compute_worker --warm a,b --fd N --confine JSON --ranks FOLDER`.

`--warm-ranks c,d`: what ranks need beside that.

The first one imports the modules of `--warm`, forks the server that starts ranks (`fork_server`, with a folder), gives
up every right that opening clients' files does not need (`confine`), and from then on only forks: one process for each
inspection, and one for each model that answers.
It stays single-threaded and opens nothing itself, so that a fork is a copy without locks that nobody holds.

Orders come as packets on the socket, one JSON object each, a fork's with its end of a stream as a file descriptor:
{"serve", "memory_bytes", "network"} is answered {"pid"}, or {"errno"} if the kernel has no process more, and
{"end": pid} with how it ended: {"status"}. The first
packet, sent unasked, is {"ready": true, "confinement": {…}, "folders": [[device, inode], …], "ranks": pid}: what it was
confined to, and the process that keeps the server of ranks (0: none), which is ended as a fork is.
A fork reads and writes frames on its stream: see `inspect` and `serve`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from shardyard_coordinator.launch import confine
from shardyard_coordinator.launch.fork_server import fork_server, go_first, make_ready_to_fork
from shardyard_coordinator.launch.frames import Header, frame, pack, receive_frame, unpack
from shardyard_coordinator.launch.guard import bind_to
from shardyard_coordinator.launch.heritage import Origin

READING_FUNCTION = "shardyard_trainer.reading:listen"
_PACKET_BYTES = 64 * 1024
# Less than the coordinator waits for the answer to an order.
_GONE_S = 3.0
# Shorter parts of a secret are words such as `=` and would make errors unreadable.
_SHORTEST_SECRET = 6


def main() -> None:
    """Imports, confines itself, reports that, then forks on request until the socket is closed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--warm", default="")
    parser.add_argument("--confine", default="{}")
    parser.add_argument("--ranks", default="")
    parser.add_argument("--warm-ranks", default="")
    parser.add_argument("--fd", type=int, required=True)
    arguments = parser.parse_args()
    control = socket.socket(fileno=arguments.fd)
    origin = Origin.now()
    for module in filter(None, arguments.warm.split(",")):
        importlib.import_module(module)
    ranks = 0
    if arguments.ranks:
        ranks = fork_server(Path(arguments.ranks), [*filter(None, arguments.warm_ranks.split(","))], control, origin)
    go_first()
    wanted = json.loads(arguments.confine)
    _make_folders(wanted)
    # Read before the rules are made, so that a folder exchanged meanwhile never looks unchanged.
    named = [*wanted.get("reads", ()), *wanted.get("writes", ())]
    folders = confine.identities(named if confine.landlock_version() else ())
    confinement = _confine(wanted)
    make_ready_to_fork()
    ready = {"ready": True, "confinement": confinement, "folders": folders, "ranks": ranks}
    control.send(json.dumps(ready).encode())
    _fork_on_order(control)


def _make_folders(wanted: dict[str, Any]) -> None:
    for folder in map(Path, wanted.get("writes", ())):
        # Only inside existing folders: nothing is made below a mount point whose mount is missing.
        if str(folder.parent) in wanted["writes"] and folder.parent.is_dir():
            folder.mkdir(exist_ok=True, mode=0o700)


def _confine(wanted: dict[str, Any]) -> dict[str, str]:
    """Gives up the rights; without `writes` it does nothing."""
    if "writes" not in wanted:
        return {}
    try:
        holds = confine.confine(wanted["reads"], wanted["writes"], hidden=wanted["hidden"], ports=wanted["ports"])
    except OSError as error:
        holds = {"landlock": f"not available: {error.strerror}", "files": "all that the account may read"}
    return holds


def _fork_on_order(control: socket.socket) -> None:
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, _PACKET_BYTES, 1)
        if not data:
            return
        order = json.loads(data)
        answer = _end(order["end"]) if "end" in order else _fork(order, descriptors[0], control)
        control.send(json.dumps(answer).encode())


def _fork(order: dict[str, Any], descriptor: int, control: socket.socket) -> dict[str, Any]:
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(descriptor)
        return {"errno": error.errno}
    if pid:
        os.close(descriptor)
        return {"pid": pid}
    status = 1
    try:
        control.close()
        bind_to(parent)
        confine.limit_memory(order["memory_bytes"])
        if not order["network"]:
            confine.forbid_network()
        channel = socket.socket(fileno=descriptor)
        if order["serve"]:
            serve(channel, order["serve"])
        else:
            inspect(channel)
        status = 0
    except BaseException:  # edge: an exception of a fork must not continue in its parent's code.
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: at exit some libraries join threads that the fork does not have.
        os._exit(status)


def _end(pid: int) -> dict[str, Any]:
    """Ends a fork, unless it has ended; returns how it ended."""
    until = time.monotonic() + _GONE_S
    done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        os.kill(pid, signal.SIGKILL)
    while not done and time.monotonic() < until:
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    return {"status": os.waitstatus_to_exitcode(status) if done else None}


def inspect(channel: socket.socket) -> None:
    """Answers until the stream is closed: {"function", "cpu_s"} and a body come in; with "secrets", values by name.

    Out go {"reading": {"field", "what", "reason"}} while it works, whenever it begins with another file, and then
    {"ok": true} with the answer, or {"ok": false, "error": traceback, "kind"}: `memory`, `system` (an OSError), or
    `raised`.
    """
    resolve(READING_FUNCTION)(lambda note: channel.sendall(frame(pack({"reading": note}))))
    while (request := receive_frame(channel)) is not None:
        header, body = unpack(request)
        confine.limit_cpu(header["cpu_s"])
        channel.sendall(frame(answer(header["function"], body, header.get("secrets", {}))))


def answer(function: str, body: bytes, secrets: Mapping[str, str | None]) -> bytes:
    """Calls a function, with the values of secrets if there are any; returns the payload of the answer's frame."""
    reply: Header = {"ok": True}
    result = b""
    try:
        result = resolve(function)(body, secrets=secrets) if secrets else resolve(function)(body)
    except BaseException as error:  # edge: a panic of a Rust library is not an Exception.
        kind = "memory" if isinstance(error, MemoryError) else "system" if is_of_the_system(error) else "raised"
        reply = {"ok": False, "error": without_values(traceback.format_exc(), secrets), "kind": kind}
    return pack(reply, result)


def without_values(text: str, secrets: Mapping[str, str | None]) -> str:
    """The text without each line of a secret, and each word of it: an error may repeat a part."""
    words = {word for value in secrets.values() if value for word in (*value.splitlines(), *value.split())}
    for word in sorted((word for word in words if len(word) >= _SHORTEST_SECRET), key=len, reverse=True):
        text = text.replace(word, "…")
    return text


def is_of_the_system(error: BaseException) -> bool:
    """Whether it is an error of the operating system. Rust libraries only say so at the end of their text."""
    return isinstance(error, OSError) or re.search(r"\(os error \d{1,4}\)$", str(error)) is not None


def serve(channel: socket.socket, factory: str) -> None:
    """Answers many questions at once with the object of `factory`, until the stream is closed.

    {"id", "function", "caller", "alone"} and a body come in, or {"cancel": id}. {"computing": [ids]} goes out before
    each part of the work, {"resting": true} when there is none, and for each question {"id", "ok"} with its answer, or
    with its error as `inspect` has it. The object has `add`, `cancel`, `busy`, `choose` and `compute`.
    """
    answerer: Any = resolve(factory)(b"")
    resting = True
    while True:
        # While there is work it is only looked for more; and a little is waited for what comes at the same time.
        while not answerer.busy or select.select([channel], [], [], answerer.patience_s)[0]:
            if not resting and not answerer.busy:
                channel.sendall(frame(pack({"resting": True})))
                resting = True
            request = receive_frame(channel)
            if request is None:
                return
            header, body = unpack(request)
            if "cancel" in header:
                answerer.cancel(header["cancel"])
            else:
                answerer.add(header["id"], header["function"], tuple(header["caller"]), body, alone=header["alone"])
        channel.sendall(frame(pack({"computing": answerer.choose()})))
        resting = False
        for number, result, error in answerer.compute():
            reply: Header = {"id": number, "ok": error is None}
            if error is not None:
                kind = "memory" if isinstance(error, MemoryError) else "raised"
                text = "".join(traceback.format_exception(error))
                reply |= {"error": text, "kind": kind}
            channel.sendall(frame(pack(reply, result)))


def resolve(function: str) -> Callable[..., Any]:
    """The function that `package.module:name` names."""
    module, _, name = function.partition(":")
    return cast(Callable[..., Any], getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    main()
