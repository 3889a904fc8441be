"""Models: which one a spec means, and the module that a task trains, fresh or from weights.

Nothing of a model's folder is ever run, and only safetensors are read.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from google.protobuf import json_format
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer import architectures
from shardyard_trainer.data.errors import SpecError, listed, nearest, raise_all, shorten
from shardyard_trainer.data.sources import resolve_uri
from shardyard_trainer.folder import FolderInvalid, ModelFolder, read_folder
from shardyard_trainer.hub import resolve_hub

if TYPE_CHECKING:
    from shardyard_trainer.tasks.base import Task
    from shardyard_trainer.tasks.modules import HuggingFaceModule
    from shardyard_trainer.tasks.parts import TrainableTask

FIELD = "spec.model"
_MOST_LAYERS = 10_000
LOADING_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    OSError,
    ImportError,
    ArithmeticError,
    AssertionError,
    StrictDataclassError,
    SafetensorError,
)


@dataclass(frozen=True)
class ModelChoice:
    """The model that a spec means: its configuration, and the folder of its weights (None: a fresh one)."""

    config: Any
    folder: Path | None
    described: ModelFolder | None = None
    commit: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    field: str = FIELD

    @property
    def is_fresh(self) -> bool:
        """Whether it starts from random weights."""
        return self.folder is None

    def tensor_names(self) -> frozenset[str]:
        """The names of the tensors in the folder's safetensors files."""
        names: set[str] = set()
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder else []:
            with _safe_file(path, self.field) as file:
                names.update(file.keys())
        return frozenset(names)


def build_module(
    task: Task, spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, *, meta: bool = False
) -> HuggingFaceModule:
    """The module that the task trains, fp32 on the CPU, the same on every rank for the same spec.

    What is drawn at random comes from the spec's seed alone. `meta` makes it without memory or weights, to count.
    Raises SpecError where the weights do not load.
    """
    # Every task of `build_task` is one.
    trainable = cast("TrainableTask", task)
    del locations  # The task was built from the same ones and has the folder.
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.optimization.seed)
        if not meta:
            return trainable.make_module(meta=False)
        with torch.device("meta"):
            return trainable.make_module(meta=True)


def choose_model(source: spec_pb2.ModelSource, locations: worker_pb2.Locations, *, field: str = FIELD) -> ModelChoice:
    """The model that a source means, its configuration read and checked. Raises SpecError."""
    kind = source.WhichOneof("source")
    if kind is None:
        raise SpecError(field, "SPEC_INVALID", "no model: give hub, uri, model or architecture")
    if kind == "architecture":
        choice = _fresh(source.architecture, f"{field}.architecture")
    else:
        folder, commit = find_folder(source, locations, field=field)
        choice = _pretrained(folder, commit, f"{field}.{kind}")
    if source.HasField("dropout"):
        for name in architectures.dropout_names(choice.config):
            if getattr(choice.config, name) is not None or name == "classifier_dropout":
                setattr(choice.config, name, source.dropout)
    return choice


def find_folder(source: Any, locations: worker_pb2.Locations, *, field: str) -> tuple[Path, str]:
    """The folder of a model or tokenizer source that is not made afresh, and its commit where it has one."""
    kind = source.WhichOneof("source")
    if kind == "hub":
        return resolve_hub(source.hub, Path(locations.cache_dir), field=f"{field}.hub")
    if kind == "uri":
        folder = resolve_uri(source.uri, locations, field=f"{field}.uri")
        if not folder.is_dir():
            raise SpecError(f"{field}.uri", "PATH_NOT_ALLOWED", f"{shorten(source.uri)!r} is a file; give its folder")
        for path in folder.iterdir():
            # What lies in the folder is opened by libraries that follow links.
            resolve_uri(str(path), locations, field=f"{field}.uri")
        return folder, ""
    name = getattr(source, kind)
    reason = "DATASET_NOT_FOUND" if kind == "dataset" else "MODEL_NOT_FOUND"
    found = locations.folders.get(name, "")
    if not found or not Path(found).is_dir():
        raise SpecError(f"{field}.{kind}", reason, f"there is no {kind} {shorten(name)!r}")
    return Path(found).resolve(), ""


