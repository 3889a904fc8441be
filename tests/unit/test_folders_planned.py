"""Model folders as people have them, each uploaded, planned and trained on for a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from helpers import small_specs, tiny_folders
from helpers.tiny_pieces import write_pieces
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 300,
    "max_position_embeddings": 64,
}  # fmt: skip


def saved(folder: Path, model_type: str, **changes: Any) -> Path:
    """A backbone of that type with random weights and no tokenizer."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**{**SIZES, **changes})
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


def vocab_txt(folder: Path, special: list[str]) -> None:
    (folder / "vocab.txt").write_text("\n".join([*special, *tiny_folders.WORDS, "##s"]) + "\n")


def byte_pairs(folder: Path, special: list[str]) -> None:
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def tokenizer_json(folder: Path, **config: Any) -> None:
    tiny_folders.gpt2_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def shards(folder: Path) -> None:
    """Two files and an index, as large models are saved."""
    model = transformers.AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").is_file()
    vocab_txt(folder, BERT)


def words(*special: str) -> Callable[[Path], object]:
    return lambda folder: vocab_txt(folder, list(special))


def pairs(*special: str) -> Callable[[Path], object]:
    return lambda folder: byte_pairs(folder, list(special))


def called(name: str) -> Callable[[Path], object]:
    return lambda folder: tokenizer_json(folder, tokenizer_class=name)


def pieces(file: str, *first: str) -> Callable[[Path], object]:
    return lambda folder: write_pieces(folder / file, first=list(first), pairs=file == "tokenizer.model")


LLAMA, LONGER = {"num_key_value_heads": 2}, {"max_position_embeddings": 66}
ALBERT, FAIRSEQ = ["<pad>", "<unk>", *BERT[2:]], "sentencepiece.bpe.model"
FOLDERS: dict[str, tuple[str, dict[str, Any], Callable[[Path], object]]] = {
    "BERT with vocab.txt alone": ("bert", {}, words(*BERT)),
    "DistilBERT": ("distilbert", {"dim": 16, "n_layers": 1, "n_heads": 2}, words(*BERT)),
    "ELECTRA": ("electra", {"embedding_size": 16}, words(*BERT)),
    "MPNet": ("mpnet", {}, words(*ROBERTA[:4], "[UNK]", "<mask>")),
    "BERT in shards": ("bert", {}, shards),
    "RoBERTa with vocab.json": ("roberta", LONGER, pairs(*ROBERTA)),
    "DeBERTa with vocab.json": ("deberta", {}, pairs(*BERT)),
    "GPT-2 with vocab.json": ("gpt2", {"bos_token_id": 0, "eos_token_id": 0}, pairs("<|endoftext|>")),
    "GPT-NeoX": ("gpt_neox", {}, called("GPTNeoXTokenizerFast")),
    "bytes under a Llama's class": ("llama", LLAMA, called("LlamaTokenizerFast")),
    "Llama with tokenizer.model": ("llama", LLAMA, pieces("tokenizer.model")),
    "Mistral with tokenizer.model": ("mistral", LLAMA, pieces("tokenizer.model")),
    "XLM-R with its pieces": ("xlm-roberta", LONGER, pieces(FAIRSEQ)),
    "CamemBERT with its pieces": ("camembert", LONGER, pieces(FAIRSEQ)),
    "ALBERT with its pieces": ("albert", {"embedding_size": 16}, pieces("spiece.model", *ALBERT)),
    "DeBERTa-v2 with its pieces": ("deberta-v2", {}, pieces("spm.model", "[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_ready_planned_and_trained_on(tmp_path: Path, name: str) -> None:
    model_type, changes, add = FOLDERS[name]
    folder = saved(tmp_path / "model", model_type, **changes)
    add(folder)
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    result = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))
    assert not result.violations
    spec = small_specs.classification_spec(small_specs.write_labelled(tmp_path / "a.csv"), {"uri": str(folder)})
    call = worker_pb2.PlanRequest(
        spec=spec,
        locations=small_specs.locations(tmp_path),
        node_shape=worker_pb2.NodeShape(cpus=2, memory_bytes=8 * 1024**3),
    )
    planned = worker_pb2.PlanResult.FromString(plan(call.SerializeToString()))
    assert not planned.violations
    stepped(tmp_path, spec)


def stepped(tmp_path: Path, spec: Any) -> None:
    locations = small_specs.locations(tmp_path)
    task = prepare(spec, locations)
    module = build_module(task, spec)
    output = module(**task.train.micro_batch([SampleRef(0, index) for index in range(2)]).inputs)
    output.loss_sum.backward()
    assert output.loss_sum.isfinite()


@pytest.mark.parametrize("last", [300, 70_000])
@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_a_fresh_model_has_an_embedding_for_the_highest_id(tmp_path: Path, model_type: str, last: int) -> None:
    names = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "the": 3, "fox": 7, "<|endoftext|>": last}
    backend = Tokenizer(models.WordLevel(names, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(name, special=True) for name in names if name.startswith(("[", "<"))])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "tokenizer")
    make = small_specs.causal_spec if model_type == "gpt2" else small_specs.masked_spec
    spec = make(small_specs.write_corpus(tmp_path), model_type, tokenizer={"uri": str(tmp_path / "tokenizer")})
    stepped(tmp_path, spec)
    task = prepare(spec, small_specs.locations(tmp_path))
    assert task.choice.config.vocab_size == last + 1
    if model_type == "bert":
        assert set(task.train._ordinary) == {3, 7}  # a word of the vocabulary stands in for a masked one
