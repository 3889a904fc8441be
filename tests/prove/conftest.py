"""What the proofs on real models need: a pretrained BERT from the Python index, and real data."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.served import Served, served, state_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def bert() -> Path:
    """The folder of the real pretrained BERT of the quickstart; skips if it cannot be had."""
    return fetched("bert_folder")


@pytest.fixture(scope="session")
def bert_tiny() -> Path:
    """The folder of BERT-tiny, with 4.4 million parameters; skips if it cannot be had."""
    return fetched("bert_tiny_folder")


def fetched(function: str) -> Path:
    """What a function of the quickstart's assets fetches; skips if it cannot be had."""
    done = subprocess.run(
        [sys.executable, "-c", f"import assets; print(assets.{function}())"],
        cwd=ROOT / "examples" / "quickstart",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the pretrained BERT cannot be had: {done.stderr.strip().splitlines()[-1]}")
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def service() -> Iterator[Served]:
    """A service with its embedded Ray."""
    folder = state_dir()
    with served(folder, "ray") as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)
