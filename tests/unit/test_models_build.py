"""Models from folders, from the Hub and from models trained here: what is taken over, started afresh, or refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from helpers import small_specs, tiny_folders
from helpers.loopback_hub import COMMIT, LoopbackHub, loopback_hub
from helpers.small_specs import classification_spec, locations, masked_spec, write_corpus, write_labelled
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.models.hub import resolve_hub
from shardyard_trainer.tasks.base import Prepared, build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.module import HuggingFaceModule

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "max_position_embeddings",
)


def built(tmp_path: Path, spec: spec_pb2.JobSpec) -> tuple[Prepared, HuggingFaceModule]:
    task = prepare(spec, locations(tmp_path))
    return task, build_module(task, spec)


def refused(tmp_path: Path, spec: spec_pb2.JobSpec) -> SpecError:
    with pytest.raises(SpecError) as caught:
        built(tmp_path, spec)
    return caught.value


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A pretrained BERT without a head."""
    folder = tmp_path / "bert"
    torch.manual_seed(5)
    transformers.BertModel(tiny_folders.bert_config()).save_pretrained(folder)
    tiny_folders.bert_tokenizer().save_pretrained(folder)
    return folder


def saved(tmp_path: Path, spec: spec_pb2.JobSpec, name: str) -> Path:
    """A folder as an export makes it, of a module as it was built."""
    task, module = built(tmp_path, spec)
    folder = tmp_path / name
    module.model.save_pretrained(folder)
    task.inputs.tokenizer.save_pretrained(folder)
    if module.own_head is not None:
        save_file(module.own_head.state_dict(), folder / "head.safetensors")
    (folder / "shardyard.json").write_text(json.dumps({"format": 1, **task.describe()}))
    return folder


def by_uri(folder: Path) -> dict[str, Any]:
    return {"uri": str(folder)}


def backbone_of(module: HuggingFaceModule) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in module.backbone.state_dict().items() if "pooler" not in name}


@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_CLS"])
def test_a_pretrained_backbone_gets_a_new_head_and_it_is_said(tmp_path: Path, bert: Path, pooling: str) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert), classify={"pooling": pooling})
    task, module = built(tmp_path, spec)
    weights = load_file(bert / "model.safetensors")
    assert [warning.reason for warning in task.warnings] == ["NEW_HEAD"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in backbone_of(module).items())
    assert (module.own_head is None) == (pooling == "POOLING_CLS")
    assert (type(module.model).__name__ == "BertForSequenceClassification") == (pooling == "POOLING_CLS")


def test_new_heads_are_drawn_from_the_seed(tmp_path: Path, bert: Path) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert))
    heads = []
    for seed in (1, 1, 2):
        spec.optimization.seed = seed
        _, module = built(tmp_path, spec)
        assert module.own_head is not None
        heads.append(module.own_head.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])


@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_CLS"])
def test_a_model_trained_here_keeps_its_own_head_and_pooling(tmp_path: Path, bert: Path, pooling: str) -> None:
    data = write_labelled(tmp_path / "a.csv")
    first = classification_spec(data, by_uri(bert), classify={"pooling": pooling})
    folder = saved(tmp_path, first, "trained")
    _, before = built(tmp_path, first)
    task, after = built(tmp_path, classification_spec(data, by_uri(folder)))
    assert not task.warnings
    inputs = task.train.micro_batch([SampleRef(0, 0), SampleRef(0, 1)]).inputs
    found = after.eval()(**inputs, return_outputs=True).outputs["logits"]
    torch.testing.assert_close(found, before.eval()(**inputs, return_outputs=True).outputs["logits"])


@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_CLS"])
def test_a_head_with_other_labels_is_refused_unless_a_new_one_is_asked_for(
    tmp_path: Path, bert: Path, pooling: str
) -> None:
    first = classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert), classify={"pooling": pooling})
    folder = saved(tmp_path, first, "trained")
    rows = [(s, "xyz"[i % 3]) for i, s in enumerate(small_specs.sentences(30))]
    other = classification_spec(write_labelled(tmp_path / "b.csv", rows), by_uri(folder))
    error = refused(tmp_path, other)
    assert (error.reason, error.field) == ("LABEL_MISMATCH", "spec.fine_tuning.text_classification.new_head")
    assert "bad, good" in error.message and "x, y, z" in error.message
    other.fine_tuning.text_classification.new_head = True
    task, module = built(tmp_path, other)
    logits = module(**task.train.micro_batch([SampleRef(0, 0)]).inputs, return_outputs=True).outputs["logits"]
    assert logits.shape == (1, 3)
    assert [warning.reason for warning in task.warnings] == ["NEW_HEAD"]


