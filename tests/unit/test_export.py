"""The exported folder: loads in plain transformers, gives the live model's logits, and is whole or absent."""

from __future__ import annotations

import hashlib
import json
import re
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from helpers.tiny_folders import bert_config, bert_tokenizer, gpt2_config, gpt2_tokenizer
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.inputs.tokenization import encode, ensure_pad, prepare
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks import table
from shardyard_trainer.tasks.causal_lm import CausalLmModule as CausalLm
from shardyard_trainer.tasks.heads import TextClassifier
from shardyard_trainer.tasks.masked_lm import MaskedLmModule as MaskedLm
from shardyard_trainer.tasks.module import HuggingFaceModule
from shardyard_trainer.training.export import dry_run, export_model

SINGLE = spec_pb2.TextClassification.PROBLEM_SINGLE_LABEL
TEXTS = ["Hello, my dog is cute", "a film", "this cat is not good .", "very bad"]


@dataclass
class FakeSamples:
    """The four texts, as a classifier's batch."""

    tokenizer: Any
    num_samples: int = 4

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        ids = encode(self.tokenizer, [TEXTS[sample.sample] for sample in samples], None, 16).ids
        width = max(len(row) for row in ids)
        inputs = {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids]),
        }
        return MicroBatch(inputs, len(samples), int(inputs["attention_mask"].sum()), inputs["input_ids"].numel())


@dataclass
class FakeTask:
    """What the export asks of a task."""

    name: str
    choice: ModelChoice
    tokenizer: Any
    described: dict[str, Any]
    length: int = 16
    train: Any = field(init=False)

    def __post_init__(self) -> None:
        self.train = FakeSamples(self.tokenizer)
        self.inputs = TextInputs(self.tokenizer, self.length)
        self.task = table.named(self.name)

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name, "max_length": self.length, **self.described}


def trained(kind: str) -> tuple[HuggingFaceModule, FakeTask]:
    torch.manual_seed(1)
    is_bert = kind.startswith("bert")
    tokenizer = prepare(bert_tokenizer() if is_bert else gpt2_tokenizer())
    ensure_pad(tokenizer)
    names = {0: "bad", 1: "good", 2: "so so"}
    labels: dict[str, Any] = {"id2label": names, "label2id": {name: key for key, name in names.items()}}
    config = bert_config(**labels) if is_bert else gpt2_config(pad_token_id=256, **labels)
    classifies = {"labels": list(names.values()), "problem": "single_label"}
    module: HuggingFaceModule
    if kind in ("bert-lm", "gpt2-lm"):
        name = "masked_lm" if is_bert else "causal_lm"
        if is_bert:
            module = MaskedLm(transformers.BertForMaskedLM(config))
        else:
            module = CausalLm(transformers.GPT2LMHeadModel(config), plain_output_layer=True)
        return module.train(), FakeTask(name, ModelChoice(config, None), tokenizer, {})
    pooling = kind.rpartition("-")[2]
    options: dict[str, Any] = {"pooling": pooling, "problem": SINGLE, "dropout": 0.5, "label_smoothing": 0.0}
    if (is_bert, pooling) in ((True, "cls"), (False, "last")):
        auto = transformers.AutoModelForSequenceClassification
        module = TextClassifier(auto.from_config(config), None, **options)
    else:
        head = nn.Linear(16, 3)
        backbone = (
            transformers.BertModel(config, add_pooling_layer=False) if is_bert else transformers.GPT2Model(config)
        )
        module = TextClassifier(backbone, head, **options)
    described = {**classifies, "pooling": pooling}
    return module.train(), FakeTask("text_classification", ModelChoice(config, None), tokenizer, described)


def attempt(tmp_path: Path) -> worker_pb2.AttemptSpec:
    data = tmp_path / "train.txt"
    data.write_text("a dog\n")
    spec = spec_pb2.JobSpec(
        model=spec_pb2.ModelSource(architecture=spec_pb2.Architecture(model_type="bert")),
        train_data=spec_pb2.DataSource(uri=str(data)),
        optimization=spec_pb2.Optimization(max_steps=7, global_batch_size=4, seed=11),
    )
    return worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/demo", job_uid="ab" * 16, epoch=2, spec=spec, world_size=2,
        locations=worker_pb2.Locations(data_roots=[str(tmp_path)]),
    )  # fmt: skip


