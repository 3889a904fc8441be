"""Facts about transformers' architectures by model type, each tested if it affects results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

from shardyard_trainer.models.folder import TORCH_HUB_PICTURE_VECTORS, TORCH_HUB_PICTURES, TORCH_HUB_TEXTS, ModelFolder

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
        "esm",
        "layoutlmv3",
        "lilt",
        "markuplm",
    }
)
"""Absolute positions begin after the padding id: position 0 is embedded as `pad_token_id + 1`."""

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
"""Encoders in which a 4-D boolean mask keeps documents apart, and positions can be given if they are absolute."""

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

WITHOUT_CACHE = frozenset({"xlstm"})
"""Causal models whose states in transformers do not fit their own configuration: each token reads the whole text."""

SEQ2SEQ = frozenset(
    {
        *("t5", "mt5", "umt5", "bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "blenderbot-small"),
        "plbart",
    }
)
"""Encoder-decoders that write texts here."""

_OWN_SEQ2SEQ = frozenset({"garden_transformer"})

_CLASSIFIES = frozenset({"bart", "mbart", "plbart"})
# Their classification head reads the decoder at the last end token of the text.

MARKS_LANGUAGES = frozenset({"mbart", "m2m_100"})
"""Those that are pretrained with a token for the language of each text."""

_STARTS_WITH_PADDING = frozenset({"t5", "mt5", "umt5", "marian", "pegasus", *_OWN_SEQ2SEQ})
# Others start with their end token.

HEAD_READS_LAST_PLACE = frozenset({"xlnet"})
"""Encoders whose own classification head reads the last place of a batch's rows, be it padding."""

_READS_PADDING = "its {} read the padding, so a text's answer would depend on the texts beside it"

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
NOT_TRAINED: Mapping[str, str] = {
    "blt": "it reads bytes in patches, not the tokens of a tokenizer",
    "clip_text_model": "it is half of a picture model, and reads its vector at its own end token",
    "convbert": _READS_PADDING.format("convolutions"),
    "cpmant": "its attention counts the padding, so a text's answer would depend on the texts beside it",
    "deepseek_v4": "transformers does not find its last norm again in what it has saved",
    "fnet": "it has no attention mask, so a text's answer would depend on the texts beside it",
    "funnel": _READS_PADDING.format("pooled blocks"),
    "git": "most of its weights read pictures",
    "layoutlmv2": "it needs detectron2 and pictures of pages",
    "layoutlmv3": "it reads pages with pictures and boxes, not texts alone",
    "mobilebert": _READS_PADDING.format("embeddings of a last token"),
    "moshi": "it is the half of a model of sound",
    "mra": _READS_PADDING.format("blocks of attention"),
    "nystromformer": _READS_PADDING.format("landmarks"),
    "perceiver": "its hidden states are latents, not one vector a token",
    "phi4_multimodal": "most of its weights read pictures and sound",
    "reformer": "it hashes at random, so the same text has another answer each time",
    "youtu": "transformers sets a row of its embeddings to zero whenever it loads it",
    "yoso": "it samples hashes at random and counts padding, so the same text has another answer each time",
}
"""Architectures of transformers that are refused by name, and why; a sweep over all of them keeps it true."""

_PICTURE_MODELS = frozenset(
    {
        *modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        *(TORCH_HUB_PICTURES, TORCH_HUB_PICTURE_VECTORS, "garden_resnet"),
    }
)
SOME_PICTURE_MODELS = ("vit", "deit", "beit", "swin", "resnet", "convnext", "mobilenet_v2", "dinov2")
"""Examples for messages."""

MASKED_PICTURE_MODELS = tuple(sorted(modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES))
"""Architectures whose masked patches can be predicted."""

