"""A folder as a reader of the documentation has one: data, a pretrained model, a running service.

Examples are written for a BERT in `bert/`, labelled reviews in `reviews.csv` (columns `text` and `label`), further
ones in `test.csv`, plain text in `book.txt`. Here they are tiny, so that every example ends in seconds.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import BertModel

from helpers.tiny_folders import WORDS, bert_config, bert_tokenizer

BIN = Path(sys.executable).parent
START_S = 60.0
STOP_S = 30.0


@dataclass(frozen=True)
class Workplace:
    """The folder, the service's address, and the environment that leads the command line to it."""

    folder: Path
    address: str
    environment: dict[str, str]

    def run(self, command: str, *, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a line as a reader would type it."""
        return subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def fill(folder: Path) -> None:
    """Write the files that examples name."""
    rng = random.Random(0)
    reviews = [(" ".join(rng.choices(WORDS[:8], k=6)) + f" {label}", label) for label in ("good", "bad") * 40]
    for name, rows in (("reviews.csv", reviews), ("test.csv", reviews[:16])):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    (folder / "book.txt").write_text("\n".join(text for text, _ in reviews) + "\n", encoding="utf-8")
    (folder / "bert").mkdir()
    BertModel(bert_config()).save_pretrained(folder / "bert")
    bert_tokenizer().save_pretrained(folder / "bert")


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Workplace]:
    """The folder with its files, and a service with the local launcher until the end."""
    home, state = folder / "here", folder / "state"
    home.mkdir()
    fill(home)
    address = f"127.0.0.1:{free_port()}"
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "SHARDYARD_ADDRESS": address,
        "SHARDYARD_STATE_DIR": str(state),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    with (folder / "serve.log").open("wb") as log:
        service = subprocess.Popen(
            [BIN / "shardyard", "serve", "--address", address, "--launcher", "local"],
            cwd=home,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until_it_listens(address, service, folder / "serve.log")
        yield Workplace(home, address, environment)
    finally:
        service.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.wait(timeout=STOP_S)
        service.kill()
        service.wait()


def wait_until_it_listens(address: str, service: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the port accepts connections. Raises RuntimeError with the service's log otherwise."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and service.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"`shardyard serve` did not start: {log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
