"""Weights that are not what config.json says: refused, warned of or kept, the same at upload, plan and answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import tiny_folders
from helpers.folder_doors import Change, asked, inspected, planned, set_config, set_tensors, spec_for
from helpers.small_specs import locations, masked_spec, write_corpus
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.export import export_model


def exported(root: Path, spec: spec_pb2.JobSpec) -> tuple[Any, Path]:
    """The module after one step of training, and the folder that it became."""
    result = planned(root, spec)
    assert not result.violations, result.violations
    task = prepare(spec, locations(root))
    module = build_module(task, spec)
    batch = task.train.micro_batch([SampleRef(0, 0), SampleRef(0, 1)])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(**batch.inputs).loss_sum.backward()
    optimizer.step()
    attempt = worker_pb2.AttemptSpec(
        spec=result.plan.resolved_spec, locations=locations(root), job_name="j", job_uid="0" * 32, epoch=1, world_size=1
    )
    export_model(module, module.state_dict(), task, attempt, {}, folder=root / "exported")
    return module, root / "exported"


REFUSED: list[tuple[str, str, Change, str]] = [
    ("BertForMaskedLM", "masked_lm", set_config(num_hidden_layers=1), "encoder.layer.1"),
    ("BertModel", "text_classification", set_config(num_hidden_layers=1), "encoder.layer.1"),
    ("GPT2LMHeadModel", "causal_lm", set_config(n_layer=1), "h.1."),
    ("BertForMaskedLM", "masked_lm", set_config(num_hidden_layers=3), "encoder.layer.2"),
    (
        "BertForMaskedLM",
        "masked_lm",
        set_tensors(bert__encoder__layer__0__attention__self__distance_embedding__weight=(7, 8)),
        "distance_embedding",
    ),
    ("BertForMaskedLM", "masked_lm", set_config(intermediate_size=48), "intermediate"),
]


@pytest.mark.parametrize("case", REFUSED, ids=[f"{row[0]}-{row[3]}" for row in REFUSED])
def test_weights_of_another_backbone_are_refused_at_upload_and_at_plan(
    tmp_path: Path, case: tuple[str, str, Change, str]
) -> None:
    kind, task, change, tensor = case
    folder = tiny_folders.save_folder(tmp_path / "m", kind)
    change(folder)
    (problem,) = inspected(folder).violations
    assert problem.reason == "MODEL_INVALID" and tensor in problem.message
    refused = planned(tmp_path, spec_for(task, tmp_path, folder)).violations
    assert {violation.reason for violation in refused} == {"MODEL_INVALID"}
    assert any(tensor in violation.message for violation in refused)


WARNED: list[tuple[str, str, Change, list[str]]] = [
    ("BertForMaskedLM", "masked_lm", set_tensors(), []),
    ("BertForPreTraining", "masked_lm", set_tensors(), []),
    ("BertForMaskedLM", "masked_lm", set_tensors(adapter__down__weight=(4, 4)), ["UNREAD_TENSORS"]),
    ("BertForMaskedLM", "masked_lm", set_tensors(cls__predictions__transform__dense__weight=None), ["NEW_HEAD"]),
    ("BertModel", "masked_lm", set_config(architectures=["BertForMaskedLM"]), ["NEW_HEAD"]),
    ("BertForSequenceClassification", "text_classification", set_tensors(), []),
    ("BertModel", "text_classification", set_config(architectures=["BertForSequenceClassification"]), ["NEW_HEAD"]),
    (
        "BertModel",
        "text_classification",
        set_config(architectures=["BertForSequenceClassification"], id2label={"0": "x", "1": "y", "2": "z"}),
        ["NEW_HEAD"],
    ),
    ("GPT2LMHeadModel", "causal_lm", set_tensors(transformer__h__0__attn__bias=(1, 1, 32, 32)), []),
    ("GPT2LMHeadModel", "causal_lm", set_tensors(transformer__h__0__attn__scale_attn=(1,)), []),
    ("GPT2LMHeadModel", "causal_lm", set_tensors(transformer__h__1__attn__rotary_emb__cos_cached=(1, 1, 32, 8)), []),
    ("GPT2LMHeadModel", "causal_lm", set_tensors(transformer__rotary_emb__original_inv_freq=(4,)), []),
]


@pytest.mark.parametrize("case", WARNED, ids=[f"{row[0]}-{row[1]}-{index}" for index, row in enumerate(WARNED)])
def test_what_of_a_head_is_not_there_or_not_read_is_said_in_the_plan(
    tmp_path: Path, case: tuple[str, str, Change, list[str]]
) -> None:
    kind, task, change, reasons = case
    folder = tiny_folders.save_folder(tmp_path / "m", kind)
    change(folder)
    assert not inspected(folder).violations
    result = planned(tmp_path, spec_for(task, tmp_path, folder))
    assert not result.violations, result.violations
    of_weights = {"NEW_HEAD", "UNREAD_TENSORS", "OUTPUT_LAYER_UNTIED"}
    assert [warning.reason for warning in result.plan.warnings if warning.reason in of_weights] == reasons


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "base_model.model.", "model."])
def test_weights_below_a_wrapper_are_refused_with_what_wraps_them(tmp_path: Path, wrapper: str) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"{wrapper}{name}": each for name, each in tensors.items()}, folder / "model.safetensors")
    (problem,) = inspected(folder).violations
    assert f"all names of the file begin with {wrapper!r}" in problem.message


def test_a_whole_file_counts_beside_the_parts_of_an_earlier_save_as_in_transformers(tmp_path: Path) -> None:
    folder, earlier = (tiny_folders.save_folder(tmp_path / name, "BertForMaskedLM") for name in ("m", "earlier"))
    other = transformers.AutoModelForMaskedLM.from_pretrained(earlier)
    torch.nn.init.normal_(other.bert.embeddings.word_embeddings.weight)
    other.save_pretrained(earlier, max_shard_size="8KB")
    parts = [*earlier.glob("model-*"), earlier / "model.safetensors.index.json"]
    for part in parts:
        part.rename(folder / part.name)
    spec = spec_for("masked_lm", tmp_path, folder)
    (twice,) = [each for each in planned(tmp_path, spec).plan.warnings if each.reason == "WEIGHTS_TWICE"]
    assert f"{len(parts) - 1} other files" in twice.message
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    module = build_module(prepare(spec, locations(tmp_path)), spec)
    for name, wanted in loaded.state_dict().items():
        assert torch.equal(module.model.state_dict()[name], wanted)


@pytest.mark.parametrize("task", ["text_classification", "masked_lm"])
def test_a_head_that_only_config_json_mentions_is_not_a_task_of_an_uploaded_model(tmp_path: Path, task: str) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertModel")
    names = {"text_classification": "BertForSequenceClassification", "masked_lm": "BertForMaskedLM"}
    set_config(architectures=[names[task]])(folder)
    model = inspected(folder).model
    assert (model.task, list(model.labels)) == ("", [])
    assert [violation.reason for violation in asked(folder, "a [MASK]").violations] == ["TASK_MISMATCH"]


@pytest.mark.parametrize("says_tied", [True, False])
def test_an_output_layer_of_its_own_stays_its_own_through_training_and_export(tmp_path: Path, says_tied: bool) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "GPT2LMHeadModel", tie_word_embeddings=False)
    set_config(tie_word_embeddings=says_tied)(folder)
    own = load_file(folder / "model.safetensors")["lm_head.weight"]
    spec = spec_for("causal_lm", tmp_path, folder)
    warned = [warning.reason for warning in planned(tmp_path, spec).plan.warnings]
    assert ("OUTPUT_LAYER_UNTIED" in warned) == says_tied
    module, out = exported(tmp_path, spec)
    assert not torch.equal(module.model.lm_head.weight, own), "it is trained"
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again.lm_head.weight, module.model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


def test_two_equal_output_layers_stay_one(tmp_path: Path) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "GPT2LMHeadModel")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    module, out = exported(tmp_path, spec_for("causal_lm", tmp_path, folder))
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_documents_stay_apart_whatever_attention_a_config_asks_for(tmp_path: Path, kind: str, setting: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "DistilBert":
        sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}
    if kind == "Electra":
        sizes["embedding_size"] = 16
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=5 + len(tiny_folders.WORDS), max_position_embeddings=40, pad_token_id=0, **sizes
    )
    folder = tmp_path / "m"
    getattr(transformers, f"{kind}ForMaskedLM")(config).save_pretrained(folder)
    tiny_folders.bert_tokenizer().save_pretrained(folder)
    set_config(**{setting: "eager"})(folder)
    spec = masked_spec(write_corpus(tmp_path), model={"uri": str(folder)}, tokenizer={})
    task = prepare(spec, locations(tmp_path))
    module = build_module(task, spec).eval()
    inputs = task.train.micro_batch([SampleRef(0, index) for index in range(4)]).inputs
    mask = inputs["attention_mask"]
    row = next(index for index in range(4) if not mask[index, 0, 0].all())
    first = mask[row, 0, 0]
    changed = inputs["input_ids"].clone()
    changed[row, first] = 5 + (changed[row, first] + 3) % 10

    def others(ids: torch.Tensor) -> torch.Tensor:
        given = {name: inputs[name] for name in ("attention_mask", "position_ids") if name in inputs}
        with torch.no_grad():
            hidden: torch.Tensor = module.backbone(input_ids=ids, **given).last_hidden_state
        return hidden[row, ~first]

    assert torch.equal(others(inputs["input_ids"]), others(changed))


def test_an_encoder_that_is_made_a_decoder_is_not_trained_on_masks(tmp_path: Path) -> None:
    folder = tiny_folders.save_folder(tmp_path / "m", "BertForMaskedLM")
    set_config(is_decoder=True)(folder)
    (refused,) = planned(tmp_path, spec_for("masked_lm", tmp_path, folder)).violations
    assert refused.reason == "OBJECTIVE_UNSUPPORTED" and "set is_decoder to false" in refused.message
    tuned = planned(tmp_path, spec_for("text_classification", tmp_path, folder)).plan
    pooling = tuned.resolved_spec.fine_tuning.text_classification.pooling
    assert pooling == spec_pb2.POOLING_LAST, "its first token has seen nothing of the text"


def test_a_causal_model_that_reads_both_ways_is_not_trained_on_next_tokens(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    tiny_folders.gpt2_tokenizer().save_pretrained(folder)
    set_config(is_causal=False)(folder)
    (refused,) = planned(tmp_path, spec_for("causal_lm", tmp_path, folder)).violations
    assert refused.reason == "OBJECTIVE_UNSUPPORTED" and "both directions" in refused.message


CONTRADICTED: list[tuple[str, str, Change, str, str]] = [
    ("BertForSequenceClassification", "text_classification", set_config(num_labels=3, id2label=None), "2, 16", "3, 16"),
    ("BertForSequenceClassification", "text_classification", set_config(id2label={"0": "a"}), "2, 16", "1, 16"),
    ("BertForSequenceClassification", "text_classification", set_tensors(classifier__weight=(5, 16)), "5, 16", "2, 16"),
    (
        "GPT2ForSequenceClassification",
        "text_classification",
        set_config(id2label={"0": "a", "1": "b", "2": "c"}, pad_token_id=0),
        "2, 16",
        "3, 16",
    ),
    (
        "BertForMaskedLM",
        "masked_lm",
        set_tensors(cls__predictions__transform__dense__weight=(8, 16)),
        "8, 16",
        "16, 16",
    ),
]


@pytest.mark.parametrize("case", CONTRADICTED, ids=[f"{row[0]}-{row[4]}" for row in CONTRADICTED])
def test_a_head_of_another_shape_is_refused_at_upload_replaced_by_a_plan_and_never_asked(
    tmp_path: Path, case: tuple[str, str, Change, str, str]
) -> None:
    kind, task, change, found, wanted = case
    folder = tiny_folders.save_folder(tmp_path / "m", kind)
    change(folder)
    shapes = f"has the shape [{found}], but config.json asks for [{wanted}]"
    (problem,) = inspected(folder).violations
    assert problem.reason == "MODEL_INVALID" and shapes in problem.message and "correct it there" in problem.message
    result = planned(tmp_path, spec_for(task, tmp_path, folder))
    assert not result.violations, result.violations
    (warning,) = [warning for warning in result.plan.warnings if warning.reason == "NEW_HEAD"]
    assert shapes in warning.message
    # As a service of an earlier version may have it.
    (refusal,) = asked(folder, "a [MASK]").violations
    assert refusal.reason == "TASK_MISMATCH" and shapes in refusal.message
