"""Sentence-transformers folders: the vectors of their authors, or a refusal that names what is not computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers import tiny_folders
from helpers.folder_doors import planned
from helpers.small_specs import classification_spec, locations, parse, write_labelled
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

TEXTS = ["the dog is cute", "a film", "The Dog eats . a cat runs"]


def sentence_folder(
    root: Path,
    *,
    kind: str = "BertModel",
    pooling: dict[str, Any] | None = None,
    parts: Sequence[str] = ("Transformer", "Pooling"),
    length: dict[str, Any] | None = None,
    prompts: dict[str, Any] | None = None,
) -> Path:
    """A folder as sentence-transformers saves it."""
    folder = tiny_folders.save_folder(root, kind)
    modules = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if i == 0 else f"{i}_{part}",
            "type": f"sentence_transformers.models.{part}",
        }
        for i, part in enumerate(parts)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for i, part in enumerate(parts[1:], start=1):
        (folder / f"{i}_{part}").mkdir()
        if part == "Pooling":
            (folder / f"{i}_{part}" / "config.json").write_text(json.dumps(pooling or flags("mean_tokens")))
    if length is not None:
        (folder / "sentence_bert_config.json").write_text(json.dumps(length))
    if prompts is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    return folder


def flags(*chosen: str) -> dict[str, Any]:
    """The pooling's file as older versions write it."""
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {"word_embedding_dimension": 16, **{f"pooling_mode_{name}": name in chosen for name in names}}


def ask(folder: Path, *texts: str, **fields: Any) -> worker_pb2.EmbedReply:
    request = pb.EmbedRequest(model="m", instances=[pb.Instance(text=text) for text in texts], **fields)
    call = worker_pb2.EmbedCall(folder=str(folder), request=request)
    return worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))


def hidden(folder: Path, text: str) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states: torch.Tensor = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    return states


POOLED: dict[str, Any] = {
    "cls": lambda hidden_TD: hidden_TD[0],
    "mean": lambda hidden_TD: hidden_TD.mean(0),
    "max": lambda hidden_TD: hidden_TD.max(0).values,
    "last": lambda hidden_TD: hidden_TD[-1],
}
NAMES = [
    (flags("cls_token"), "cls"),
    (flags("mean_tokens"), "mean"),
    (flags("max_tokens"), "max"),
    (flags("lasttoken"), "last"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
    ({}, "mean"),
    ({"embedding_dimension": 16, "pooling_mode": "cls"}, "cls"),
    ({"embedding_dimension": 16, "pooling_mode": "lasttoken"}, "last"),
    ({"embedding_dimension": 16, "pooling_mode": ["max"]}, "max"),
]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("pooling", "name"), NAMES, ids=[f"{i}-{row[1]}" for i, row in enumerate(NAMES)])
def test_the_folders_pooling_and_scale_are_those_of_embed(
    tmp_path: Path, pooling: dict[str, Any], name: str, normalized: bool
) -> None:
    parts = ("Transformer", "Pooling", *(["Normalize"] if normalized else []))
    folder = sentence_folder(tmp_path, pooling=pooling or {"word_embedding_dimension": 16}, parts=parts)
    for embedding, text in zip(ask(folder, *TEXTS).response.embeddings, TEXTS, strict=True):
        expected = POOLED[name](hidden(folder, text))
        if normalized:
            expected = expected / expected.norm()
        assert torch.allclose(torch.tensor(embedding.values), expected, atol=1e-5)


def test_a_pooling_that_is_asked_for_comes_before_the_folders(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path, pooling=flags("cls_token"))
    (found,) = ask(folder, TEXTS[0], pooling=spec_pb2.POOLING_MAX).response.embeddings
    assert torch.allclose(torch.tensor(found.values), hidden(folder, TEXTS[0]).max(0).values, atol=1e-5)


def test_texts_are_cut_and_lower_cased_as_the_folder_says(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "a", length={"max_seq_length": 5, "do_lower_case": True})
    plain = sentence_folder(tmp_path / "b")
    long, short = ask(folder, "THE dog Is cute and so on", "the dog is").response.embeddings
    assert list(long.values) == pytest.approx(list(short.values), abs=1e-5)
    assert ask(folder, "DOG").response == ask(plain, "dog").response != ask(plain, "DOG").response


def feature_plan(root: Path, folder: Path) -> worker_pb2.PlanResult:
    (root / "texts.txt").write_text("\n".join(TEXTS))
    spec = parse({"featureExtraction": {"data": {"uri": str(root / "texts.txt")}}, "model": {"uri": str(folder)}})
    return planned(root, spec)


def test_a_plan_for_features_says_what_the_folder_says(tmp_path: Path) -> None:
    parts, length = ("Transformer", "Pooling", "Normalize"), {"max_seq_length": 20}
    folder = sentence_folder(tmp_path / "m", pooling=flags("cls_token"), parts=parts, length=length)
    wanted = feature_plan(tmp_path, folder).plan.resolved_spec.feature_extraction
    assert (wanted.pooling, wanted.normalize, wanted.max_length) == (spec_pb2.POOLING_CLS, True, 20)