def test_a_new_head_of_the_same_shape_is_new(tmp_path: Path, bert: Path) -> None:
    data = write_labelled(tmp_path / "a.csv")
    first = classification_spec(data, by_uri(bert), classify={"pooling": "POOLING_CLS"})
    folder = saved(tmp_path, first, "trained")
    old = load_file(folder / "model.safetensors")["classifier.weight"]
    again = classification_spec(
        data, by_uri(folder), classify={"newHead": True}, optimization={"maxSteps": "1", "seed": "8"}
    )
    _, module = built(tmp_path, again)
    assert not torch.equal(module.model.classifier.weight, old)
    assert all(
        torch.equal(t, load_file(folder / "model.safetensors")[f"bert.{n}"]) for n, t in backbone_of(module).items()
    )


@pytest.mark.parametrize("kind", ["ModernBert", "MPNet"])
@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["bad", "good"]])
def test_a_head_that_only_its_own_class_can_use_is_put_aside(tmp_path: Path, kind: str, names: list[str]) -> None:
    sizes = {name: getattr(tiny_folders.bert_config(), name) for name in _SIZES}
    config = getattr(transformers, f"{kind}Config")(**sizes, pad_token_id=0, id2label=dict(enumerate(names)))
    folder = tmp_path / "model"
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(folder)
    tiny_folders.bert_tokenizer().save_pretrained(folder)
    task, module = built(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(folder)))
    assert [(warning.reason, warning.message) for warning in task.warnings] == [
        ("NEW_HEAD", "the model's head is put aside: a new one is started")
    ]
    weights = load_file(folder / "model.safetensors").values()
    assert all(any(torch.equal(tensor, known) for known in weights) for tensor in backbone_of(module).values())
    batch = task.train.micro_batch([SampleRef(0, 0)])
    assert module(**batch.inputs, return_outputs=True).outputs["logits"].shape == (1, 2)


def test_masked_pretraining_is_continued_and_fine_tuned(tmp_path: Path, bert: Path) -> None:
    spec = masked_spec(write_corpus(tmp_path), model=by_uri(bert), tokenizer={}, pretraining={"maskedLm": {}})
    task, module = built(tmp_path, spec)
    assert task.length == 32  # the model's longest
    assert [warning.reason for warning in task.warnings] == ["NEW_HEAD"]
    embeddings = module.model.get_input_embeddings().weight
    assert module.model.get_output_embeddings().weight is embeddings
    folder = saved(tmp_path, spec, "pretrained")
    task, _ = built(tmp_path, masked_spec(write_corpus(tmp_path), model=by_uri(folder), tokenizer={}))
    assert not task.warnings
    task, tuned = built(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(folder)))
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[f"bert.{name}"]) for name, tensor in backbone_of(tuned).items())


def test_a_causal_model_is_continued_and_fine_tuned_with_end_for_padding(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    config = transformers.GPT2Config(
        vocab_size=257, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tiny_folders.gpt2_tokenizer().save_pretrained(folder)
    task, module = built(tmp_path, small_specs.causal_spec(write_corpus(tmp_path), model=by_uri(folder), tokenizer={}))
    assert [warning.reason for warning in task.warnings] == ["PAD_TOKEN"]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, weights[f"transformer.{name}"]) for name, tensor in backbone_of(module).items())
    assert module.model.config.activation_function == "gelu_new"
    assert type(module.model.transformer.h[0].mlp.act).__name__ == "GELUTanh"
    task, tuned = built(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(folder)))
    assert task.describe()["pooling"] == "last"
    assert type(tuned.model).__name__ == "GPT2ForSequenceClassification"
    assert all(torch.equal(tensor, weights[f"transformer.{name}"]) for name, tensor in backbone_of(tuned).items())


def test_the_faster_gelu_is_the_same_function() -> None:
    x = torch.linspace(-6, 6, 1001)
    slow, fast = transformers.activations.ACT2FN["gelu_new"], transformers.activations.ACT2FN["gelu_pytorch_tanh"]
    torch.testing.assert_close(fast(x), slow(x), rtol=1e-6, atol=1e-6)


def test_dropout_is_set_everywhere(tmp_path: Path) -> None:
    model = small_specs.architecture("bert") | {"dropout": 0.3}
    _, module = built(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), model, tokenizer={"train": {}}))
    found = {m.p for m in module.modules() if isinstance(m, torch.nn.Dropout)}
    assert found == {0.3}
    assert module.model.config.attention_probs_dropout_prob == 0.3


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"never": "opened"}))


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.dense.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../other.safetensors"}}))


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (_pickled, "MODEL_UNSAFE", "pytorch_model.bin is a pickle"),
        (lambda folder: (folder / "config.json").unlink(), "MODEL_INVALID", "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "MODEL_INVALID", "no weights"),
        (lambda folder: _config(folder, auto_map={"AutoModel": "evil.Model"}), "CUSTOM_CODE_REFUSED", "auto_map"),
        (lambda folder: _config(folder, model_type="nope"), "MODEL_INVALID", "nope"),
        (lambda folder: _config(folder, hidden_size=20), "MODEL_INVALID", ""),
        (lambda folder: (folder / "tokenizer.json").unlink(), "TOKENIZER_MISSING", "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "MODEL_INVALID", "tokenizer"),
        (_poison, "MODEL_INVALID", "encoder.layer.0.output.dense.weight"),
        (_drop, "MODEL_INVALID", "encoder.layer.1.output.dense.weight"),
        (_cut, "MODEL_INVALID", ""),
        (_index, "MODEL_INVALID", "other.safetensors"),
    ],
)
def test_a_folder_that_is_not_a_model_is_refused(
    tmp_path: Path, bert: Path, spoil: Any, reason: str, message: str
) -> None:
    spoil(bert)
    error = refused(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert)))
    assert (error.reason, message in error.message) == (reason, True), error.message


