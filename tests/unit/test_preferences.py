"""Pairs of answers as people write them, what is learnt of them, and their loss; bad ones are named by their row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.chat_folders import CHATML, chat_folder
from helpers.chats import chat, write_lines
from helpers.preferences import PlainPreference, rewards, spec_of
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.model_evaluation import prepare_evaluation

NAME = "projects/default/models/chat"
ROWS = [("What is red?", "A rose.", "I do not know."), ("Two?", "1 + 1", "no")] * 3
SYSTEM = "Be short."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("model") / "chat")


def planned(folder: Path, model: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder, **{NAME: model}))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def pairs_of(folder: Path, model: Path, spec: spec_pb2.JobSpec) -> list[tuple[str, str, str]]:
    """What stands before the two answers of each pair, and what is learnt of them."""
    found = planned(folder, model, spec)
    assert not found.violations, found.violations
    assert planned(folder, model, found.plan.resolved_spec).plan == found.plan
    prepared = prepare(found.plan.resolved_spec, locations(folder, **{NAME: model}))
    decode = prepared.inputs.tokenizer.decode
    pairs = []
    for at in range(prepared.train.num_samples):
        batch = prepared.train.micro_batch([SampleRef(0, at)])
        assert batch.num_units == 1 and batch.inputs["before"].isnan().all()
        before, learnt = [], []
        for ids, labels in zip(batch.inputs["input_ids"], batch.inputs["labels"], strict=True):
            before.append(decode(ids[: int((labels >= 0).nonzero()[0]) + 1]))
            learnt.append(decode(labels[labels >= 0]))
        assert before[0] == before[1]
        pairs.append((before[0], learnt[0], learnt[1]))
    return pairs


def texts(folder: Path) -> Path:
    return write_lines(
        folder / "a.jsonl", [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
    )


def messages(folder: Path) -> Path:
    said = [
        (chat(ask)["messages"], chat(ask, good)["messages"][1:], chat(ask, bad)["messages"][1:])
        for ask, good, bad in ROWS
    ]
    return write_lines(
        folder / "a.jsonl", [{"prompt": ask, "chosen": good, "rejected": bad} for ask, good, bad in said]
    )


def whole(folder: Path) -> Path:
    rows = [{"chosen": chat(ask, good)["messages"], "rejected": chat(ask, bad)["messages"]} for ask, good, bad in ROWS]
    return write_lines(folder / "a.jsonl", rows)


def human_roles(folder: Path) -> Path:
    def said(ask: str, answer: str) -> list[dict[str, str]]:
        return [{"content": ask, "role": "Human"}, {"content": answer, "role": "Assistant"}]

    rows = [{"chosen": said(ask, good), "rejected": said(ask, bad)} for ask, good, bad in ROWS]
    return write_lines(folder / "a.jsonl", rows)


def ultra_feedback(folder: Path) -> Path:
    rows = [
        {"prompt": ask, "prompt_id": "x", "chosen": chat(ask, good)["messages"], "rejected": chat(ask, bad)["messages"],
         "messages": chat(ask, good)["messages"], "score_chosen": 9.0}
        for ask, good, bad in ROWS
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return folder / "a.parquet"


def share_gpt(folder: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": ask}], "chosen": {"from": "gpt", "value": good},
         "rejected": {"from": "gpt", "value": bad}}
        for ask, good, bad in ROWS
    ]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json"


def alpaca(folder: Path) -> Path:
    rows = [{"instruction": ask, "input": " ", "chosen": good, "rejected": bad} for ask, good, bad in ROWS]
    return write_lines(folder / "a.jsonl", rows)


def orca(folder: Path) -> Path:
    rows = [{"system": "", "question": ask, "chosen": good, "rejected": bad} for ask, good, bad in ROWS]
    return write_lines(folder / "a.jsonl", rows)


def argilla(folder: Path) -> Path:
    return write_lines(folder / "a.jsonl", [{"input": ask, "chosen": good, "rejected": bad} for ask, good, bad in ROWS])


def transcripts(folder: Path) -> Path:
    rows = [{"chosen": f"\n\nHuman: {ask}\n\nAssistant: {good}", "rejected": f"\n\nHuman: {ask}\n\nAssistant: {bad}"}
            for ask, good, bad in ROWS]  # fmt: skip
    return write_lines(folder / "a.jsonl", rows)


def transcript_and_texts(folder: Path) -> Path:
    rows = [{"prompt": f"\n\nHuman: {ask}\n\nAssistant:", "chosen": good, "rejected": bad} for ask, good, bad in ROWS]
    return write_lines(folder / "a.jsonl", rows)


def as_csv(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["prompt", "chosen", "rejected"])
        rows.writerows(
            [(ask, json.dumps(chat(ask, good)["messages"]), chat(ask, bad)["messages"]) for ask, good, bad in ROWS]
        )
    return folder / "a.csv"


FORMATS = (
    texts, messages, whole, human_roles, ultra_feedback, share_gpt, alpaca, orca, argilla, transcripts,
    transcript_and_texts, as_csv,
)  # fmt: skip


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_each_format_is_the_same_pairs(write: Any, tmp_path: Path, model: Path) -> None:
    pairs = pairs_of(tmp_path, model, spec_of(write(tmp_path)))
    assert pairs == [
        (f"<s><|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n", f"{good}<|im_end|>", f"{bad}<|im_end|>")
        for ask, good, bad in ROWS
    ]


def test_of_several_turns_only_the_answers_that_differ_are_learnt(tmp_path: Path, model: Path) -> None:
    good, bad = (chat("a?", "b", "c?", last, system=SYSTEM)["messages"] for last in ("good", "bad"))
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"chosen": good, "rejected": bad}, {"system": SYSTEM, "chosen": good[1:], "rejected": bad[1:]}],
    )
    first, second = pairs_of(tmp_path, model, spec_of(path))
    assert first == second and first[1:] == ("good<|im_end|>", "bad<|im_end|>")
    assert SYSTEM in first[0] and first[0].endswith("c?<|im_end|>\n<|im_start|>assistant\n")


GOOD = {"prompt": "a?", "chosen": "good", "rejected": "bad"}
ASKED = chat("a?")["messages"]
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "the same answer": ({"rejected": " good\n"}, "rejected", "'chosen' and 'rejected' are the same"),
    "an empty answer": ({"chosen": " "}, "chosen", "'chosen' is blank; write a text"),
    "no answer": ({"rejected": None}, "rejected", "'rejected' is missing"),
    "no prompt": ({"prompt": ""}, "prompt", "'prompt' is blank"),
    "a number": ({"chosen": 5}, "chosen", "'chosen' is '5'; write a text in quotes, or leave the row out"),
    "several answers": ({"chosen": ["b", "c"]}, "chosen", "'chosen' is a list of 2 texts; write one, and a row for"),
    "an answer with a score": ({"chosen": {"answer": "b", "score": 1}}, "chosen", "; give a list"),
    "an empty list": ({"rejected": []}, "rejected", "'rejected' is an empty list"),
    "an empty message": ({"rejected": [{"role": "assistant", "content": ""}]}, "rejected", "message 1 of 'rejected'"),
    "an unknown role": ({"chosen": [{"role": "assistent", "content": "x"}]}, "chosen", "did you mean assistant?"),
    "roles out of order": ({"prompt": [*ASKED, *ASKED]}, "prompt", "message 2 of 'prompt': its role is user, but"),
    "an answered prompt": ({"prompt": chat("a?", "b")["messages"]}, "prompt", "the last message is to be answered"),
    "an answer by the user": (
        {"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]},
        "rejected", "begin with different messages",
    ),
    "two answers in a row": (
        {"chosen": [{"role": "assistant", "content": "x"}] * 2}, "chosen", "message 2 of 'chosen': its role is",
    ),
    "a whole conversation of another prompt": (
        {"chosen": chat("b?", "b")["messages"]}, "prompt", "whole conversations without the 'prompt'",
    ),
    "a question alone": ({"chosen": ASKED}, "chosen", "'chosen' has no message of the role assistant"),
    "a history without answers": ({"history": ["a", "b"]}, "history", "'history' has 'a'; write a list of [question"),
    "another prompt": (
        {"chosen": chat("b?", "c")["messages"], "rejected": chat("b?", "d")["messages"]},
        "prompt", "whole conversations without the 'prompt'",
    ),
    "half a character": ({"chosen": "x \ud83d"}, "chosen", "'chosen' has half of a surrogate pair"),
    "two systems": (
        {"prompt": [{"role": "system", "content": "x"}, *ASKED], "system": SYSTEM}, "system", "a `system` of its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_an_invalid_pair_is_refused_with_row_and_column_or_skipped(name: str, tmp_path: Path, model: Path) -> None:
    change, column, message = REFUSED[name]
    path = write_lines(tmp_path / "a.jsonl", [GOOD, {**GOOD, **change}, *[GOOD] * 4])
    (violation,) = planned(tmp_path, model, spec_of(path)).violations
    assert message in violation.message and violation.field == "spec.train_data", violation
    assert (violation.metadata["line"], violation.metadata["column"]) == ("2", column), violation
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, model, spec_of(path, trainData=lenient))
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert found.plan.num_train_samples == 5 and message[-20:] in left_out.message


def test_a_pair_that_the_chat_template_does_not_take_is_one_bad_row(tmp_path: Path, model: Path) -> None:
    strict = "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}" + CHATML
    path = write_lines(tmp_path / "a.jsonl", [GOOD, {**GOOD, "prompt": "x"}, *[GOOD] * 4])
    lenient = {"uri": str(path), "maxBadRowsShare": 0.2}
    found = planned(tmp_path, model, spec_of(path, {"chatTemplate": strict}, trainData=lenient))
    (left_out,) = [each for each in found.plan.warnings if each.reason == "BAD_ROWS_LEFT_OUT"]
    assert left_out.message.count("no x") == 1 and "1 of 6 rows" in left_out.message


def test_answers_that_repeat_their_prompt_are_counted(tmp_path: Path, model: Path) -> None:
    repeating = {"question": "1+2=", "response_chosen": "1+2=3", "response_rejected": "1+2=4"}
    for row, is_told in ((repeating, True), ({**GOOD, "chosen": "a? b"}, False)):
        path = write_lines(tmp_path / "a.jsonl", [row] * 4)
        told = {each.reason: each.message for each in planned(tmp_path, model, spec_of(path)).plan.warnings}
        assert ("in 4 of 4 pairs" in told.get("PROMPT_IN_ANSWERS", "")) == is_told


def test_answers_alone_have_no_prompt(tmp_path: Path, model: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"chosen": "good", "rejected": "bad"}])
    (violation,) = planned(tmp_path, model, spec_of(path)).violations
    assert "it has no prompt" in violation.message and "prompt: NAME" in violation.message


def test_what_is_cut_off_or_the_same_is_left_out_and_counted(tmp_path: Path, model: Path) -> None:
    long = "word " * 12
    rows = [
        {**GOOD, "prompt": long * 3}, {**GOOD, "chosen": f"{long * 3} a", "rejected": f"{long * 3} b"},
        {**GOOD, "chosen": f"{long} {long}"}, *[GOOD] * 5,
    ]  # fmt: skip
    path = write_lines(tmp_path / "a.jsonl", rows)
    found = planned(tmp_path, model, spec_of(path, {"maxLength": 100}))
    told = [each.message for each in found.plan.warnings if each.reason == "NO_ANSWER_LEFT"]
    assert [message.partition(" within")[0] for message in told] == [
        "in 1 of 8 pairs nothing is left of an answer", "in 1 of 8 pairs both answers are the same",
    ]  # fmt: skip
    assert found.plan.num_train_samples == 6 and found.plan.train_stats.cut_share == pytest.approx(1 / 6)
    path = write_lines(tmp_path / "b.jsonl", rows[:2])
    (violation,) = planned(tmp_path, model, spec_of(path, {"maxLength": 100})).violations
    assert "in none of 2 pairs the two answers differ within the first 100 tokens" in violation.message


def test_defaults_are_those_of_the_field(tmp_path: Path, model: Path) -> None:
    spec = spec_of(texts(tmp_path))
    for rate, adapted in ((1e-6, False), (5e-6, True)):
        spec.optimization.ClearField("learning_rate")
        if adapted:
            spec.fine_tuning.lora.rank = 4
        found = planned(tmp_path, model, spec).plan.resolved_spec
        assert found.optimization.learning_rate == rate and found.fine_tuning.preference.beta == 0.1
        assert found.fine_tuning.preference.HasField("label_smoothing")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_and_its_gradient_are_those_of_the_papers_formula(
    smoothing: float, tmp_path: Path, model: Path
) -> None:
    spec = spec_of(texts(tmp_path), {"beta": 0.3, "labelSmoothing": smoothing})
    task = prepare(spec, locations(tmp_path, **{NAME: model}))
    module = build_module(task, spec)
    plain = PlainPreference(build_module(task, spec).model, beta=0.3)
    with torch.no_grad():
        for own in (module, plain):
            for index, weight in enumerate(own.model.parameters()):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)), alpha=0.05)
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(6)])
    ids, labels = batch.inputs["input_ids"], batch.inputs["labels"]
    with torch.no_grad():
        before = plain.log_probs(plain.reference, ids, labels).view(-1, 2)
    task.train.take_before(before.numpy())
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(6)])
    ours = module(**batch.inputs).loss_sum
    right, wrong = (plain(**batch.inputs).loss_sum, plain(ids.view(-1, 2, ids.shape[1]).flip(1).flatten(0, 1),
                    labels.view(-1, 2, ids.shape[1]).flip(1).flatten(0, 1), before).loss_sum)  # fmt: skip
    theirs = (1 - smoothing) * right + smoothing * wrong
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    for (name, own), other in zip(module.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, rtol=1e-4, atol=1e-6), name
    margins = rewards(module, batch) - 0.3 * (plain.log_probs(plain.model, ids, labels).view(-1, 2) - before)
    assert margins.abs().max() < 1e-4


def test_a_model_that_is_only_measured_is_compared_with_none(tmp_path: Path, model: Path) -> None:
    described = json.dumps({"format": 1, "task": "preference", "max_length": 100, "beta": 0.5})
    (model / "shardyard.json").write_text(described)
    try:
        evaluation = {"data": {"uri": str(texts(tmp_path))}}
        spec = spec_of(tmp_path / "a.jsonl")
        spec.Clear()
        spec.model_evaluation.data.uri = evaluation["data"]["uri"]
        spec.model.model = NAME
        found = prepare_evaluation(spec, locations(tmp_path, **{NAME: model}))
    finally:
        (model / "shardyard.json").unlink()
    module = build_module(found.task, found.spec).eval()
    assert found.task.eval is not None
    batch = found.task.eval.micro_batch([SampleRef(0, 0)])
    plain = PlainPreference.log_probs(module.model, batch.inputs["input_ids"], batch.inputs["labels"])
    assert rewards(module, batch)[0].numpy() == pytest.approx(0.5 * plain.detach().numpy(), rel=1e-5)
    metrics = found.task.metrics()
    with torch.no_grad():
        metrics.update(batch, module(**batch.inputs, return_outputs=True))
    numbers = metrics.compute([metrics.part()])
    assert numbers["reward_margin"] == pytest.approx(
        float(np.diff(rewards(module, batch)[0].numpy()[::-1])[0]), rel=1e-5
    )
    assert set(metrics.directions()) <= set(numbers)
