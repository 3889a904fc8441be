"""How large a configuration may be: every name that means layers, experts, labels, widths; and what people have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from shardyard_trainer.models.bounds import too_large
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.folder import read_folder


@pytest.mark.parametrize(
    "values",
    [
        *({name: 10**6} for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")),
        *({name: 10**6} for name in ("num_decoder_layers", "num_encoder_blocks", "depth", "num_hidden_groups")),
        {"num_experts": 10**6},
        {"num_hidden_layers": 1000, "num_local_experts": 2000},
        {"num_labels": 10**7},
        {"hidden_size": 10**9},
        {"d_model": 10**8},
        {"vocab_size": 2**40},
        {"max_position_embeddings": 2**40},
        {"text_config": {"num_hidden_layers": 10**6}},
        {"depths": [2, 10**6]},
        {"layer_types": ["full_attention"] * 20_000} | {"layers_of": [1] * 20_000},
        {"anything": 2**60},
        {"n_embd": int(1e300)},
    ],
    ids=str,
)
def test_a_setting_over_its_bound_is_named(values: dict[str, object]) -> None:
    over = too_large(values)
    assert over is not None and over.value > over.most and over.name in over.message
    assert len(over.message) < 100


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mixtral", "t5", "albert", "qwen2_moe", "deepseek_v3"])
def test_the_sizes_that_architectures_have_are_not(kind: str) -> None:
    assert too_large(transformers.CONFIG_MAPPING[kind]().to_dict()) is None


def test_labels_that_are_only_counted_are_bounded_before_they_get_names(tmp_path: Path) -> None:
    config = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "num_labels": 100_001}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FolderInvalid, match="num_labels is 100,001; at most 100,000"):
        read_folder(open_folder(tmp_path))
