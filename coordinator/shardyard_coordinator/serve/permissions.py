"""The permission that each method needs. A method without a row is denied; a test checks all descriptors."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Permission(StrEnum):
    """What a caller may do."""

    OPEN = "open"
    VIEW = "view"
    SUBMIT = "submit"


_SERVICES: Mapping[str, Mapping[str, Permission]] = {
    "shardyard.v1.JobService": {
        "CreateJob": Permission.SUBMIT,
        "GetJob": Permission.VIEW,
        "ListJobs": Permission.VIEW,
        "UpdateJob": Permission.SUBMIT,
        "DeleteJob": Permission.SUBMIT,
        "PlanJob": Permission.SUBMIT,
        "WaitJob": Permission.VIEW,
        "CancelJob": Permission.SUBMIT,
        "PauseJob": Permission.SUBMIT,
        "ResumeJob": Permission.SUBMIT,
        "WatchJob": Permission.VIEW,
        "BatchCreateJobs": Permission.SUBMIT,
        "BatchCancelJobs": Permission.SUBMIT,
        "ListAttempts": Permission.VIEW,
    },
    "shardyard.v1.EventService": {"ListEvents": Permission.VIEW, "WatchEvents": Permission.VIEW},
    "shardyard.v1.WebhookService": {
        "CreateWebhook": Permission.SUBMIT,
        "GetWebhook": Permission.VIEW,
        "ListWebhooks": Permission.VIEW,
        "UpdateWebhook": Permission.SUBMIT,
        "DeleteWebhook": Permission.SUBMIT,
        "RotateWebhookSecret": Permission.SUBMIT,
        "TestWebhook": Permission.SUBMIT,
        "ListDeliveries": Permission.VIEW,
    },
    "shardyard.v1.LogService": {"TailLogs": Permission.VIEW},
    "shardyard.v1.MetricService": {"QueryMetrics": Permission.VIEW, "WatchMetrics": Permission.VIEW},
    "shardyard.v1.CheckpointService": {"GetCheckpoint": Permission.VIEW, "ListCheckpoints": Permission.VIEW},
    "shardyard.v1.ModelService": {
        "CreateModel": Permission.SUBMIT,
        "GetModel": Permission.VIEW,
        "ListModels": Permission.VIEW,
        "DeleteModel": Permission.SUBMIT,
        "DownloadModel": Permission.SUBMIT,
        "Predict": Permission.SUBMIT,
        "Embed": Permission.SUBMIT,
        "ExplainPrediction": Permission.SUBMIT,
        "ExportModel": Permission.SUBMIT,
        "RecommendModels": Permission.SUBMIT,
    },
    "shardyard.v1.DatasetService": {
        "CreateDataset": Permission.SUBMIT,
        "GetDataset": Permission.VIEW,
        "ListDatasets": Permission.VIEW,
        "DeleteDataset": Permission.SUBMIT,
        "DownloadDataset": Permission.SUBMIT,
    },
    "shardyard.v1.ServerService": {"GetServerInfo": Permission.VIEW},
    "grpc.health.v1.Health": {"Check": Permission.OPEN, "Watch": Permission.OPEN},
    "grpc.reflection.v1.ServerReflection": {"ServerReflectionInfo": Permission.OPEN},
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": Permission.OPEN},
}

PERMISSIONS: Mapping[str, Permission] = MappingProxyType(
    {f"/{service}/{method}": needed for service, methods in _SERVICES.items() for method, needed in methods.items()}
)

LOCAL_PRINCIPAL = "local"

GRANTS: Mapping[str, frozenset[Permission]] = MappingProxyType({LOCAL_PRINCIPAL: frozenset(Permission)})


def may(principal: str, path: str) -> bool:
    """Whether the principal may call the method; false for unknown principals and methods."""
    needed = PERMISSIONS.get(path)
    return needed is not None and (needed is Permission.OPEN or needed in GRANTS.get(principal, frozenset()))
