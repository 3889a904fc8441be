"""What is known of transformers' architectures: facts by model type, each held by a test where it concerns results."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from shardyard_trainer.folder import ModelFolder

POSITIONS_AFTER_PADDING = frozenset(
    {
        "roberta",
        "xlm-roberta",
        "xlm-roberta-xl",
        "camembert",
        "roberta-prelayernorm",
        "xmod",
        "data2vec-text",
        "mpnet",
        "ibert",
        "longformer",
        "luke",
    }
)
"""Absolute positions begin behind the padding id: position 0 is embedded as `pad_token_id + 1`."""

PACKED_BY_POSITIONS = frozenset(
    {
        "gpt2",
        "gpt_neox",
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
        "stablelm",
        "mixtral",
    }
)
"""Causal models in which restarted `position_ids` without an attention mask keep documents apart."""

PACKED_BY_MASK = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "ernie"})
"""Encoders in which a 4-D boolean mask keeps documents apart, and positions can be given where they are absolute."""

PLAIN_OUTPUT_LAYER = frozenset(
    {
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi",
        "phi3",
        "gemma",
        "olmo",
        "olmo2",
        "starcoder2",
        "stablelm",
    }
)
"""Causal models whose logits are the output layer of the last hidden state and nothing else: no scale, no soft cap."""

_HEAD_ON_FIRST_TOKEN = frozenset(
    {
        "bert",
        "roberta",
        "xlm-roberta",
        "camembert",
        "electra",
        "distilbert",
        "albert",
        "ernie",
        "megatron-bert",
        "deberta",
        "deberta-v2",
    }
)
# They have a causal head, but without further inputs look at the tokens that it is to predict.
_SEES_AHEAD = frozenset({"bert-generation", "cpmant", "xlnet"})
# Causal models whose classification head is not one linear layer named `score`.
_HEAD_OF_ITS_OWN = frozenset({"ctrl", "modernbert-decoder"})
_TEXT_MODELS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)
_DROPOUT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "dropout_rate")


def is_causal(model_type: str) -> bool:
    """Whether the architecture reads from left to right: it has a causal head and no masked one."""
    return (
        model_type not in _SEES_AHEAD
        and model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def objectives(config: Any) -> list[str]:
    """The pretraining objectives that an architecture supports."""
    if not reads_text(config):
        return []
    if is_causal(config.model_type):
        return ["causal_lm"]
    return ["masked_lm"] if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else []


def reads_text(config: Any) -> bool:
    """Whether the architecture makes one vector of each token of a text: no encoder-decoder, and nothing composite."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "vocab_size"):
        return False
    return any(config.model_type in names for names in _TEXT_MODELS)


def native_pooling(model_type: str) -> str:
    """What transformers' own classification head of this architecture reads: `cls`, `last`, or empty: it has none."""
    if model_type in _HEAD_ON_FIRST_TOKEN:
        return "cls"
    has_head = model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return "last" if has_head and is_causal(model_type) and model_type not in _HEAD_OF_ITS_OWN else ""


def default_pooling(model_type: str, described: ModelFolder | None) -> str:
    """What a classifier was trained with, else the mean for encoders and the last token for causal models."""
    if described is not None and described.pooling:
        return described.pooling
    own = native_pooling(model_type) if described is not None and described.task == "text_classification" else ""
    return own or ("last" if is_causal(model_type) else "mean")


def position_offset(config: Any) -> int:
    """What the model's own positions begin at."""
    if config.model_type not in POSITIONS_AFTER_PADDING:
        return 0
    if config.model_type == "mpnet":
        return 2  # It takes 1 for its padding, whatever its configuration says.
    return int(config.pad_token_id or 0) + 1


def longest(config: Any) -> int | None:
    """Tokens that the model can address; None: no limit is known."""
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    return found - position_offset(config)


def known_types() -> list[str]:
    """The model types that a fresh model can be made of."""
    return sorted(name for name in CONFIG_MAPPING if name in modeling_auto.MODEL_MAPPING_NAMES)


def dropout_names(config: Any) -> list[str]:
    """The names under which a configuration has dropout probabilities."""
    return [
        name
        for name, value in config.to_dict().items()
        if name.endswith(_DROPOUT_ENDINGS) and (value is None or isinstance(value, int | float))
    ]
