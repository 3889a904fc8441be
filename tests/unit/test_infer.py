"""Predict and embed: answers equal plain transformers, in the order asked; bad questions are refused by index."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.tiny_folders import save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.warm import ModelCache
from shardyard_trainer.models.door import Folder, open_folder
from shardyard_trainer.tasks.opening import open_model

THREE_MIB = 3 * 1024 * 1024
TEXTS = ["the dog is cute", "a film", "the dog eats . a cat runs", "not good"]


def ask(folder: Path, *texts: str | tuple[str, str], limit: int = THREE_MIB, **fields: Any) -> worker_pb2.PredictReply:
    request = pb.PredictRequest(model="projects/default/models/m", instances=instances(texts), **fields)
    call = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=limit)
    return worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))


def ask_vectors(
    folder: Path, *texts: str | tuple[str, str], limit: int = THREE_MIB, **fields: Any
) -> worker_pb2.EmbedReply:
    request = pb.EmbedRequest(model="projects/default/models/m", instances=instances(texts), **fields)
    call = worker_pb2.EmbedCall(folder=str(folder), request=request, max_response_bytes=limit)
    return worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))


def instances(texts: tuple[str | tuple[str, str], ...]) -> list[pb.Instance]:
    return [
        pb.Instance(text=text)
        if isinstance(text, str)
        else pb.Instance(pair=pb.TextPair(text=text[0], text_pair=text[1]))
        for text in texts
    ]


def places(reply: worker_pb2.PredictReply | worker_pb2.EmbedReply) -> list[tuple[str, str]]:
    return [(violation.field, violation.reason) for violation in reply.violations]


@torch.inference_mode()
def reference(folder: Path, auto: Any, *texts: str) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = auto.from_pretrained(folder).eval()
    return [model(**tokenizer(text, return_tensors="pt")) for text in texts]


def test_a_plain_classifier_answers_as_transformers_does_in_the_order_asked(tmp_path: Path) -> None:
    labels = {0: "bad", 1: "fair", 2: "good"}
    folder = save_folder(tmp_path, "BertForSequenceClassification", id2label=labels, label2id={})
    reply = ask(folder, *TEXTS)
    expected = reference(folder, transformers.AutoModelForSequenceClassification, *TEXTS)
    for prediction, output in zip(reply.response.predictions, expected, strict=True):
        assert torch.allclose(torch.tensor(prediction.logits), output.logits[0], atol=1e-5)
        scores = {score.label: score.score for score in prediction.classification.scores}
        assert list(scores) == ["bad", "fair", "good"]
        assert math.isclose(sum(scores.values()), 1)
        assert prediction.classification.label == max(scores, key=scores.__getitem__)


def test_one_call_may_mix_pairs_and_texts(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForSequenceClassification")
    together = ask(folder, "a dog", ("a dog", "a cat"), "a cat").response.predictions
    alone = [ask(folder, each).response.predictions[0] for each in ("a dog", ("a dog", "a cat"), "a cat")]
    for one, other in zip(together, alone, strict=True):
        assert list(one.logits) == pytest.approx(list(other.logits), abs=1e-5)


def test_a_causal_classifier_reads_the_last_real_token_though_padding_is_the_end_token(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2ForSequenceClassification", pad_token_id=256)
    expected = reference(folder, transformers.AutoModelForSequenceClassification, *TEXTS)
    for prediction, output in zip(ask(folder, *TEXTS).response.predictions, expected, strict=True):
        assert torch.allclose(torch.tensor(prediction.logits), output.logits[0], atol=1e-4)


def test_several_labels_are_named_over_the_threshold(tmp_path: Path) -> None:
    folder = save_folder(
        tmp_path, "BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"
    )
    low = ask(folder, "a dog", classification=pb.ClassificationParameters(threshold=0.0)).response.predictions[0]
    assert list(low.classification.labels) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert not low.classification.label
    half = ask(folder, "a dog").response.predictions[0].classification
    assert list(half.labels) == [score.label for score in half.scores if score.score >= 0.5]


def test_a_single_output_is_a_number(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForSequenceClassification", num_labels=1)
    prediction = ask(folder, "a dog").response.predictions[0]
    assert prediction.regression.value == pytest.approx(prediction.logits[0])


def test_greedy_generation_equals_transformers_and_leaves_the_prompt_out(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = ["the dog", "a cat is", "my dog"]
    reply = ask(folder, *prompts, generation=pb.GenerationParameters(max_new_tokens=8))
    for prompt, prediction in zip(prompts, reply.response.predictions, strict=True):
        ids = torch.tensor([[256, *tokenizer(prompt)["input_ids"]]])
        new = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=256)[0, ids.shape[1] :]
        assert prediction.generated_text == tokenizer.decode(new, skip_special_tokens=True)


def test_sampling_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")

    def sample(seed: int, *texts: str) -> list[str]:
        parameters = pb.GenerationParameters(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=seed)
        return [each.generated_text for each in ask(folder, *texts, generation=parameters).response.predictions]

    assert sample(1, "the dog", "a") == sample(1, "the dog", "a much longer text")[:1] + sample(1, "x", "a")[1:]
    assert sample(1, "the dog") != sample(2, "the dog")


def test_the_lowest_temperature_is_greedy(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    greedy, cold = (
        ask(folder, "a", generation=pb.GenerationParameters(max_new_tokens=8, temperature=temperature))
        for temperature in (0.0, 1e-300)
    )
    assert greedy == cold


def test_a_text_continues_past_the_models_window(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel", eos_token_id=None)
    transformers.AutoTokenizer.from_pretrained(folder)
    reply = ask(folder, "x" * 100, "", generation=pb.GenerationParameters(max_new_tokens=90, temperature=2.0))
    assert all(len(each.generated_text) > 10 for each in reply.response.predictions)


def test_masks_are_filled_with_the_likeliest_tokens(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForMaskedLM")
    text = "the [MASK] is very [MASK] ."
    reply = ask(folder, text, "a [MASK]", fill_mask=pb.FillMaskParameters(top_k=3))
    expected = reference(folder, transformers.AutoModelForMaskedLM, text)[0].logits[0].double().softmax(-1)
    masks = reply.response.predictions[0].masked_tokens.masks
    for mask, position in zip(masks, (2, 5), strict=True):
        best = expected[position].topk(3)
        assert [candidate.token_id for candidate in mask.candidates] == best.indices.tolist()
        assert [candidate.score for candidate in mask.candidates] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert len(reply.response.predictions[1].masked_tokens.masks) == 1


@pytest.mark.parametrize(
    ("kind", "texts", "fields", "expected"),
    [
        ("BertForMaskedLM", ("a [MASK]", "a dog"), {}, [("instances[1].text", "SPEC_INVALID")]),
        ("BertForMaskedLM", (("a", "b"),), {}, [("instances[0].pair", "TASK_MISMATCH")]),
        ("BertModel", ("a",), {}, [("model", "TASK_MISMATCH")]),
        (
            "GPT2LMHeadModel",
            ("a", ("a", "b"), "x" * 65537),
            {"fill_mask": pb.FillMaskParameters()},
            [
                ("instances[2].text", "SPEC_INVALID"),
                ("fill_mask", "TASK_MISMATCH"),
                ("instances[1].pair", "TASK_MISMATCH"),
            ],
        ),
        ("BertForSequenceClassification", (), {}, [("instances", "SPEC_INVALID")]),
    ],
)
def test_bad_questions_are_refused_all_at_once(
    tmp_path: Path, kind: str, texts: tuple[Any, ...], fields: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    reply = ask(save_folder(tmp_path, kind), *texts, **fields)
    assert places(reply) == expected
    assert not reply.HasField("response")


def test_an_instance_without_input_is_named(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForSequenceClassification")
    request = pb.PredictRequest(instances=[pb.Instance(text="a"), pb.Instance()])
    call = worker_pb2.PredictCall(folder=str(folder), request=request)
    assert places(worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))) == [
        ("instances[1]", "SPEC_INVALID")
    ]


def test_a_head_that_is_not_there_makes_a_backbone_not_a_random_answer(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertModel")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForSequenceClassification"]}))
    assert places(ask(folder, "a")) == [("model", "TASK_MISMATCH")]
    assert not ask_vectors(folder, "a").violations


@pytest.mark.parametrize(
    "described",
    [
        {"format": 2},
        {"task": "mining"},
        {"labels": [1, 2]},
        {"labels": ["a", "b", "c"]},
        {"max_length": "long"},
        {"max_length": 0},
        {"pooling": "median"},
        {"problem": 3},
    ],
)
def test_a_false_description_is_refused(tmp_path: Path, described: dict[str, Any]) -> None:
    folder = save_folder(tmp_path, "BertForSequenceClassification")
    good = {"format": 1, "task": "text_classification", "labels": ["a", "b"], "problem": "single_label"}
    (folder / "shardyard.json").write_text(json.dumps(good))
    assert not ask(folder, "a").violations
    (folder / "shardyard.json").write_text(json.dumps({**good, **described}))
    assert places(ask(folder, "a")) == [("model", "MODEL_INVALID")]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("T5ForSequenceClassification", transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32)),
        ("ViTModel", transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)),
    ],
)
def test_a_model_that_does_not_read_a_text_token_by_token_is_refused(tmp_path: Path, kind: str, config: Any) -> None:
    folder = save_folder(tmp_path / "m", "BertModel")
    getattr(transformers, kind)(config).save_pretrained(folder)
    if kind == "ViTModel":
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert places(ask(folder, "a")) == [("model", "TASK_MISMATCH")]
    # A picture model has vectors, but none of texts.
    place = "instances[0].text" if kind == "ViTModel" else "model"
    assert places(ask_vectors(folder, "a")) == [(place, "TASK_MISMATCH")]


def test_a_missing_folder_does_not_crash(tmp_path: Path) -> None:
    assert places(ask(tmp_path / "nowhere", "a")) == [("model", "MODEL_INVALID")]


def test_an_answer_too_large_is_refused_with_how_many_fit(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertModel")
    output = spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE
    reply = ask_vectors(folder, *["the dog"] * 100, limit=4096, output=output)
    assert places(reply) == [("instances", "RESPONSE_TOO_LARGE")]
    fits = int(reply.violations[0].metadata["fits"])
    assert 0 < fits < 100
    kept = ask_vectors(folder, *["the dog"] * fits, limit=4096, output=output)
    assert not kept.violations
    assert kept.ByteSize() <= 4096 + 16


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_foreseen_size_is_never_exceeded(tmp_path: Path, kind: str) -> None:
    folder = save_folder(tmp_path, kind)
    reply = ask(folder, *["a [MASK]"] * 50, limit=2000)
    fits = int(reply.violations[0].metadata["fits"])
    kept = ask(folder, *["a [MASK]"] * fits, limit=2000)
    assert not kept.violations
    assert kept.response.ByteSize() <= 2000


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "GPT2Model"])
def test_vectors_equal_the_last_hidden_state(tmp_path: Path, kind: str) -> None:
    folder = save_folder(tmp_path, kind)
    expected = [output.last_hidden_state[0] for output in reference(folder, transformers.AutoModel, *TEXTS)]
    whole = ask_vectors(folder, *TEXTS, output=spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE)
    pooled = ask_vectors(folder, *TEXTS, normalize=True)
    for hidden, one, other in zip(expected, whole.response.embeddings, pooled.response.embeddings, strict=True):
        assert list(one.shape) == list(hidden.shape)
        assert torch.allclose(torch.tensor(one.values).reshape(hidden.shape), hidden, atol=1e-4)
        vector = hidden[-1] if kind.startswith("GPT2") else hidden.mean(0)
        assert torch.allclose(torch.tensor(other.values), torch.nn.functional.normalize(vector, dim=0), atol=1e-4)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("POOLING_CLS", lambda hidden_TD: hidden_TD[0]),
        ("POOLING_LAST", lambda hidden_TD: hidden_TD[-1]),
        ("POOLING_MEAN", lambda hidden_TD: hidden_TD.mean(0)),
        ("POOLING_MAX", lambda hidden_TD: hidden_TD.max(0).values),
    ],
)
def test_each_pooling_is_of_the_tokens_own_vectors(tmp_path: Path, kind: str, pooling: str, expected: Any) -> None:
    folder = save_folder(tmp_path, kind)
    found = ask_vectors(folder, *TEXTS, pooling=spec_pb2.Pooling.Value(pooling)).response.embeddings
    for embedding, output in zip(found, reference(folder, transformers.AutoModel, *TEXTS), strict=True):
        assert torch.allclose(torch.tensor(embedding.values), expected(output.last_hidden_state[0]), atol=1e-5)


def test_a_classifier_embeds_with_the_token_that_its_head_reads_if_nothing_is_asked(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertForSequenceClassification")
    by_default, cls = ask_vectors(folder, "a dog"), ask_vectors(folder, "a dog", pooling=spec_pb2.POOLING_CLS)
    assert by_default.response.embeddings == cls.response.embeddings
    assert ask_vectors(folder, "a dog", pooling=spec_pb2.POOLING_MEAN).response.embeddings != cls.response.embeddings


@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "GPT2Model"])
def test_a_configuration_that_asks_for_other_outputs_changes_no_answer(tmp_path: Path, kind: str) -> None:
    folder = save_folder(tmp_path, kind)
    plain = ask_vectors(folder, "a dog").response
    config = json.loads((folder / "config.json").read_text())
    config |= {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(config))
    assert ask_vectors(folder, "a dog").response == plain


def test_a_length_over_the_models_is_refused(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertModel")
    assert places(ask_vectors(folder, "a", max_length=33)) == [("max_length", "SPEC_INVALID")]
    assert not ask_vectors(folder, "a " * 100, max_length=32).violations


@pytest.mark.parametrize("length", [1, 2, 3])
def test_no_length_is_too_short_to_be_kept(tmp_path: Path, length: int) -> None:
    folder = save_folder(tmp_path, "BertModel")
    output = spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE
    reply = ask_vectors(folder, "a " * 100, ("a", "dog " * 100), max_length=length, output=output)
    assert [list(embedding.shape) for embedding in reply.response.embeddings] == [[length, 16], [length, 16]]


def test_words_have_no_vector_of_their_own(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "BertModel")
    given = [pb.Instance(text="a dog"), pb.Instance(words=pb.Words(words=["a", "dog"]))]
    call = worker_pb2.EmbedCall(folder=str(folder), request=pb.EmbedRequest(model="m", instances=given))
    reply = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))
    assert [(each.field, each.reason) for each in reply.violations] == [("instances[1].words", "TASK_MISMATCH")]


def test_models_are_loaded_once_and_the_oldest_is_given_up_under_the_budget(tmp_path: Path) -> None:
    folders = [open_folder(save_folder(tmp_path / str(index), "BertModel")) for index in range(3)]
    loaded: list[Folder] = []

    def counting(folder: Folder) -> Any:
        loaded.append(folder)
        return open_model(folder)

    size = open_model(folders[0]).loaded.size_bytes
    cache = ModelCache(counting, budget_bytes=2 * size)
    for folder in (folders[0], folders[1], folders[0], folders[2], folders[0], folders[1]):
        cache.get(folder)
    assert loaded == [folders[0], folders[1], folders[2], folders[1]]
    assert cache.held_bytes <= 2 * size
    save_folder(folders[1].path, "BertModel", hidden_size=32)
    assert cache.get(folders[1]).loaded.width == 32
