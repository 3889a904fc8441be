"""States that earlier versions left behind: made by their own code, kept as text, and restored for tests.

`python tests/helpers/old_states.py COMMIT` checks that commit out beside this repository, lets its service finish one
job, train another, and keep a third waiting, kills it, and writes what is left to `tests/states/COMMIT/`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

STATES = Path(__file__).resolve().parent.parent / "states"
# Messages contain paths and their lengths: a state is restored to a folder whose name is as long.
_PREFIX = "/tmp/sy-old-"
_MADE_AT = f"{_PREFIX}00000000"
_LEFT_OUT = (".log", ".lock", "-wal", "-shm")

_STORY = """
import pathlib, sys
import shardyard
folder, address = pathlib.Path(sys.argv[1]), sys.argv[2]
corpus = folder / "corpus.txt"
corpus.write_text("\\n".join(f"line {n} of the corpus" for n in range(60)) + "\\n")
def spec(steps):
    return shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=16),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 1, "n_embd": 8}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=corpus,
        optimization=shardyard.Optimization(max_steps=steps, global_batch_size=2),
    )
with shardyard.Client(address) as client:
    client.submit(spec(4), job_id="finished").wait(timeout=120)
    running = client.submit(spec(100_000), job_id="unfinished")
    client.submit(spec(5), job_id="waiting")
    for event in running.watch():
        if event.progress is not None and event.progress.step > 2:
            break
"""


def states() -> list[str]:
    """The commits whose states are kept, the oldest first."""
    return (STATES / "ORDER").read_text().split()


def restore(commit: str) -> Path:
    """A new folder with what that version left: `state`, and the storage in it. The caller removes it."""
    folder = Path(tempfile.mkdtemp(prefix=Path(_PREFIX).name, dir=Path(_PREFIX).parent))
    assert len(str(folder)) == len(_MADE_AT)
    state = folder / "state"
    for path, content in json.loads((STATES / commit / "files.json").read_text()).items():
        target = state / path
        if content is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        found = zlib.decompress(base64.b64decode(content))
        target.write_bytes(found.replace(_MADE_AT.encode(), str(folder).encode()) if path.endswith(".json") else found)
    script = (STATES / commit / "store.sql").read_text()
    script = script.replace(_MADE_AT, str(folder)).replace(_MADE_AT.encode().hex().upper(), str(folder).encode().hex())
    with sqlite3.connect(state / "store.db") as database:
        database.executescript(script)
    database.close()
    return folder


def make(commit: str) -> None:
    """Writes `tests/states/COMMIT/`, by that commit's own code."""
    tree, folder = Path(tempfile.mkdtemp()) / "tree", Path(_MADE_AT)
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), commit], cwd=STATES.parent, check=True)
    folder.mkdir(mode=0o700)
    try:
        _live(tree, folder)
        _keep(folder / "state", STATES / commit)
    finally:
        shutil.rmtree(folder)
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=STATES.parent, check=True)


def _live(tree: Path, folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(tree / root) for root in ("client", "coordinator", "trainer")),
        "SHARDYARD_STATE_DIR": str(folder / "state"),
        "SHARDYARD_LISTEN": address,
        "SHARDYARD_LAUNCHER": "local",
        "SHARDYARD_CPUS": "1",
    }
    service = subprocess.Popen(
        [sys.executable, "-m", "shardyard_coordinator.main"], env=environment, cwd=folder, start_new_session=True
    )
    try:
        time.sleep(5)
        story = [sys.executable, "-c", _STORY, str(folder), address]
        subprocess.run(story, env=environment, cwd=folder, check=True, timeout=240)
    finally:
        os.killpg(service.pid, signal.SIGKILL)
        service.wait()
    time.sleep(1)  # Its gang ends with it.


def _keep(state: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(state / "store.db")
    (target / "store.sql").write_text("\n".join(database.iterdump()) + "\n")
    (finished,) = database.execute("SELECT uid FROM job WHERE job_id = 'finished'").fetchone()
    database.close()
    files: dict[str, str | None] = {}
    for path in sorted((state / "storage").rglob("*")):
        name = str(path.relative_to(state))
        if "/cache/" in name or name.endswith(_LEFT_OUT) or f"/{finished}/e000001/step-" in name:
            continue
        if path.is_dir():
            files[name] = None
        else:
            files[name] = base64.b64encode(zlib.compress(path.read_bytes(), 9)).decode()
    (target / "files.json").write_text(json.dumps(files, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    make(sys.argv[1])
