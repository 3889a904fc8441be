"""What a feature extraction is to do: its plan, and what a rank needs to know to do its part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import Message

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering import warm
from shardyard_trainer.answering.inspect import check_weights
from shardyard_trainer.data.columns import check_roles
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.stats import loss_warnings
from shardyard_trainer.inputs.image import ImageInputs
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.models import sources
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.planning import memory, resolve
from shardyard_trainer.planning.checks import node_memory_of_worker, reserved_bytes, slots_of
from shardyard_trainer.planning.extraction_rows import PictureRows, Rows, TextRows
from shardyard_trainer.planning.identity import data_fingerprint
from shardyard_trainer.planning.pins import model_fingerprint
from shardyard_trainer.tasks.feature_extraction import TASK
from shardyard_trainer.tasks.opening import Opened
from shardyard_trainer.tasks.vectors import POOLING_VALUES, Vectors, Wish

ROWS_PER_SHARD = {
    spec_pb2.FeatureExtraction.OUTPUT_POOLED: 2048,
    spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE: 128,
}
"""Rows in one Parquet file: the work repeated after a failure, and the rows in memory at once."""

FIELD = "spec.feature_extraction"
_OUTPUTS = spec_pb2.FeatureExtraction


@dataclass(frozen=True)
class Extraction:
    """A resolved feature extraction: what makes the vectors, which ones, and of which rows."""

    vectors: Vectors
    wish: Wish
    rows: Rows

    @property
    def rows_per_shard(self) -> int:
        """Rows in one file of the result."""
        return ROWS_PER_SHARD[self.output]

    @property
    def output(self) -> spec_pb2.FeatureExtraction.Output.ValueType:
        """As a spec has it."""
        return _OUTPUTS.OUTPUT_LAST_HIDDEN_STATE if self.wish.whole else _OUTPUTS.OUTPUT_POOLED


def read_extraction(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[Extraction, Message | None]:
    """What a spec asks for, its defaults filled in, and its model as it is pinned. Raises SpecError, all at once."""
    wanted = spec.feature_extraction
    errors: list[SpecError] = []
    opened, pinned, files = None, None, []
    try:
        opened, pinned = _load_model(spec, locations)
    except SpecError as error:
        errors.append(error)
    try:
        files = resolve_source(wanted.data, locations, field=f"{FIELD}.data")
    except SpecError as error:
        errors.append(error)
    if wanted.data.max_bad_rows_share:
        message = "each row gets its vector; fix the rows that cannot be used, and leave this out"
        errors.append(SpecError(f"{FIELD}.data.max_bad_rows_share", "SPEC_INVALID", message))
    errors.extend(check_roles(wanted.data, TASK.roles, task=TASK.name, field=f"{FIELD}.data"))
    raise_all(errors)
    assert opened is not None
    vectors = opened.vectors
    raise_all(SpecError(f"{FIELD}.{each.field}", each.reason, each.message) for each in vectors.refuse(wanted))
    rows: Rows
    if isinstance(opened.inputs, ImageInputs):
        rows = PictureRows(files, wanted.data, opened.inputs, Path(locations.cache_dir))
    else:
        assert isinstance(opened.inputs, TextInputs)
        rows = TextRows(files, wanted.data, opened.inputs)
    return Extraction(vectors, vectors.wish(wanted), rows), pinned


def plan_extraction(
    spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, node: worker_pb2.NodeShape
) -> plan_pb2.JobPlan:
    """The plan, and in `spec` what it found. Raises SpecError."""
    found, pinned = read_extraction(spec, locations)
    wanted, wish = spec.feature_extraction, found.wish
    wanted.output = found.output
    wanted.pooling = POOLING_VALUES[wish.pooling]
    if wish.length:
        wanted.max_length = wish.length
    wanted.normalize = wish.normalize
    resolve.fill_source(wanted.data, found.rows.files)
    sources.pin(spec.model, pinned)
    stats = found.rows.stats(wish)
    num_parameters = sum(parameter.numel() for parameter in found.vectors.loaded.model.parameters())
    workers = spec.resources.workers
    need = memory_of_vectors(num_parameters, available=node_memory_of_worker(spec, node))
    return plan_pb2.JobPlan(
        resolved_spec=spec,
        batch=plan_pb2.BatchPlan(workers=workers),
        num_parameters=num_parameters,
        memory=need.to_proto(reserved_bytes(spec, node)),
        total_steps=num_shards(stats.num_samples, found.rows_per_shard),
        num_train_samples=stats.num_samples,
        slots=slots_of(spec),
        data_fingerprint=data_fingerprint(spec, locations),
        model_fingerprint=model_fingerprint(spec, locations),
        output=plan_pb2.JOB_OUTPUT_DATASET,
        train_stats=stats.to_proto(),
        warnings=loss_warnings(stats, of="feature extraction", length=wish.length, field=f"{FIELD}.max_length"),
    )


def memory_of_vectors(num_parameters: int, *, available: int) -> memory.Memory:
    """Memory of one worker that makes vectors: the weights, and the process."""
    return memory.Memory(
        parameters=4 * num_parameters,
        gradients=0,
        optimizer=0,
        activations=0,
        logits=0,
        batches=0,
        process=memory.CPU_PROCESS_BYTES,
        available=available,
        on_gpu=False,
    )


def num_shards(num_rows: int, rows_per_shard: int) -> int:
    """The number of Parquet files in the result."""
    return -(-num_rows // rows_per_shard)


def _load_model(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[Opened, Message | None]:
    kind = spec.model.WhichOneof("source")
    if kind is None:
        raise SpecError("spec.model", "SPEC_INVALID", "no model: give hub, uri, model, checkpoint or adapter")
    if kind == "architecture":
        message = "a fresh model has nothing to extract; give a pretrained one"
        raise SpecError("spec.model.architecture", "SPEC_INVALID", message)
    found = sources.find_folder(spec.model, locations, field="spec.model")
    folder = found.folder
    field = f"spec.model.{kind}"
    if kind != "model":
        raise_all([SpecError(field, each.reason, str(each), each.metadata) for each in check_weights(folder)])
    try:
        opened = warm.shared_cache().get(folder)
        _ = opened.vectors  # A model without any is refused here.
        return opened, found.pinned
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from error
