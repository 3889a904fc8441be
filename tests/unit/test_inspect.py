"""Model folders of every bad kind are refused with reason and file, and a good one is described."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.inspect import inspect_model, probe_storage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path)
    vocabulary = {"[UNK]": 0, "[PAD]": 1, "a": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(tmp_path)
    return tmp_path


def inspected(folder: Path) -> worker_pb2.InspectModelResult:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))


def test_a_good_folder_is_described(folder: Path) -> None:
    result = inspected(folder)
    assert not result.violations
    assert (result.model.model_type, result.model.task, list(result.model.inputs)) == ("bert", "", [])
    assert result.model.num_parameters == sum(t.numel() for t in load_file(folder / "model.safetensors").values())


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_attentions": True}])
def test_what_a_folders_calls_would_return_is_of_no_matter(folder: Path, settings: dict[str, object]) -> None:
    _config(**settings)(folder)
    assert not inspected(folder).violations


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _ours(**values: object) -> Callable[[Path], object]:
    return lambda folder: (folder / "shardyard.json").write_text(json.dumps({"format": 1, **values}))


def _header(entries: dict[str, object], data: bytes = b"") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return write


def _entry(shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _weight(tensor: torch.Tensor) -> Callable[[Path], None]:
    """The folder with another tensor for a weight of 8 numbers."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, "embeddings.LayerNorm.weight": tensor}, folder / "model.safetensors")

    return change


def _frame_of_type(kind: int) -> Callable[[Path], None]:
    """A tokenizer that gives a text's tokens this type."""

    def change(folder: Path) -> None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A:{kind}", pair="$A:0 $B:1")
        tokenizer.save(str(folder / "tokenizer.json"))

    return change


def _without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "attention" not in name}, folder / "model.safetensors")


