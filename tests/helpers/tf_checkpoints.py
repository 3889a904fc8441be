"""TensorFlow checkpoints as models: small ones, specs with them, and what they are converted into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from helpers.bundles import Part, Written, floats
from helpers.plan_requests import filled
from helpers.small_specs import locations
from shardyard.v1 import spec_pb2
from shardyard_trainer.models import sources

GARDEN = Path(__file__).parents[1] / "checkpoints"


def found(uri: Path, root: Path, **cache: Path) -> sources.Found:
    where = locations(root)
    if cache:
        where.cache_dir = str(cache["cache"])
    where.data_roots.append(str(GARDEN.resolve()))
    source = spec_pb2.ModelSource(checkpoint=spec_pb2.TensorflowCheckpoint(uri=str(uri)))
    return sources.find_folder(source, where, field="spec.model")


def room(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return filled(tmp_path / "here")


def planned_with(uri: str) -> dict[str, Any]:
    return {
        "fine_tuning": {"text_classification": {"max_length": 12}},
        "model": {"checkpoint": {"uri": uri}},
        "train_data": {"uri": "ROOT/reviews.csv"},
        "optimization": {"max_steps": 2},
    }


def set_params(**encoder: Any) -> Callable[[Path], None]:
    """Model Garden's own settings in place of bert_config.json."""

    def change(folder: Path) -> None:
        (folder / "bert_config.json").unlink()
        model = {"encoder": {"type": "bert", "bert": {"num_layers": 2, "hidden_size": 32, **encoder}}}
        (folder / "params.yaml").write_text(yaml.safe_dump({"task": {"model": model}}))

    return change


def bert(folder: Path, changes: Mapping[str, Part | None], renamed: tuple[str, str] = ("", "")) -> None:
    """A BERT of TensorFlow 1, with some of its tensors exchanged, or taken away, or with other names."""
    shapes = {"word": (9, 4), "position": (8, 4), "token_type": (2, 4)}
    parts = {f"bert/embeddings/{name}_embeddings": floats(*shape) for name, shape in shapes.items()}
    parts |= {f"bert/embeddings/LayerNorm/{name}": floats(4) for name in ("gamma", "beta")}
    for index in range(2):
        layer = f"bert/encoder/layer_{index}"
        dense = {f"attention/self/{name}": (4, 4) for name in ("query", "key", "value")}
        dense |= {"attention/output/dense": (4, 4), "intermediate/dense": (4, 6), "output/dense": (6, 4)}
        for name, shape in dense.items():
            parts |= {f"{layer}/{name}/kernel": floats(*shape), f"{layer}/{name}/bias": floats(shape[1])}
        for name in ("attention/output", "output"):
            parts |= {f"{layer}/{name}/LayerNorm/{part}": floats(4) for part in ("gamma", "beta")}
    parts |= {"bert/pooler/dense/kernel": floats(4, 4), "bert/pooler/dense/bias": floats(4)}
    kept = {name.replace(*renamed): part for name, part in {**parts, **changes}.items() if part is not None}
    Written(kept).save(folder)
    (folder / "bert_config.json").write_text('{"num_attention_heads": 2}')
