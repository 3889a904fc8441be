"""What is held out for evaluation is drawn by one lot: a job that is planned again gets the samples that it had."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import chats, questions, tagged
from helpers.pair_specs import translation
from helpers.small_specs import locations, parse
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.holdout import by_lot, split_by_lot
from shardyard_trainer.tasks.ingredients import prepare

DRAWN = {
    (10, 0.3, 0): [0, 1, 3],
}


@pytest.mark.parametrize(("num_samples", "holdout", "seed"), [*DRAWN, (7, 0.01, 3), (100, 0.25, 8), (5, 0, 1)])
def test_the_lot_is_the_same_in_every_version(num_samples: int, holdout: float, seed: int) -> None:
    order = np.random.default_rng([seed, 0x401D]).permutation(num_samples)
    held = max(round(num_samples * holdout), int(holdout > 0))
    train, held_out = by_lot(num_samples, holdout, seed)
    assert train.tolist() == order[held:].tolist() and held_out.tolist() == order[:held].tolist()
    train, held_out = split_by_lot(num_samples, holdout, seed)
    assert train.tolist() == sorted(order[held:].tolist()) and held_out.tolist() == sorted(order[:held].tolist())
    assert held_out.tolist() == DRAWN.get((num_samples, holdout, seed), held_out.tolist())


@pytest.mark.parametrize(
    ("what", "message"),
    [("row", "1 row: nothing would be left to train on"), ("context", "1 context: nothing would be left")],
)
def test_nothing_left_to_train_on_is_refused(what: str, message: str) -> None:
    with pytest.raises(DataError, match=f"{message}.*give eval_data, or holdout 0"):
        by_lot(1, 0.1, 0, what=what)


NUMBER = 24
ORDINAL = [f"w{at}" for at in range(NUMBER)]


def of_question(word: str) -> Mapping[str, Any]:
    return {"question": "Who?", "context": f"{word} waited", "answers": {"text": [word], "answer_start": [0]}}


def words_of(prepared: Any, samples: Any) -> list[str]:
    """The one word of each sample that tells it apart."""
    found = []
    for at in range(samples.num_samples):
        (ids,) = samples.micro_batch([SampleRef(0, at)]).inputs["input_ids"]
        found += re.findall(r"w[0-9]+", prepared.inputs.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return found


Spec = Callable[..., spec_pb2.JobSpec]


def pairs_spec(train: Path, **changes: Any) -> spec_pb2.JobSpec:
    return parse({**translation(), "train_data": {"uri": str(train)}, **changes})


TASKS: dict[str, tuple[Spec, Callable[[str], Mapping[str, Any]]]] = {
    "question_answering": (questions.spec_of, of_question),
    "translation": (pairs_spec, lambda word: {"source": word, "target": "x"}),
    "instruction": (chats.spec_of, lambda word: chats.chat(f"Who is {word}?", "A dog.")),
    "token_classification": (tagged.spec_of, lambda word: {"tokens": [word, "ran"], "tags": ["B-PER", "O"]}),
}


@pytest.mark.parametrize("name", TASKS)
def test_each_task_holds_out_the_rows_of_the_lot(name: str, tmp_path: Path) -> None:
    spec_of, row = TASKS[name]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row(word)) + "\n" for word in ORDINAL))
    spec = spec_of(tmp_path / "a.jsonl", evaluation={"holdout": 0.25})
    prepared = prepare(spec, locations(tmp_path))
    train, held_out = split_by_lot(NUMBER, 0.25, spec.optimization.seed)
    assert words_of(prepared, prepared.eval) == [ORDINAL[at] for at in held_out]
    assert words_of(prepared, prepared.train) == [ORDINAL[at] for at in train]
