"""The README.md beside a trained model: what it is, how to use it in plain transformers, and the receipt.

The code in it is run by a test and gives the logits of `Predict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.data.digests import file_sha256
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.data.sources import DataFile, open_regular, resolve_source
from shardyard_trainer.models.door import CODE
from shardyard_trainer.models.folder import OWN_HEAD, OWN_TYPES, TORCH_HUB_PICTURE_VECTORS, TORCH_HUB_TEXTS
from shardyard_trainer.models.hub_process import CACHE
from shardyard_trainer.tasks.base import TrainingTask
from shardyard_trainer.training.config import resolved_spec
from shardyard_trainer.training.versions import versions

_POOLED = {
    "mean": "((hidden * mask).sum(1) / mask.sum(1))",
    "max": "hidden.masked_fill(mask == 0, float('-inf')).max(1).values",
    "last": "hidden[range(len(hidden)), mask.sum((1, 2)) - 1]",
    "cls": "hidden[:, 0]",
}


@dataclass(frozen=True)
class Subject:
    """What a card is about. `own_head` is the pooling of a head that transformers does not have, else empty; `vectors`
    that of the vectors of length 1 that are all that the model gives, else empty.

    The weights are those after `step`, 0: the last one. `hub` is the configuration of a module of PyTorch Hub, whose
    code is beside the weights; None: transformers has the model's class.
    """

    task: TrainingTask
    model_type: str
    num_parameters: int
    labels: Sequence[str]
    max_length: int | None
    own_head: str
    vectors: str
    metrics: Mapping[str, float]
    step: int
    hub: Any = None


def model_card(subject: Subject, attempt: worker_pb2.AttemptSpec) -> str:
    """The card as Markdown with its front matter."""
    name = attempt.job_name.rpartition("/")[2] or "model"
    parts = [
        _front_matter(subject),
        f"# {name}\n\n{_what(subject, resolved_spec(attempt))}",
        f"## Use it\n\n```python\n{usage(subject)}```",
        f"## Results\n\n{_table(subject.metrics)}",
        f"## Receipt\n\n{_receipt(attempt, subject.step)}",
    ]
    return "\n\n".join(parts) + "\n"


def usage(subject: Subject) -> str:
    """Plain torch and transformers, run in the model's folder; ends with `logits`."""
    if subject.model_type in OWN_TYPES:
        module = OWN_TYPES[subject.model_type].rpartition(".")[2]
        return (
            f"import {module}  # beside this file: transformers does not have this model\n\n{module}.register()\n"
            + _usage(subject)
        )
    return _usage(subject)


def _usage(subject: Subject) -> str:
    task = subject.task
    if subject.hub is not None and not (subject.own_head or subject.vectors):
        return _usage_of_hub(subject)
    if task.usage:
        return task.usage
    if subject.own_head or subject.vectors:
        return _usage_of_vectors(subject)
    cut = f", truncation=True, max_length={subject.max_length}" if subject.max_length else ""
    return (
        f"from transformers import {task.auto}, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")  # this folder\n'
        f'model = {task.auto}.from_pretrained(".").eval()\n'
        f'logits = model(**tokenizer({task.example}{cut}, return_tensors="pt")).logits\n'
    )


def _usage_of_vectors(subject: Subject) -> str:
    """The code for pooled vectors, which are the `logits` if there is no head of our own to read them."""
    pooled = _POOLED[subject.own_head or subject.vectors]
    needs, head = "from safetensors.torch import load_file\n", 'head = load_file("head.safetensors")\n'
    logits = f'{pooled} @ head["weight"].T + head["bias"]'
    if subject.vectors:
        needs, head = "from torch.nn.functional import normalize\n", ""
        logits = f"normalize({pooled}, dim=-1)  # a vector for each text; their products are cosines"
    imports, loads, hidden = (
        "from transformers import AutoModel, AutoTokenizer\n\n",
        'backbone = AutoModel.from_pretrained(".").eval()\n',
        "backbone(**inputs).last_hidden_state",
    )
    if subject.hub is not None:
        needs = f"import torch\nfrom safetensors.torch import load_file\n{needs if subject.vectors else ''}"
        imports, loads, hidden = (
            "from transformers import PreTrainedTokenizerFast\n\n",
            _loads_of_hub(subject.hub),
            _vectors_of_hub(subject.hub),
        )
    reader = "PreTrainedTokenizerFast" if subject.hub is not None else "AutoTokenizer"
    return (
        f"{needs}{imports}"
        f'tokenizer = {reader}.from_pretrained(".")  # this folder\n'
        f"{loads}{head}"
        'texts = ["Hello, my dog is cute"]\n'
        f"inputs = tokenizer(texts, padding=True, truncation=True, max_length={subject.max_length}, "
        'return_tensors="pt")\n'
        'mask = inputs["attention_mask"].unsqueeze(-1)\n'
        f"hidden = {hidden}\n"
        f"logits = {logits}\n"
    )


