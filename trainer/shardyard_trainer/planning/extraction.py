"""What a feature extraction is to do: its plan, and what a rank needs to know to do its part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering import warm
from shardyard_trainer.answering.inspect import check_weights
from shardyard_trainer.data.columns import Row, check_roles, read_rows
from shardyard_trainer.data.errors import SpecError, raise_all
from shardyard_trainer.data.sources import DataFile, resolve_source
from shardyard_trainer.data.stats import DataStats, TokenCounter, loss_warnings
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.inputs.tokenization import encode
from shardyard_trainer.models import sources
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.planning import memory, resolve
from shardyard_trainer.planning.checks import node_memory_of_worker, slots_of
from shardyard_trainer.planning.identity import data_fingerprint
from shardyard_trainer.planning.pins import model_fingerprint
from shardyard_trainer.tasks.feature_extraction import TASK
from shardyard_trainer.tasks.opening import text_inputs
from shardyard_trainer.tasks.vectors import POOLING_VALUES, choose_length, choose_pooling

ROWS_PER_SHARD = {
    spec_pb2.FeatureExtraction.OUTPUT_POOLED: 2048,
    spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE: 128,
}
"""Texts in one Parquet file: what is done again after a failure, and what lies in memory at once."""

FIELD = "spec.feature_extraction"
_BATCH_TEXTS = 512
_OUTPUTS = spec_pb2.FeatureExtraction


@dataclass(frozen=True)
class Extraction:
    """A resolved feature extraction. `whole`: one vector a token instead of one a text."""

    loaded: Loaded
    inputs: TextInputs
    files: list[DataFile]
    source: spec_pb2.DataSource
    whole: bool
    pooling: str
    max_length: int
    normalize: bool
    rows_per_shard: int

    def rows(self) -> list[Row]:
        """The texts, in order. Raises DataError."""
        return list(self.texts())

    def texts(self) -> Iterator[Row]:
        """The same, as they are read."""
        return read_rows(self.files, self.source, with_label=False, field=f"{FIELD}.data")


def read_extraction(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[Extraction, str]:
    """What a spec asks for, its defaults filled in, and the Hub commit of its model. Raises SpecError, all at once."""
    wanted = spec.feature_extraction
    errors: list[SpecError] = []
    model, commit, files = None, "", []
    try:
        model, commit = _load_model(spec, locations)
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
    assert model is not None
    loaded, inputs = model
    try:
        length = choose_length(loaded, wanted.max_length if wanted.HasField("max_length") else None)
    except ValueError as error:
        raise SpecError(f"{FIELD}.max_length", "SPEC_INVALID", str(error)) from None
    output = wanted.output or _OUTPUTS.OUTPUT_POOLED
    found = Extraction(
        loaded=loaded,
        inputs=inputs,
        files=files,
        source=wanted.data,
        whole=output == _OUTPUTS.OUTPUT_LAST_HIDDEN_STATE,
        pooling=choose_pooling(loaded, wanted.pooling),
        max_length=length,
        normalize=wanted.normalize or loaded.folder.normalize,
        rows_per_shard=ROWS_PER_SHARD[output],
    )
    return found, commit


def plan_extraction(
    spec: spec_pb2.JobSpec, locations: worker_pb2.Locations, node: worker_pb2.NodeShape
) -> plan_pb2.JobPlan:
    """The plan, and in `spec` what it found. Raises SpecError."""
    found, commit = read_extraction(spec, locations)
    wanted = spec.feature_extraction
    wanted.output = _OUTPUTS.OUTPUT_LAST_HIDDEN_STATE if found.whole else _OUTPUTS.OUTPUT_POOLED
    wanted.pooling = POOLING_VALUES[found.pooling]
    wanted.max_length = found.max_length
    wanted.normalize = found.normalize
    resolve.fill_source(wanted.data, found.files)
    if commit:
        spec.model.hub.revision = commit
    stats = _stats(found)
    num_rows = stats.num_samples
    num_parameters = sum(parameter.numel() for parameter in found.loaded.model.parameters())
    workers = spec.resources.workers
    need = memory.Memory(
        parameters=4 * num_parameters,
        gradients=0,
        optimizer=0,
        activations=0,
        logits=0,
        batches=0,
        process=memory.CPU_PROCESS_BYTES,
        available=node_memory_of_worker(spec, node),
        on_gpu=False,
    )
    return plan_pb2.JobPlan(
        resolved_spec=spec,
        batch=plan_pb2.BatchPlan(workers=workers),
        num_parameters=num_parameters,
        memory=need.to_proto(),
        total_steps=num_shards(num_rows, found.rows_per_shard),
        num_train_samples=num_rows,
        slots=slots_of(spec),
        data_fingerprint=data_fingerprint(spec, locations),
        model_fingerprint=model_fingerprint(spec, locations),
        output=plan_pb2.JOB_OUTPUT_DATASET,
        train_stats=stats.to_proto(),
        warnings=loss_warnings(stats, of="feature extraction", length=found.max_length, field=f"{FIELD}.max_length"),
    )


def _stats(found: Extraction) -> DataStats:
    """What the texts hold, tokenised as the ranks will do it. Raises DataError, SpecError."""
    for _ in found.texts():
        pass  # Errors of the last row are reported before any is tokenised, which takes ten times as long.
    counter = TokenCounter(found.inputs.tokenizer)
    total = DataStats(num_samples=0, num_tokens=0, num_cut=0, num_words=0, num_unknown=0)
    for paired, rows in groupby(found.texts(), key=lambda row: row.text_pair is not None):
        while batch := list(islice(rows, _BATCH_TEXTS)):
            pairs = [row.text_pair or "" for row in batch] if paired else None
            encoded = encode(found.inputs.tokenizer, [row.text for row in batch], pairs, found.max_length)
            words, unknown = counter.count(encoded.ids)
            total = DataStats(
                num_samples=total.num_samples + len(batch),
                num_tokens=total.num_tokens + sum(map(len, encoded.ids)),
                num_cut=total.num_cut + sum(encoded.cut),
                num_words=total.num_words + int(words.sum()),
                num_unknown=total.num_unknown + int(unknown.sum()),
                num_blank=total.num_blank + int((words == 0).sum()),
            )
    return total


def num_shards(num_rows: int, rows_per_shard: int) -> int:
    """The number of Parquet files in the result."""
    return -(-num_rows // rows_per_shard)


def _load_model(spec: spec_pb2.JobSpec, locations: worker_pb2.Locations) -> tuple[tuple[Loaded, TextInputs], str]:
    kind = spec.model.WhichOneof("source")
    if kind is None:
        raise SpecError("spec.model", "SPEC_INVALID", "no model: give hub, uri or model")
    if kind == "architecture":
        message = "a fresh model has nothing to extract; give a pretrained one"
        raise SpecError("spec.model.architecture", "SPEC_INVALID", message)
    folder, commit = sources.find_folder(spec.model, locations, field="spec.model")
    field = f"spec.model.{kind}"
    if kind != "model":
        raise_all([SpecError(field, each.reason, str(each), each.metadata) for each in check_weights(folder)])
    try:
        opened = warm.shared_cache().get(folder)
        return (opened.loaded, text_inputs(opened)), commit
    except FolderInvalid as error:
        raise SpecError(field, error.reason, str(error), error.metadata) from error