NOT_FOR_PICTURES: Mapping[str, str] = {
    "dinat": "it needs another library (natten)",
    "imagegpt": "it reads clusters of colours as tokens, not pixels",
    "perceiver": "it has a head for each way of reading pictures, and its configuration does not say which",
    "pvt": "its head has 1,000 outputs whatever its configuration says; pvt_v2 does not",
    "shieldgemma2": "it is a language model that judges pictures by a prompt",
    "siglip2": "it reads patches of a size of their own for each picture",
    "timm_wrapper": "it builds models of another library (timm) by name",
}
"""Architectures of transformers with a head for pictures that are refused by name, and why."""

_TEXT_MODELS = (
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
    frozenset({TORCH_HUB_TEXTS}),
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
    """The pretraining objectives that a model supports: none that its direction of reading would give away."""
    if is_seq2seq(config):
        return ["span_corruption"]
    if not reads_text(config) or is_turned(config):
        return []
    if is_causal(config.model_type):
        return ["causal_lm"]
    return ["masked_lm"] if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES else []


def reads_text(config: Any) -> bool:
    """Whether the architecture makes one vector of each token of a text: no encoder-decoder, and nothing composite."""
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "vocab_size"):
        return False
    return any(config.model_type in names for names in _TEXT_MODELS)


def refusal(config: Any) -> str:
    """Why no model of this configuration is trained here or asked; empty: it is."""
    model_type = config.model_type
    if model_type in NOT_TRAINED:
        return f"{model_type} is not supported: {NOT_TRAINED[model_type]}"
    if getattr(config, "is_encoder_decoder", False):
        return f"{model_type} is an encoder with a decoder; use a model that is one of them, such as bert or gpt2"
    if not reads_text(config):
        return f"{model_type} is not a model that reads a text into one vector a token; use one such as bert or gpt2"
    if model_type == "xmod" and not getattr(config, "default_language", None):
        return "xmod has a part for each language; set default_language in its configuration, such as en_XX"
    return ""


def is_seq2seq(config: Any) -> bool:
    """Whether the architecture is an encoder-decoder that writes texts here."""
    return writes_texts(config.model_type) and bool(getattr(config, "is_encoder_decoder", False))


def writes_texts(model_type: str) -> bool:
    """Whether models of this type are encoder-decoders that write texts here."""
    return model_type in SEQ2SEQ or model_type in _OWN_SEQ2SEQ


def classifies(config: Any) -> bool:
    """Whether the architecture is an encoder-decoder whose own classification head is asked here, and not trained."""
    return config.model_type in _CLASSIFIES and is_seq2seq(config)


def classifier_refusal(config: Any) -> str:
    """Why nothing is asked of a model with transformers' own classification head for texts; empty: something is."""
    if classifies(config):
        return ""
    if getattr(config, "is_encoder_decoder", False) and config.model_type not in NOT_TRAINED:
        others = ", ".join(sorted(_CLASSIFIES))
        return (
            f"{config.model_type} is an encoder with a decoder, whose classification head is not read here; of these "
            f"models {others} are, and encoders such as roberta and deberta-v2"
        )
    return refusal(config)


def seq2seq_refusal(config: Any) -> str:
    """Why no model of this configuration writes texts here; empty: it does."""
    if is_seq2seq(config):
        return ""
    if writes_texts(config.model_type):
        return f"is_encoder_decoder is false in this {config.model_type}; set it to true"
    what = "an encoder-decoder that is not supported"
    if not getattr(config, "is_encoder_decoder", False):
        what = "not an encoder-decoder, which reads one text and writes another"
    return f"{config.model_type} is {what}; use one such as t5, bart, mbart or pegasus"


def decoder_start(config: Any, special: Mapping[str, int | None]) -> int | None:
    """The token that a fresh model's decoder starts with, of the special tokens by their roles."""
    return special.get("pad" if config.model_type in _STARTS_WITH_PADDING else "eos")


def usual_start(config: Any) -> int | None:
    """The token that the decoder of a folder starts with if nothing says it, as in folders of the first T5."""
    return decoder_start(config, {"pad": config.pad_token_id, "eos": config.eos_token_id})


def decoder_scale(config: Any) -> float:
    """What the decoder's last hidden state is multiplied by before the output layer."""
    scales = getattr(config, "scale_decoder_outputs", config.model_type == "umt5" and config.tie_word_embeddings)
    return float(width(config) ** -0.5) if scales else 1.0