def test_a_folder_with_a_link_out_of_the_roots_is_refused(tmp_path: Path, bert: Path) -> None:
    (bert / "notes.txt").symlink_to("/etc/hostname")
    error = refused(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert)))
    assert (error.reason, error.field) == ("PATH_NOT_ALLOWED", "spec.model.uri")


def test_a_text_longer_than_the_model_can_address_is_refused(tmp_path: Path, bert: Path) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert))
    spec.fine_tuning.text_classification.max_length = 33
    error = refused(tmp_path, spec)
    assert (error.field, error.reason) == ("spec.fine_tuning.text_classification.max_length", "SPEC_INVALID")
    assert "32" in error.message


def test_a_tokenizer_is_not_trained_for_a_pretrained_model(tmp_path: Path, bert: Path) -> None:
    spec = masked_spec(write_corpus(tmp_path), model=by_uri(bert))
    assert refused(tmp_path, spec).field == "spec.tokenizer.train"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "other"
    tiny_folders.gpt2_tokenizer().save_pretrained(folder)
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), by_uri(bert), tokenizer={"uri": str(folder)})
    assert "token id 256 ('<|endoftext|>'), but the model has 25 embeddings" in refused(tmp_path, spec).message


@pytest.fixture
def hub(bert: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with loopback_hub(bert) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub


def test_a_hub_model_is_pinned_to_its_commit_and_then_needs_no_hub(tmp_path: Path, hub: LoopbackHub) -> None:
    found = resolve_hub(spec_pb2.HubModel(id="me/bert"), tmp_path / "cache")
    assert found.commit == COMMIT
    asked = hub.requests
    assert resolve_hub(spec_pb2.HubModel(id="me/bert", revision=COMMIT), tmp_path / "cache") == found
    assert hub.requests == asked
    spec = classification_spec(write_labelled(tmp_path / "a.csv"), {"hub": {"id": "me/bert", "revision": COMMIT}})
    task, _ = built(tmp_path, spec)
    assert task.choice.pinned == spec_pb2.HubModel(id="me/bert", revision=COMMIT) and hub.requests == asked


MISSING = [
    ("me/nothing", "", "MODEL_NOT_FOUND", "spec.model.hub.id"),
    ("me/bert", "v9", "REVISION_NOT_FOUND", "spec.model.hub.revision"),
    ("a/b/c", "", "SPEC_INVALID", "spec.model.hub.id"),
    ("../x", "", "SPEC_INVALID", "spec.model.hub.id"),
]


def test_a_download_that_was_cut_off_is_made_again(tmp_path: Path, hub: LoopbackHub) -> None:
    found = resolve_hub(spec_pb2.HubModel(id="me/bert"), tmp_path / "cache")
    (found.folder.path / "model.safetensors").unlink()
    (tmp_path / "cache/hub/complete" / COMMIT).unlink()
    again = resolve_hub(spec_pb2.HubModel(id="me/bert", revision=COMMIT), tmp_path / "cache")
    assert again.folder.has("model.safetensors")


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("case", MISSING, ids=[f"{row[0]}@{row[1]}" for row in MISSING])
def test_a_hub_model_that_is_not_there_is_refused(tmp_path: Path, case: tuple[str, str, str, str]) -> None:
    model_id, revision, reason, field = case
    with pytest.raises(SpecError) as caught:
        resolve_hub(spec_pb2.HubModel(id=model_id, revision=revision), tmp_path / "cache")
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_hub_model_of_pickles_is_refused(tmp_path: Path, hub: LoopbackHub, bert: Path) -> None:
    _pickled(bert)
    with pytest.raises(SpecError) as caught:
        resolve_hub(spec_pb2.HubModel(id="me/bert"), tmp_path / "cache")
    assert caught.value.reason == "MODEL_UNSAFE"


@pytest.mark.usefixtures("hub")
def test_a_cache_that_cannot_be_written_is_not_the_hubs_fault(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        resolve_hub(spec_pb2.HubModel(id="me/bert"), tmp_path / "cache")


def test_a_hub_that_does_not_answer_is_unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SpecError) as caught:
        resolve_hub(spec_pb2.HubModel(id="me/bert"), tmp_path / "cache")
    assert caught.value.reason == "HUB_UNREACHABLE"