def exported(kind: str, tmp_path: Path) -> tuple[HuggingFaceModule, Path, worker_pb2.Exported]:
    module, task = trained(kind)
    folder = tmp_path / "models" / "uid"
    folder.parent.mkdir()
    result = export_model(module, module.state_dict(), task, attempt(tmp_path), {"loss": 0.5}, folder=folder)  # type: ignore[arg-type]
    return module, folder, result


def test_the_card_says_of_which_step_the_weights_are(tmp_path: Path) -> None:
    module, task = trained("bert-mean")
    told = attempt(tmp_path)
    for step, said in ((7, "7 steps of 4 samples"), (3, "the weights after step 3 of 7, each of 4 samples")):
        export_model(module, module.state_dict(), task, told, {}, folder=tmp_path / "m", step=step)  # type: ignore[arg-type]
        assert f"* {said} on 2 workers" in (tmp_path / "m" / "README.md").read_text()


CLASSIFIERS = ["bert-mean", "bert-cls", "bert-last", "gpt2-mean", "gpt2-cls", "gpt2-last"]


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "bert-lm", "gpt2-lm"])
def test_the_folder_is_described_and_nothing_else_is_left(kind: str, tmp_path: Path) -> None:
    _, folder, result = exported(kind, tmp_path)
    assert [path.name for path in folder.parent.iterdir()] == ["uid"]
    assert Path(result.path) == folder
    assert {file.path for file in result.model.files} == {path.name for path in folder.iterdir()}
    for file in result.model.files:
        assert file.sha256 == hashlib.sha256((folder / file.path).read_bytes()).hexdigest()
    assert result.model.metrics["loss"] == 0.5
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    assert tokenizer["padding"] is None
    assert tokenizer["truncation"] is None
    assert transformers.AutoTokenizer.from_pretrained(folder).model_max_length == 32


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "bert-lm", "gpt2-lm"])
def test_plain_transformers_loads_all_of_it(kind: str, tmp_path: Path) -> None:
    _, folder, _ = exported(kind, tmp_path)
    auto = {
        "bert-lm": transformers.AutoModelForMaskedLM,
        "gpt2-lm": transformers.AutoModelForCausalLM,
        "bert-cls": transformers.AutoModelForSequenceClassification,
        "gpt2-last": transformers.AutoModelForSequenceClassification,
    }.get(kind, transformers.AutoModel)
    _, info = auto.from_pretrained(folder, output_loading_info=True)
    unexpected = [name for name in info["missing_keys"] if "pooler" not in name]
    assert not unexpected
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_the_cards_code_gives_the_logits_of_predict_and_of_the_live_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, folder, _ = exported(kind, tmp_path)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    call = worker_pb2.PredictCall(
        folder=str(folder),
        request=model_service_pb2.PredictRequest(instances=[model_service_pb2.Instance(text=text) for text in TEXTS]),
    )
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    predicted = torch.tensor([list(prediction.logits) for prediction in reply.response.predictions])
    assert torch.allclose(predicted[:1], names["logits"], atol=1e-5)
    module.eval()
    batch = FakeSamples(names["tokenizer"]).micro_batch([SampleRef(0, index) for index in range(4)])
    outputs = module(**batch.inputs, return_outputs=True).outputs
    assert outputs is not None
    assert torch.allclose(predicted, outputs["logits"], atol=1e-5)
    assert reply.response.predictions[0].classification.scores[2].label == "so so"


@pytest.mark.parametrize("kind", ["bert-lm", "gpt2-lm"])
def test_a_language_models_card_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, folder, _ = exported(kind, tmp_path)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["logits"].shape[-1] == module.model.config.vocab_size