def is_of_pictures(model_type: str) -> bool:
    """Whether the architecture reads pictures, and no text."""
    return model_type in _PICTURE_MODELS and not any(model_type in names for names in _TEXT_MODELS)


def picture_refusal(config: Any) -> str:
    """Why no model of this configuration classifies pictures here; empty: it does."""
    model_type = config.model_type
    if model_type in NOT_FOR_PICTURES:
        return f"{model_type} is not supported: {NOT_FOR_PICTURES[model_type]}"
    if model_type not in _PICTURE_MODELS:
        return f"{model_type} is not a picture model; use one such as {', '.join(SOME_PICTURE_MODELS)}"
    channels = getattr(config, "num_channels", 3)
    if channels not in (1, 3):
        return f"num_channels is {channels}: pictures have 3 (RGB), or 1 (grey)"
    return ""


REFUSALS = (refusal, picture_refusal, seq2seq_refusal)
"""Of every modality: a model that all of them refuse does nothing here."""


def masked_picture_refusal(config: Any) -> str:
    """Why no model of this configuration learns from masked pictures here; empty: it does."""
    if config.model_type not in MASKED_PICTURE_MODELS:
        return f"transformers has no head for masked pictures for {config.model_type}"
    return picture_refusal(config)


def backbone_of(model: Any) -> Any:
    """The part of a transformers model that gives `last_hidden_state`: the model itself if it has no head."""
    backbone = model.base_model
    if backbone is model and model.get_output_embeddings() is not None:
        # The head of Llama 4 gives its backbone another name than its class says.
        backbone = getattr(model, "model", model)
    return backbone


def native_pooling(config: Any, described: ModelFolder | None = None) -> str:
    """What transformers' own classification head of this model reads: `cls`, `last`, `end`, or empty: it has none.

    `end` is the place of the last end token.

    Sentence-transformers folders have none: their vectors are those of the tokens, without a pooler.
    """
    model_type = config.model_type
    if described is not None and described.sentence is not None:
        return ""
    if model_type in _HEAD_ON_FIRST_TOKEN:
        # Read from left to right, the first token knows nothing of the text.
        return "" if is_turned(config) else "cls"
    if classifies(config):
        return "end"
    has_head = model_type in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    reads_last = has_head and is_causal(model_type) and not is_turned(config) and model_type not in _HEAD_OF_ITS_OWN
    return "last" if reads_last else ""


def default_pooling(config: Any, described: ModelFolder | None) -> str:
    """What a model was trained with, else the mean for encoders and the last token for what reads left to right."""
    if described is not None and described.pooling:
        return described.pooling
    own = (
        native_pooling(config)
        if described is not None and described.auto == "AutoModelForSequenceClassification"
        else ""
    )
    return own or ("last" if is_causal(config.model_type) != is_turned(config) else "mean")


def is_turned(config: Any) -> bool:
    """Whether the configuration makes an encoder read from left to right, or a causal model in both directions."""
    if is_causal(config.model_type):
        return getattr(config, "is_causal", True) is False or bool(
            getattr(config, "use_bidirectional_attention", False)
        )
    return bool(getattr(config, "is_decoder", False))


def width(config: Any) -> int:
    """Numbers in one token's vector of the last hidden state."""
    # OPT's smaller vectors go through a projection after the last layer (OPT-350m has 512 of 1,024).
    return int(config.word_embed_proj_dim if config.model_type == "opt" else config.hidden_size)


def position_offset(config: Any) -> int:
    """What the model's own positions begin at."""
    if config.model_type not in POSITIONS_AFTER_PADDING:
        return 0
    if config.model_type == "mpnet":
        return 2  # It takes 1 for its padding, whatever its configuration says.
    return int(config.pad_token_id or 0) + 1


def has_token_types(config: Any) -> bool:
    """Whether the model tells the texts of a pair apart by types of their tokens."""
    return bool(getattr(config, "type_vocab_size", 0) > 1)


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
