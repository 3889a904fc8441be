"""What a plan says that a text keeps for the backward pass, against what torch really keeps of it on this CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from helpers.plan_requests import ask, filled, fine_tuning, pretraining
from helpers.small_pictures import write_folders
from shardyard.v1 import spec_pb2
from shardyard_trainer.planning.activations import attention_bytes, kept_bytes
from shardyard_trainer.tasks.adaptation import adapt, num_layers_frozen
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.tasks.picture_module import Kept

WIDTH, HEADS, LAYERS, LENGTH = 64, 4, 2, 96


def gpt2(dropout: float) -> Any:
    drops = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "vocab_size": 64, "n_positions": LENGTH}
    return transformers.GPT2Model(transformers.GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def bert(dropout: float) -> Any:
    drops = {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": 64}
    return transformers.BertModel(transformers.BertConfig(**sizes, **drops, intermediate_size=4 * WIDTH))


def llama(dropout: float) -> Any:
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": 64}
    settings = {"num_key_value_heads": 2, "intermediate_size": 160, "attention_dropout": dropout}
    return transformers.LlamaModel(transformers.LlamaConfig(**sizes, **settings))


def bart(dropout: float) -> Any:
    drops = {"attention_dropout": dropout, "dropout": dropout, "activation_dropout": dropout}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "vocab_size": 64}
    sizes = {"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": 1, "encoder_ffn_dim": 160}
    return transformers.BartModel(transformers.BartConfig(**sizes, **heads, **drops, decoder_ffn_dim=160))


LORA = spec_pb2.FineTuning(lora=spec_pb2.Lora(rank=4, alpha=8))
FROZEN = spec_pb2.FineTuning(freeze=spec_pb2.Freeze(embeddings=True, layers=1))


@pytest.mark.parametrize("wanted", [spec_pb2.FineTuning(), LORA, FROZEN], ids=["whole", "adapters", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make", [gpt2, bert, llama], ids=lambda make: make.__name__)
def test_what_is_counted_without_memory_is_what_torch_keeps(
    make: Callable[[float], Any], dropout: float, wanted: spec_pb2.FineTuning
) -> None:
    def module() -> HuggingFaceModule:
        made = HuggingFaceModule()
        made.model, made.own_head = make(dropout), None
        adapt(made, wanted)
        return made

    with torch.device("meta"):
        imagined = module()
    counted = kept_bytes(imagined, LENGTH)
    assert counted is not None
    assert imagined.model.config._attn_implementation == "sdpa"
    real = module().train()
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, LENGTH // 2 :] = 0
    kept = Kept(real)
    with kept:
        real.backbone(input_ids=torch.zeros(2, LENGTH, dtype=torch.long), attention_mask=mask)
    layers = LAYERS - num_layers_frozen(real)
    planned = counted + layers * LENGTH * attention_bytes(real.model.config, LENGTH)
    assert planned == pytest.approx(kept.num_bytes / 2, rel=0.06)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("source", [LENGTH // 4, LENGTH - 8])
def test_an_encoder_decoder_keeps_its_source_in_one_part_and_its_target_in_the_other(
    source: int, dropout: float
) -> None:
    def module() -> HuggingFaceModule:
        made = HuggingFaceModule()
        made.model, made.own_head = bart(dropout), None
        return made

    with torch.device("meta"):
        imagined = module()
    counted = kept_bytes(imagined, LENGTH, source)
    assert counted is not None
    real = module().train()
    mask = torch.ones(2, source, dtype=torch.long)
    mask[1, source // 2 :] = 0
    targets = torch.zeros(2, LENGTH - source, dtype=torch.long)
    kept = Kept(real)
    with kept:
        real.backbone(
            input_ids=torch.zeros(2, source, dtype=torch.long), attention_mask=mask, decoder_input_ids=targets
        )
    planned = counted + LAYERS * LENGTH * attention_bytes(real.model.config, LENGTH, source)
    assert planned == pytest.approx(kept.num_bytes / 2, rel=0.06)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = filled(tmp_path_factory.mktemp("activations"))
    write_folders(folder / "flowers", 4)
    return folder


def activations(root: Path, spec: dict[str, Any], node: dict[str, Any] | None = None) -> int:
    result = ask(root, spec, node)
    assert not result.violations, result.violations
    return int(result.plan.memory.activations_bytes)


def test_long_texts_keep_their_attention_on_cpus_with_dropout(root: Path) -> None:
    def planned(length: int, dropout: float) -> int:
        model = {"architecture": {"model_type": "gpt2", "overrides": {"n_layer": 2, "n_embd": 32, "n_head": 8}}}
        return activations(
            root,
            pretraining(
                pretraining={"causal_lm": {"sequence_length": length}},
                model={**model, "dropout": dropout},
                optimization={"max_steps": 4, "global_batch_size": 1},
                evaluation={"holdout": 0},
            ),
        )

    # Twice the length keeps twice as much of everything, but four times the attention weights, or the mask of padding.
    assert planned(256, 0.1) > 3 * planned(128, 0.1)
    assert planned(256, 0.0) < 2.6 * planned(128, 0.0)
    assert planned(256, 0.1) - planned(256, 0.0) > 0.9 * 12 * 8 * 256 * 256 * 2 * 0.9


def test_what_is_frozen_keeps_nothing(root: Path) -> None:
    whole = activations(root, fine_tuning())
    frozen = activations(root, fine_tuning(fine_tuning={"text_classification": {}, "freeze": {"backbone": True}}))
    assert frozen == 0 < whole


def test_adapters_of_a_picture_model_are_counted_once(root: Path) -> None:
    vit = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    spec = fine_tuning(
        fine_tuning={"image_classification": {"image_size": 32}},
        model={"architecture": {"model_type": "vit", "overrides": {**vit, "intermediate_size": 64}}},
        train_data={"uri": "ROOT/flowers"},
        optimization={"max_steps": 2, "global_batch_size": 4},
        evaluation={"holdout": 0},
    )
    whole = activations(root, spec)
    task = {"image_classification": {"image_size": 32}}
    adapted = activations(root, {**spec, "fine_tuning": {**task, "lora": {"rank": 2}}})
    assert whole / 2 < adapted < 1.3 * whole
