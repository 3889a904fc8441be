"""Ranks that are looked at from within and from outside: what they may open."""

from __future__ import annotations

import json
from pathlib import Path

import psutil

from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.launch.claim import claim_of
from shardyard_coordinator.launch.protocols import AttemptKey, Launch


def looking_launch(storage: Path, root: Path, looks: list[tuple[str, Path]]) -> Launch:
    """One rank that tries `looks`, in a storage that is claimed."""
    folder, epoch = storage / "jobs" / "one" / "e000001", 1
    for made in (folder, storage / "models" / "others"):
        made.mkdir(parents=True)
    (storage / "models" / "others" / "config.json").write_text("theirs")
    claim = claim_of(storage, "ours")
    Path(claim.path).write_text("ours")
    (folder / "looks.json").write_text(json.dumps([(verb, str(path)) for verb, path in looks]))
    spec = worker_pb2.AttemptSpec(
        job_uid="one",
        epoch=epoch,
        job_dir=str(folder.parent),
        attempt_dir=str(folder),
        export_dir=str(storage / "models" / "mine"),
        world_size=1,
        locations=worker_pb2.Locations(data_roots=[str(root)], cache_dir=str(storage / "cache"), claim=claim),
    )
    return Launch(AttemptKey("one", epoch), spec.SerializeToString(), str(folder), 1, 1, 0, ())


def is_confined(rank: psutil.Process) -> bool:
    """Whether the kernel says that a rank has given up its rights, and no capability but those that a rank needs."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{rank.pid}/status").read_text().splitlines())
    return status["NoNewPrivs"] == "1" and int(status["CapEff"], 16) & ~0x804006 == 0


def is_warm(rank: psutil.Process) -> bool:
    """Whether it is a fork of a warm process: then it has the command line of the process that it is a copy of."""
    return any(part.endswith("compute_worker") for part in rank.cmdline())