def _usage_of_hub(subject: Subject) -> str:
    """The code for a module of PyTorch Hub that gives logits for pictures, or for each token by a head of our own."""
    if subject.hub.model_type == TORCH_HUB_TEXTS:
        return (
            "import torch\n"
            "from safetensors.torch import load_file\n"
            "from transformers import PreTrainedTokenizerFast\n\n"
            'tokenizer = PreTrainedTokenizerFast.from_pretrained(".")  # this folder\n'
            f"{_loads_of_hub(subject.hub, has_head=True)}"
            f"inputs = tokenizer({subject.task.example}, truncation=True, max_length={subject.max_length}, "
            'return_tensors="pt")\n'
            f"hidden = {_vectors_of_hub(subject.hub)}\n"
            'logits = hidden @ head["weight"].T + head["bias"]\n'
        )
    has_head = subject.hub.model_type == TORCH_HUB_PICTURE_VECTORS
    found = 'logits = model(processor(picture, return_tensors="pt")["pixel_values"])\n'
    if has_head:
        found = f'{found.replace("logits", "vectors")}logits = vectors @ head["weight"].T + head["bias"]\n'
    return (
        "import torch\n"
        "from PIL import Image, ImageOps\n"
        "from safetensors.torch import load_file\n"
        "from transformers import AutoImageProcessor\n\n"
        'processor = AutoImageProcessor.from_pretrained(".", backend="pil")  # this folder\n'
        f"{_loads_of_hub(subject.hub, has_head=has_head)}"
        'mode = "RGB" if len(processor.image_mean) == 3 else "L"\n'
        'picture = ImageOps.exif_transpose(Image.open("picture.png")).convert(mode)\n'
        f"{found}"
    )


def _loads_of_hub(config: Any, *, has_head: bool = False) -> str:
    """Makes the `model` by its code, which is in this folder, with the trained weights."""
    given = "".join(f", {name}={value!r}" for name, value in (config.arguments or {}).items())
    lines = [f'torch.hub.set_dir("{CODE}/{CACHE}")'] if config.has_cache else []
    entrypoint = json.dumps(config.entrypoint)
    lines.append(f'model = torch.hub.load("{CODE}", {entrypoint}, source="local", trust_repo=True{given})')
    if config.is_compiled:
        lines.append("model = model._orig_mod  # torch.compile made another module of it")
    if head := getattr(config, "head", ""):
        inputs = "Linear(old.in_features"
        places = ""
        if config.head_kind == "Conv2d":
            inputs, places = "Conv2d(old.in_channels", ", 1, old.stride, old.padding"
        lines += [
            f'old = model.get_submodule("{head}")',
            f"new = torch.nn.{inputs}, {config.num_labels}{places}, bias=old.bias is not None)",
            "for name in [name for name, each in model.named_modules(remove_duplicate=False) if each is old]:",
            "    model.set_submodule(name, new)",
        ]
    lines.append('tensors = load_file("model.safetensors")')
    if has_head:
        lines.append(f'head = {{name: tensors.pop(f"{OWN_HEAD}{{name}}") for name in ("weight", "bias")}}')
    return "\n".join([*lines, "model.load_state_dict(tensors)", "model.float().eval()", ""])


def _vectors_of_hub(config: Any) -> str:
    """The expression for the vectors of tokens."""
    mask = f'inputs["attention_mask"]{" == 0" if config.masks_padding else ""}'
    call = f'model(inputs["input_ids"]{f", {config.mask}={mask}" if config.mask else ""})'
    if not config.output:
        return call
    return f"{call}[{config.output}]" if config.output.isdigit() else f'{call}["{config.output}"]'


