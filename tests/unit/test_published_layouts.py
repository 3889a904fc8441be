"""Models as their authors publish them: settings that only the model's code reads, sizes that differ, heads of old."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import processors

from helpers.small_specs import classification_spec, locations, write_labelled
from helpers.tiny_folders import WORDS, bert_tokenizer, gpt2_tokenizer
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.export import export_model

TEXTS = ["the dog is cute", "a film", "the dog eats . a cat runs", "not good"]
ENCODER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 5 + len(WORDS), "max_position_embeddings": 32,
}  # fmt: skip
RELATIVE = {
    **ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    "position_biased_input": False, "type_vocab_size": 0, "share_att_key": True,
}  # fmt: skip
DECODER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 257, "bos_token_id": 256,
    "eos_token_id": 256, "pad_token_id": 256, "max_position_embeddings": 32,
}  # fmt: skip

PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DeBERTa-v3": ("deberta-v2", {**RELATIVE, "norm_rel_ebd": "layer_norm"}),
    "DeBERTa-v2 with a convolution": (
        "deberta-v2",
        {**RELATIVE, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2},
    ),
    "OPT-350m": (
        "opt",
        {**DECODER, "ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "XLNet": ("xlnet", {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "vocab_size": 5 + len(WORDS)}),
    "Qwen2": ("qwen2", {**DECODER, "num_key_value_heads": 2, "intermediate_size": 32}),
}


def tokenizer_of(model_type: str, *, ends: bool = False) -> Any:
    """One that fits; with `ends` it adds the end token, which is also its padding, to each text."""
    if model_type not in {"opt", "qwen2"}:
        return bert_tokenizer()
    tokenizer = gpt2_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    if ends:
        end = tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
    return tokenizer


def published(folder: Path, name: str, *, ends: bool = False) -> Path:
    """A folder with a classification head of three classes and weights of a fixed seed."""
    model_type, settings = PUBLISHED[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings, num_labels=3)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer_of(model_type, ends=ends).save_pretrained(folder)
    return folder


def inspected(folder: Path) -> worker_pb2.InspectModelResult:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))


def logits(folder: Path) -> torch.Tensor:
    request = pb.PredictRequest(model="m", instances=[pb.Instance(text=text) for text in TEXTS])
    call = worker_pb2.PredictCall(folder=str(folder), request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    assert not reply.violations, reply.violations
    return torch.tensor([list(prediction.logits) for prediction in reply.response.predictions])


def vectors(folder: Path) -> torch.Tensor:
    request = pb.EmbedRequest(
        model="m", instances=[pb.Instance(text=text) for text in TEXTS], pooling="POOLING_MEAN", normalize=True
    )
    call = worker_pb2.EmbedCall(folder=str(folder), request=request)
    reply = worker_pb2.EmbedReply.FromString(embed(call.SerializeToString()))
    assert not reply.violations, reply.violations
    return torch.tensor([list(each.values) for each in reply.response.embeddings])


@torch.inference_mode()
def plainly(folder: Path, auto: Any, *, length: int = 32) -> list[Any]:
    """What transformers gives for each text alone, cut to `length`."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = auto.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in TEXTS]
    return [model(input_ids=each["input_ids"], attention_mask=each["attention_mask"]) for each in encoded]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_classifier_answers_and_embeds_as_transformers_does(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path, name)
    found = inspected(folder)
    assert not found.violations and found.model.task == "text_classification"
    expected = torch.cat([output.logits for output in plainly(folder, transformers.AutoModelForSequenceClassification)])
    assert torch.allclose(logits(folder), expected, atol=1e-4)
    states = [output.last_hidden_state[0] for output in plainly(folder, transformers.AutoModel)]
    means = torch.nn.functional.normalize(torch.stack([state.mean(0) for state in states]), dim=-1)
    assert torch.allclose(vectors(folder), means, atol=1e-4)


def test_a_causal_classifier_passes_over_an_end_token_that_is_the_padding_as_transformers_does(tmp_path: Path) -> None:
    folder = published(tmp_path, "Qwen2", ends=True)
    expected = torch.cat([output.logits for output in plainly(folder, transformers.AutoModelForSequenceClassification)])
    assert torch.allclose(logits(folder), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["DeBERTa-v3", "OPT-350m", "Qwen2"])
@pytest.mark.parametrize("pooling", ["POOLING_UNSPECIFIED", "POOLING_MEAN"])
def test_a_fine_tuned_model_is_exported_as_transformers_reads_it(tmp_path: Path, name: str, pooling: str) -> None:
    given = published(tmp_path / "given", name, ends=True)
    spec = classification_spec(
        write_labelled(tmp_path / "labelled.csv"), {"uri": str(given)}, classify={"pooling": pooling, "newHead": True}
    )
    request = worker_pb2.PlanRequest(
        spec=spec, locations=locations(tmp_path), node_shape=worker_pb2.NodeShape(memory_bytes=2**33, cpus=4)
    )
    planned = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
    assert not planned.violations, planned.violations
    task = prepare(spec, locations(tmp_path))
    module = build_module(task, spec)
    attempt = worker_pb2.AttemptSpec(
        spec=planned.plan.resolved_spec, locations=locations(tmp_path), job_name="j", job_uid="0" * 32, epoch=1,
        world_size=1,
    )  # fmt: skip
    folder = tmp_path / "exported"
    export_model(module, module.state_dict(), task, attempt, {}, folder=folder)
    answered = logits(folder)
    if not (folder / "head.safetensors").exists():
        outputs = plainly(folder, transformers.AutoModelForSequenceClassification, length=task.length)
        assert torch.allclose(answered, torch.cat([output.logits for output in outputs]), atol=1e-4)


def test_a_model_that_is_not_supported_says_so_before_its_weights_are_blamed(tmp_path: Path) -> None:
    settings = {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 32}
    config = transformers.FunnelConfig(vocab_size=5 + len(WORDS), **settings)
    transformers.FunnelForSequenceClassification(config).save_pretrained(tmp_path)
    bert_tokenizer().save_pretrained(tmp_path)
    (problem,) = inspected(tmp_path).violations
    assert problem.message.startswith("funnel is not supported")
