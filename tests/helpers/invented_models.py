"""Catalogues of invented models, small enough to be counted in milliseconds, and questions about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardyard.v1 import choosing_pb2, model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.choosing.catalogue import Catalogue, read_catalogue
from shardyard_trainer.choosing.recommend import answer

GIB = 2**30
REFERENCE = "lab/middle"
SOURCE = "lab/repository LICENSE"


def bert(name: str, width: int = 32, layers: int = 2, **changes: Any) -> dict[str, Any]:
    """An encoder of English texts."""
    made: dict[str, Any] = {
        "id": f"lab/{name}",
        "family": "BERT",
        "model_type": "bert",
        "architecture": {
            "vocab_size": 500,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "intermediate_size": 4 * width,
            "max_position_embeddings": 256,
        },
        "parameters": 1,
        "counted_as": "AutoModel",
        "licence": "mit",
        "licence_source": SOURCE,
        "gated": False,
        "weights": "safetensors",
        "languages": ["en"],
        "context": 256,
        "image_size": 0,
        "tasks": ["text_classification"],
        "scores": [],
        "unchecked": [],
        "note": "",
    }
    return {**made, **changes}


def scored(value: float, benchmark: str = "Bench", *, higher: bool = True) -> dict[str, Any]:
    """A published result."""
    return {
        "benchmark": benchmark,
        "metric": "accuracy",
        "value": value,
        "higher_is_better": higher,
        "source": "invented",
    }


def invented(*models: dict[str, Any], other: str = "") -> Catalogue:
    """A catalogue; `other` is the benchmark of languages that are not English."""
    compared = {
        "english": [{"benchmark": "Bench", "reference": REFERENCE}],
        "other": [{"benchmark": other, "reference": REFERENCE}] if other else [],
    }
    return read_catalogue(
        {
            "language_groups": {"many": {"source": "invented", "languages": ["de", "en", "sw"]}},
            "commercial_use": {"mit": True, "cc-by-nc-4.0": False},
            "comparisons": {"text_classification": compared} if models else {},
            "models": list(models),
        }
    )


def asked(
    catalogue: Catalogue,
    task: str = "text_classification",
    *,
    memory: int = 8 * GIB,
    models: list[model_service_pb2.Model] | None = None,
    folders: dict[str, Path] | None = None,
    price: float | None = None,
    **request: Any,
) -> choosing_pb2.RecommendModelsResponse:
    """The answer of the trainer."""
    call = worker_pb2.RecommendRequest(
        request=choosing_pb2.RecommendModelsRequest(parent="projects/default", task=task, **request),
        node_shape=worker_pb2.NodeShape(memory_bytes=memory, cpus=2),
        models=models,
        locations=worker_pb2.Locations(folders={name: str(path) for name, path in (folders or {}).items()}),
        currency="EUR",
        slot_hour_price=price,
    )
    return answer(call, catalogue)


def names(found: choosing_pb2.RecommendModelsResponse) -> list[str]:
    """The recommended models in their order."""
    return [each.name.removeprefix("hub:lab/") for each in found.recommendations]


def points(found: choosing_pb2.RecommendModelsResponse, name: str) -> dict[str, float]:
    """The points of a recommended model, by criterion."""
    each = next(one for one in found.recommendations if one.name.endswith(name))
    return {one.criterion: one.points for one in each.points}
