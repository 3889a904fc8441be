"""Checkpoints that are whole or do not exist: every rank writes its shards, then a manifest is renamed into place.

The rename is the commit. A checkpoint is `{attempt_dir}/step-{step:09}/` and belongs to one attempt; nothing in
it counts without `manifest.json`, which names every file with its size and hash, and is hashed itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shardyard_trainer.claim import check_storage, missing_storage
from shardyard_trainer.failures import ROOM_STEP, RunFailed, storage_failure
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.engine import Engine
from shardyard_trainer.training.shards import ShardFile, ShardWriter, damage, fsync_folder
from shardyard_trainer.training.versions import versions

FORMAT = 1
MANIFEST = "manifest.json"
SKIPS_BEFORE_FAILURE = 3
GIB = 1 << 30


@dataclass
class RunState:
    """Everything of a run that a checkpoint carries beside the engine's states. Its sample position is its step."""

    step: int = 0
    tokens: int = 0
    skipped_in_row: int = 0
    learning: dict[str, Any] = field(default_factory=dict)
    selection: dict[str, Any] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """JSON values only; floats come back exactly."""
        return asdict(self)


class Checkpoints:
    """Writes and restores the checkpoints of one attempt. `save` and `restore` are collectives."""

    def __init__(
        self,
        context: Context,
        engine: Engine,
        *,
        predicted_bytes: int,
        zero_stage: int,
        free_bytes: Callable[[Path], tuple[int, int]] | None = None,
    ) -> None:
        """`free_bytes` returns the free and total bytes of the disk under a folder; None: ask the file system."""
        self._context = context
        self._engine = engine
        self._predicted_bytes = predicted_bytes
        self._zero_stage = zero_stage
        self._free_bytes = free_bytes or _free_bytes
        self._skipped = 0
        self.last_step = 0
        self.restored_from = ""
        self.last_time_s = time.monotonic()

    def save(self, state: RunState, metrics: dict[str, float], *, is_required: bool = False) -> bool:
        """Commits a checkpoint of `state.step`; false if there was no room and training may continue without.

        Raises: RunFailed(STORAGE_FULL or STORAGE_NOT_WRITABLE) if it `is_required`, or the third time in a row.
        """
        folder = self.folder(state.step)
        problem = self._context.gang.from_chief(self._room(folder) if self._context.gang.is_chief else None)
        if problem is None:
            problem = self._write(folder, state, metrics)
        self.last_time_s = time.monotonic()
        if problem is None:
            self.last_step = state.step
            self._pressure_ends()
            return True
        self._skipped += 1
        if is_required or self._skipped >= SKIPS_BEFORE_FAILURE:
            raise problem
        text = f"the checkpoint of step {state.step} was skipped: {problem.message}"
        self._context.disk_pressure(text, active=True, durable=self._skipped == 1)
        return False

    def folder(self, step: int) -> Path:
        """The folder of this attempt's checkpoint of a step."""
        return Path(self._context.attempt.attempt_dir) / f"step-{step:09}"

    def probe(self) -> None:
        """Writes and removes a file on every rank, to check the storage of a resumed attempt. A collective.

        Raises: RunFailed(STORAGE_FULL or STORAGE_NOT_WRITABLE).
        """
        path = Path(self._context.attempt.attempt_dir) / f"probe-{self._context.gang.rank}"
        problem = missing_storage(self._context.attempt.locations)
        try:
            if problem is None:
                with open(path, "wb") as out:
                    out.write(b"probe")
                    out.flush()
                    os.fsync(out.fileno())
                path.unlink()
        except OSError as raised:
            problem = _first_problem([raised])
        if (first := next((each for each in self._context.gang.gather(problem) if each), None)) is not None:
            raise first

    def restore(self) -> RunState | None:
        """Loads the first whole candidate into the engine; None if there are no candidates.

        Raises: RunFailed(CHECKPOINT_CORRUPT) if there are some, and none is whole; RunFailed(STORAGE_UNAVAILABLE)
        if none can be seen because the storage is not there.
        """
        check_storage(self._context.attempt.locations)
        damages = []
        for candidate in self._context.attempt.resume_candidates:
            folder = Path(candidate)
            manifest, problem = self.verify(folder)
            if manifest is not None:
                return self._load(folder, manifest)
            damages.append(f"{folder.name}: {problem}")
            self._report_corrupt(folder, problem)
        if damages:
            raise RunFailed(
                "CHECKPOINT_CORRUPT",
                "no checkpoint is whole: " + "; ".join(damages),
                "repair or restore the storage, or submit a new job to start over",
                {"path": self._context.attempt.resume_candidates[0]},
            )
        return None

    def load_weights(self, step: int) -> bool:
        """Loads the committed checkpoint of a step, of this attempt or one before; false if none is whole.

        The engine is then at that step: nothing may be trained or saved any more. A collective.
        """
        own = self.folder(step)
        before = [Path(each) for each in self._context.attempt.resume_candidates if Path(each).name == own.name]
        is_own: bool = self._context.gang.from_chief((own / MANIFEST).exists())
        for folder in [own, *before] if is_own else before:
            manifest, problem = self.verify(folder)
            if manifest is not None:
                self._load(folder, manifest)
                return True
            self._report_corrupt(folder, problem)
        return False

    def verify(self, folder: Path) -> tuple[dict[str, Any] | None, str]:
        """Reads every file of a checkpoint, the ranks sharing the work: its manifest, or None and what is damaged."""
        gang = self._context.gang
        manifest, problem = gang.from_chief(read_manifest(folder) if gang.is_chief else None)
        if manifest is None:
            return None, problem
        files = [ShardFile(**file) for file in manifest["files"]]
        found = next((text for file in files[gang.rank :: gang.world_size] if (text := damage(folder, file))), "")
        problem = next((text for text in gang.gather(found) if text), "")
        return (None, problem) if problem else (manifest, "")

    def _load(self, folder: Path, manifest: dict[str, Any]) -> RunState:
        world_size = self._context.gang.world_size
        if (manifest["world_size"], manifest["zero_stage"]) != (world_size, self._zero_stage):
            raise RunFailed(
                "USER_CONFIG",
                f"{folder.name} is of {manifest['world_size']} workers at ZeRO stage {manifest['zero_stage']}, this "
                f"attempt has {world_size} at stage {self._zero_stage}",
                "continue with the same number of workers and the same stage",
            )
        state = RunState(**self._engine.load(folder))
        self.restored_from = str(folder)
        self.last_step = state.step
        return state

    def _room(self, folder: Path) -> RunFailed | None:
        """Makes the folder; returns the failure if it cannot, or if checkpoint and reserve do not fit.

        The launch has made the parent folders: if they are missing, so is the storage.
        """
        if (missing := missing_storage(self._context.attempt.locations)) is not None:
            return missing
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            return _first_problem([error])
        free, total = self._free_bytes(folder.parent)
        # A twentieth of a very large disk would be more than enough.
        needed = int(self._predicted_bytes * 1.1) + min(max(GIB, total // 20), 16 * GIB)
        if free >= needed:
            return None
        shutil.rmtree(folder, ignore_errors=True)
        return RunFailed(
            "STORAGE_FULL",
            f"the storage had {free / GIB:.2f} GiB free, a checkpoint and its reserve need {needed / GIB:.2f}",
            room_step(needed - free, kept_bytes(folder.parent.parent)),
            {"path": str(folder.parent), "free": str(free), "needed": str(needed)},
        )

    def _write(self, folder: Path, state: RunState, metrics: dict[str, float]) -> RunFailed | None:
        """Writes shards, then the manifest; returns an error of any rank on every rank, and removes the folder then."""
        gang = self._context.gang
        writer = ShardWriter(self._context.trace)
        self._engine.save(folder, state.state_dict(), writer)
        parts = gang.gather((writer.files, writer.error))
        files = sorted((file for part, _ in parts for file in part), key=lambda file: file.path)
        problem = _first_problem(error for _, error in parts)
        if problem is None and gang.is_chief:
            problem = self._commit(folder, files, state, metrics)
        agreed: RunFailed | None = gang.from_chief(problem)
        if agreed is not None and gang.is_chief:
            shutil.rmtree(folder, ignore_errors=True)
        return agreed

    def _commit(
        self, folder: Path, files: Sequence[ShardFile], state: RunState, metrics: dict[str, float]
    ) -> RunFailed | None:
        context = self._context
        size_bytes = sum(file.bytes for file in files)
        manifest = {
            "format": FORMAT,
            "job_uid": context.attempt.job_uid,
            "epoch": context.attempt.epoch,
            "step": state.step,
            "world_size": context.gang.world_size,
            "zero_stage": self._zero_stage,
            "created_us": time.time_ns() // 1000,
            "size_bytes": size_bytes,
            "files": [asdict(file) for file in files],
            "cursor": state.state_dict(),
            "metrics": metrics,
            "versions": versions(),
        }
        # The next attempt continues after this step: metrics that were lost with this rank would stay lost.
        context.settle()
        try:
            write_manifest(folder, manifest, context.trace)
        except OSError as error:
            return _first_problem([error])
        self._predicted_bytes = size_bytes
        context.checkpointed(state.step, str(folder), size_bytes=size_bytes, metrics=metrics)
        return None

    def _report_corrupt(self, folder: Path, problem: str) -> None:
        epoch, step = _number(folder.parent.name, "e"), _number(folder.name, "step-")
        self._context.found_corrupt(step, str(folder), epoch=epoch, problem=problem)

    def _pressure_ends(self) -> None:
        if self._skipped:
            self._context.disk_pressure("checkpoints are written again", active=False)
        self._skipped = 0


def write_manifest(folder: Path, manifest: dict[str, Any], trace: Callable[[str], None]) -> None:
    """Commits the checkpoint in `folder`: when this returns, the manifest survives a power cut."""
    signed = {**manifest, "sha256": manifest_hash(manifest)}
    partial = folder / f"{MANIFEST}.tmp"
    with open(partial, "wb") as out:
        out.write(json.dumps(signed, sort_keys=True, indent=1).encode())
        out.flush()
        os.fsync(out.fileno())
    fsync_folder(folder)
    trace("manifest.written")
    partial.rename(folder / MANIFEST)
    trace("manifest.renamed")
    fsync_folder(folder)
    fsync_folder(folder.parent)


def read_manifest(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The manifest of a committed checkpoint, or None and a sentence about its fault."""
    path = folder / MANIFEST
    try:
        if path.exists() and not path.is_file():  # Reading a pipe would wait forever.
            return None, f"{MANIFEST} is not a file"
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        return None, f"{MANIFEST}: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return None, f"{MANIFEST} is not JSON: {error}"
    if not isinstance(manifest, dict) or manifest.get("sha256") != manifest_hash(manifest):
        return None, f"{MANIFEST} does not have the hash that it says"
    if manifest["format"] != FORMAT:
        return None, f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
    return manifest, ""


def manifest_hash(manifest: dict[str, Any]) -> str:
    """The sha256 of the manifest without its own hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _first_problem(errors: Any) -> RunFailed | None:
    error = next((error for error in errors if error is not None), None)
    if error is None:
        return None
    return storage_failure(error, "a checkpoint", on_storage=True)


def kept_bytes(job_folder: Path) -> list[int]:
    """The sizes of the checkpoints in a job's folder, of all attempts."""
    sizes = []
    for manifest in job_folder.glob(f"e*/step-*/{MANIFEST}"):
        with contextlib.suppress(OSError):  # The service removes old ones meanwhile.
            sizes.append(sum(path.stat().st_size for path in manifest.parent.iterdir()))
    return sizes


def room_step(missing: int, kept: Sequence[int]) -> str:
    """The advice for a full storage; it includes keeping fewer checkpoints only if that frees enough."""
    if sum(kept) - max(kept, default=0) >= missing:
        return f"{ROOM_STEP}, or submit it with a lower checkpoints.keep_last (this job has {len(kept)} there)"
    return ROOM_STEP


def _free_bytes(folder: Path) -> tuple[int, int]:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize, usage.f_blocks * usage.f_frsize


def _number(name: str, prefix: str) -> int:
    digits = name.removeprefix(prefix)
    return int(digits) if digits.isdigit() else 0
