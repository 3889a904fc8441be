"""Inspects model folders and the shared storage, in a warm process of the cluster.

`inspect_model` checks that a folder is a model and loads, without running code of it, and returns all errors at once.
`check_weights` is the same check for a folder that a spec names; its result is kept until a file changes.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from shardyard.v1 import model_service_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.models import weights
from shardyard_trainer.models.door import Folder, FolderInvalid, open_folder, refuse_links, signature
from shardyard_trainer.models.folder import ModelFolder, read_folder
from shardyard_trainer.models.gguf_folder import dequantise, gguf_in
from shardyard_trainer.reading import about, reading

if TYPE_CHECKING:
    from shardyard_trainer.tasks.base import Predictor  # It imports torch, which other calls do without.


class _Look(NamedTuple):
    """The errors of a folder, its description, and the inputs and parameters that its model takes."""

    problems: tuple[FolderInvalid, ...]
    described: ModelFolder | None
    num_parameters: int
    takes: tuple[str, ...]
    parameters: str
    silence: str = ""
    """Why nothing can be asked of a model that has a head; empty: it answers, or has none."""


def inspect_model(request: bytes) -> bytes:
    """Inspects a model folder: InspectModelRequest → InspectModelResult."""
    about("files", "MODEL_INVALID")
    call = worker_pb2.InspectModelRequest.FromString(request)
    folder = open_folder(Path(call.folder))
    seen = _look_into_any(folder, call.cache_dir)
    found = seen.described
    problems = [*seen.problems, *_contradicted_heads(found), *_silent_heads(seen)]
    result = worker_pb2.InspectModelResult(
        violations=[
            worker_pb2.Violation(field="files", reason=problem.reason, message=str(problem), metadata=problem.metadata)
            for problem in problems
        ]
    )
    if not problems and found is not None:
        result.model.CopyFrom(
            model_service_pb2.Model(
                model_type=found.model_type,
                task=found.task,
                labels=found.labels if found.task else (),
                inputs=seen.takes,
                parameters=seen.parameters,
                num_parameters=seen.num_parameters,
            )
        )
    return result.SerializeToString()


def _look_into_any(folder: Folder, cache_dir: str) -> _Look:
    """A look into a Hugging Face folder, or into what a GGUF file is converted into."""
    try:
        if cache_dir and (origin := gguf_in(folder)) is not None:
            folder = dequantise(origin, Path(cache_dir))
    except FolderInvalid as problem:
        return _Look((problem,), None, 0, (), "")
    return _look_into(folder, signature(folder.path))


def _contradicted_heads(found: ModelFolder | None) -> Iterator[FolderInvalid]:
    """The error of a head that contradicts config.json: such a folder can be fine-tuned, but cannot predict."""
    if found is not None and found.reshaped:
        yield FolderInvalid(
            f"{found.reshaped}; correct it there (num_labels and id2label are the outputs of a classifier), put the "
            "config.json that the weights were saved with beside them, or name the bare model in `architectures` (such "
            'as "BertModel") to use it without its head',
            file="config.json",
        )


def _silent_heads(seen: _Look) -> Iterator[FolderInvalid]:
    """The error of a head that no request is answered with: its model would be registered for a task in vain."""
    if seen.silence and seen.described is not None and seen.described.task:
        yield FolderInvalid(
            f"nothing is predicted with a {seen.described.model_type} that has a head for {seen.described.task}: "
            f"{seen.silence}",
            file="config.json",
        )


def check_weights(folder: Folder) -> tuple[FolderInvalid, ...]:
    """The errors of a model folder, except a missing tokenizer, which a spec may supply."""
    problems = _look_into(folder, signature(folder.path)).problems
    return tuple(problem for problem in problems if problem.reason != "TOKENIZER_MISSING")


@functools.lru_cache(maxsize=64)
def _look_into(folder: Folder, _signature: tuple[tuple[str, int, int, int, int], ...]) -> _Look:
    problems: list[FolderInvalid] = []

    def gather(check: Callable[[], None]) -> None:
        try:
            check()
        except FolderInvalid as problem:
            problems.append(problem)
        except weights.WeightsInvalid as problem:
            problems.append(FolderInvalid(str(problem), file=problem.file, tensor=problem.tensor))

    found: list[ModelFolder] = []
    tensors: list[weights.Tensor] = []
    predictors: list[Predictor] = []
    silence: list[str] = []
    gather(lambda: refuse_links(folder))
    gather(lambda: found.append(read_folder(folder)))
    gather(lambda: tensors.extend(_check_files(folder)))
    if found or folder.has("generation_config.json"):  # Else config.json itself is at fault, which is an error already.
        gather(lambda: _check_generation(folder))
    gather(lambda: _check_inputs(folder, found[0] if found else None))
    num_parameters = 0
    if not problems or [problem.reason for problem in problems] == ["TOKENIZER_MISSING"]:
        gather(lambda: _check_loads(found[0], tensors))
        gather(lambda: _check_head(found[0]))
    if not problems:
        gather(lambda: found.append(_with_task(found.pop())))
        gather(lambda: predictors.extend(_check_answers(folder, silence)))
    if found:
        num_parameters = sum(math.prod(tensor.shape) for tensor in tensors if tensor.dtype.startswith(("F", "BF")))
    takes, parameters = (predictors[0].takes, predictors[0].parameters) if predictors else ((), "")
    described = found[0] if found else None
    return _Look(tuple(problems), described, num_parameters, takes, parameters, "".join(silence))


def _with_task(described: ModelFolder) -> ModelFolder:
    """The folder with its task, which follows from the head in its weights."""
    from shardyard_trainer.models.weight_heads import with_true_head  # It imports torch, which other calls do without.
    from shardyard_trainer.tasks import table

    described = with_true_head(described)
    task = table.of_folder(described)
    return replace(described, task=task.name if task is not None else "")


def _check_files(folder: Folder) -> list[weights.Tensor]:
    tensors = []
    for name in weights.weight_names(folder):
        header = weights.read_header(folder, name)
        weights.check_finite(folder, name, header)
        tensors.extend(header)
    if not tensors:
        raise weights.no_weights(folder)
    return tensors


def _check_generation(folder: Folder) -> None:
    from shardyard_trainer.models.generation import generation_settings  # It imports transformers.

    generation_settings(folder)


def _check_inputs(folder: Folder, described: ModelFolder | None) -> None:
    """Reads what reads the model's inputs, as every later use does: by its task's modality, else a tokenizer."""
    from shardyard_trainer.inputs.text import TextInputs  # They import torch, which other calls do without.
    from shardyard_trainer.tasks import table
    from shardyard_trainer.tasks.opening import inputs_of

    kind = inputs_of(described, table.of_folder(described)) if described is not None else TextInputs
    if described is not None and kind is not TextInputs:
        kind.load(folder, described)
        return
    try:
        _check_tokenizer(folder, described.config if described is not None else {})
    except FolderInvalid as problem:
        # Of a model that is not read it is not known what it takes: it may be pictures.
        if described is not None or problem.reason != "TOKENIZER_MISSING" or not folder.has("config.json"):
            raise


def _check_tokenizer(folder: Folder, config: Mapping[str, Any]) -> None:
    """Builds the tokenizer as every later use does."""
    from shardyard_trainer.inputs.vocabularies import build_tokenizer, too_many_ids, too_many_types

    tokenizer, vocab_size = build_tokenizer(folder), config.get("vocab_size")
    complaint = too_many_ids(tokenizer, vocab_size) if isinstance(vocab_size, int) else ""
    if complaint := complaint or too_many_types(tokenizer, config.get("type_vocab_size")):
        raise FolderInvalid(complaint, file="tokenizer.json")


def _check_loads(folder: ModelFolder, tensors: list[weights.Tensor]) -> None:
    """Loads the backbone by transformers, once it is known that config.json asks for no more than the file holds."""
    import torch
    from transformers import AutoModel

    from shardyard_trainer.models import architectures
    from shardyard_trainer.models.loading import LOADING_ERRORS, quiet, what_failed
    from shardyard_trainer.models.settings import model_config
    from shardyard_trainer.models.weight_heads import refuse_deep
    from shardyard_trainer.models.weight_report import judge
    from shardyard_trainer.plain_words import in_plain_words

    reading("the model that config.json asks for")
    # Whatever transformers raises here (many types: validation, shapes, missing attributes), it is the folder's fault.
    config: Any = None
    try:
        config = model_config(folder.source)
        refuse_deep(config, len(tensors))
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
        stored = sum(math.prod(tensor.shape) for tensor in tensors)
        if wanted > 2 * stored + 10**6:
            raise FolderInvalid(
                f"config.json asks for {wanted} parameters, but the weights have {stored}", file="config.json"
            )
        with quiet():
            model, info = weights.load_pretrained(AutoModel, folder.source, config, ignore_mismatched_sizes=True)
    except LOADING_ERRORS as error:
        if isinstance(error, FolderInvalid):
            raise
        reason = in_plain_words(error) if config is None else what_failed(error, config)[1]
        raise FolderInvalid(f"the model does not load: {reason}", file="config.json") from None
    try:
        judge(model, info)
    except FolderInvalid:
        if refusal := architectures.refusal(config):
            raise FolderInvalid(refusal, file="config.json") from None
        raise


def _check_answers(folder: Folder, silence: list[str]) -> Iterator[Predictor]:
    """Loads the model as `Predict` and `Embed` will, so that a ready one answers; yields its predictor, if any.

    Why it cannot be asked at all goes to `silence`.
    """
    from shardyard_trainer.tasks.opening import open_model

    try:
        predictor = open_model(folder).predictor
    except FolderInvalid as problem:
        # A model that reads no text is kept too; the answer to a question says what it reads.
        if problem.reason != "TASK_MISMATCH":
            raise
        silence.append(str(problem))
        return
    if predictor is not None:
        yield predictor


def _check_head(folder: ModelFolder) -> None:
    """A head of our own has as many outputs as there are labels."""
    name = "head.safetensors"
    if not folder.source.has(name):
        return
    header = weights.read_header(folder.source, name)
    weights.check_finite(folder.source, name, header)
    shapes = {tensor.name: tensor.shape for tensor in header}
    outputs = max(len(folder.labels), 1)
    if shapes.get("bias") != (outputs,) or len(shapes.get("weight", ())) != 2 or shapes["weight"][0] != outputs:
        raise FolderInvalid(f"head.safetensors is not a head of {outputs} outputs: {shapes}"[:300], file=name)


def probe_storage(request: bytes) -> bytes:
    """ProbeStorageRequest → ProbeStorageReply: reads the coordinator's file and writes one next to it.

    A file that is not there, or a folder that cannot be written, leaves its part of the answer empty.
    """
    path = Path(worker_pb2.ProbeStorageRequest.FromString(request).path)
    reply = worker_pb2.ProbeStorageReply()
    try:
        reply.content = path.read_bytes()
        written = path.with_name(f"{path.name}.worker-{os.getpid()}")
        written.write_bytes(reply.content)
        reply.written_path = str(written)
    except OSError:
        return reply.SerializeToString()
    return reply.SerializeToString()
