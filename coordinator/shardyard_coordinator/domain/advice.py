"""The message and next step of each cause, for a FailureReport that has none."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from shardyard_coordinator.domain.causes import Cause


class Advice(NamedTuple):
    """What happened, and the next step."""

    message: str
    next_step: str


ADVICE: Mapping[Cause, Advice] = MappingProxyType(
    {
        Cause.CUDA_OOM: Advice("a GPU ran out of memory", "give a smaller micro_batch_size, or more workers"),
        Cause.HOST_OOM: Advice("a worker ran out of memory", "give a smaller micro_batch_size or max_length"),
        Cause.LOSS_DIVERGED: Advice("the loss is no longer a number", "give a lower learning_rate, or clip lower"),
        Cause.ENGINE_START_TIMEOUT: Advice("the gang did not reach its first steps", "read the job's logs"),
        Cause.DATA_ERROR: Advice(
            "the data could not be read",
            "restore the data as it was inspected, or submit a new job with the corrected data",
        ),
        Cause.DATA_NOT_FOUND: Advice("the data is not there", "restore it"),
        Cause.DATA_CHANGED: Advice(
            "the data is not what was inspected", "restore it as it was, or submit a new job with the data as it is"
        ),
        Cause.MODEL_NOT_FOUND: Advice("the model is not there", "restore it"),
        Cause.MODEL_CHANGED: Advice(
            "the model is not what was inspected", "restore it as it was, or submit a new job with the model as it is"
        ),
        Cause.USER_CONFIG: Advice("the spec does not work", "change the field that is named"),
        Cause.VERSION_MISMATCH: Advice("a worker has other versions", "install the same versions on every node"),
        Cause.MAX_RUN_TIME: Advice("max_run_time is over", "give a longer max_run_time; the checkpoints are kept"),
        Cause.MAX_QUEUE_TIME: Advice("it waited longer than allowed", "submit it again, or ask for fewer workers"),
        Cause.HUNG: Advice("a rank made no step", "look at the stacks in the logs of the rank that is named"),
        Cause.NCCL_TIMEOUT: Advice("the ranks lost contact", "look at the network between the nodes"),
        Cause.WORKER_LOST: Advice("a worker's process ended", "look at the end of its log, then submit the job again"),
        Cause.NODE_LOST: Advice("a node is gone", "bring the node back, or let the job continue elsewhere"),
        Cause.RAY_LOST: Advice("the cluster that ran the gang is gone", "look at the cluster's own logs"),
        Cause.PREEMPTED: Advice("it made room for another job", "nothing: it continues by itself"),
        Cause.DRAINED: Advice("its node was drained", "nothing: it continues by itself"),
        Cause.GPU_FAULT: Advice("a GPU reported a fault", "look at the GPU with nvidia-smi, and replace it"),
        Cause.CHECKPOINT_CORRUPT: Advice(
            "no intact checkpoint is left", "repair or restore the storage, or submit a new job to start over"
        ),
        Cause.STORAGE_FULL: Advice(
            "the storage is full",
            "free some space (delete jobs, models and data sets that are not needed), or raise its quota",
        ),
        Cause.STORAGE_NOT_WRITABLE: Advice("the storage cannot be written", "correct its permissions or its mount"),
        Cause.STORAGE_UNAVAILABLE: Advice("the storage is not there", "mount the storage root again"),
        Cause.EXPORT_FAILED: Advice("the model could not be exported", "look at the logs; its checkpoint is kept"),
        Cause.EXPORT_REFUSED: Advice(
            "the format is worse than its bound allows",
            "raise max_drop, or take another format; the model is as it was",
        ),
        Cause.OBJECT_EXISTS: Advice(
            "objects at the address are not those of the model",
            "choose another address, or remove them in the object store",
        ),
        Cause.OBJECT_NOT_FOUND: Advice("there is no such bucket", "check its spelling"),
        Cause.OBJECT_STORE_REFUSED: Advice(
            "the object store refuses what is asked of it", "have the operator allow it there, then submit it again"
        ),
        Cause.OBJECT_STORE_UNREACHABLE: Advice(
            "the object store does not answer", "submit it again when it does: what is there already is not sent again"
        ),
        Cause.SECRET_UNUSABLE: Advice("a secret cannot be used", "have the operator correct its file"),
        Cause.UNKNOWN: Advice("the gang ended without saying why", "read the end of the first failing rank's log"),
    }
)
