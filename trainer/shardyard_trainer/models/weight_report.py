"""Which weights of a folder transformers loads, and the verdict on the rest: the same for every caller.

Upload, planning, training, prediction and export load a folder through different heads. Whatever `from_pretrained`
reports is judged here, and nothing of it is thrown away:

| Reported | Verdict |
| --- | --- |
| a tensor of the backbone is missing, or has another shape | refused |
| a tensor of the backbone is not read, such as a layer beyond `num_hidden_layers` | refused: it is another model |
| a pooler is missing | accepted: only heads that need it start one |
| the vector of a masked patch is missing, or not read | accepted: only pretraining on pictures needs it |
| a tensor of a head is missing | the head is started afresh with a warning; nothing answers with it |
| a tensor of a head has another shape | the same, with both shapes; an upload is refused: its config.json is wrong |
| a head of another task, or a constant that older files carry, is not read | accepted: training changes neither |
| any other tensor is not read | a warning that names it |
| the output layer is tied by config.json, but the file has another one | a warning; the file's is kept, untied |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardyard_trainer.data.errors import listed
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import FolderInvalid

_CONSTANTS = re.compile(
    r"(^|\.)(position_ids|token_type_ids|(original_)?inv_freq|(cos|sin)_cached|masked_bias|causal_mask|scale_attn"
    r"|attn\.bias|attention\.bias)$"
)
_HEADS = frozenset(
    {
        *("cls", "lm_head", "lm_loss", "classifier", "pre_classifier", "score", "qa_outputs", "pooler", "predictions"),
        *("generator_predictions", "generator_lm_head", "discriminator_predictions", "sop_classifier", "pred_layer"),
        *("vocab_transform", "vocab_layer_norm", "vocab_projector", "logits_proj", "sequence_summary", "embed_out"),
        *("lm_predictions", "mask_predictions", "head", "decoder", "dense", "seq_relationship", "v_head"),
    }
)
"""Names of the heads of other tasks."""

_WRAPPERS: Mapping[str, str] = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DataParallel",
    "base_model.model.": "peft",
    "model.": "a class around the model, such as a LightningModule,",
}
"""What puts a model's names below its own, by the beginning that it gives them."""


@dataclass(frozen=True)
class WeightReport:
    """What became of a folder's weights: missing `lacking` parts of the head, `unread` tensors of no known use.

    `untied` are weights that the file has of their own, though config.json ties them: an output layer, if there are
    any. `reshaped` says of a part of the head that is there in another shape than config.json asks for which shapes
    those are; empty: none is.
    """

    lacking: tuple[str, ...]
    unread: tuple[str, ...]
    untied: tuple[str, ...] = ()
    reshaped: str = ""


def judge(model: Any, info: Mapping[str, Any], *, untied: tuple[str, ...] = ()) -> WeightReport:
    """The verdict on a load. Raises FolderInvalid for whatever makes it another model."""
    backbone = architectures.backbone_of(model)
    parts = {name for name, _ in (*backbone.named_children(), *backbone.named_parameters(recurse=False))}
    prefix = "" if backbone is model else next(name for name, part in model.named_modules() if part is backbone) + "."
    own = f"{model.base_model_prefix}."

    def is_of_backbone(name: str) -> bool:
        return name.startswith((prefix or own, own)) or name.partition(".")[0] in parts

    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name and not _is_mask(name))
    _refuse_mismatched([each for each in info["mismatched_keys"] if is_of_backbone(each[0])])
    _refuse_missing([name for name in missing if name.startswith(prefix)], info["unexpected_keys"])
    left = sorted(name for name in info["unexpected_keys"] if not _CONSTANTS.search(name) and not _is_mask(name))
    _refuse_unread([name for name in left if is_of_backbone(name) and "pooler" not in name], model.config)
    heads = {*missing, *(name for name, *_ in info["mismatched_keys"])}
    return WeightReport(
        lacking=tuple(sorted(heads)),
        unread=tuple(name for name in left if name.partition(".")[0] not in _HEADS and not is_of_backbone(name)),
        untied=untied,
        reshaped=_reshaped([each for each in info["mismatched_keys"] if not is_of_backbone(each[0])]),
    )


def _is_mask(name: str) -> bool:
    return name.rpartition(".")[2] == "mask_token"


def _reshaped(mismatched: Iterable[tuple[str, Any, Any]]) -> str:
    # A weight says more than its bias.
    named = sorted(mismatched, key=lambda each: (-len(each[1]), each[0]))
    return "; ".join(
        f"{name} of the weights has the shape {list(found)}, but config.json asks for {list(wanted)}"
        for name, found, wanted in named[:1]
    )


def _refuse_mismatched(mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    for name, found, wanted in sorted(mismatched):
        raise FolderInvalid(
            f"tensor {name!r} has shape {list(found)}, but config.json asks for {list(wanted)}; put the config.json "
            "that these weights were saved with beside them",
            file="model.safetensors",
            tensor=str(name),
        )


def _refuse_missing(missing: list[str], unexpected: Iterable[str]) -> None:
    if missing:
        wrapper = next((each for each in _WRAPPERS if all(name.startswith(each) for name in unexpected)), "")
        step = "save the whole model again with save_pretrained"
        if wrapper and unexpected:
            step = (
                f"all names of the file begin with {wrapper!r}, which {_WRAPPERS[wrapper]} puts before them: save the "
                "model inside of it with save_pretrained, or remove this beginning from the names"
            )
        raise FolderInvalid(
            f"the weights lack {len(missing)} tensors that config.json asks for, {missing[0]!r} among them; {step}",
            file="model.safetensors",
            tensor=missing[0],
        )


def _refuse_unread(unread: list[str], config: Any) -> None:
    if unread:
        raise FolderInvalid(
            f"transformers reads {len(unread)} tensors of the weights nowhere in a {config.model_type} of this "
            f"config.json, {listed(unread, most=2)} among them; without them it is another model: put the config.json "
            "that belongs to the weights beside them (its number of layers, for example), or leave the tensors out",
            file="model.safetensors",
            tensor=unread[0],
        )
