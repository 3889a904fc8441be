"""Feature extraction as a job: each rank turns its part of the rows into Parquet files, one at a time.

A file is whole or absent (written under another name, fsynced, renamed), lies in the job's own folder, and is not made
again by a later attempt: that is the checkpoint. At the end rank 0 checks that all are there and puts them in place.
Columns: `row` (int64, counted from 0 over the files in order), of pictures their `path`, and `vector` (list<float>), or
`vectors` (list<list<float>>, one a token or place).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.claim import check_storage
from shardyard_trainer.failures import RunFailed, storage_failure
from shardyard_trainer.planning.extraction import Extraction, num_shards, read_extraction
from shardyard_trainer.planning.identity import check_same_data
from shardyard_trainer.planning.pins import check_same_model
from shardyard_trainer.training.config import resolved_spec
from shardyard_trainer.training.context import Context
from shardyard_trainer.training.results import put_in_place, stored_files, sync
from shardyard_trainer.training.shards import fsync_folder


def run(attempt: worker_pb2.AttemptSpec, context: Context) -> None:
    """One rank's part of the job; on rank 0 also its end. Raises RunFailed, SpecError."""
    spec = resolved_spec(attempt)
    check_same_data(spec, attempt.locations, attempt.plan, job_dir=attempt.job_dir)
    check_same_model(spec, attempt.locations, attempt.plan)
    context.phase("loading model")
    extraction, _ = read_extraction(spec, attempt.locations)
    extraction.vectors.loaded.model.to(context.gang.device)
    num_rows = extraction.rows.num_rows
    folder = _working_folder(attempt, extraction)
    total = num_shards(num_rows, extraction.rows_per_shard)
    try:
        check_storage(attempt.locations)
        folder.mkdir(exist_ok=True)
        context.resumed(len(_made(folder)), str(folder))
        if not _extract_share(context, extraction, folder, total):
            return
        context.gang.wait_for_all()
        if context.gang.is_chief:
            _finish(context, extraction, folder, total, num_rows)
    except OSError as error:
        raise storage_failure(error, "the features", on_storage=True) or error from error


def _extract_share(context: Context, extraction: Extraction, folder: Path, total: int) -> bool:
    """Writes this rank's files; false if a directive stopped it. The first file serves as the canary."""
    gang = context.gang
    meter = _Meter(context, total)
    size, num_rows = extraction.rows_per_shard, extraction.rows.num_rows
    for index in range(gang.rank, -(-total // gang.world_size) * gang.world_size, gang.world_size):
        path = folder / _name(index)
        tokens = 0
        if index < total and not path.is_file():
            tokens = _write_shard(extraction, index * size, min((index + 1) * size, num_rows), path)
        meter.tokens += int(gang.sum_ahead([float(tokens)])()[0])
        # All ranks stop after the same round of files.
        action = gang.from_chief(context.directive)
        meter.report(len(_made(folder)) if gang.is_chief else 0, is_first=index == gang.rank)
        if action:
            context.stopped()
            return False
    return True


class _Meter:
    """Progress events: files made and tokens read by all ranks."""

    def __init__(self, context: Context, total: int) -> None:
        self._context = context
        self._total = total
        self._started_s = time.monotonic()
        self.tokens = 0

    def report(self, made: int, *, is_first: bool) -> None:
        """Says how many files are there; the first time also that the job runs."""
        elapsed_s = max(time.monotonic() - self._started_s, 1e-6)
        self._context.progressed(
            made, total_steps=self._total, tokens=self.tokens, tokens_per_s=self.tokens / elapsed_s
        )
        if is_first:
            self._context.canary_passed(duration_s=0.0)


def _write_shard(extraction: Extraction, first: int, last: int, path: Path) -> int:
    """Writes one file; the positions read."""
    columns: dict[str, pa.Array] = {"row": pa.array(range(first, last), pa.int64())}
    if (names := extraction.rows.names(first, last)) is not None:
        columns["path"] = pa.array(names, pa.string())
    vectors: list[Any] = []
    num_tokens = 0
    step = extraction.rows.at_once or max(last - first, 1)
    for start in range(first, last, step):
        encoded = extraction.rows.read(start, min(start + step, last), extraction.wish)
        vectors += [each.tolist() for each in extraction.vectors.compute(encoded, extraction.wish)]
        num_tokens += extraction.rows.num_tokens(encoded)
    if extraction.wish.whole:
        columns["vectors"] = pa.array(vectors, pa.list_(pa.list_(pa.float32())))
    else:
        columns["vector"] = pa.array(vectors, pa.list_(pa.float32()))
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with building.open("wb") as file:
            pq.write_table(pa.table(columns), file)
            file.flush()
            os.fsync(file.fileno())
        building.rename(path)
    finally:
        building.unlink(missing_ok=True)
    fsync_folder(path.parent)
    return num_tokens


def _finish(context: Context, extraction: Extraction, folder: Path, total: int, num_rows: int) -> None:
    """Checks that all files are there and whole, and puts them in place as a data set."""
    context.finished(total)
    context.phase("exporting")
    found = sum(pq.read_metadata(folder / _name(index)).num_rows for index in range(total))
    if found != num_rows:
        raise RunFailed("EXPORT_FAILED", f"{found} of {num_rows} rows were written", "submit the job again")
    wish = extraction.wish
    about = {
        "format": 1,
        "rows": num_rows,
        "width": extraction.vectors.width,
        "output": "last_hidden_state" if wish.whole else "pooled",
        "pooling": "" if wish.whole else wish.pooling,
        **({"max_length": wish.length} if wish.length else {}),
        "normalize": wish.normalize,
    }
    # The leading underscore lets readers of a folder of Parquet files pass over it.
    (folder / "_features.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    check_storage(context.attempt.locations)
    target = Path(context.attempt.export_dir)
    for path in folder.glob(".*"):
        path.unlink()  # Left half made by an attempt that was killed.
    sync(folder)
    put_in_place(folder, target)
    context.exported(worker_pb2.Exported(path=str(target), model=_describe(target), is_dataset=True))


def _describe(folder: Path) -> model_service_pb2.Model:
    files = stored_files(folder)
    return model_service_pb2.Model(files=files, size_bytes=sum(file.size_bytes for file in files), path=str(folder))


def _working_folder(attempt: worker_pb2.AttemptSpec, extraction: Extraction) -> Path:
    """In the job's folder, named after what its files depend on: those of other data are never taken."""
    digest = hashlib.sha256(resolved_spec(attempt).SerializeToString(deterministic=True))
    digest.update(extraction.rows.digest().encode())
    return Path(attempt.job_dir or attempt.attempt_dir, f"features-{digest.hexdigest()[:16]}")


def _made(folder: Path) -> list[Path]:
    return sorted(folder.glob("features-*.parquet"))


def _name(index: int) -> str:
    return f"features-{index:06}.parquet"
