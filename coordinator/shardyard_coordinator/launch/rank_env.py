"""The environment of a rank's process: what it may use of its node, and nothing of how the coordinator was started."""

from __future__ import annotations

from pathlib import Path

from shardyard.worker.v1 import worker_pb2

# A torchrun around the coordinator must not reach the gang.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def rank_environment(spec: bytes, *, cpus: int, gpus: int, loopback: bool) -> dict[str, str]:
    """Variables for the ranks of an AttemptSpec; `loopback`: the whole gang is on one node."""
    attempt = worker_pb2.AttemptSpec.FromString(spec)
    extensions = Path(attempt.locations.cache_dir or attempt.attempt_dir) / "torch_extensions"
    threads = str(attempt.threads_per_rank or max(cpus, 1))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Spinning threads of one rank would take the cores of the next.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        # Of our own: what lies in a home folder was compiled by somebody else, for something else.
        "TORCH_EXTENSIONS_DIR": str(extensions),
    }
    if gpus == 0:
        variables["DS_ACCELERATOR"] = "cpu"
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if loopback:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
        variables["NCCL_SOCKET_IFNAME"] = "lo"
    return variables
