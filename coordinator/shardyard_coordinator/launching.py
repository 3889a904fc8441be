"""Where gangs and compute processes run, made from the operator's settings: on Ray, or as processes of this machine."""

from __future__ import annotations

import contextlib
import os

from shardyard_coordinator.control.copying import CopyLauncher
from shardyard_coordinator.launch.allowed import Folders, object_ports
from shardyard_coordinator.launch.gpus import usable_gpus
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.launch.process_compute import ProcessCompute, Size
from shardyard_coordinator.launch.protocols import Compute, Launcher
from shardyard_coordinator.launch.rank_env import torch_hub_cache, torch_hub_folders
from shardyard_coordinator.launch.ray_head import EmbeddedHead
from shardyard_coordinator.launch.ray_launcher import RayCompute, RayLauncher
from shardyard_coordinator.seams import Clock
from shardyard_coordinator.settings import LauncherKind, Settings


def launcher_and_compute(settings: Settings, clock: Clock) -> tuple[Launcher, Compute]:
    """The launcher, which copies models itself, and the compute processes beside it; neither is started."""
    inner, compute = _on_ray_or_here(settings, clock)
    return CopyLauncher(inner, compute, settings.remote, clock, storage=settings.storage), compute


def _on_ray_or_here(settings: Settings, clock: Clock) -> tuple[Launcher, Compute]:
    state = settings.state_dir.absolute()
    environment = {"HF_ENDPOINT": os.environ["HF_ENDPOINT"]} if "HF_ENDPOINT" in os.environ else {}
    if settings.torch_hub:
        # Weights that code of PyTorch Hub loads are in the service's own cache, not in that of a rank.
        environment["TORCH_HOME"] = str(torch_hub_cache().parent)
        with contextlib.suppress(OSError):  # Only a folder that is there can be opened to a confined process.
            (torch_hub_cache() / "checkpoints").mkdir(parents=True, exist_ok=True)
    size = Size(inspections=settings.compute_workers + 1, memory_bytes=settings.compute_memory_bytes)
    reads = (*settings.data_roots, *torch_hub_folders(settings.torch_hub), str(settings.storage))
    has_objects = settings.remote_roots or settings.remote_export_roots
    ports = tuple(object_ports(settings.s3_endpoint, os.environ)) if has_objects else ()
    objects = str(settings.storage / "objects")
    folders = Folders(reads, str(settings.storage / "cache"), hidden=str(state), objects=objects, ports=ports)
    secrets_dir = str(settings.secrets_folder)
    if settings.launcher is LauncherKind.LOCAL:
        local = LocalLauncher(
            clock=clock, cpus=settings.cpus, gpus=settings.gpus, environment=environment, hidden=str(state)
        )
        log_file = state / "compute.log"
        return local, ProcessCompute(
            log=log_file, size=size, folders=folders, environment=environment, secrets_dir=secrets_dir
        )
    head = None
    if not settings.ray_address:
        gpus = len(usable_gpus(settings.gpus))
        head = EmbeddedHead(state, cpus=settings.cpus, gpus=gpus, environment=environment)
    ray = RayLauncher(
        log=state / "ray-agent.log",
        head=head,
        address=settings.ray_address,
        environment=environment,
        hidden=str(state),
    )
    # On a user's own cluster the node may be another machine, and only the storage is common.
    log_file = (settings.storage if settings.ray_address else state) / "compute.log"
    compute = RayCompute(
        ray.link, log=log_file, size=size, folders=folders, environment=environment, secrets_dir=secrets_dir
    )
    return ray, compute
