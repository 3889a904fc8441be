"""The environment variables of a rank, and the folders that it may use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from shardyard.worker.v1 import worker_pb2

# A torchrun around the coordinator must not reach the gang.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


def rank_environment(spec: bytes, *, cpus: int, gpus: int, loopback: bool) -> dict[str, str]:
    """Variables for the ranks of an AttemptSpec; `loopback`: the whole gang is on one node."""
    attempt = worker_pb2.AttemptSpec.FromString(spec)
    caches = Path(attempt.locations.cache_dir or attempt.attempt_dir)
    threads = str(attempt.threads_per_rank or max(cpus, 1))
    variables = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Spinning threads of one rank would take the cores of the next.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        # A private cache: the one in a home folder was compiled for other programs, and is not read.
        "TORCH_EXTENSIONS_DIR": str(caches / "torch_extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "CUDA_CACHE_PATH": str(caches / "cuda"),
        "XDG_CACHE_HOME": str(caches / "xdg"),
        "HF_HOME": str(caches / "home"),
        "TMPDIR": str(temp_folder(attempt)),
        # Libraries ask for it, and a rank does not read /etc/passwd.
        "LOGNAME": os.environ.get("LOGNAME") or os.environ.get("USER") or "shardyard",
    }
    if gpus == 0:
        variables["DS_ACCELERATOR"] = "cpu"
        variables["CUDA_VISIBLE_DEVICES"] = ""
    if loopback:
        variables["GLOO_SOCKET_IFNAME"] = "lo"
        variables["NCCL_SOCKET_IFNAME"] = "lo"
    return variables


def rank_rights(spec: bytes, *, hidden: str = "") -> dict[str, list[str]]:
    """The folders that ranks of an AttemptSpec may use, as `confined_rank` takes them; empty without a service's claim.

    `hidden` is the state folder: folders of the environment that contain it are not opened as a whole.
    """
    attempt = worker_pb2.AttemptSpec.FromString(spec)
    locations = attempt.locations
    if not locations.HasField("claim"):
        return {}
    export = Path(attempt.export_dir)
    storage = str(Path(locations.claim.path).parent)
    return {
        "reads": [*locations.data_roots, *torch_hub_folders(locations.torch_hub), storage],
        "writes": [attempt.job_dir, locations.cache_dir, str(temp_folder(attempt)), str(staging_folder(attempt))],
        # A model is renamed into place, in a folder with other jobs' models.
        "puts": [str(export.parent)],
        "hidden": [hidden or storage],
    }


def torch_hub_folders(repositories: Mapping[str, str]) -> list[str]:
    """What code of PyTorch Hub reads: its own folder, and the weights in torch's cache; empty if none may run."""
    return [*repositories.values(), str(torch_hub_cache() / "checkpoints")] if repositories else []


def torch_hub_cache() -> Path:
    """The folder in which torch keeps repositories of PyTorch Hub: `hub` in `$TORCH_HOME`, or in torch's cache."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("TORCH_HOME") or f"{caches}/torch").expanduser().absolute() / "hub"


def temp_folder(attempt: worker_pb2.AttemptSpec) -> Path:
    """A short path, because paths of sockets are limited; inside the attempt's folder if there are no caches."""
    return Path(attempt.locations.cache_dir or attempt.attempt_dir) / "tmp"


def staging_folder(attempt: worker_pb2.AttemptSpec) -> Path:
    """The folder for the trainer's export before it is renamed into place."""
    export = Path(attempt.export_dir)
    return export.with_name(f".{export.name}.e{attempt.epoch:06}")
