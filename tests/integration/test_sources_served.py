"""Models of every source, as jobs on two workers: asked, exported, and equal to what their source computes.

The rate is so small that a job leaves the weights as they are after steps with every gradient: what the export computes
then has to be what the source computes, within 1e-5. What jobs learn is shown elsewhere, with models of some of these
sources. A LoRA adapter of peft is in `test_model_folders.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import shardyard
from helpers.ggufs import write_llama
from helpers.plain_bert import hidden_states
from helpers.served import Served, served
from helpers.small_pictures import write_folders
from helpers.small_specs import shared_data
from helpers.tf_checkpoints import GARDEN, found
from helpers.tiny_folders import WORDS, bert_tokenizer, save_folder
from helpers.torch_hub_repos import (
    BERT_HUBCONF,
    RESNET,
    RESNET_HUBCONF,
    TRANSFORMER_HUBCONF,
    write_repository,
)
from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.models.tensor_bundle import open_bundle
from shardyard_trainer.models.weights import load_pretrained

JOB_S = 300.0
IDS = torch.tensor([[2, 8, 9, 11, 3], [2, 12, 7, 5, 3]])
GARDEN_WORDS = (GARDEN / "bert_v2/vocab.txt").read_text().splitlines()


@dataclass(frozen=True)
class Place:
    """A folder under a data root with sources and data, and the service."""

    root: Path
    service: Served


@dataclass(frozen=True)
class Source:
    """A model from elsewhere as a job has it: its task, the model by the data root, and the data in it.

    `asks` says whether the trained model answers as it should. `compare` gives what its exported folder computes, and
    what the source does, from that folder and the data root.
    """

    task: Any
    model: Callable[[Path], Any]
    data: str
    asks: Callable[[shardyard.Model, Path], bool]
    compare: Callable[[Path, Path], tuple[torch.Tensor, torch.Tensor]]
    tokenizer: str | None = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("sources")
    root = folder / "root"
    root.mkdir()
    write_data(root)
    repositories = [write_hub(root / name, name) for name in ("hub_bert", "hub_resnet", "hub_transformer")]
    for name in ("bert_v1", "bert_v2", "resnet_50", "transformer"):
        shutil.copytree(GARDEN / name, root / name)
    save_words(root / "garden_words", GARDEN_WORDS)
    save_words(root / "numbers", ["<pad>", "</s>", "[UNK]", *(f"n{number}" for number in range(3, 40))], end="</s>")
    write_llama(root / "gguf/tiny.gguf", quantised=True)
    write_sentences(root / "sentences")
    options = ["--data-root", str(root), *(f"--torch-hub-repo={each}" for each in repositories)]
    with served(folder / "service", "local", *options) as service:
        yield Place(root, service)


def write_data(root: Path) -> None:
    """Labelled texts, plain ones, pairs and pictures."""
    rows = [f"the film is {'good' if at % 2 else 'bad'} and {WORDS[at % 9]},{at % 2}" for at in range(24)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    (root / "book.txt").write_text("\n".join(f"the dog {WORDS[at % 9]} a cat {WORDS[at % 7]}" for at in range(90)))
    pairs = [{"anchor": f"the {word}", "positive": f"a {word} dog"} for word in WORDS]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name, words in (("translated", WORDS), ("numbered", [f"n{number}" for number in range(3, 23)])):
        several = [{"source": f"{words[at]} {words[-at]}", "target": words[at]} for at in range(1, 20)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    write_folders(root / "pictures", 4)


def write_hub(folder: Path, name: str) -> Path:
    """A repository whose function draws the same weights each time."""
    code = {"hub_bert": BERT_HUBCONF, "hub_resnet": RESNET_HUBCONF, "hub_transformer": TRANSFORMER_HUBCONF}[name]
    seeded = re.sub(r"\n    return ", "\n    import torch\n    torch.manual_seed(7)\n    return ", code)
    write_repository(folder, hubconf=seeded, **({"resnet": RESNET} if name == "hub_resnet" else {}))
    if name != "hub_resnet":
        bert_tokenizer().save_pretrained(folder)
    return folder


def save_words(folder: Path, words: list[str], *, end: str = "") -> None:
    """A tokenizer of whole words: BERT's, or with an end token alone."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, words.index(word)) for word in ([end] if end else ["[CLS]", "[SEP]"])]
    single = f"$A {end}" if end else "[CLS] $A [SEP]"
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    names = {"eos_token": end} if end else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    given = {"tokenizer_object": made, "pad_token": words[0], "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(**given, **names).save_pretrained(folder)


def write_sentences(folder: Path) -> None:
    """A folder of sentence-transformers: the first token's vector, scaled."""
    save_folder(folder, "BertModel")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling/config.json").write_text(json.dumps(flags))


def gives_a_label(model: shardyard.Model, _root: Path) -> bool:
    return model.predict(["the film is good"])[0].label in {"0", "1"}


def names_a_picture(model: shardyard.Model, root: Path) -> bool:
    return set(model.predict([root / "pictures/rose/000.jpg"])[0].scores) == {"daisy", "rose", "violet"}


def writes_a_text(model: shardyard.Model, _root: Path) -> bool:
    return isinstance(model.predict(["n3 n4" if model.id == "transformer" else "the dog"])[0].text, str)


def gives_its_vector(model: shardyard.Model, root: Path) -> bool:
    found = torch.tensor(model.embed(["the dog"])[0].values)
    return bool(torch.allclose(found, vector(root / "sentences"), atol=1e-5))


def vector(folder: Path) -> torch.Tensor:
    """The first token's vector of a text, with length 1, by transformers alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    states = transformers.AutoModel.from_pretrained(folder).eval()(**tokenizer("the dog", return_tensors="pt"))
    first = states.last_hidden_state[0, 0]
    return first / first.norm()


def of_garden(name: str) -> Callable[[Path, Path], tuple[torch.Tensor, torch.Tensor]]:
    """The vectors of real tokens by an exported BERT, and those that TensorFlow computed."""

    def compare(folder: Path, _root: Path) -> tuple[torch.Tensor, torch.Tensor]:
        expected = np.load(GARDEN / name / "expected.npz")
        names = {"input_ids": "word_ids", "attention_mask": "mask", "token_type_ids": "type_ids"}
        given = {ours: torch.tensor(expected[f"input_{theirs}"]).long() for ours, theirs in names.items()}
        states = transformers.AutoModel.from_pretrained(folder).eval()(**given).last_hidden_state
        real = given["attention_mask"].bool()
        return states[real], torch.tensor(expected["sequence"])[real]

    return compare


def of_tensorflow_1(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    bundle = open_bundle(open_folder(root / "tf1", also=re.compile(r".*")), "bert_model.ckpt")
    tensors = {
        name: bundle.read(name)
        for name, entry in bundle.entries.items()
        if name.startswith("bert/") and entry.is_float and "adam" not in name
    }
    ids = np.array([[2, 5, 6, 7, 8, 9, 3], [2, 10, 11, 12, 13, 14, 3]])
    expected = hidden_states(tensors, ids, heads=4)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model(input_ids=torch.tensor(ids)).last_hidden_state, torch.tensor(expected).float()


def of_garden_resnet(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps leave the statistics of batch normalisation changed: the source's are put back."""
    expected = np.load(GARDEN / "resnet_50/expected.npz")
    source = found(root / "resnet_50", root, cache=root.parent / "cache").folder
    before, after = (
        load_pretrained(transformers.AutoModel, each, model_config(each))[0].eval()
        for each in (source, open_folder(folder))
    )
    after.load_state_dict(dict(before.named_buffers()), strict=False)
    states = after(torch.tensor(expected["pictures"]).permute(0, 3, 1, 2)).last_hidden_state
    return states.permute(0, 2, 3, 1), torch.tensor(expected["hidden"])


def of_garden_transformer(folder: Path, _root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    expected = np.load(GARDEN / "transformer/expected.npz")
    exported = open_folder(folder)
    model = load_pretrained(transformers.AutoModelForSeq2SeqLM, exported, model_config(exported))[0].eval()
    sources_BT, targets_BT = (torch.tensor(expected[name]).long() for name in ("inputs", "targets"))
    read_BT = torch.cat([torch.zeros_like(targets_BT[:, :1]), targets_BT[:, :-1]], 1)
    outputs = model(input_ids=sources_BT, attention_mask=(sources_BT != 0).long(), decoder_input_ids=read_BT)
    return outputs.logits, torch.tensor(expected["logits"])


def of_hub_bert(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.hub.load(str(root / "hub_bert"), "bert", source="local").eval()
    exported = transformers.AutoModel.from_pretrained(folder).eval()
    return exported(input_ids=IDS).last_hidden_state, source.bert(input_ids=IDS).last_hidden_state


def of_hub_transformer(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.hub.load(str(root / "hub_transformer"), "transformer", source="local").eval()
    exported = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    return exported(**given).logits, source(**given).logits


def of_hub_resnet(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights but those of the last layer, which is a new one, and the outputs with the source's statistics."""
    source = torch.hub.load(str(root / "hub_resnet"), "resnet18", source="local", width=4, num_classes=10).eval()
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensors[name] for name, _ in source.named_parameters() if not name.startswith("fc.")}
    pictures = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    before = source(pictures)
    torch.nn.init.zeros_(source.conv1.weight)
    source.load_state_dict(own, strict=False)
    return source(pictures), before


def of_gguf(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Beside what transformers itself reads of the file."""
    kind, ids = transformers.AutoModelForCausalLM, IDS + 3
    source = kind.from_pretrained(root / "gguf", gguf_file="tiny.gguf", dtype=torch.float32).eval()
    return kind.from_pretrained(folder).eval()(input_ids=ids).logits, source(input_ids=ids).logits


def of_sentences(folder: Path, root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return vector(folder), vector(root / "sentences")


def checkpoint(name: str) -> Callable[[Path], Any]:
    return lambda root: shardyard.TensorflowCheckpoint(str(root / name))


def hub(name: str, entrypoint: str, **arguments: Any) -> Callable[[Path], Any]:
    return lambda root: shardyard.TorchHub(root / name, entrypoint, arguments)


CLASSES = shardyard.TextClassification(max_length=16)
WRITES = shardyard.Translation(max_source_length=12, max_target_length=8)
SOURCES: dict[str, Source] = {
    "garden_bert_v1": Source(
        CLASSES, checkpoint("bert_v1"), "reviews.csv", gives_a_label, of_garden("bert_v1"), tokenizer="garden_words"
    ),
    "garden_bert_v2": Source(CLASSES, checkpoint("bert_v2"), "reviews.csv", gives_a_label, of_garden("bert_v2")),
    "garden_resnet": Source(
        shardyard.ImageClassification(), checkpoint("resnet_50"), "pictures", names_a_picture, of_garden_resnet
    ),
    "transformer": Source(
        WRITES, checkpoint("transformer"), "numbered.jsonl", writes_a_text, of_garden_transformer, tokenizer="numbers"
    ),
    "tensorflow_1_bert": Source(CLASSES, checkpoint("tf1"), "reviews.csv", gives_a_label, of_tensorflow_1),
    "hub_bert": Source(CLASSES, hub("hub_bert", "bert"), "reviews.csv", gives_a_label, of_hub_bert),
    "hub_resnet": Source(
        shardyard.ImageClassification(image_size=32), hub("hub_resnet", "resnet18", width=4, num_classes=10),
        "pictures", names_a_picture, of_hub_resnet,
    ),
    "hub_transformer": Source(
        WRITES, hub("hub_transformer", "transformer"), "translated.jsonl", writes_a_text, of_hub_transformer
    ),
    "gguf": Source(
        shardyard.CausalLm(sequence_length=16), lambda root: f"server:{root / 'gguf'}", "book.txt", writes_a_text,
        of_gguf,
    ),
    "sentence_transformers": Source(
        shardyard.SentenceEmbedding(), lambda root: f"server:{root / 'sentences'}", "pairs.jsonl", gives_its_vector,
        of_sentences,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_is_trained_by_two_workers_answers_and_leaves_as_its_source_computes(
    name: str, place: Place, tmp_path: Path
) -> None:
    source, root = SOURCES[name], place.root
    if name == "tensorflow_1_bert":
        shutil.copytree(shared_data("tf1_bert_tiny"), root / "tf1")
    spec = shardyard.JobSpec(
        source.task,
        model=source.model(root),
        tokenizer=f"server:{root / source.tokenizer}" if source.tokenizer else None,
        train_data=f"server:{root / source.data}",
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=6, learning_rate=1e-30),
        parallelism=shardyard.Parallelism(zero_stage=2),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(place.service.address) as client:
        job = client.submit(spec, job_id=name.replace("_", "-"))
        assert job.wait(timeout=JOB_S).state == "succeeded", job.info.failure
        norms = [point.value for point in job.metrics("grad_norm")["grad_norm"].points]
        assert norms and min(norms) > 0
        model = job.model()
        assert source.asks(model, root)
        folder = model.download(tmp_path / "exported")
    with torch.no_grad():
        ours, theirs = source.compare(folder, root)
    largest = theirs.abs().max()
    assert largest > 1e-3
    # Of the largest value, or of 1.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(largest)))
