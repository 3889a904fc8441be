"""Answers: windows as transformers cuts them, the best spans as a search over all of them, scores as SQuAD counts."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, PreTrainedTokenizerFast

from helpers.questions import asked, spec_of
from helpers.small_specs import locations
from helpers.tagged import write_lines
from helpers.tiny_folders import bert_tokenizer, gpt2_tokenizer, save_folder
from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.contexts import ContextCutter
from shardyard_trainer.inputs.tokenization import ensure_pad, prepare
from shardyard_trainer.tasks.answer_metrics import best_threshold, score
from shardyard_trainer.tasks.answer_spans import best_spans
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare as prepare_job
from shardyard_trainer.training.export import export_model

KINDS = {"bert": bert_tokenizer, "gpt2": gpt2_tokenizer}
TEXTS = st.lists(st.sampled_from(["dog", "unbelievable", "U.S.", "é", "😀", "don't"]), min_size=1, max_size=60).map(
    " ".join
)


@pytest.mark.parametrize("kind", KINDS)
@given(question=TEXTS, context=TEXTS, length=st.integers(100, 160), overlap=st.integers(0, 12))
@settings(max_examples=40, deadline=None)
def test_windows_are_those_of_transformers(kind: str, question: str, context: str, length: int, overlap: int) -> None:
    tokenizer = prepare(KINDS[kind]())
    ensure_pad(tokenizer)
    question = question[:20]
    (found,) = ContextCutter(tokenizer, length, overlap).cut([(f"  {question} ", context)])
    expected = tokenizer(
        question.strip(),
        context,
        truncation="only_second",
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    tokenizer.backend_tokenizer.no_truncation()
    assert [window.ids for window in found.windows] == expected["input_ids"]
    for row, window in enumerate(found.windows):
        offsets = expected["offset_mapping"][row][window.first : window.end]
        assert [tuple(each) for each in window.offsets] == [tuple(each) for each in offsets]


@given(question=TEXTS, context=TEXTS, length=st.integers(8, 40), overlap=st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_every_token_of_the_context_is_in_a_window_however_long_the_question(
    question: str, context: str, length: int, overlap: int
) -> None:
    tokenizer = prepare(bert_tokenizer())
    (found,) = ContextCutter(tokenizer, length, overlap).cut([(question, context)])
    seen = {number for window in found.windows for number in range(window.begin, window.begin + len(window.offsets))}
    assert seen == set(range(len(found.offsets)))
    assert all(len(window.ids) <= length for window in found.windows)


@given(seed=st.integers(0, 2**31), longest=st.integers(1, 12), most=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_the_best_spans_are_those_of_a_search_over_all(seed: int, longest: int, most: int) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(3, 10, 2)).astype(np.float32)
    contexts = np.asarray([[3, 9], [2, 3], [1, 10]])
    found = best_spans(
        torch.tensor(logits), torch.tensor(contexts), torch.tensor([0, 9, 0]), longest=longest, most=most
    )
    for row, (first, end) in enumerate(contexts):
        spans = {
            (start, stop): float(logits[row, start, 0] + logits[row, stop, 1])
            for start, stop in itertools.product(range(first, end), repeat=2)
            if 0 <= stop - start < longest
        }
        best = sorted(spans.values(), reverse=True)[:most]
        scores = found.scores_WK[row][: len(best)].tolist()
        assert scores == pytest.approx(best, abs=1e-5)
        for at, value in enumerate(scores):
            assert spans[int(found.firsts_WK[row][at]), int(found.lasts_WK[row][at])] == pytest.approx(value, abs=1e-5)
        assert float(found.totals_W[row]) == pytest.approx(math.log(sum(map(math.exp, spans.values()))), abs=1e-4)
    assert float(found.rests_W[1]) == pytest.approx(float(logits[1, 9].sum()), abs=1e-5)


# By the script that comes with SQuAD (evaluate-v2.0.py).
SCORES = [
    ("the Eiffel Tower!", ["Eiffel tower"], 1.0, 1.0),
    ("Eiffel Tower in Paris", ["Paris", "Eiffel Tower"], 0.0, 2 * 1 * 0.5 / 1.5),
    ("a the an", ["The"], 1.0, 1.0),
    ("Lyon", ["Paris"], 0.0, 0.0),
    ("to to be", ["to be be"], 0.0, 2 / 3),
    ("1,000", ["1000"], 1.0, 1.0),
    ("Lyon", [], 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "wanted", "exact", "f1"), SCORES)
def test_an_answer_is_scored_as_squad_scores_it(answer: str, wanted: list[str], exact: float, f1: float) -> None:
    assert score(answer, wanted) == pytest.approx((exact, f1))


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12)
)
def test_no_threshold_is_better_than_the_one_that_is_found(rows: list[tuple[float, bool, int]]) -> None:
    f1, has_answer, margins = (
        np.asarray([r[0] for r in rows]),
        np.asarray([r[1] for r in rows]),
        np.asarray([r[2] for r in rows], float),
    )

    def total(threshold: float) -> float:
        return float(np.where(margins > threshold, ~has_answer, has_answer * f1).sum())

    found = best_threshold(f1, has_answer, margins)
    if has_answer.all() or not has_answer.any():
        assert found == 0
    else:
        assert total(found) == pytest.approx(max(total(at / 2) for at in range(-9, 10)))
        assert not (margins == found).any()


def exported(folder: Path, metrics: Mapping[str, float], **task: Any) -> tuple[Any, Any, Path]:
    """A model as its weights were drawn, and its export."""
    train = write_lines(folder / "a.jsonl", asked(60, 1, unanswered=0.2, filler=30))
    spec = spec_of(train, {"maxAnswerLength": 4, **task})
    prepared = prepare_job(spec, locations(folder))
    module = build_module(prepared, spec)
    attempt = worker_pb2.AttemptSpec(
        spec=spec, job_name="projects/p/jobs/j", epoch=1, world_size=1, locations=locations(folder)
    )
    target = folder / "models" / "uid"
    target.parent.mkdir()
    export_model(module, module.state_dict(), prepared, attempt, metrics, folder=target)
    return prepared, module, target


def ask(folder: Path, *asked: tuple[str, str], **parameters: Any) -> list[Any]:
    reply = reply_of(folder, *asked, **parameters)
    assert not reply.violations, reply.violations
    return [prediction.answer for prediction in reply.response.predictions]


def reply_of(folder: Path, *asked: tuple[str, str], limit: int = 0, **parameters: Any) -> worker_pb2.PredictReply:
    instances = [
        model_service_pb2.Instance(question=model_service_pb2.Question(question=question, context=context))
        for question, context in asked
    ]
    request = model_service_pb2.PredictRequest(instances=instances, question_answering=parameters or None)
    call = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=limit)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def test_the_cards_code_gives_the_answer_of_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, folder = exported(tmp_path, {"no_answer_threshold": 1e9})
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    context = " ".join(row["context"] for row in asked(4, 5))
    code = code.replace('"Goethe wrote Faust in Weimar."', repr(context))
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    (answer,) = ask(folder, (names["question"], context))
    assert len(names["logits"]) > 1 and answer.text == names["answer"]
    likeliest = float(names["logits"].double().flatten().softmax(0).max())
    assert answer.score / (1 - answer.no_answer_score) == pytest.approx(likeliest, rel=1e-4)


def test_predict_abstains_by_the_threshold_of_the_evaluation_or_of_the_call(tmp_path: Path) -> None:
    prepared, module, folder = exported(tmp_path, {})
    metrics = prepared.metrics()
    module.eval()
    with torch.no_grad():
        for at in range(prepared.eval.num_samples):
            batch = prepared.eval.micro_batch([SampleRef(0, at)])
            metrics.update(batch, module(**batch.inputs, return_outputs=True))
    found = metrics.compute([metrics.part()])
    data = prepared.eval.data
    questions = [("Who came?", data.context(int(each))) for each in prepared.eval.questions]
    margins = sorted(metrics.part()[2][3])
    middle = (margins[2] + margins[3]) / 2
    for threshold in (margins[0] - 1, middle, margins[-1] + 1):
        answers = ask(folder, *questions, threshold=threshold)
        assert all(0 < answer.no_answer_score < 1 and len(answer.candidates) == 5 for answer in answers)
        if threshold != middle:
            assert {bool(answer.text) for answer in answers} == {threshold > margins[-1]}
    assert 0 <= found["f1"] <= 1 and found["f1"] >= found["f1_threshold_0"]


@pytest.mark.parametrize("may_abstain", [False, True])
def test_logits_that_are_not_numbers_give_no_answer_and_scores_that_are_not_numbers(
    may_abstain: bool, tmp_path: Path
) -> None:
    _, _, folder = exported(tmp_path, {})
    about = json.loads((folder / "shardyard.json").read_text())
    assert about["allow_no_answer"] is True
    (folder / "shardyard.json").write_text(json.dumps(about | {"allow_no_answer": may_abstain}))
    tensors = load_file(folder / "model.safetensors")
    # Finite, so that the folder is taken; what is computed with it is not.
    next(tensor for name, tensor in tensors.items() if name.endswith("0.attention.output.LayerNorm.weight")).fill_(3e38)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    context = " ".join(["Anna went to Rome in 1969 ."] * 15)
    for parameters in ({}, {"threshold": 0.5}, {"top_k": 1}):
        for answer in ask(folder, ("Who?", context), ("When?", "1969"), **parameters):
            assert math.isnan(answer.score) and not answer.text and not answer.candidates
            assert math.isnan(answer.no_answer_score) == (may_abstain or "threshold" in parameters)


def test_a_windows_loss_is_that_of_transformers_and_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    prepared, module, _ = exported(tmp_path, {})
    module.eval()
    samples, total, expected = prepared.train, 0.0, 0.0
    with torch.no_grad():
        for at in range(12):
            batch = samples.micro_batch([SampleRef(0, at)])
            total += float(module(**batch.inputs).loss_sum)
            for row, mask in enumerate(batch.inputs["attention_mask"]):
                length = int(mask.sum())
                inputs = {name: batch.inputs[name][row : row + 1, :length] for name in ("input_ids", "token_type_ids")}
                labels = {
                    "start_positions": batch.inputs["starts"][row : row + 1],
                    "end_positions": batch.inputs["stops"][row : row + 1],
                }
                expected += float(module.model(**inputs, **labels).loss)
        together = samples.micro_batch([SampleRef(0, at) for at in range(12)])
        assert float(module(**together.inputs).loss_sum) == pytest.approx(total, rel=1e-5)
    assert total == pytest.approx(expected, rel=1e-5)


def test_letters_that_a_tokenizers_offsets_leave_out_are_a_part_of_the_answer() -> None:
    # As RobBERT's: the space that is put before a word is taken for its first letter.
    vocabulary = {token: at for at, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġd", "Ġdo"])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[("Ġ", "d"), ("Ġd", "o")]))
    steps = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    assert backend.encode("a dog").offsets[2] == (3, 4)
    cutter = ContextCutter(PreTrainedTokenizerFast(tokenizer_object=backend), 40, 4)
    context = "a dog, dog"
    (found,) = cutter.cut([("cat", context)])
    for start in (2, 7):
        first, last = found.span(start, start + 3) or (0, 0)
        assert context[found.offsets[first][0] : found.offsets[last][1]] == "dog"


@pytest.mark.parametrize("kind", ["BertForQuestionAnswering", "GPT2ForQuestionAnswering"])
def test_a_folder_from_elsewhere_answers_as_transformers_does(kind: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path, kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    question, context = "a dog", "the cat eats"
    inputs = tokenizer(question, context, return_tensors="pt", return_token_type_ids=kind.startswith("Bert"))
    with torch.no_grad():
        outputs = model(**inputs)
    places = [at for at, part in enumerate(inputs.sequence_ids(0)) if part == 1]
    spans = {
        (start, end): float(outputs.start_logits[0, start] + outputs.end_logits[0, end])
        for start, end in itertools.product(places, repeat=2)
        if start <= end
    }
    (answer,) = ask(folder, (question, context), top_k=1)
    first, last = max(spans, key=spans.__getitem__)
    offsets = tokenizer(question, context, return_offsets_mapping=True)["offset_mapping"]
    assert answer.text == context[offsets[first][0] : offsets[last][1]].strip()
    total = math.log(sum(map(math.exp, spans.values())))
    assert answer.score == pytest.approx(math.exp(max(spans.values()) - total), rel=1e-4)
    assert not answer.HasField("no_answer_score") and len(answer.candidates) == 1
    # A threshold is asked for, so the model may say that there is none; GPT-2 has no token that could.
    reply = reply_of(folder, (question, context), threshold=-1e9)
    if kind.startswith("Bert"):
        assert not reply.response.predictions[0].answer.text
    else:
        assert [each.field for each in reply.violations] == ["question_answering.threshold"]


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    reply = reply_of(save_folder(tmp_path, "BertForQuestionAnswering", num_labels=3), ("a dog", "the cat"))
    assert "the head has 3 outputs; one that finds answers has 2" in reply.violations[0].message


def test_what_is_blank_is_named_and_the_largest_answer_is_foreseen(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForQuestionAnswering")
    reply = reply_of(folder, ("a dog", "the cat"), (" ", "the cat"), ("a dog", "\n"))
    assert [each.field for each in reply.violations] == [
        "instances[1].question.question",
        "instances[2].question.context",
    ]
    asked = [("a dog", "the cat eats " * 20)] * 6
    sizes = [each.ByteSize() for each in ask(folder, *asked, top_k=100, max_answer_length=512)]
    reply = reply_of(folder, *asked, limit=sum(sizes) // 2, top_k=100, max_answer_length=512)
    (violation,) = reply.violations
    assert violation.reason == "RESPONSE_TOO_LARGE" and violation.metadata["fits"] in {"1", "2"}
