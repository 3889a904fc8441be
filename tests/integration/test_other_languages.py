"""The clients in other languages under examples/: generated from the protos, and run against a real service."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from helpers.repository import ROOT
from helpers.served import BIN, Served, served
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


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example for Go, built: with modules from a proxy, or (GO111MODULE=off) with a system's sources in GOPATH."""
    missing = [name for name in ("go", "protoc-gen-go", "protoc-gen-go-grpc") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = tmp_path_factory.mktemp("go")
    folder = path / "src" / "example.org" / "finetune"
    shutil.copytree(ROOT / "examples" / "go", folder, ignore=shutil.ignore_patterns("gen", "go.sum", "finetune"))
    generated = _run([str(BIN / "buf"), "generate", str(ROOT), "--template", "buf.gen.yaml"], folder)
    assert generated.returncode == 0, generated.stderr
    sources = {"GOPATH": f"{path}{os.pathsep}{os.environ.get('GOPATH', '')}", "GOFLAGS": "-modcacherw"}
    if os.environ.get("GO111MODULE") != "off":
        tidied = _run(["go", "mod", "tidy"], folder, sources)
        if tidied.returncode:
            pytest.skip(f"its modules cannot be fetched: {tidied.stderr[-300:]}")
    built = _run(["go", "build", "-o", "finetune", "."], folder, sources)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(params=["node", "go"])
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command of each client."""
    folder: Path = request.getfixturevalue(request.param)
    return {"node": ["node", str(folder / "finetune.js")], "go": [str(folder / "finetune")]}[request.param]


def test_a_client_fine_tunes_follows_and_asks(service: Served, client: list[str]) -> None:
    data = service.folder.parent / "data"
    command = [*client, str(data / "bert"), str(data / "reviews.csv"), "a good film", "bad"]
    for _ in range(2):  # The second time the data is there already.
        done = service.run(*command)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        numbers = [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert any("FINALIZING → SUCCEEDED" in line for line in lines)
        assert [line.partition(" ")[0] in {"good", "bad"} for line in lines[-2:]] == [True, True]


def test_a_client_shows_what_the_service_says_is_wrong(service: Served, client: list[str]) -> None:
    data = service.folder.parent / "data"
    done = service.run(*client, str(data / "none"), str(data / "reviews.csv"), "a film")
    assert done.returncode == 1 and "job.spec.model.uri" in done.stderr and "is not there" in done.stderr


def _run(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    found = {**os.environ, **(environment or {})}
    return subprocess.run(
        command, cwd=folder, env=found, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
