"""A model from the service in an environment that has never heard of Shardyard: only torch and transformers."""

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
from helpers.chat_folders import chat_folder
from helpers.chats import write_chats
from helpers.repository import ROOT
from helpers.workplace import Workplace, workplace

TEXT = "Hello, my dog is cute"
PRINTED = "\nimport json, sys\nassert 'shardyard' not in sys.modules\nprint(json.dumps(logits[0].tolist()))\n"
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    for package in ("torch==2.13.0", "transformers"):
        command = [python, "-m", "pip", "-qq", "install", "--constraint", ROOT / "constraints.txt", package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    return python


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("elsewhere")) as place:
        yield place


@pytest.mark.parametrize(("pooling", "loads_whole"), [("mean", False), ("cls", True)])
def test_the_cards_lines_give_the_logits_of_predict(
    place: Workplace, plain_python: Path, pooling: str, loads_whole: bool
) -> None:
    with shardyard.Client(place.address) as client:
        job = client.submit(
            shardyard.TextClassification(pooling=pooling),
            model=place.folder / "bert",
            train_data=place.folder / "reviews.csv",
            optimization=shardyard.Optimization(max_steps=6, learning_rate=1e-3),
            job_id=f"elsewhere-{pooling}",
        )
        job.wait(timeout=120)
        model = job.model()
        folder = place.folder / f"model-{pooling}"
        model.download(folder)
        (answer,) = model.predict([TEXT])
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("AutoModelForSequenceClassification" in code) == loads_whole
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    done = subprocess.run(
        [plain_python, "-I", "-c", code + PRINTED], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(list(answer.logits), abs=1e-5)
    assert Path(sys.executable) != plain_python


def test_the_cards_lines_of_an_instruction_model_say_what_predict_answers(place: Workplace, plain_python: Path) -> None:
    chat_folder(place.folder / "chat")
    write_chats(place.folder / "chats.jsonl")
    with shardyard.Client(place.address) as client:
        job = client.submit(
            shardyard.Instruction(max_length=64),
            model=place.folder / "chat",
            train_data=place.folder / "chats.jsonl",
            optimization=shardyard.Optimization(max_steps=20, learning_rate=1e-2),
            job_id="elsewhere-chats",
        )
        job.wait(timeout=120)
        model = job.model()
        folder = place.folder / "model-chats"
        model.download(folder)
        (answer,) = model.predict(["Hello, who are you?"], max_new_tokens=40)
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    done = subprocess.run(
        [plain_python, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "apply_chat_template" in code and done.stdout == f"{answer.text}\n"
