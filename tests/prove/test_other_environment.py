"""Models from the service in an environment that has never heard of Shardyard: torch, transformers and Pillow alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardyard
from helpers import elsewhere
from helpers.chat_folders import chat_folder
from helpers.repository import ROOT
from helpers.workplace import Workplace, workplace
from shardyard_trainer.tasks.table import NAMES

NO_MODEL = {"feature_extraction", "model_evaluation"}
FIRST, LAST = "import json\n", "\nimport sys\nassert 'shardyard' not in sys.modules\n"
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for package in ("torch==2.13.0", "transformers", "pillow"):
        command = [python, "-m", "pip", "-qq", "install", "--constraint", ROOT / "constraints.txt", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("elsewhere")) as place:
        elsewhere.write(place.folder)
        chat_folder(place.folder / "chat")
        yield place


def test_every_task_that_makes_a_model_has_a_case() -> None:
    assert {name.partition(",")[0] for name in elsewhere.CASES} == set(NAMES) - NO_MODEL


@pytest.mark.parametrize("name", elsewhere.CASES)
def test_the_cards_code_gives_the_answer_of_predict(name: str, place: Workplace, plain_python: Path) -> None:
    case = elsewhere.CASES[name]
    settings = dict(case.settings)
    if isinstance(settings["model"], str):
        settings["model"] = place.folder / settings["model"]
    with shardyard.Client(place.address) as client:
        job = client.submit(
            case.task,
            train_data=place.folder / case.data,
            optimization=shardyard.Optimization(max_steps=12, learning_rate=5e-3),
            job_id=re.sub("[^a-z]+", "-", name),
            **settings,
        )
        assert job.wait(timeout=120).state == "succeeded"
        model = job.model()
        folder = place.folder / f"model-{job.id}"
        model.download(folder)
        answer = case.answer(model, folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert Path(sys.executable) != plain_python
    done = subprocess.run(
        [plain_python, "-I", "-c", f"{FIRST}{code}\n{case.code}{LAST}"],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    shown = json.loads(done.stdout.splitlines()[-1])
    assert answer and shown == (pytest.approx(answer, abs=1e-5) if isinstance(answer[0], float) else answer)
