"""Models that stay loaded between calls, the least recently used given up under a memory budget.

A model is known by its folder and the identity of the folder's files: a changed file is another model.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel  # Its import takes seconds: a process is warm only once it has it.

from shardyard.v1 import transfer_pb2
from shardyard_trainer.inputs.tokenization import prepare
from shardyard_trainer.inputs.vocabularies import build_tokenizer
from shardyard_trainer.models import architectures
from shardyard_trainer.models.door import Folder, FolderInvalid, signature
from shardyard_trainer.models.folder import ModelFolder, read_folder
from shardyard_trainer.models.known_files import check_known
from shardyard_trainer.models.loading import LOADING_ERRORS, one_line, prepare_config, quiet
from shardyard_trainer.models.sentence import lower_case
from shardyard_trainer.models.settings import generation_settings, model_config
from shardyard_trainer.models.weight_heads import CLASSES, with_true_head
from shardyard_trainer.models.weight_report import judge
from shardyard_trainer.models.weights import load_pretrained, read_tensors

BUDGET_VARIABLE = "SHARDYARD_MODEL_CACHE_BYTES"
DEFAULT_BUDGET_BYTES = 2 * 1024**3

Signature = tuple[tuple[str, int, int, int, int], ...]


@dataclass(frozen=True)
class WarmModel:
    """A loaded model, ready to be asked.

    `model` is an `AutoModelFor…` where transformers has the task's head, else the backbone; `head` [C, D] is then
    applied to what `pooling` makes of the last hidden state. `longest` is how many tokens the model can address;
    `strangers` are tensors of the folder that the model has no place for; `generation` is generation_config.json.
    """

    folder: ModelFolder
    tokenizer: Any
    model: PreTrainedModel
    head: nn.Linear | None
    is_causal: bool
    longest: int | None
    size_bytes: int
    strangers: tuple[str, ...]
    generation: Mapping[str, Any]

    @property
    def backbone(self) -> nn.Module:
        """The part that gives `last_hidden_state`."""
        backbone: nn.Module = architectures.backbone_of(self.model)
        return backbone

    @property
    def width(self) -> int:
        """Numbers in one token's vector."""
        return architectures.width(self.model.config)


class ModelCache:
    """Loads on the first ask. Safe to use from several threads: they wait for one load."""

    def __init__(self, load: Callable[[Folder], WarmModel], *, budget_bytes: int) -> None:
        self._load = load
        self._budget_bytes = budget_bytes
        self._models: OrderedDict[tuple[Folder, Signature], WarmModel] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, source: Folder, known: Sequence[transfer_pb2.StoredFile] = ()) -> WarmModel:
        """The model of a folder. Raises FolderInvalid, MODEL_CHANGED for a file that is not as `known`.

        The bytes are compared when the model is loaded, and again once size or time of a file have changed.
        """
        with self._lock:
            key = (source, signature(source.path))
            if key in self._models:
                self._models.move_to_end(key)
                return self._models[key]
            for stale in [other for other in self._models if other[0] == source]:
                del self._models[stale]
            check_known(source, known)
            model = self._load(source)
            self._models[key] = model
            # The newest stays however large it is: it is about to be asked.
            while len(self._models) > 1 and self.held_bytes > self._budget_bytes:
                self._models.popitem(last=False)
            return model

    @property
    def held_bytes(self) -> int:
        """Bytes of all weights held."""
        return sum(model.size_bytes for model in self._models.values())


def load(source: Folder) -> WarmModel:
    """Loads a folder for inference, in fp32, on the CPU. Raises FolderInvalid."""
    folder = with_true_head(read_folder(source))
    tokenizer = prepare(build_tokenizer(source))
    if folder.sentence is not None and folder.sentence.lower_case:
        lower_case(tokenizer)
    has_own_head = source.has("head.safetensors")
    model, lacking, strangers = _load_model(source, "" if has_own_head else folder.task)
    if lacking:
        raise FolderInvalid(f"the weights lack {lacking[0]!r}, which would be drawn at random", tensor=lacking[0])
    model.eval().requires_grad_(False)
    model.config.use_cache = False
    config = model.config
    if refusal := architectures.refusal(config):
        raise FolderInvalid(refusal, reason="TASK_MISMATCH")
    head = read_head(source) if has_own_head else None
    if folder.task == "text_classification":
        outputs = head.out_features if head is not None else config.num_labels
        if outputs != max(len(folder.labels), 1):
            raise FolderInvalid(f"the head has {outputs} outputs for {len(folder.labels)} labels", file="config.json")
    return WarmModel(
        folder=folder,
        tokenizer=tokenizer,
        model=model,
        head=head,
        is_causal=architectures.is_causal(config.model_type),
        longest=architectures.longest(config),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        strangers=tuple(strangers),
        generation=generation_settings(source),
    )


def _load_model(source: Folder, task: str) -> tuple[Any, list[str], list[str]]:
    """The model by transformers, the names of weights that the folder lacks (a missing pooler is left out), and of
    those that it has too many.
    """
    try:
        with quiet():
            model, info = load_pretrained(CLASSES[task], source, prepare_config(model_config(source)))
        report = judge(model, info)
    except LOADING_ERRORS as error:
        if isinstance(error, FolderInvalid):
            raise
        raise FolderInvalid(f"the model does not load: {one_line(error)}") from None
    if any("pooler" in name for name in info["missing_keys"]):
        model.base_model.pooler = None
    return model, list(report.lacking), sorted(info["unexpected_keys"])


def read_head(source: Folder) -> nn.Linear:
    """The head of a folder whose architecture transformers has no head for."""
    try:
        tensors = read_tensors(source, "head.safetensors")
        head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
        head.load_state_dict(tensors)
    except LOADING_ERRORS as error:
        raise FolderInvalid(f"the head does not load: {one_line(error)}", file="head.safetensors") from None
    return head.eval().requires_grad_(False)


def shared_cache() -> ModelCache:
    """The cache of this process."""
    return _SHARED


_SHARED = ModelCache(load, budget_bytes=int(os.environ.get(BUDGET_VARIABLE, DEFAULT_BUDGET_BYTES)))
