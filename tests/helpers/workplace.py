"""A folder as a reader of the documentation has one: data, a pretrained model, a running service.

Examples are written for a BERT in `bert/`, labelled reviews in `reviews.csv` (columns `text` and `label`), further
ones in `test.csv`, plain text in `book.txt`. Here they are tiny, so that every example ends in seconds.
"""

from __future__ import annotations

import contextlib
import csv
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import BertModel

from helpers.served import free_port, served, wait_until_it_listens
from helpers.tiny_folders import WORDS, bert_config, bert_tokenizer

_HTTP = "127.0.0.1:7480"
_SERVER_FOLDER = "/srv/data"


@dataclass(frozen=True)
class Workplace:
    """The folder, the service's addresses, and the environment that leads the command line to it."""

    folder: Path
    address: str
    http: str
    environment: dict[str, str]

    def here(self, text: str) -> str:
        """A text of a page, for this place: pages have the usual address for HTTP, and a folder of a server."""
        return text.replace(_HTTP, self.http).replace(_SERVER_FOLDER, str(self.folder))

    def run(self, command: str, *, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a line as a reader would type it."""
        return subprocess.run(
            ["bash", "-ec", self.here(command)],
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
    home = folder / "here"
    home.mkdir()
    fill(home)
    http = f"127.0.0.1:{free_port()}"
    options = ("--http", http, "--data-root", str(home), "--webhook-allow", "127.0.0.1")
    with served(folder / "service", "local", *options) as service:
        assert service.process is not None
        wait_until_it_listens(http, service.process, service.folder / "serve.log")
        yield Workplace(home, service.address, http, service.environment)