def test_a_part_that_changes_behind_a_link_is_noticed(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m", pooling=flags("cls_token"))
    (folder / "1_Pooling").rename(tmp_path / "shared")
    (folder / "1_Pooling").symlink_to(tmp_path / "shared")
    for pooling, value in (("cls_token", spec_pb2.POOLING_CLS), ("max_tokens", spec_pb2.POOLING_MAX)):
        (tmp_path / "shared" / "config.json").write_text(json.dumps(flags(pooling)))
        found = feature_plan(tmp_path, folder)
        assert not found.violations and found.plan.resolved_spec.feature_extraction.pooling == value


@pytest.mark.parametrize("name", ["cls", "mean", "max"])
def test_fine_tuning_reads_the_vector_that_the_folder_gives(tmp_path: Path, name: str) -> None:
    flag = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}[name]
    folder = sentence_folder(tmp_path / "m", pooling=flags(flag), length={"max_seq_length": 20, "do_lower_case": True})
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), {"uri": str(folder)})
    spec.fine_tuning.text_classification.ClearField("max_length")
    found = planned(tmp_path, spec).plan.resolved_spec
    wanted = found.fine_tuning.text_classification
    assert (wanted.max_length, wanted.pooling) == (20, spec_pb2.Pooling.Value(f"POOLING_{name.upper()}"))
    assert planned(tmp_path, found).plan.resolved_spec == found
    task = prepare(spec, locations(tmp_path))
    module = build_module(task, spec).eval()
    assert module.own_head is not None, "a pooler between the vector and the head would be another vector"
    inputs = task.train.micro_batch([SampleRef(0, 3)]).inputs
    del inputs["labels"]
    with torch.no_grad():
        states = module.backbone(**inputs).last_hidden_state[0]
        logits = module(**inputs, return_outputs=True).outputs["logits"][0]
        assert torch.allclose(logits, module.own_head(POOLED[name](states)), atol=1e-6)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pooling": flags("mean_tokens", "max_tokens")}, "joins 2 poolings"),
    ({"pooling": {"pooling_mode": ["mean", "max"]}}, "joins 2 poolings"),
    ({"pooling": flags()}, "joins 0 poolings"),
    ({"pooling": flags("mean_sqrt_len_tokens")}, "mean_sqrt_len_tokens"),
    ({"pooling": flags("weightedmean_tokens")}, "weightedmean"),
    ({"pooling": {"pooling_mode": "attention"}}, "attention"),
    ({"pooling": {"pooling_mode": [{"mean": True}]}}, "is not mean, cls, max or last"),
    ({"parts": ("Transformer", "Pooling", "Dense", "Normalize")}, "part Dense"),
    ({"parts": ("WordEmbeddings", "Pooling")}, "part WordEmbeddings"),
    ({"parts": ("Transformer", "SpladePooling")}, "part SpladePooling"),
    ({"parts": ("Transformer",)}, "not Transformer, Pooling, Normalize"),
    ({"parts": ("Transformer", "Normalize", "Pooling")}, "not Transformer, Pooling, Normalize"),
    ({"prompts": {"prompts": {"query": "q: "}, "default_prompt_name": "query"}}, "'query' before every text"),
    ({"length": {"max_seq_length": "long"}}, "max_seq_length"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(i) for i, _ in enumerate(REFUSED)])
def test_what_is_not_computed_here_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = sentence_folder(tmp_path / "m", **changes)
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    (problem,) = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString())).violations
    assert problem.reason == "MODEL_INVALID" and message in problem.message
    assert [violation.reason for violation in ask(folder, "a").violations] == ["MODEL_INVALID"]
    assert {violation.reason for violation in feature_plan(tmp_path, folder).violations} == {"MODEL_INVALID"}


@pytest.mark.parametrize("kind", ["Transformer", "BERT"])
def test_a_transformer_in_a_folder_of_its_own_is_named_with_the_next_step(tmp_path: Path, kind: str) -> None:
    folder = sentence_folder(tmp_path / "m", parts=(kind, "Pooling"))
    own = folder / f"0_{kind}"
    own.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).rename(own / name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = own.name
    (folder / "modules.json").write_text(json.dumps(modules))
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    problem, *_ = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString())).violations
    assert f"its transformer is in '0_{kind}'; move the files" in problem.message
    problem, *_ = feature_plan(tmp_path, folder).violations
    assert f"its transformer is in '0_{kind}'; move the files" in problem.message


def test_prompts_that_need_not_be_used_do_not_prevent_loading(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "q: "}, "default_prompt_name": None}
    folder = sentence_folder(tmp_path, parts=("Transformer", "Pooling", "Dropout"), prompts=prompts)
    assert not ask(folder, "a dog").violations