def _only_a_pickle(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {folder}/ran",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def _class_of_the_model(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    _config(tokenizer_class="Nope")(folder)


def _index_of_nothing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")


def _of_timm(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "config.json").write_text('{"architecture": "vit_tiny", "pretrained_cfg": {}}')


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133508397\n"

ROWS: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("no config", lambda f: (f / "config.json").unlink(), "MODEL_INVALID", "config.json"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), "MODEL_INVALID", "JSON object"),
    ("config is deep", lambda f: (f / "config.json").write_text("[" * 100_000), "MODEL_INVALID", "not JSON"),
    ("remote code", _config(auto_map={"AutoModel": "m.M"}), "CUSTOM_CODE_REFUSED", "never run"),
    ("unknown type", _config(model_type="brt"), "MODEL_INVALID", "nearest"),
    ("no type", _config(model_type=None), "MODEL_INVALID", "has no model_type; add the name of its architecture"),
    ("timm", _of_timm, "MODEL_INVALID", "config.json is one of timm (pretrained_cfg)"),
    ("indivisible heads", _config(num_attention_heads=3), "MODEL_INVALID", "multiple"),
    ("width of another type", _config(hidden_size="wide"), "MODEL_INVALID", "hidden_size"),
    ("no such activation", _config(hidden_act="nope"), "MODEL_INVALID", "transformers has no hidden_act 'nope'"),
    ("too many layers", _config(num_hidden_layers=10**6), "MODEL_INVALID", "layers"),
    ("too wide", _config(intermediate_size=10**9), "MODEL_INVALID", "intermediate_size is 1,000,000,000"),
    ("wider than its file", _config(intermediate_size=10**6), "MODEL_INVALID", "parameters"),
    ("too many labels", _config(num_labels=10**7), "MODEL_INVALID", "labels"),
    ("too many positions", _config(max_position_embeddings=2**31), "MODEL_INVALID", "max_position_embeddings"),
    ("other shape", _config(intermediate_size=24), "MODEL_INVALID", "shape"),
    ("a pickle", _only_a_pickle, "MODEL_UNSAFE", "pytorch_model.bin"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), "MODEL_INVALID", "no weights"),
    ("empty weights", lambda f: (f / "model.safetensors").write_bytes(b""), "MODEL_INVALID", "at least 8"),
    ("header", lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**63)), "MODEL_INVALID", "header"),
    ("overlap", _header({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, bytes(12)), "MODEL_INVALID", "overlaps"),
    ("hole", _header({"a": _entry([2], 0, 8), "b": _entry([2], 12, 20)}, bytes(20)), "MODEL_INVALID", "hole"),
    ("trailing bytes", _header({"a": _entry([2], 0, 8)}, bytes(9)), "MODEL_INVALID", "end at byte 8"),
    ("product overflows", _header({"a": _entry([2**62, 2**62], 0, 0)}), "MODEL_INVALID", "span 0"),
    ("negative shape", _header({"a": _entry([-1], 0, 0)}), "MODEL_INVALID", "no valid shape"),
    ("empty tensors", _header({str(i): _entry([0], 0, 0) for i in range(100_000)}), "MODEL_INVALID", "100000 tensors"),
    ("not a number", _nan, "MODEL_INVALID", "embeddings.LayerNorm.bias"),
    ("beyond 32 bits", _weight(torch.full((8,), 1e300, dtype=torch.float64)), "MODEL_INVALID", "too large for 32 bits"),
    ("whole numbers", _weight(torch.ones(8, dtype=torch.int8)), "MODEL_INVALID", "whole numbers (I8)"),
    ("truths", _weight(torch.ones(8, dtype=torch.bool)), "MODEL_INVALID", "whole numbers (BOOL)"),
    ("no width", _config(hidden_size=0), "MODEL_INVALID", "hidden_size: 0, which must be at least 1"),
    ("no heads", _config(num_attention_heads=0), "MODEL_INVALID", "num_attention_heads: 0, which must be at least 1"),
    ("layers below none", _config(num_hidden_layers=-1), "MODEL_INVALID", "num_hidden_layers: -1"),
    ("padding from outside", _config(pad_token_id=99), "MODEL_INVALID", "pad_token_id is 99"),
    ("a list for a text", _config(hidden_act=["gelu"]), "MODEL_INVALID", "hidden_act is ['gelu'], but must be str"),
    ("types of another model", _frame_of_type(9), "MODEL_INVALID", "the token type 9"),
    ("a tensor is missing", _without_a_layer, "MODEL_INVALID", "lack"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), "TOKENIZER_MISSING", "tokenizer.json"),
    ("tokenizer of another model", _config(vocab_size=2), "MODEL_INVALID", "vocab_size"),
    ("bad tokenizer", lambda f: (f / "tokenizer.json").write_text("{}"), "MODEL_INVALID", "tokenizer.json"),
    ("a link out", lambda f: (f / "x").symlink_to("/etc/passwd"), "MODEL_INVALID", "regular file"),
    ("a number without end", lambda f: (f / "config.json").write_text('{"a": ' + "9" * 5000 + "}"), "MODEL_INVALID",
     "thousands of digits"),
    ("generation settings", lambda f: (f / "generation_config.json").write_text('{"top_k": "all"}'), "MODEL_INVALID",
     "top_k: 'all', which is not a whole number"),
    ("lists for names", _ours(task=[]), "MODEL_INVALID", "shardyard.json has the task '[]'"),
    ("objects for names", _ours(task="causal_lm", problem={"a": 1}), "MODEL_INVALID", "shardyard.json has the problem"),
    ("names in lists", lambda f: (f / "tokenizer_config.json").write_text('{"model_input_names": [["input_ids"]]}'),
     "MODEL_INVALID", "which is not a list of attention_mask"),
    ("a template without a name", lambda f: (f / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": [], "template": ""}]}'), "MODEL_INVALID", "chat_template"),
    ("an index of nothing", _index_of_nothing, "MODEL_INVALID", "no weight_map"),
    ("an adapter", lambda f: (f / "adapter_config.json").write_text("{}"), "MODEL_INVALID", "give it as the `adapter`"),
    ("a pointer", lambda f: (f / "model.safetensors").write_text(POINTER), "MODEL_INVALID", "git lfs pull"),
    ("a tokenizer's pointer", lambda f: (f / "tokenizer.json").write_text(POINTER), "MODEL_INVALID", "git lfs pull"),
    ("TensorFlow's weights", lambda f: (f / "model.safetensors").rename(f / "tf_model.h5"), "MODEL_INVALID", "another"),
    ("a class of config.json", _class_of_the_model, "MODEL_INVALID", "config.json names the tokenizer_class"),
    ("quantised", _config(quantization_config={"quant_method": "awq"}), "MODEL_INVALID", "quantised (awq)"),
    ("a fifo", lambda f: os.mkfifo(f / "x"), "MODEL_INVALID", "regular file"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason", "part"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_folder_is_refused_and_nothing_of_it_runs(
    folder: Path, change: Callable[[Path], object], reason: str, part: str
) -> None:
    change(folder)
    result = inspected(folder)
    assert [violation.reason for violation in result.violations] == [reason]
    assert part in result.violations[0].message
    assert not (folder / "ran").exists()
    assert not result.HasField("model")


def test_all_that_is_wrong_comes_back_at_once(folder: Path) -> None:
    _nan(folder)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").unlink()
    reasons = [violation.reason for violation in inspected(folder).violations]
    assert reasons == ["MODEL_INVALID", "MODEL_INVALID", "TOKENIZER_MISSING"]


def test_a_changed_file_is_looked_at_again(folder: Path) -> None:
    assert not inspected(folder).violations
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "pooler.dense.bias": torch.full((8,), float("inf"))}, folder / "model.safetensors")
    assert inspected(folder).violations


def test_the_storage_probe_reads_and_writes(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"42")
    request = worker_pb2.ProbeStorageRequest(path=str(tmp_path / "probe"))
    reply = worker_pb2.ProbeStorageReply.FromString(probe_storage(request.SerializeToString()))
    assert reply.content == b"42"
    assert Path(reply.written_path).read_bytes() == b"42"
    gone = worker_pb2.ProbeStorageRequest(path=str(tmp_path / "nowhere" / "probe"))
    assert not worker_pb2.ProbeStorageReply.FromString(probe_storage(gone.SerializeToString())).content