def adapt(choice: ModelChoice, tokenizer: Any, length: int) -> ModelChoice:
    """A fresh model's configuration made to fit its tokenizer and the longest sequence; a given model's checked.

    Raises SpecError for a tokenizer that the model has no embeddings for.
    """
    config = choice.config
    if not choice.is_fresh:
        if len(tokenizer) > config.vocab_size:
            raise SpecError(
                "spec.tokenizer",
                "MODEL_INVALID",
                f"the tokenizer has {len(tokenizer):,} tokens, the model {config.vocab_size:,}; use the model's own",
            )
        return choice
    place = f"{choice.field}.overrides"
    wanted = choice.overrides.get("vocab_size", len(tokenizer))
    if wanted < len(tokenizer):
        raise SpecError(
            f"{place}.vocab_size",
            "SPEC_INVALID",
            f"{wanted:,} is less than the tokenizer's {len(tokenizer):,}; leave it out",
        )
    config.vocab_size = wanted
    for role in ("pad", "bos", "eos", "cls", "sep"):
        if hasattr(config, f"{role}_token_id"):
            setattr(config, f"{role}_token_id", getattr(tokenizer, f"{role}_token_id"))
    if (
        "max_position_embeddings" not in _canonical(config, choice.overrides)
        and architectures.longest(config) is not None
    ):
        config.max_position_embeddings = length + architectures.position_offset(config)
    _check_builds(replace(choice, config=config))
    return replace(choice, config=config)


def check_length(choice: ModelChoice, length: int, *, field: str) -> None:
    """Raises SpecError where the model cannot address so many tokens."""
    most = architectures.longest(choice.config)
    if most is not None and length > most:
        raise SpecError(
            field, "SPEC_INVALID", f"{length:,} is more than the {most:,} tokens that the model can address"
        )


def load(
    auto_class: Any,
    choice: ModelChoice,
    *,
    meta: bool,
    **options: Any,
) -> tuple[Any, list[str]]:
    """A transformers model of the choice, and the names of its tensors that the weights lack: heads and poolers.

    Raises SpecError MODEL_INVALID, also where the weights lack a part of the backbone.
    """
    config = copy.deepcopy(choice.config)
    own_names = _use_faster_gelu(config)
    try:
        if choice.is_fresh or meta:
            model, info = auto_class.from_config(config, dtype=torch.float32, **options), None
        else:
            model, info = auto_class.from_pretrained(
                str(choice.folder),
                config=config,
                # Without it transformers takes the checkpoint's own type.
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except LOADING_ERRORS as error:
        raise SpecError(choice.field, "MODEL_INVALID", f"the model does not load: {_one_line(error)}") from error
    for name in own_names:
        setattr(model.config, name, "gelu_new")
    return model, [] if info is None else _check_loaded(model, info, choice)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers says nothing and draws no bars: what is to be known is in warnings of the task."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_loaded(model: Any, info: Mapping[str, Any], choice: ModelChoice) -> list[str]:
    lacking = sorted(info["missing_keys"])
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    strange = [name for name in lacking if name.startswith(prefix) and "pooler" not in name]
    strange += [name for name, *_ in info["mismatched_keys"] if name.startswith(prefix)]
    if strange:
        raise SpecError(
            choice.field,
            "MODEL_INVALID",
            f"the weights lack {len(strange)} tensors of the configuration's shapes, {strange[0]} among them",
            {"tensor": strange[0]},
        )
    _check_finite(model, choice)
    return lacking


def _pretrained(folder: Path, commit: str, field: str) -> ModelChoice:
    try:
        described = read_folder(folder)
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from None
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}"))
        if pickles:
            raise SpecError(
                field, "MODEL_UNSAFE", f"{pickles[0]} is a pickle, which could run code; save the model as safetensors"
            )
        raise SpecError(field, "MODEL_INVALID", "the folder has no *.safetensors file")
    _check_index(folder, field)
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except LOADING_ERRORS as error:
        raise SpecError(field, "MODEL_INVALID", f"config.json does not load: {_one_line(error)}") from error
    return ModelChoice(config, folder, described, commit, field=field)


def _check_index(folder: Path, field: str) -> None:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise SpecError(field, "MODEL_INVALID", f"{index.name} is not an index of weights") from None
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise SpecError(
                field, "MODEL_INVALID", f"{index.name} names {shorten(name)!r}, which is no file of the folder"
            )


