"""A rank that only tries what `looks.json` in its attempt's folder lists, and writes what came of it.

Started by the local launcher in the place of the trainer.
"""

from __future__ import annotations

import getpass
import importlib
import json
import os
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import shared_memory
from pathlib import Path

from shardyard.worker.v1 import worker_pb2


def main() -> None:
    """Writes `seen.json` beside `looks.json`: `done`, or the error's name, for each."""
    folder = Path(sys.argv[1]).parent
    looks = json.loads((folder / "looks.json").read_text())
    seen = [_try(VERBS[verb], Path(path)) for verb, path in looks]
    (folder / "seen.json").write_text(json.dumps(seen))


def _try(verb: Callable[[Path], str | object], path: Path) -> str:
    try:
        found = verb(path)
    except OSError as error:
        return type(error).__name__
    return found if isinstance(found, str) else "done"


def _share(path: Path) -> None:
    shared = shared_memory.SharedMemory(name=path.name, create=True, size=4096)
    shared.close()
    shared.unlink()


def _meet(_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname()).close()


def _put(path: Path) -> None:
    """As the trainer does with an export: written next to its final place, then renamed."""
    staging = path.with_name(f".{path.name}.e000001")
    (staging / "model.safetensors").write_text("weights")
    staging.rename(path)


def _put_features(path: Path) -> None:
    """As the trainer does with features: from the job's folder to their place."""
    made = Path(sys.argv[1]).parent.parent / "features"
    made.mkdir()
    (made / "part-0.parquet").write_text("rows")
    made.rename(path)


def _ask_claim(path: Path) -> str:
    from shardyard_trainer.claim import missing_storage  # torch.

    failure = missing_storage(worker_pb2.Locations(claim=worker_pb2.StorageClaim(path=str(path), store_id="ours")))
    return failure.cause if failure is not None else "done"


def _name_thread(_path: Path) -> None:
    """As CUDA does when it starts, which fails if that does."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        Path(f"/proc/self/task/{thread.native_id}/comm").write_text("cuda")
    finally:
        ended.set()


def _make_device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o060000, os.makedev(7, 0))


def _start(_path: Path) -> str:
    return "warm" if "compute_worker" in Path("/proc/self/cmdline").read_text() else "cold"


def _order(path: Path) -> str:
    """Asks a `fork_server` for a rank with all rights, with what a confined rank can have of its folder."""
    folder = os.open(path, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as caller, open(os.devnull, "wb") as null:
        caller.connect(f"/proc/self/fd/{folder}/socket")
        socket.send_fds(caller, [b"\0"], [folder, null.fileno(), null.fileno(), null.fileno()])
        order = json.dumps({"program": "this", "arguments": [], "environment": dict(os.environ), "rights": {}}).encode()
        caller.sendall(struct.pack(">I", len(order)) + order)
        answer = caller.recv(65_536)[4:]
    os.close(folder)
    return next(iter(json.loads(answer or b"{}")), "nothing")


def _count_descriptors(_path: Path) -> str:
    """Beside the one that lists them."""
    return str(sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1)


VERBS: dict[str, Callable[[Path], object]] = {
    "start": _start,
    "read": Path.read_bytes,
    "list": os.listdir,
    "write": lambda path: path.write_text("written"),
    "remove": Path.unlink,
    "temporary": lambda _path: tempfile.TemporaryFile().close(),
    "share": _share,
    "meet": _meet,
    "put": _put,
    "put features": _put_features,
    "make device": _make_device,
    "name thread": _name_thread,
    "import": lambda path: bool(importlib.import_module(path.name)),
    "ask name": lambda _path: bool(getpass.getuser()),
    "claim": _ask_claim,
    "order": _order,
    "signal": lambda path: os.kill(int(path.name), 0),
    "descriptors": _count_descriptors,
}

if __name__ == "__main__":
    main()
