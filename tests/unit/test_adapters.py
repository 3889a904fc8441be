"""Adapters of peft as models: what they compute is what peft computes, and what cannot be merged is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.adapters import CONFIG, WEIGHTS, adapt, change_settings, change_tensors
from helpers.loopback_hub import COMMIT, MODEL, LoopbackHub, loopback_hub
from helpers.small_specs import classification_spec, locations, write_labelled
from helpers.tiny_folders import save_folder
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.models.sentence import read_sentence
from shardyard_trainer.models.sources import Found, find_folder
from shardyard_trainer.planning.pins import model_fingerprint
from shardyard_trainer.tasks.ingredients import prepare

LLAMA = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 37, "attention_bias": True,
}  # fmt: skip
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 37, "d_kv": 16}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
IDS = torch.arange(14).reshape(2, 7) + 3
PICTURES = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)

# A base and its sizes, the class that it is adapted as, and the adapter's settings.
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "a classifier and all biases": (
        "BertModel", {}, "AutoModelForSequenceClassification",
        {"num_labels": 5, "task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "all"},
    ),
    "a backbone": (
        "BertForMaskedLM", {}, "AutoModel",
        {"task_type": "FEATURE_EXTRACTION", "target_modules": ["query", "output.dense"]},
    ),
    "ranks and scales by layer, turned weights": (
        "GPT2LMHeadModel", {}, "AutoModelForCausalLM",
        {
            "task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "use_rslora": True,
            "rank_pattern": {"h.0.attn.c_attn": 3}, "alpha_pattern": {r"^transformer\.h\.1\.mlp\.c_proj": 7},
            "fan_in_fan_out": True,
        },
    ),
    "ranks by a regular expression": (
        "GPT2LMHeadModel", {}, "AutoModelForCausalLM",
        {
            "task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True,
            "rank_pattern": {r".*h\.1\..*(c_attn|c_proj)": 2},
        },
    ),
    "DoRA, and a tied output layer alone": (
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, "AutoModelForCausalLM",
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "lm_head"], "use_dora": True},
    ),
    "DoRA on turned weights": (
        "GPT2LMHeadModel", {}, "AutoModelForCausalLM",
        {"task_type": "CAUSAL_LM", "target_modules": ["c_fc"], "use_dora": True, "fan_in_fan_out": True},
    ),
    "embeddings": (
        "LlamaForCausalLM", LLAMA, "AutoModelForCausalLM",
        {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "v_proj"]},
    ),
    "biases of its own": (
        "LlamaForCausalLM", LLAMA, "AutoModelForCausalLM",
        {"task_type": "CAUSAL_LM", "target_modules": ["v_proj"], "lora_bias": True},
    ),
    "more tokens": (
        "LlamaForCausalLM", LLAMA, "AutoModelForCausalLM",
        {"num_tokens": 105, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]},
    ),
    "more tokens, tied": (
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, "AutoModelForCausalLM",
        {"num_tokens": 105, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]},
    ),
    "a table trained as a whole, tied": (
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}, "AutoModelForCausalLM",
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "an encoder-decoder": (
        "T5ForConditionalGeneration", T5, "AutoModelForSeq2SeqLM",
        {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]},
    ),
    "pictures": (
        "ViTModel", VIT, "AutoModelForImageClassification",
        {"num_labels": 3, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]},
    ),
    "convolutions": (
        "ResNetForImageClassification", RESNET, "AutoModelForImageClassification",
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    ),
}  # fmt: skip


def base_of(folder: Path, kind: str, sizes: dict[str, Any]) -> Path:
    if kind.startswith(("Bert", "GPT2")):
        return save_folder(folder, kind)
    torch.manual_seed(3)
    made = getattr(transformers, kind)
    made(made.config_class(**sizes)).eval().save_pretrained(folder)
    return folder


def source(adapter: Path, base: Path) -> spec_pb2.ModelSource:
    found = spec_pb2.ModelSource()
    found.adapter.folder.uri, found.adapter.base.uri = str(adapter), str(base)
    return found


def found_in(tmp_path: Path) -> Found:
    return find_folder(source(tmp_path / "adapter", tmp_path / "base"), locations(tmp_path), field="spec.model")


def refused(tmp_path: Path) -> SpecError:
    with pytest.raises(SpecError) as caught:
        found_in(tmp_path)
    return caught.value


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    if model.config.model_type in {"vit", "resnet"}:
        size = 8 if model.config.model_type == "vit" else 32
        return {"pixel_values": PICTURES[..., :size, :size]}
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})}


@torch.inference_mode()
def outputs(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(**inputs_of(model))[0]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_merged_model_says_what_peft_says_with_the_adapter_beside(name: str, tmp_path: Path) -> None:
    kind, sizes, auto, lora = KINDS[name]
    base = base_of(tmp_path / "base", kind, sizes)
    expected = outputs(adapt(tmp_path / "adapter", base, auto, **lora))
    found = found_in(tmp_path)
    model = getattr(transformers, auto).from_pretrained(found.folder.path).eval()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert "merged from a LoRA adapter" in found.note and found.folder.path.is_relative_to(tmp_path / "cache")
    if not lora.keys() & {"num_labels", "num_tokens"}:
        before = getattr(transformers, auto).from_pretrained(base).eval()
        assert not torch.allclose(outputs(before), expected, atol=1e-3)
    assert found_in(tmp_path).folder.path == found.folder.path


def test_names_of_earlier_versions_of_transformers_are_read(tmp_path: Path) -> None:
    lora = {"num_labels": 3, "target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    base = base_of(tmp_path / "base", "ViTModel", VIT)
    expected = outputs(adapt(tmp_path / "adapter", base, "AutoModelForImageClassification", **lora))
    renamed = {
        f"vit.layers.{layer}.attention.q_proj.lora_{part}.weight": (
            f"vit.encoder.layer.{layer}.attention.attention.query.lora_{part}.weight"
        )
        for layer in range(2)
        for part in "AB"
    }
    change_tensors(tmp_path / "adapter", **renamed)
    model = transformers.AutoModelForImageClassification.from_pretrained(found_in(tmp_path).folder.path).eval()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    """A BERT and an adapter with a head of three labels."""
    base = save_folder(tmp_path / "base", "BertModel")
    lora = {"num_labels": 3, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    adapt(tmp_path / "adapter", base, "AutoModelForSequenceClassification", **lora)
    return tmp_path / "adapter"


def test_the_tokenizer_of_the_adapter_counts_if_it_has_one(classifier: Path, tmp_path: Path) -> None:
    plain = found_in(tmp_path).folder
    assert (plain.path / "tokenizer.json").read_bytes() == (tmp_path / "base/tokenizer.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (classifier / name).write_bytes((tmp_path / "base" / name).read_bytes() + b" ")
    (tmp_path / "base/special_tokens_map.json").write_text('{"unk_token": "[OTHER]"}')
    own = found_in(tmp_path).folder
    assert own.path != plain.path and (own.path / "tokenizer.json").read_bytes().endswith(b" ")
    assert not (own.path / "special_tokens_map.json").exists()


def test_what_sentence_transformers_does_and_a_chat_template_are_the_adapters_if_it_has_them(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", "BertModel")
    adapter = tmp_path / "adapter"
    adapt(adapter, base, "AutoModel", task_type="FEATURE_EXTRACTION", target_modules=["query"])
    for folder, pooling in ((base, "mean_tokens"), (adapter, "cls_token")):
        types = [f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling")]
        modules = [{"path": path, "type": kind} for path, kind in zip(("", "1_Pooling"), types, strict=True)]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        flags = {"pooling_mode_mean_tokens": False, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling/config.json").write_text(json.dumps(flags))
    (base / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    (base / "chat_template.jinja").write_text("base")
    settings = read_sentence(found_in(tmp_path).folder)
    assert settings is not None and (settings.pooling, settings.max_length) == ("cls", None)
    assert (found_in(tmp_path).folder.path / "chat_template.jinja").read_text() == "base"
    (adapter / "chat_template.jinja").write_text("adapter")
    (adapter / "modules.json").unlink()
    found = found_in(tmp_path).folder
    settings = read_sentence(found)
    assert settings is not None and (settings.pooling, settings.max_length) == ("mean", 7)
    assert (found.path / "chat_template.jinja").read_text() == "adapter"


def test_a_spec_trains_the_merged_model_and_names_what_is_wrong_in_its_field(classifier: Path, tmp_path: Path) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), classify={"newHead": True})
    spec.ClearField("tokenizer")
    spec.model.CopyFrom(source(classifier, tmp_path / "base"))
    task = prepare(spec, locations(tmp_path))
    assert task.choice.described is not None and task.choice.described.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    first = model_fingerprint(spec, locations(tmp_path))
    change_settings(classifier, lora_alpha=7)
    second = model_fingerprint(spec, locations(tmp_path))
    (tmp_path / "base/config.json").write_text((tmp_path / "base/config.json").read_text() + " ")
    assert len({first, second, model_fingerprint(spec, locations(tmp_path))}) == 3
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(SpecError, match="the folder has no weights") as caught:
        prepare(spec, locations(tmp_path))
    assert caught.value.field == "spec.model.adapter"


@pytest.fixture
def hub(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub(classifier) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_an_adapter_of_the_hub_is_pinned_by_its_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    wanted = source(tmp_path / "adapter", tmp_path / "base")
    wanted.adapter.folder.hub.id = MODEL
    found = find_folder(wanted, locations(tmp_path), field="spec.model")
    assert isinstance(found.pinned, spec_pb2.AdaptedModel) and found.pinned.folder.hub.revision == COMMIT
    assert found.pinned.base.uri == str(tmp_path / "base")
    assert found.folder.path == found_in(tmp_path).folder.path


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "of the type 'IA3', only LORA is read"),
    "a changed start": ({"init_lora_weights": "pissa_niter_4"}, "changes the weights of the model itself too"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, "would be another adapter: layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "of the future": ({"use_something": True}, "would be another adapter: use_something"),
    "what is read beside texts": ({"peft_type": "PREFIX_TUNING"}, "train a LoRA adapter instead"),
    "a regular expression": ({"alpha_pattern": {"(a+)+$": 2}}, "has patterns other than names, which are not run"),
    "no dictionary": ({"alpha_pattern": [1]}, "alpha_pattern: '[1]', which is not an object"),
    "an alpha of text": ({"lora_alpha": "8"}, "lora_alpha: '8', which is not a number"),
    "no alpha": ({"lora_alpha": float("nan")}, "lora_alpha: 'nan', which is not a number"),
    "another rank": ({"r": 2}, "has matrices of the ranks 4 and 4, but adapter_config.json says 2"),
    "DoRA that is not there": ({"use_dora": True}, "has lora_magnitude_vector or lacks it"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_would_be_passed_over_are_refused(name: str, classifier: Path, tmp_path: Path) -> None:
    changes, words = SETTINGS[name]
    change_settings(classifier, **changes)
    error = refused(tmp_path)
    assert words in error.message and (error.field, error.reason) == ("spec.model.adapter", "MODEL_INVALID")


def test_a_layer_that_the_base_lacks_is_not_filled_by_chance(tmp_path: Path) -> None:
    base = save_folder(tmp_path / "base", "BertForMaskedLM")
    adapt(tmp_path / "adapter", base, "AutoModel", task_type="FEATURE_EXTRACTION", target_modules=["pooler.dense"])
    assert "neither the adapter nor its model has pooler.dense.weight of a BertModel" in refused(tmp_path).message


def named(folder: Path) -> Path:
    (folder / "named").mkdir()
    return folder / "named"


QUERY = "bert.encoder.layer.0.attention.self.query"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda folder: (folder / CONFIG).unlink(), "the folder has no adapter_config.json"),
    "settings that are not JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is not JSON"),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), "the folder has no adapter_model.safetensors"),
    "a pickle alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
        "is a pickle, which can run code",
    ),
    "another folder": (
        lambda folder: (folder / CONFIG).rename(named(folder) / CONFIG), "its folder 'named' has one: give that",
    ),
    "weights that ZeRO-3 has not gathered": (
        lambda folder: change_tensors(folder, **{f"{QUERY}.lora_A.weight": torch.ones(0)}), "ZeRO stage 3",
    ),
    "half a file": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:300]), "header"),
    "half a pair": (
        lambda folder: change_tensors(folder, **{f"{QUERY}.lora_B.weight": None}), "needs a pair of matrices",
    ),
    "another width": (
        lambda folder: change_tensors(folder, **{f"{QUERY}.lora_A.weight": torch.ones(4, 17)}),
        "makes the shape [16, 17], but the model has [16, 16] there",
    ),
    "not finite": (
        lambda folder: change_tensors(folder, **{f"{QUERY}.lora_A.weight": torch.full((4, 16), torch.nan)}),
        "not finite",
    ),
    "another layer": (
        lambda folder: change_tensors(
            folder, **{f"{QUERY}.lora_{part}.weight": f"bert.layer.9.query.lora_{part}.weight" for part in "AB"}
        ),
        "bert.layer.9.query.weight among them; it was trained beside",
    ),
    "names without their beginning": (
        lambda folder: change_tensors(folder, **{f"base_model.model.{QUERY}.lora_A.weight": "query.lora_A.weight"}),
        "does not begin with 'base_model.model.'",
    ),
    "another kind of tensor": (
        lambda folder: change_tensors(folder, **{f"{QUERY}.lora_A.weight": f"{QUERY}.lora_E"}),
        "is of a kind that is not read",
    ),
    "another head": (
        lambda folder: change_tensors(folder, **{"classifier.weight": torch.ones(3, 9)}),
        "makes the shape [3, 9], but the model has [2, 16] there",
    ),
    "no head": (
        lambda folder: change_tensors(folder, **{"classifier.weight": None, "classifier.bias": None}),
        "neither the adapter nor its model has classifier.bias, classifier.weight of a BertForSequenceClassification",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_adapter_of_the_model_are_refused(name: str, classifier: Path, tmp_path: Path) -> None:
    damage, words = FILES[name]
    damage(classifier)
    error = refused(tmp_path)
    assert words in error.message and error.field == "spec.model.adapter"
    assert error.reason == ("MODEL_UNSAFE" if "pickle" in name else "MODEL_INVALID") and len(error.message) < 600


def test_an_adapter_given_as_a_model_is_refused_with_what_to_do(classifier: Path, tmp_path: Path) -> None:
    spec = spec_pb2.ModelSource(uri=str(classifier))
    with pytest.raises(SpecError, match=re.escape("give it as the `adapter` of a job's model")):
        prepare(classification_spec(write_labelled(tmp_path / "a.csv"), {"uri": spec.uri}), locations(tmp_path))
