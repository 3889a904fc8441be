"""The Shardyard SDK: submit, watch and use training jobs.

    import shardyard

    with shardyard.Client() as client:
        job = client.submit(
            shardyard.TextClassification(),
            model="./bert",
            train_data=shardyard.Data("reviews.csv", text="review", label="sentiment"),
            optimization=shardyard.Optimization(epochs=2),
        )
        for event in job.watch():
            print(event)
        print(job.model().predict(["Hello, my dog is cute"])[0].label)

`AsyncClient` is the same for asyncio. Names are imported when they are first used: the generated code under
`shardyard.v1` needs no gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardyard._async.access import AsyncAccess
    from shardyard._async.client import AsyncClient
    from shardyard._async.job import AsyncJob
    from shardyard._async.resources import AsyncDataset, AsyncModel
    from shardyard._async.webhooks import AsyncWebhook
    from shardyard._sync.access import Access
    from shardyard._sync.client import Client
    from shardyard._sync.job import Job
    from shardyard._sync.resources import Dataset, Model
    from shardyard._sync.webhooks import Webhook
    from shardyard.errors import (
        Aborted,
        AlreadyExists,
        Cancelled,
        DataLoss,
        DeadlineExceeded,
        FailedPrecondition,
        Internal,
        InvalidArgument,
        JobCancelled,
        JobError,
        JobFailed,
        NotFound,
        OutOfRange,
        PermissionDenied,
        RequestError,
        ResourceExhausted,
        ShardyardError,
        Unauthenticated,
        Unavailable,
        Unimplemented,
        Violation,
    )
    from shardyard.receiving import read_webhook
    from shardyard.spec_pretraining import CausalLm, MaskedImage, MaskedItem, MaskedLm, SpanCorruption
    from shardyard.spec_settings import (
        Checkpoints,
        EarlyStopping,
        EvaluationPolicy,
        ExportPolicy,
        Freeze,
        Lora,
        Optimization,
        Parallelism,
        Resources,
        Retry,
    )
    from shardyard.spec_sources import (
        Adapter,
        Architecture,
        Data,
        Distillation,
        Pretrained,
        TensorflowCheckpoint,
        TorchHub,
        TrainedTokenizer,
    )
    from shardyard.specs import (
        FeatureExtraction,
        ImageClassification,
        Instruction,
        JobSpec,
        ModelCopy,
        ModelEvaluation,
        ModelExport,
        Preference,
        QuestionAnswering,
        Recommendation,
        Reranking,
        SentenceEmbedding,
        Summarization,
        TextClassification,
        TokenClassification,
        Translation,
    )
    from shardyard.types import (
        Answer,
        Delivery,
        Embedding,
        Entity,
        Event,
        Explanation,
        Image,
        Items,
        JobInfo,
        ModelRecommendation,
        Plan,
        Prediction,
        ProjectEvent,
        Question,
        RankedItem,
        RecommendedModels,
        Tag,
        WebhookInfo,
        Words,
    )

__version__ = "0.1.0"

_HOMES = {
    "shardyard._async.access": ("AsyncAccess",),
    "shardyard._async.client": ("AsyncClient",),
    "shardyard._async.job": ("AsyncJob",),
    "shardyard._async.resources": ("AsyncDataset", "AsyncModel"),
    "shardyard._sync.access": ("Access",),
    "shardyard._async.webhooks": ("AsyncWebhook",),
    "shardyard._sync.client": ("Client",),
    "shardyard._sync.job": ("Job",),
    "shardyard._sync.resources": ("Dataset", "Model"),
    "shardyard._sync.webhooks": ("Webhook",),
    "shardyard.errors": (
        "Aborted",
        "AlreadyExists",
        "Cancelled",
        "DataLoss",
        "DeadlineExceeded",
        "FailedPrecondition",
        "Internal",
        "InvalidArgument",
        "JobCancelled",
        "JobError",
        "JobFailed",
        "NotFound",
        "OutOfRange",
        "PermissionDenied",
        "RequestError",
        "ResourceExhausted",
        "ShardyardError",
        "Unauthenticated",
        "Unavailable",
        "Unimplemented",
        "Violation",
    ),
    "shardyard.receiving": ("read_webhook",),
    "shardyard.spec_pretraining": ("CausalLm", "MaskedImage", "MaskedItem", "MaskedLm", "SpanCorruption"),
    "shardyard.spec_settings": (
        "Checkpoints",
        "EarlyStopping",
        "EvaluationPolicy",
        "ExportPolicy",
        "Freeze",
        "Lora",
        "Optimization",
        "Parallelism",
        "Resources",
        "Retry",
    ),
    "shardyard.spec_sources": (
        "Adapter",
        "Architecture",
        "Data",
        "Distillation",
        "Pretrained",
        "TensorflowCheckpoint",
        "TorchHub",
        "TrainedTokenizer",
    ),
    "shardyard.specs": (
        "FeatureExtraction",
        "ImageClassification",
        "Instruction",
        "JobSpec",
        "ModelCopy",
        "ModelEvaluation",
        "ModelExport",
        "Preference",
        "QuestionAnswering",
        "Recommendation",
        "Reranking",
        "SentenceEmbedding",
        "Summarization",
        "TextClassification",
        "TokenClassification",
        "Translation",
    ),
    "shardyard.types": (
        "Answer",
        "Delivery",
        "Embedding",
        "Entity",
        "Event",
        "Explanation",
        "Image",
        "Items",
        "JobInfo",
        "ModelRecommendation",
        "Plan",
        "Prediction",
        "ProjectEvent",
        "Question",
        "RankedItem",
        "RecommendedModels",
        "Tag",
        "WebhookInfo",
        "Words",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Aborted",
    "Access",
    "Adapter",
    "AlreadyExists",
    "Answer",
    "Architecture",
    "AsyncAccess",
    "AsyncClient",
    "AsyncDataset",
    "AsyncJob",
    "AsyncModel",
    "AsyncWebhook",
    "Cancelled",
    "CausalLm",
    "Checkpoints",
    "Client",
    "Data",
    "DataLoss",
    "Dataset",
    "DeadlineExceeded",
    "Delivery",
    "Distillation",
    "EarlyStopping",
    "Embedding",
    "Entity",
    "EvaluationPolicy",
    "Event",
    "Explanation",
    "ExportPolicy",
    "FailedPrecondition",
    "FeatureExtraction",
    "Freeze",
    "Image",
    "ImageClassification",
    "Instruction",
    "Internal",
    "InvalidArgument",
    "Items",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobInfo",
    "JobSpec",
    "Lora",
    "MaskedImage",
    "MaskedItem",
    "MaskedLm",
    "Model",
    "ModelCopy",
    "ModelEvaluation",
    "ModelExport",
    "ModelRecommendation",
    "NotFound",
    "Optimization",
    "OutOfRange",
    "Parallelism",
    "PermissionDenied",
    "Plan",
    "Prediction",
    "Preference",
    "Pretrained",
    "ProjectEvent",
    "Question",
    "QuestionAnswering",
    "RankedItem",
    "Recommendation",
    "RecommendedModels",
    "RequestError",
    "Reranking",
    "ResourceExhausted",
    "Resources",
    "Retry",
    "SentenceEmbedding",
    "ShardyardError",
    "SpanCorruption",
    "Summarization",
    "Tag",
    "TensorflowCheckpoint",
    "TextClassification",
    "TokenClassification",
    "TorchHub",
    "TrainedTokenizer",
    "Translation",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Violation",
    "Webhook",
    "WebhookInfo",
    "Words",
    "read_webhook",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'shardyard' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
