"""Configurations of models: what cannot work in overrides or a folder is refused before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from helpers import tiny_folders
from helpers.small_specs import OVERRIDES, causal_spec, locations, masked_spec, write_corpus
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.models.architectures import known_types
from shardyard_trainer.models.fresh import fresh_config, number_complaint
from shardyard_trainer.models.loading import FIXED_SETTINGS, quiet
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare


def spec_of(tmp_path: Path, model_type: str, overrides: dict[str, Any]) -> spec_pb2.JobSpec:
    make = masked_spec if model_type in ("bert", "roberta") else causal_spec
    family = OVERRIDES.get(model_type, OVERRIDES["llama" if make is causal_spec else "bert"])
    model = {"architecture": {"modelType": model_type, "overrides": {**family, **overrides}}}
    return make(write_corpus(tmp_path), model_type, model=model)


REFUSED: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads", ("2 attention heads", "3 key-value", "such as 1")),
    ("llama", {"num_key_value_heads": 0}, "num_key_value_heads", ("0: at least 1",)),
    ("llama", {"head_dim": 3}, "head_dim", ("heads of 3", "even")),
    ("llama", {"hidden_size": 6}, "hidden_size", ("heads of 3", "even")),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads", ("0: at least 1",)),
    ("qwen3", {"num_attention_heads": -2}, "num_attention_heads", ("-2: at least 1",)),
    ("gpt2", {"n_head": 0}, "n_head", ("0: at least 1",)),
    ("gpt2", {"n_inner": -3}, "n_inner", ("-3: at least 1",)),
    ("bert", {"type_vocab_size": 0}, "type_vocab_size", ("0: at least 1",)),
    ("gpt2", {"return_dict": False}, "return_dict", ("false: training needs true", "leave it out")),
    ("llama", {"output_attentions": True}, "output_attentions", ("true: training needs false",)),
    ("bert", {"output_hidden_states": True}, "output_hidden_states", ("true: training needs false",)),
    ("bert", {"chunk_size_feed_forward": 7}, "chunk_size_feed_forward", ("7: training needs 0",)),
    ("llama", {"attention_dropout": 2}, "attention_dropout", ("2 is not a dropout", "less than 1")),
    ("gpt2", {"attn_pdrop": -0.1}, "attn_pdrop", ("-0.1 is not a dropout",)),
    ("gpt2", {"summary_first_dropout": 1}, "summary_first_dropout", ("1 is not a dropout",)),
    ("bert", {"classifier_dropout": 2}, "classifier_dropout", ("2 is not a dropout",)),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps", ("-1 must be over 0", "1e-5")),
    ("gpt2", {"layer_norm_epsilon": 0}, "layer_norm_epsilon", ("0 must be over 0",)),
    ("gpt2", {"initializer_range": -1}, "initializer_range", ("-1 is not a standard deviation",)),
    ("llama", {"pad_token_id": 99999}, "pad_token_id", ("99999", "0 to", "leave it out")),
    ("gpt2", {"eos_token_id": -5}, "eos_token_id", ("-5",)),
    ("roberta", {"bos_token_id": 50_000}, "bos_token_id", ("50000",)),
    ("llama", {"hidden_act": "badact"}, "hidden_act", ("no hidden_act 'badact'", "gelu")),
    ("gpt2", {"activation_function": "gelo"}, "activation_function", ("'gelo'", "did you mean gelu?")),
    ("gpt2", {"dtype": "float16"}, "dtype", ("dtype cannot be overridden", "optimization.precision")),
    ("llama", {"model_type": "bert"}, "model_type", ("cannot be overridden", "architecture.model_type")),
    ("bert", {"transformers_version": "4.0"}, "transformers_version", ("cannot be overridden",)),
    ("bert", {"auto_map": {}}, "auto_map", ("cannot be overridden", "ever run")),
    ("bert", {"_name_or_path": "/etc/passwd"}, "_name_or_path", ("no such setting",)),
    ("mixtral", {"num_local_experts": 2, "num_experts_per_tok": 5}, "num_experts_per_tok", ("5 experts", "are 2")),
    ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok", ("0 experts a token",)),
]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{row[0]} {next(iter(row[1]))}" for row in REFUSED])
def test_an_override_that_cannot_work_is_refused_by_its_name(
    tmp_path: Path, case: tuple[str, dict[str, Any], str, tuple[str, ...]]
) -> None:
    model_type, overrides, name, words = case
    with pytest.raises(SpecError) as caught:
        prepare(spec_of(tmp_path, model_type, overrides), locations(tmp_path))
    error = caught.value
    assert (error.reason, error.field) == ("SPEC_INVALID", f"spec.model.architecture.overrides.{name}")
    assert all(word in error.message for word in words), error.message


@pytest.mark.parametrize("name", ["dtyp", "transformers_versio", "auto_mapp"])
def test_what_cannot_be_overridden_is_not_suggested(name: str) -> None:
    wanted = spec_pb2.Architecture(model_type="llama")
    wanted.overrides.update({name: "x"})
    with pytest.raises(SpecError) as caught:
        fresh_config(wanted, "spec.model.architecture")
    assert "no such setting" in caught.value.message
    assert f"did you mean {name[:-1]}" not in caught.value.message


def test_heads_that_do_not_fit_the_architectures_own_are_refused_for_what_was_given() -> None:
    wanted = spec_pb2.Architecture(model_type="mistral")
    wanted.overrides.update({"num_attention_heads": 4, "hidden_size": 64})
    with pytest.raises(SpecError) as caught:
        fresh_config(wanted, "m")
    assert caught.value.field == "m.overrides.num_attention_heads"
    assert "4 attention heads cannot share 8 key-value heads evenly" in caught.value.message
    wanted.overrides.update({"num_key_value_heads": 2})
    assert fresh_config(wanted, "m")[0].num_key_value_heads == 2


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 1, "head_dim": 6, "attention_dropout": 0, "rms_norm_eps": 1}),
    ("llama", {"return_dict": True, "output_attentions": False, "chunk_size_feed_forward": 0, "hidden_act": "gelu"}),
    ("gpt2", {"n_head": 1, "n_embd": 7, "attn_pdrop": 0.99, "pad_token_id": 0, "eos_token_id": 299}),
    ("bert", {"classifier_dropout": 0, "initializer_range": 0, "type_vocab_size": 1, "use_cache": False}),
]


@pytest.mark.parametrize(("model_type", "overrides"), ACCEPTED)
def test_an_override_that_works_is_taken(tmp_path: Path, model_type: str, overrides: dict[str, Any]) -> None:
    task = prepare(spec_of(tmp_path, model_type, overrides), locations(tmp_path))
    kept = {name: value for name, value in overrides.items() if not name.endswith("_token_id")}
    assert {name: getattr(task.choice.config, name) for name in kept} == kept


def test_every_architectures_own_settings_are_accepted() -> None:
    for model_type in known_types():
        with quiet():
            settings = transformers.CONFIG_MAPPING[model_type]().to_dict()
        assert not {name: value for name, value in settings.items() if number_complaint(name, value)}, model_type
        assert {name: settings.get(name, value) for name, value in FIXED_SETTINGS.items()} == FIXED_SETTINGS, model_type


def folder_spec(tmp_path: Path, **settings: Any) -> spec_pb2.JobSpec:
    folder = tiny_folders.save_folder(tmp_path / "gpt2", "GPT2LMHeadModel")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return causal_spec(write_corpus(tmp_path), model={"uri": str(folder)}, tokenizer={})


@pytest.mark.parametrize(
    ("name", "value"), [("return_dict", False), ("output_attentions", True), ("output_hidden_states", True)]
)
def test_what_a_folders_calls_would_return_is_of_no_matter(tmp_path: Path, name: str, value: bool) -> None:
    spec = folder_spec(tmp_path, **{name: value})
    task = prepare(spec, locations(tmp_path))
    module = build_module(task, spec)
    assert getattr(module.model.config, name) == FIXED_SETTINGS[name]
    loss = module(**task.train.micro_batch([SampleRef(0, 0)]).inputs).loss_sum
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attn_pdrop", 2, "config.json has attn_pdrop: 2 is not a dropout"),
        ("layer_norm_epsilon", -1.0, "config.json has layer_norm_epsilon: -1 must be over 0"),
        ("initializer_range", float("inf"), "config.json has initializer_range: inf is not a standard deviation"),
        ("activation_function", "nope", "transformers has no activation_function 'nope'; it has gelu"),
    ],
)
def test_a_folder_of_settings_that_cannot_work_is_refused(tmp_path: Path, name: str, value: Any, message: str) -> None:
    spec = folder_spec(tmp_path, **{name: value})
    with pytest.raises(SpecError) as caught:
        build_module(prepare(spec, locations(tmp_path)), spec)
    assert (caught.value.reason, caught.value.field) == ("MODEL_INVALID", "spec.model.uri")
    assert message in caught.value.message