@pytest.mark.parametrize(
    ("model_type", "auto", "names"),
    [
        ("llama", transformers.AutoModelForCausalLM, {}),
        ("gpt_neox", transformers.AutoModelForCausalLM, {}),
        ("distilbert", transformers.AutoModelForMaskedLM, {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
        ("roberta", transformers.AutoModelForMaskedLM, {}),
    ],
)
def test_other_architectures_are_exported_whole(
    model_type: str, auto: Any, names: dict[str, int], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    common = {"vocab_size": 300, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(model_type, **common, **(names or sizes))
    model = auto.from_config(config)
    is_causal = auto is transformers.AutoModelForCausalLM
    module = CausalLm(model, plain_output_layer=True) if is_causal else MaskedLm(model)
    tokenizer = prepare(gpt2_tokenizer() if is_causal else bert_tokenizer())
    task = FakeTask("causal_lm" if is_causal else "masked_lm", ModelChoice(config, None), tokenizer, {})
    result = export_model(module, module.state_dict(), task, attempt(tmp_path), {}, folder=tmp_path / "m")  # type: ignore[arg-type]
    assert result.model.num_parameters == sum(parameter.numel() for parameter in module.parameters())
    _, info = auto.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_the_card_has_the_receipt(tmp_path: Path) -> None:
    _, folder, _ = exported("bert-mean", tmp_path)
    card = (folder / "README.md").read_text()
    assert hashlib.sha256(b"a dog\n").hexdigest() in card
    for part in (
        "seed 11",
        "projects/default/jobs/demo",
        f"torch {torch.__version__.partition('+')[0]}",
        '"max_steps"',
    ):
        assert part in card


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    module, _, result = exported("gpt2-lm", tmp_path)
    assert result.model.num_parameters == sum(parameter.numel() for parameter in module.parameters())


def test_ties_that_came_undone_on_the_way_are_written_once(tmp_path: Path) -> None:
    module, task = trained("gpt2-lm")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    result = export_model(module, state, task, attempt(tmp_path), {}, folder=tmp_path / "m")  # type: ignore[arg-type]
    assert result.model.num_parameters == sum(parameter.numel() for parameter in module.parameters())


def test_an_earlier_export_is_replaced_and_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    module, task = trained("bert-cls")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "stale").write_text("x")
    export_model(module, module.state_dict(), task, attempt(tmp_path), {}, folder=folder)  # type: ignore[arg-type]
    assert not (folder / "stale").exists()
    trial = tmp_path / "trial"
    dry_run(module, module.state_dict(), task, attempt(tmp_path), {}, folder=trial)  # type: ignore[arg-type]
    assert not trial.exists()
    assert module.training


def test_weights_that_are_not_the_live_models_are_refused(tmp_path: Path) -> None:
    module, task = trained("bert-mean")
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["own_head.bias"] += 1
    with pytest.raises(RunFailed, match="differ") as failed:
        export_model(module, state, task, attempt(tmp_path), {}, folder=tmp_path / "m")  # type: ignore[arg-type]
    assert failed.value.cause == "EXPORT_FAILED"
    assert not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".m*"))


@pytest.mark.parametrize(("name", "value"), [("own_head.bias", float("nan")), ("own_head.weight", 3e38)])
def test_a_model_that_computes_no_numbers_has_diverged(tmp_path: Path, name: str, value: float) -> None:
    module, task = trained("bert-mean")
    with torch.no_grad():
        module.get_parameter(name).fill_(value)
    state = module.state_dict()
    with pytest.raises(RunFailed, match="no longer") as failed:
        export_model(module, state, task, attempt(tmp_path), {}, folder=tmp_path / "m")  # type: ignore[arg-type]
    assert failed.value.cause == "LOSS_DIVERGED"
    assert not (tmp_path / "m").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    module, task = trained("bert-mean")
    (tmp_path / "models").write_text("a file where the folder should be")
    folder = tmp_path / "models" / "m"
    with pytest.raises(RunFailed, match="models") as failed:
        export_model(module, module.state_dict(), task, attempt(tmp_path), {}, folder=folder)  # type: ignore[arg-type]
    assert failed.value.cause == "EXPORT_FAILED"


def test_a_disk_that_fails_the_writer_of_weights_is_named_and_not_called_a_bad_export(tmp_path: Path) -> None:
    module, task = trained("bert-mean")
    (tmp_path / "models").mkdir()
    told = attempt(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(RunFailed, match="File too large") as failed:
            export_model(module, module.state_dict(), task, told, {}, folder=tmp_path / "models" / "m")  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed.value.cause == "STORAGE_FULL" and not list((tmp_path / "models").iterdir())
