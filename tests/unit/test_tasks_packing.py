"""Packed documents do not see one another: one test for every family that is packed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import small_specs
from shardyard.v1 import spec_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.packed import positions_from
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

_SPECIAL_SETTINGS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "qwen3": {"head_dim": 16},
    "electra": {"embedding_size": 32},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "starcoder2": {"num_key_value_heads": 2},
}
_GROUPED = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "olmo",
    "olmo2",
    "starcoder2",
    "mixtral",
}


def _model(model_type: str) -> dict[str, Any]:
    if model_type == "distilbert":
        return {"architecture": {"modelType": model_type, "overrides": _SPECIAL_SETTINGS[model_type]}, "dropout": 0}
    overrides = dict(_SPECIAL_SETTINGS.get(model_type, {}))
    if model_type in _GROUPED or model_type == "stablelm":
        overrides["num_key_value_heads"] = 2
    return small_specs.architecture(model_type, **overrides) | {"dropout": 0}


@pytest.mark.parametrize("model_type", sorted(architectures.PACKED_BY_POSITIONS))
def test_a_causal_model_sees_nothing_of_the_document_before(tmp_path: Path, model_type: str) -> None:
    spec = small_specs.causal_spec(small_specs.write_corpus(tmp_path), model=_model(model_type))
    task = prepare(spec, small_specs.locations(tmp_path))
    module = build_module(task, spec).eval()
    batch = task.train.micro_batch([SampleRef(0, i) for i in range(4)])
    positions = batch.inputs["position_ids"]
    row = int((positions == 0).sum(1).argmax())
    begins = np.flatnonzero(positions[row].numpy() == 0)
    second = int(begins[1])
    ids = batch.inputs["input_ids"][row : row + 1]
    changed = ids.clone()
    changed[0, :second] = (changed[0, :second] + 1) % 200

    def hidden(tokens: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module.backbone(input_ids=tokens, use_cache=False, **more).last_hidden_state[0, second:]

    kept_apart = {"position_ids": positions[row : row + 1]}
    # Not to the bit: experts sum in the order of the tokens that they get.
    torch.testing.assert_close(hidden(ids, **kept_apart), hidden(changed, **kept_apart), rtol=1e-5, atol=1e-6)
    alone = hidden(ids, **kept_apart)[: int(begins[2] - second) if len(begins) > 2 else None]
    with torch.no_grad():
        by_itself = module.backbone(input_ids=ids[:, second : second + len(alone)], use_cache=False)
    torch.testing.assert_close(alone, by_itself.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    # The test would see a leak: without the positions there is one.
    assert not torch.allclose(hidden(ids), hidden(changed), atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(architectures.PACKED_BY_MASK))
def test_an_encoder_sees_one_document_only(tmp_path: Path, model_type: str) -> None:
    spec = small_specs.masked_spec(small_specs.write_corpus(tmp_path), model=_model(model_type))
    task = prepare(spec, small_specs.locations(tmp_path))
    module = build_module(task, spec).eval()
    inputs = task.train.micro_batch([SampleRef(0, i) for i in range(4)]).inputs
    offset = architectures.position_offset(task.choice.config)
    positions = inputs["position_ids"] - offset
    row = int((positions == 0).sum(1).argmax())
    begins = [*np.flatnonzero(positions[row].numpy() == 0), positions.shape[1]]
    first, last = int(begins[1]), int(begins[2])
    ids = inputs["input_ids"][row : row + 1]
    changed = ids.clone()
    changed[0, :first] = changed[0, :first].flip(0)
    changed[0, last:] = changed[0, last:].flip(0)

    def hidden(tokens: torch.Tensor) -> torch.Tensor:
        mask, where = inputs["attention_mask"][row : row + 1], inputs["position_ids"][row : row + 1]
        with torch.no_grad():
            output = module.backbone(input_ids=tokens, attention_mask=mask, position_ids=where)
        return output.last_hidden_state[0, first:last]

    assert torch.equal(hidden(ids), hidden(changed))
    with torch.no_grad():
        alone = module.backbone(input_ids=ids[:, first:last]).last_hidden_state[0]
    torch.testing.assert_close(hidden(ids), alone, rtol=1e-4, atol=1e-5)


def test_robertas_positions_begin_behind_its_padding(tmp_path: Path) -> None:
    spec = small_specs.masked_spec(small_specs.write_corpus(tmp_path), "roberta")
    task = prepare(spec, small_specs.locations(tmp_path))
    inputs = task.train.micro_batch([SampleRef(0, i) for i in range(4)]).inputs
    assert inputs["position_ids"].min() == task.choice.config.pad_token_id + 1
    assert task.choice.config.max_position_embeddings == 32 + task.choice.config.pad_token_id + 1


def test_positions_restart_at_every_beginning() -> None:
    starts = np.array([True, False, False, True, True, False])
    assert positions_from(starts).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("model_type", sorted(architectures.PLAIN_OUTPUT_LAYER))
def test_the_loss_is_that_of_the_models_own_logits(tmp_path: Path, model_type: str) -> None:
    spec = small_specs.causal_spec(small_specs.write_corpus(tmp_path), model=_model(model_type))
    task = prepare(spec, small_specs.locations(tmp_path))
    module = build_module(task, spec).eval()
    batch = task.train.micro_batch([SampleRef(0, i) for i in range(3)])
    labels = batch.inputs["labels"]
    with torch.no_grad():
        loss = module(**batch.inputs).loss_sum
        logits = module.model(
            input_ids=batch.inputs["input_ids"], position_ids=batch.inputs["position_ids"], use_cache=False
        ).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert batch.num_units == int((labels != -100).sum())


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_bits_per_byte_are_those_of_the_text_whatever_frames_it(tmp_path: Path, model_type: str) -> None:
    spec = small_specs.causal_spec(
        small_specs.write_corpus(tmp_path), model_type, evalData={"uri": str(small_specs.write_corpus(tmp_path))}
    )
    spec.tokenizer.train.algorithm = spec_pb2.TrainedTokenizer.ALGORITHM_BYTE_BPE
    task = prepare(spec, small_specs.locations(tmp_path))
    module = build_module(task, spec).eval()
    assert task.eval is not None
    gatherer, nats = task.metrics(), 0.0
    for index in range(task.eval.num_samples):
        batch = task.eval.micro_batch([SampleRef(0, index)])
        with torch.no_grad():
            output = module(**batch.inputs, return_outputs=True)
        gatherer.update(batch, output)
        nats += float(output.loss_sum)
    found = task.metrics().compute([gatherer.part()])
    num_bytes = len((tmp_path / "corpus.txt").read_text().replace("\n", "").encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("probability", [0.15, 0.3])
def test_whole_words_are_masked_as_often_as_asked_for(tmp_path: Path, probability: float) -> None:
    objective = {"maskedLm": {"maskProbability": probability, "wholeWord": True, "sequenceLength": 64}}
    spec = small_specs.masked_spec(small_specs.write_corpus(tmp_path), pretraining=objective)
    spec.tokenizer.train.vocab_size = 64
    task = prepare(spec, small_specs.locations(tmp_path))
    chosen = ordinary = 0
    for data_epoch in range(10):
        for index in range(task.train.num_samples):
            batch = task.train.micro_batch([SampleRef(data_epoch, index)])
            chosen += len(batch.inputs["targets"])
            ordinary += int((batch.inputs["input_ids"] >= 0).sum())
    frames = 2 * 200 / task.train.corpus.num_tokens
    assert chosen / (ordinary * (1 - frames)) == pytest.approx(probability, rel=0.03)
