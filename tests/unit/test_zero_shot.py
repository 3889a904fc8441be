"""Classes of the caller's by a model that knows entailment: the scores of transformers' pipeline, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers.pair_specs import sure_folder
from helpers.tiny_folders import save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model

LABELS = ["cute", "bad", "a good film"]
TEXTS = ["the dog is cute", "my cat sleeps . " * 20, "not this film"]
NLI = ("contradiction", "neutral", "entailment")


def nli(folder: Path, names: tuple[str, ...] = NLI, **config: Any) -> Path:
    """A tiny classifier with these labels, whose tokenizer knows how many tokens the model takes."""
    save_folder(
        folder,
        "BertForSequenceClassification",
        id2label=dict(enumerate(names)),
        label2id={name: at for at, name in enumerate(names)},
        **config,
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    # As BERT's own tokenizer has them, which this folder does not name.
    more = {"model_max_length": 32, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **more}))
    return folder


def ask(folder: Path, instances: list[pb.Instance], limit: int = 0, **fields: Any) -> worker_pb2.PredictReply:
    asked = pb.ZeroShotParameters(**{"labels": LABELS, **fields})
    request = pb.PredictRequest(instances=instances, zero_shot=asked)
    call = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=limit)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def texts(*given: str) -> list[pb.Instance]:
    return [pb.Instance(text=text) for text in given]


def encoder_decoder(folder: Path, kind: str) -> Path:
    """A tiny classifier that reads a text with an encoder and a decoder."""
    labels = {"id2label": dict(enumerate(NLI)), "label2id": {name: at for at, name in enumerate(NLI)}}
    return sure_folder(folder, kind, "ForSequenceClassification", std=0.3, **labels)


@pytest.mark.parametrize("kind", ["Bart", "MBart", "PLBart"])
@pytest.mark.parametrize("several", [False, True])
def test_encoder_decoders_classify_as_in_the_pipeline(tmp_path: Path, kind: str, several: bool) -> None:
    folder = encoder_decoder(tmp_path, kind)
    given = [*TEXTS, "the dog [SEP] is bad"]
    # One by one: transformers refuses rows with different numbers of end tokens beside each other.
    pipeline = transformers.pipeline("zero-shot-classification", model=str(folder), device="cpu", batch_size=1)
    wanted = [pipeline(text, candidate_labels=LABELS, multi_label=several) for text in given]
    reply = ask(folder, texts(*given), multi_label=several)
    assert not reply.violations
    for expected, prediction in zip(wanted, reply.response.predictions, strict=True):
        scores = dict(zip(expected["labels"], expected["scores"], strict=True))
        found = {each.label: each.score for each in prediction.classification.scores}
        assert found == pytest.approx(scores, abs=1e-5) and len({round(score, 4) for score in scores.values()}) > 1
    pair = pb.Instance(pair=pb.TextPair(text="my cat", text_pair="not very good"))
    call = worker_pb2.PredictCall(folder=str(folder), request=pb.PredictRequest(instances=[*texts("hello"), pair]))
    answers = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    plain = transformers.pipeline("text-classification", model=str(folder), device="cpu", top_k=None)
    for asked, prediction in zip(
        ("hello", {"text": "my cat", "text_pair": "not very good"}), answers.response.predictions, strict=True
    ):
        own = plain(asked)
        scores = {each["label"]: each["score"] for each in (own[0] if isinstance(own[0], list) else own)}
        found = {each.label: each.score for each in prediction.classification.scores}
        assert found == pytest.approx(scores, abs=1e-5)


def test_a_classifier_that_answers_nothing_is_refused_where_it_is_uploaded(tmp_path: Path) -> None:
    good = encoder_decoder(tmp_path / "bart", "Bart")
    result = inspected(good)
    assert not result.violations and list(result.model.inputs) == ["text", "pair"]
    (problem,) = inspected(encoder_decoder(tmp_path / "t5", "T5")).violations
    assert problem.reason == "MODEL_INVALID" and "head for text_classification" in problem.message
    assert "bart, mbart, plbart are" in problem.message


def inspected(folder: Path) -> worker_pb2.InspectModelResult:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))


@pytest.mark.parametrize("names", [NLI, ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"), ("entailment", "not_entailment")])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"multi_label": True},
        {"hypothesis_template": "this film is {} ."},
        {"labels": ["cute"]},
        {"labels": ["good", "bad"], "multi_label": True, "hypothesis_template": "the dog {}"},
    ],
)
def test_scores_are_those_of_the_pipeline_of_transformers(
    tmp_path: Path, names: tuple[str, ...], asked: dict[str, Any]
) -> None:
    folder = nli(tmp_path / "nli", names)
    pipeline = transformers.pipeline("zero-shot-classification", model=str(folder), device="cpu")
    own = {name: value for name, value in asked.items() if name != "labels"}
    wanted = pipeline(TEXTS, candidate_labels=asked.get("labels", LABELS), **own)
    reply = ask(folder, texts(*TEXTS), **asked)
    assert not reply.violations
    for expected, prediction in zip(wanted, reply.response.predictions, strict=True):
        found = prediction.classification
        assert [each.label for each in found.scores] == asked.get("labels", LABELS)
        scores = dict(zip(expected["labels"], expected["scores"], strict=True))
        assert {each.label: each.score for each in found.scores} == pytest.approx(scores, abs=1e-6)
        if asked.get("multi_label") or len(found.scores) == 1:
            assert set(found.labels) == {label for label, score in scores.items() if score >= 0.5} and not found.label
        else:
            assert found.label == expected["labels"][0] and not found.labels


def test_contradiction_is_found_by_its_name_and_the_threshold_counts(tmp_path: Path) -> None:
    folder = nli(tmp_path / "nli", ("neutral", "contradiction", "entailment"))
    single = nli(tmp_path / "other", ("contradiction", "neutral", "entailment"))
    answers = [ask(each, texts("a dog"), multi_label=True).response.predictions[0] for each in (folder, single)]
    # The same weights: only the output that is subtracted differs.
    assert answers[0].logits != answers[1].logits
    (none,) = ask(folder, texts("a dog"), multi_label=True, threshold=1.0).response.predictions
    (every,) = ask(folder, texts("a dog"), multi_label=True, threshold=0.0).response.predictions
    assert not none.classification.labels and list(every.classification.labels) == LABELS


@pytest.mark.parametrize(
    ("names", "asked", "field", "words"),
    [
        (("bad", "good"), {}, "zero_shot", "the model predicts bad, good; zero_shot needs a classification of pairs"),
        (("entailment", "entails", "no"), {}, "zero_shot", "one label that begins with `entail`"),
        (
            ("entailment", "a", "b"),
            {"multi_label": True},
            "zero_shot.multi_label",
            "none of which begins with `contra`",
        ),
        (("entailment", "a", "b"), {"labels": ["x"]}, "zero_shot.multi_label", "give several labels"),
        (NLI, {"hypothesis_template": "about"}, "zero_shot.hypothesis_template", "'about' must have {} once"),
        (NLI, {"hypothesis_template": "{} {}"}, "zero_shot.hypothesis_template", "and no other braces"),
        (NLI, {"hypothesis_template": "It is {{}}."}, "zero_shot.hypothesis_template", "and no other braces"),
        (NLI, {"labels": ["cute", " "]}, "zero_shot.labels[1]", "blank"),
        (NLI, {"labels": ["cute", "dog " * 40]}, "zero_shot.labels[1]", "leaves nothing of 32 tokens for a text"),
    ],
)
def test_what_does_not_fit_is_refused_by_field(
    tmp_path: Path, names: tuple[str, ...], asked: dict[str, Any], field: str, words: str
) -> None:
    (violation,) = ask(nli(tmp_path / "nli", names), texts("a dog"), **asked).violations
    assert violation.field == field and words in violation.message


def test_pairs_and_models_that_score_are_refused(tmp_path: Path) -> None:
    pair = pb.Instance(pair=pb.TextPair(text="a", text_pair="b"))
    (violation,) = ask(nli(tmp_path / "nli"), [*texts("a dog"), pair]).violations
    assert violation.field == "instances[1].pair" and "send `text`" in violation.message
    several = nli(tmp_path / "several", problem_type="multi_label_classification")
    assert [each.reason for each in ask(several, texts("a")).violations] == ["TASK_MISMATCH"]


def test_an_answer_over_the_limit_is_refused_before_it_is_computed(tmp_path: Path) -> None:
    reply = ask(nli(tmp_path / "nli"), texts(*["a dog"] * 50), limit=1000)
    assert [each.reason for each in reply.violations] == ["RESPONSE_TOO_LARGE"]
