"""A model's generation settings: obeyed by Predict as by transformers, and kept by training and export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.small_specs import causal_spec, locations, write_corpus
from helpers.tiny_folders import save_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.export import export_model

PROMPTS = ["the dog", "a cat is a cat", "my dog"]


def ask(folder: Path, *texts: str, **parameters: Any) -> list[str]:
    request = pb.PredictRequest(model="m", instances=[pb.Instance(text=text) for text in texts])
    request.generation.CopyFrom(pb.GenerationParameters(**parameters))
    call = worker_pb2.PredictCall(folder=str(folder), request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    assert not reply.violations, reply.violations
    return [prediction.generated_text for prediction in reply.response.predictions]


def with_settings(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def greedy(folder: Path, text: str, num: int) -> str:
    """What transformers makes of the folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[256, *tokenizer(text)["input_ids"]]])
    options = {"max_new_tokens": num, "do_sample": False, "pad_token_id": 256}
    # Without the mask transformers takes the begin token for padding.
    new = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return str(tokenizer.decode([token for token in new if token not in ends], skip_special_tokens=True))


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(range(40, 140))},
        {"eos_token_id": [256, *range(10, 60)]},
        {"suppress_tokens": list(range(0, 200, 2))},
        {"begin_suppress_tokens": list(range(100))},
        {"repetition_penalty": 0.7, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "eos_token_id": 256},
    ],
    ids=str,
)
def test_predict_continues_texts_as_transformers_does(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    before = ask(with_settings(folder), *PROMPTS, max_new_tokens=10)
    with_settings(folder, **settings)
    found = ask(folder, *PROMPTS, max_new_tokens=10)
    assert found == [greedy(folder, prompt, 10) for prompt in PROMPTS]
    assert found != before, "the setting changes something"


def test_a_text_ends_at_each_of_the_end_tokens(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    whole = ask(with_settings(folder), PROMPTS[0], max_new_tokens=10)[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[256, *tokenizer(PROMPTS[0])["input_ids"]]])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 256}
    new = model.generate(ids, max_new_tokens=10, **options)[0, ids.shape[1] :].tolist()
    last = next(token for token in reversed(new) if new.index(token) > 0)
    ended = ask(with_settings(folder, eos_token_id=[7, last]), PROMPTS[0], max_new_tokens=10)[0]
    assert ended == tokenizer.decode(new[: new.index(last)]) != whole


def test_what_a_request_leaves_out_is_as_the_model_says(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    plain = ask(with_settings(folder), PROMPTS[0])
    with_settings(folder, do_sample=True, temperature=2.5, top_k=200, max_new_tokens=12)
    sampled = ask(folder, PROMPTS[0])
    assert sampled != plain and sampled == ask(folder, PROMPTS[0], temperature=2.5, max_new_tokens=12)
    assert ask(folder, PROMPTS[0], temperature=0, max_new_tokens=40) == plain
    assert ask(with_settings(folder, do_sample=True, top_k=1), PROMPTS[0]) == plain
    assert ask(with_settings(folder, temperature=2.5), PROMPTS[0]) == plain, "without do_sample nothing is drawn"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -1.0),
        ("top_p", float("nan")),
        ("top_p", 1.5),
        ("repetition_penalty", -2),
        ("repetition_penalty", float("inf")),
        ("no_repeat_ngram_size", 10_000),
    ],
)
def test_a_setting_that_nothing_can_be_drawn_with_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    folder = with_settings(save_folder(tmp_path, "GPT2LMHeadModel"), do_sample=True, **{name: value})
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    found = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))
    assert [problem.metadata["file"] for problem in found.violations] == ["generation_config.json"]
    assert f"has {name}: " in found.violations[0].message and "leave it out" in found.violations[0].message


def test_the_likeliest_token_is_left_at_the_lowest_top_p(tmp_path: Path) -> None:
    folder = save_folder(tmp_path, "GPT2LMHeadModel")
    plain = ask(with_settings(folder), PROMPTS[0])
    assert ask(with_settings(folder, do_sample=True, top_p=0.0), PROMPTS[0]) == plain


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eos_token_id": [256, 9], "do_sample": True, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"temperature": 0.6, "repetition_penalty": 1.2}, {"eos_token_id": 256}),
        ({"eos_token_id": [7, 9]}, {"eos_token_id": [7, 9, 256]}),
        (None, {"eos_token_id": 256}),
    ],
    ids=str,
)
def test_training_keeps_the_settings_and_all_end_tokens(
    tmp_path: Path, settings: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    folder = save_folder(tmp_path / "m", "GPT2LMHeadModel")
    if settings is None:
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        with_settings(folder, **settings)
    spec = causal_spec(write_corpus(tmp_path), model={"uri": str(folder)}, tokenizer={})
    where = locations(tmp_path)
    task = prepare(spec, where)
    module = build_module(task, spec)
    attempt = worker_pb2.AttemptSpec(spec=spec, locations=where, job_name="j", job_uid="0" * 32, epoch=1, world_size=1)
    export_model(module, module.state_dict(), task, attempt, {}, folder=tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    wanted = {**(settings or {}), **expected}
    assert {name: kept[name] for name in wanted} == wanted
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == wanted["eos_token_id"]
