"""The clients under examples/ that are not Python, made ready to run; a test is skipped if their tools are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from helpers.repository import ROOT
from helpers.served import BIN

EXAMPLES = ROOT / "examples"
INSTALL_S = 300


def node_client(folder: Path) -> list[str]:
    """The command of the example for Node.js, with its packages and its generated code."""
    if shutil.which("npm") is None:
        pytest.skip("Node.js with npm is not installed")
    place = folder / "node"
    shutil.copytree(EXAMPLES / "node", place, ignore=shutil.ignore_patterns("node_modules", "gen"))
    installed = _run(["npm", "install", "--no-package-lock", "--no-fund", "--no-audit"], place)
    if installed.returncode:
        pytest.skip(f"its packages cannot be installed: {installed.stderr[-300:]}")
    # As `npm run generate`, which is beside the protos.
    generated = _run(["npx", "buf", "generate", str(ROOT), "--template", "buf.gen.yaml"], place)
    assert generated.returncode == 0, generated.stderr
    return ["node", str(place / "finetune.js")]


def go_client(folder: Path) -> list[str]:
    """The example for Go, built: with modules from a proxy, or (GO111MODULE=off) with a system's sources in GOPATH."""
    missing = [name for name in ("go", "protoc-gen-go", "protoc-gen-go-grpc") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    place = folder / "src" / "example.org" / "finetune"
    shutil.copytree(EXAMPLES / "go", place, ignore=shutil.ignore_patterns("gen", "go.sum", "finetune"))
    generated = _run([str(BIN / "buf"), "generate", str(ROOT), "--template", "buf.gen.yaml"], place)
    assert generated.returncode == 0, generated.stderr
    sources = {"GOPATH": f"{folder}{os.pathsep}{os.environ.get('GOPATH', '')}", "GOFLAGS": "-modcacherw"}
    if os.environ.get("GO111MODULE") != "off":
        tidied = _run(["go", "mod", "tidy"], place, sources)
        if tidied.returncode:
            pytest.skip(f"its modules cannot be fetched: {tidied.stderr[-300:]}")
    built = _run(["go", "build", "-o", "finetune", "."], place, sources)
    assert built.returncode == 0, built.stderr
    return [str(place / "finetune")]


def curl_client() -> list[str]:
    """The example for curl, which needs no code of its own."""
    missing = [name for name in ("bash", "curl", "jq", "perl") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    return [str(EXAMPLES / "curl" / "finetune.sh")]


def _run(
    command: list[str], folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    found = {**os.environ, **(environment or {})}
    return subprocess.run(
        command, cwd=folder, env=found, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