def _front_matter(subject: Subject) -> str:
    # JSON strings are YAML strings: nothing that a user named can break out.
    library = "transformers" if subject.hub is None else "pytorch"
    lines = ["---", f"library_name: {library}", "tags:", "- shardyard", f"- {json.dumps(subject.model_type)}"]
    if not subject.own_head and subject.task.pipeline:
        lines.append(f"pipeline_tag: {subject.task.pipeline}")
    return "\n".join([*lines, "---"])


def _what(subject: Subject, spec: spec_pb2.JobSpec) -> str:
    text = (
        f"A {subject.model_type} model of {subject.num_parameters:,} parameters "
        f"for {subject.task.name.replace('_', ' ')}, trained by Shardyard from {_source(spec.model)}."
    )
    if spec.HasField("distillation"):
        learnt = spec.distillation
        text += (
            f"\n\nIt also learnt from a teacher, {_source(learnt.teacher)}: {learnt.weight:g} of its loss was the "
            f"distance from the teacher's outputs at a temperature of {learnt.temperature:g}."
        )
    if subject.labels:
        text += (
            "\n\nLabels, in the order of the outputs: "
            + ", ".join(f"`{_plain(label)}`" for label in subject.labels)
            + "."
        )
    return text


def _source(model: spec_pb2.ModelSource) -> str:
    """Where a model came from."""
    adapter = model.adapter
    return {
        "architecture": "random weights",
        "torch_hub": f"`{_plain(model.torch_hub.entrypoint)}` of the PyTorch Hub repository "
        f"`{Path(_plain(model.torch_hub.repo)).name}` at `{model.torch_hub.revision}`",
        "adapter": f"{_place(adapter.base)} with the LoRA adapter of {_place(adapter.folder)}",
        "checkpoint": f"the TensorFlow checkpoint `{Path(model.checkpoint.uri).name}`",
    }.get(model.WhichOneof("source") or "") or _place(model)


def _place(source: spec_pb2.ModelSource | spec_pb2.AdapterFolder | spec_pb2.BaseModel) -> str:
    """Where a folder came from."""
    kind = source.WhichOneof("source")
    if kind == "hub":
        return f"the Hub model `{source.hub.id}` at `{source.hub.revision}`"
    if kind == "uri":
        return f"the folder `{_plain(Path(source.uri).name)}`"
    return f"`{getattr(source, kind)}`" if kind in {"model", "dataset"} else ""


def _table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "No evaluation was requested."
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| Metric | Value |", "| --- | --- |", *rows])


def _receipt(attempt: worker_pb2.AttemptSpec, step: int) -> str:
    spec = resolved_spec(attempt)
    steps = attempt.plan.total_steps or spec.optimization.max_steps
    made = f"{steps} steps of" if step in {0, steps} else f"the weights after step {step} of {steps}, each of"
    lines = [
        f"* Job `{attempt.job_name}`, uid `{attempt.job_uid}`, attempt {attempt.epoch}",
        f"* {made} {spec.optimization.global_batch_size} "
        f"samples on {attempt.world_size} worker{'s' * (attempt.world_size != 1)}, "
        f"ZeRO stage {spec.parallelism.zero_stage}, "
        f"seed {spec.optimization.seed}",
        "* " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        *_data_lines("training data", spec.train_data, attempt.locations),
        *_data_lines("evaluation data", spec.eval_data, attempt.locations),
    ]
    text = json.dumps(json_format.MessageToDict(spec, preserving_proto_field_name=True), indent=2, sort_keys=True)
    return "\n".join(lines) + f"\n\nThe spec, every default filled in:\n\n```json\n{text}\n```"


def _data_lines(what: str, source: spec_pb2.DataSource, locations: worker_pb2.Locations) -> list[str]:
    if source.WhichOneof("source") is None:
        return []
    try:
        files = resolve_source(source, locations)
    except SpecError as error:
        return [f"* {what}: gone since ({error.reason})"]
    return [f"* {what}: {_data_line(file)}" for file in files]


def _data_line(file: DataFile) -> str:
    digest = file_sha256(file.path, file.name, open_regular)
    return f"`{_plain(file.name)}`, {file.path.stat().st_size} bytes, sha256 `{digest}`"


def _plain(text: str) -> str:
    """A name inside backquotes: none of its characters ends them or the line."""
    return "".join(character if character.isprintable() and character != "`" else " " for character in text)[:200]