def _fresh(wanted: spec_pb2.Architecture, field: str) -> ModelChoice:
    known = architectures.known_types()
    if wanted.model_type not in known:
        raise SpecError(
            f"{field}.model_type",
            "SPEC_INVALID",
            f"transformers has no model type {shorten(wanted.model_type)!r}{nearest(wanted.model_type, known)}",
        )
    kind = transformers.CONFIG_MAPPING[wanted.model_type]
    default = kind()
    overrides = _checked_overrides(json_format.MessageToDict(wanted.overrides), default, f"{field}.overrides")
    try:
        with quiet():
            config = kind(**overrides)
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{field}.overrides", "SPEC_INVALID", f"refused by {wanted.model_type}: {_one_line(error)}"
        ) from None
    _check_sizes(config, field)
    return ModelChoice(config, None, overrides=overrides, field=field)


def _checked_overrides(given: Mapping[str, Any], default: Any, field: str) -> dict[str, Any]:
    known = {**default.to_dict(), **dict.fromkeys(default.attribute_map)}
    checked: dict[str, Any] = {}
    errors: list[SpecError] = []
    for name, value in given.items():
        place = f"{field}.{shorten(name)}"
        if name not in known or name in ("model_type", "transformers_version", "dtype", "auto_map"):
            errors.append(
                SpecError(place, "SPEC_INVALID", f"{default.model_type} has no such setting{nearest(name, known)}")
            )
            continue
        before = getattr(default, name, None)
        # Struct knows one kind of number: an integer is one again where it is whole and nothing else is meant.
        whole = isinstance(value, float) and value.is_integer() and not isinstance(before, float)
        after = int(value) if whole and not isinstance(before, bool) else value
        if isinstance(before, bool | int | float | str) and not _same_kind(before, after):
            errors.append(
                SpecError(place, "SPEC_INVALID", f"{shorten(str(value))} is no {type(before).__name__}, as {before} is")
            )
            continue
        checked[name] = after
    raise_all(errors)
    return checked


def _same_kind(before: Any, after: Any) -> bool:
    if isinstance(before, bool) or isinstance(after, bool):
        return isinstance(before, bool) and isinstance(after, bool)
    if isinstance(before, float):
        return isinstance(after, int | float) and math.isfinite(after)
    return isinstance(after, type(before))


def _check_sizes(config: Any, field: str) -> None:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")
    for name in names:
        value = getattr(config, name, None)
        own = config.attribute_map.get(name, name)
        if isinstance(value, int) and value < 1:
            raise SpecError(f"{field}.overrides.{own}", "SPEC_INVALID", f"{value}: at least 1")
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise SpecError(
            f"{field}.overrides.{own}",
            "MODEL_DOES_NOT_FIT",
            f"{layers:,} layers; at most {_MOST_LAYERS:,} are planned for",
        )


def _canonical(config: Any, overrides: Mapping[str, Any]) -> set[str]:
    own = {value: name for name, value in config.attribute_map.items()}
    return {own.get(name, name) for name in overrides}


def _check_builds(choice: ModelChoice) -> None:
    try:
        with quiet(), torch.device("meta"):
            transformers.AutoModel.from_config(choice.config)
    except LOADING_ERRORS as error:
        raise SpecError(
            f"{choice.field}.overrides",
            "SPEC_INVALID",
            f"no {choice.config.model_type} can be made so: {_one_line(error)}",
        ) from None


def _check_finite(model: Any, choice: ModelChoice) -> None:
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise SpecError(
                choice.field, "MODEL_INVALID", f"the tensor {name} has values that are not finite", {"tensor": name}
            )


def _use_faster_gelu(config: Any) -> list[str]:
    """Computes the tanh approximation of GELU by one kernel instead of seven: the same formula by another name.

    Returns the settings that are to have their own name again in what is exported.
    """
    names = [name for name in ("activation_function", "hidden_act") if getattr(config, name, None) == "gelu_new"]
    for name in names:
        setattr(config, name, "gelu_pytorch_tanh")
    return names


@contextmanager
def _safe_file(path: Path, field: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SpecError(field, "MODEL_INVALID", f"{path.name}: {_one_line(error)}", {"file": path.name}) from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


def labels_of(choice: ModelChoice) -> tuple[str, ...]:
    """The labels of the classification head in the choice's folder; empty: it has none."""
    described = choice.described
    if described is None or described.task != "text_classification":
        return ()
    return described.labels


def names_listed(labels: tuple[str, ...]) -> str:
    """Labels as a message shows them."""
    return listed(labels, most=8)


def has_head(choice: ModelChoice) -> bool:
    """Whether the choice's folder has a classification head."""
    return choice.described is not None and choice.described.task == "text_classification"
