"""The clients in other languages under examples/: generated from the protos, and run against a real service."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.repository import ROOT
from helpers.served import Served, served
from helpers.workplace import fill

INSTALL_S = 300


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("languages")
    data = folder / "data"
    data.mkdir()
    fill(data)
    with served(folder / "service", "local", "--data-root", str(data)) as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example for Node.js with its packages and its generated code."""
    if shutil.which("npm") is None:
        pytest.skip("Node.js with npm is not installed")
    folder = tmp_path_factory.mktemp("node") / "node"
    shutil.copytree(ROOT / "examples" / "node", folder, ignore=shutil.ignore_patterns("node_modules", "gen"))
    installed = _run(["npm", "install", "--no-package-lock", "--no-fund", "--no-audit"], folder)
    if installed.returncode:
        pytest.skip(f"its packages cannot be installed: {installed.stderr[-300:]}")
    # As `npm run generate`, which is beside the protos.
    generated = _run(["npx", "buf", "generate", str(ROOT), "--template", "buf.gen.yaml"], folder)
    assert generated.returncode == 0, generated.stderr
    return folder


def test_node_fine_tunes_follows_and_asks(service: Served, node: Path) -> None:
    data = service.folder.parent / "data"
    command = ["node", str(node / "finetune.js"), str(data / "bert"), str(data / "reviews.csv"), "a good film", "bad"]
    for _ in range(2):  # The second time the data is there already.
        done = service.run(*command)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        numbers = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert any("FINALIZING → SUCCEEDED" in line for line in lines)
        assert [line.partition(" ")[0] in {"good", "bad"} for line in lines[-2:]] == [True, True]


def test_node_shows_what_the_service_says_is_wrong(service: Served, node: Path) -> None:
    data = service.folder.parent / "data"
    done = service.run("node", str(node / "finetune.js"), str(data / "none"), str(data / "reviews.csv"), "a film")
    assert done.returncode == 1 and "job.spec.model.uri" in done.stderr and "is not there" in done.stderr


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False)
