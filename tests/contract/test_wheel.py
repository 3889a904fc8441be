"""The bare wheel in an environment of its own: the SDK imports, is light, and brings nothing that trains or serves."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from helpers.repository import ROOT

HEAVY = ("torch", "transformers", "deepspeed", "ray", "sqlalchemy", "datasets", "pandas", "typer")
PROBE = """
import json, sys, time
started = time.perf_counter()
import shardyard
shardyard.Client
from shardyard.v1 import job_service_pb2_grpc
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [*pip(sys.executable), "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT], check=True
    )
    (built,) = folder.glob("shardyard-*.whl")
    return built


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [*pip(python), "install", "--constraint", ROOT / "constraints.txt", wheel],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    return python


def pip(python: str | Path) -> list[str | Path]:
    return [python, "-m", "pip", "-qq", "--disable-pip-version-check"]


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in tops if not name.endswith(".dist-info")} == {
        "shardyard",
        "shardyard_coordinator",
        "shardyard_trainer",
    }


def test_the_wheel_holds_the_catalogue_of_models(wheel: Path) -> None:
    assert "shardyard_trainer/choosing/catalogue.json" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_says_that_its_types_may_be_used(wheel: Path) -> None:
    assert "shardyard/py.typed" in zipfile.ZipFile(wheel).namelist()


def test_the_bare_wheel_imports_the_sdk_and_nothing_heavy(bare_python: Path) -> None:
    done = subprocess.run([bare_python, "-c", PROBE], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert set(HEAVY) & set(seen["modules"]) == set()
    assert "grpc" in seen["modules"]


def test_the_script_of_the_bare_wheel_says_which_extra_it_needs(bare_python: Path) -> None:
    done = subprocess.run([bare_python.parent / "shardyard", "jobs"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "shardyard[cli]" in done.stderr
