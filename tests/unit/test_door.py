"""The door to strangers' folders: which files it opens, what of their settings counts, and what is refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import CONFIG_MAPPING

from helpers.tiny_folders import save_folder
from shardyard_trainer.models import architectures, weights
from shardyard_trainer.models.door import FolderInvalid, is_allowed, open_folder, refuse_links
from shardyard_trainer.models.generation import generation_settings
from shardyard_trainer.models.loading import LOADING_ERRORS, quiet
from shardyard_trainer.models.settings import model_config
from shardyard_trainer.plain_words import in_plain_words


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "root/model"
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"model_type": "bert"}')
    return path


NAMES = [
    ("config.json", True),
    ("model-00001-of-00002.safetensors", True),
    ("1_Pooling/config.json", True),
    ("2_Dense/model.safetensors", True),
    ("../config.json", False),
    ("/etc/passwd", False),
    ("modeling_x.py", False),
    ("pytorch_model.bin", False),
    ("adapter_config.json", True),
    ("1_Pooling/../../x.safetensors", False),
    (".hidden.safetensors", False),
    ("model.safetensors\n", False),
]


@pytest.mark.parametrize(("name", "allowed"), NAMES)
def test_only_known_files_are_ever_opened(folder: Path, name: str, allowed: bool) -> None:
    assert is_allowed(name) is allowed
    if not allowed:
        with pytest.raises(FolderInvalid, match="not a file that is read"), open_folder(folder).open(name):
            pass


def test_a_link_is_followed_inside_of_the_roots_and_refused_out_of_them(folder: Path, tmp_path: Path) -> None:
    inside, outside = tmp_path / "root/shared.json", tmp_path / "outside.json"
    for path in (inside, outside):
        path.write_text(f'{{"model_type": "{path.stem}"}}')
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../shared.json")
    opened = open_folder(folder, roots=(tmp_path / "root",))
    refuse_links(opened)
    assert opened.read_json("config.json") == {"model_type": "shared"}
    with pytest.raises(FolderInvalid, match="link out"):
        open_folder(folder).read_json("config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(FolderInvalid, match="link out"):
        opened.read_json("config.json")
    with pytest.raises(FolderInvalid, match="link out"):
        refuse_links(opened)


def test_a_folder_on_the_way_that_becomes_a_link_is_seen_when_a_file_is_opened(folder: Path, tmp_path: Path) -> None:
    opened = open_folder(folder)
    refuse_links(opened)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FolderInvalid, match="link out"):
        opened.read_json("config.json")


ENTRIES: list[tuple[str, Callable[[Path], object], str]] = [
    ("fifo", lambda f: os.mkfifo(f / "vocab.txt"), "not a regular file"),
    ("link to nothing", lambda f: (f / "vocab.txt").symlink_to("gone"), "link to nothing"),
    ("link to itself", lambda f: (f / "vocab.txt").symlink_to("vocab.txt"), "link to nothing"),
    ("folder that leaves", lambda f: (f / "deep").symlink_to("/etc"), "link out"),
    ("device", lambda f: (f / "x").symlink_to("/dev/zero"), "link out"),
]


@pytest.mark.parametrize(("make", "part"), [row[1:] for row in ENTRIES], ids=[row[0] for row in ENTRIES])
def test_anything_that_is_not_a_file_is_refused_at_any_depth(
    folder: Path, make: Callable[[Path], object], part: str
) -> None:
    (folder / "a").mkdir()
    make(folder / "a")
    with pytest.raises(FolderInvalid, match=part):
        refuse_links(open_folder(folder))


def test_a_folder_that_is_gone_is_the_folders_fault_and_not_the_storages(folder: Path) -> None:
    opened = open_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FolderInvalid, match="No such file"), opened.open("config.json"):
        pass
    folder.rmdir()
    for look in (opened.names, opened.weight_names, lambda: refuse_links(opened), lambda: opened.has("config.json")):
        with pytest.raises(FolderInvalid, match="cannot be read"):
            look()


def configured(folder: Path, **values: Any) -> Any:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **values}))
    return model_config(open_folder(folder))


IGNORED = {
    "_name_or_path": "/etc/passwd", "name_or_path": "/etc/passwd", "transformers_weights": "../../x.safetensors",
    "attn_implementation": "somebody/kernels", "_attn_implementation_internal": "somebody/kernels",
    "experts_implementation": "somebody/kernels", "fusion_config": {"a": True}, "use_kernels": True,
    "distributed_config": {"tp_size": 8}, "per_layer_config": {"0": {"hidden_size": 9}}, "to_dict": 5,
    "custom_pipelines": {"x": {"impl": "evil.P"}}, "base_model_name_or_path": "/etc", "vocab_file": "/etc/passwd",
    "backbone": "resnet50", "use_timm_backbone": True, "device_map": "auto", "subfolder": "../..",
    "return_dict": False, "dtype": "int8", "torch_dtype": "float16", "output_attentions": True,
}  # fmt: skip


@pytest.mark.parametrize("name", IGNORED)
def test_a_setting_that_names_code_files_or_places_never_reaches_the_configuration(folder: Path, name: str) -> None:
    plain = configured(folder).to_dict()
    assert configured(folder, **{name: IGNORED[name]}).to_dict() == plain


WRONG = [
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"head_dim": "8"}, "head_dim: '8', which is not a whole number"),
    ({"rope_scaling": "linear"}, "rope_scaling: 'linear', which is not an object"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
    ({"layer_norm_eps": float("nan")}, "NaN"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000; at most 2,000"),
    ({"model_type": "distilbert", "n_layers": 10**6}, "n_layers is 1,000,000; at most 2,000"),
    ({"model_type": "gpt2", "n_layer": 10**6}, "n_layer"),
    ({"model_type": "albert", "num_hidden_groups": 10**6}, "num_hidden_groups"),
    ({"num_labels": 10**7}, "num_labels is 10,000,000; at most 100,000"),
    ({"id2label": {"0": 0.5}}, "object of names, but has 0.5"),
    ({"id2label": ["a"]}, "object of names"),
    ({"architectures": json.loads("[" * 20 + "]" * 20)}, "nested"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised \\(gptq\\)"),
]


@pytest.mark.parametrize(("values", "part"), WRONG, ids=[part for _, part in WRONG])
def test_a_setting_of_another_kind_is_refused_by_name(folder: Path, values: dict[str, Any], part: str) -> None:
    with pytest.raises(LOADING_ERRORS, match=part):
        configured(folder, **values)


def text_types() -> list[str]:
    kinds = {name: CONFIG_MAPPING[name] for name in architectures.known_types()}
    with quiet():
        return [name for name, kind in kinds.items() if not kind.sub_configs and architectures.reads_text(kind())]


def test_every_text_architectures_own_settings_arrive_as_transformers_reads_them(tmp_path: Path) -> None:
    types = text_types()
    assert len(types) > 100
    for name in types:
        with quiet():
            values = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
        (tmp_path / "config.json").write_text(json.dumps(values))
        with quiet():
            wanted = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
            found = model_config(open_folder(tmp_path)).to_dict()
        differing = {key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)}
        assert differing <= {"dtype", "_name_or_path"}, (name, differing)


OLD = [
    {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 5000},
    {"model_type": "qwen2", "head_dim": 32, "use_sliding_window": True, "sliding_window": 64},
    {"model_type": "phi", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
    {"model_type": "gpt2", "n_ctx": 32, "n_positions": 32, "gradient_checkpointing": False, "summary_type": "mean"},
    {"model_type": "bert", "num_labels": 5, "position_embedding_type": "absolute", "pooler_fc_size": 768},
    {"model_type": "mamba2", "time_step_limit": [0.0, float("inf")]},
]


@pytest.mark.parametrize("values", OLD, ids=[str(row["model_type"]) for row in OLD])
def test_settings_of_older_folders_mean_what_they_meant(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    wanted = transformers.AutoConfig.from_pretrained(tmp_path)
    found = model_config(open_folder(tmp_path))
    for name in [*values, "rope_parameters", "num_labels", "head_dim", "max_position_embeddings"]:
        if name not in {"gradient_checkpointing", "n_ctx", "pooler_fc_size"}:
            assert getattr(found, name, None) == getattr(wanted, name, None), name


def test_of_generation_settings_only_known_ones_count(folder: Path) -> None:
    given = {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7, "cache_config": {"a": 1}, "x": "/etc"}
    (folder / "generation_config.json").write_text(json.dumps(given))
    assert generation_settings(open_folder(folder)) == {"eos_token_id": [1, 2], "do_sample": True, "temperature": 0.7}
    (folder / "generation_config.json").write_text('{"temperature": "hot"}')
    with pytest.raises(FolderInvalid, match="temperature: 'hot', which is not a number"):
        generation_settings(open_folder(folder))


INDICES = ["../../other.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "", "gone.safetensors", 5]


@pytest.mark.parametrize("name", INDICES)
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, name: object) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"x")
    path = save_folder(tmp_path / "a/model", "BertModel")
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(weights.WeightsInvalid, match="is not a file of the folder"):
        weights.weight_names(open_folder(path))


FOREIGN = [
    ("No module named x. Please pip install 'x' to go on", "No module named x."),
    ("bad object at 0x7f00deadbeef in file", "bad object in file"),
    (
        "Error no file named model in directory /srv/secret/place/model-1.",
        "Error no file named model in directory model-1.",
    ),
    ("see https://huggingface.co/docs for help", "ValueError"),
    ("<class 'transformers.models.bert.BertConfig'> is not it", "BertConfig is not it"),
    ("", "ValueError"),
    (
        "Validation error for field 'hidden_act': TypeError: Field 'hidden_act' expected str, got list (value: [1])",
        "hidden_act is [1], but must be str; correct it, or leave it out",
    ),
    (
        "Class validation error for validator 'validate_rope': ValueError: RoPE requires an even rotary dimension",
        "RoPE requires an even rotary dimension",
    ),
]


@pytest.mark.parametrize(("said", "shown"), FOREIGN)
def test_messages_of_libraries_are_passed_on_without_paths_addresses_and_advice(said: str, shown: str) -> None:
    assert in_plain_words(ValueError(said)) == shown
