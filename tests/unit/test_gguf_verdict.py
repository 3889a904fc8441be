"""What a GGUF file lacks, has too much, or says otherwise than transformers reads is refused or kept, never silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from gguf.constants import GGML_QUANT_SIZES

from helpers.ggufs import HEADS, WIDTH, byte_pairs, write_llama, write_settings
from helpers.small_specs import locations
from helpers.tiny_folders import gpt2_tokenizer
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.inputs.vocabularies import build_tokenizer
from shardyard_trainer.models import sources
from shardyard_trainer.models.door import FolderInvalid
from shardyard_trainer.models.gguf_header import read_header
from shardyard_trainer.models.gguf_settings import configuration
from shardyard_trainer.planning.pins import model_fingerprint

Say = Callable[[Any], None]


def silent(_writer: Any) -> None:
    """Says nothing."""


def found(folder: Path, root: Path) -> sources.Found:
    return sources.find_folder(spec_pb2.ModelSource(uri=str(folder)), locations(root), field="spec.model")


def factors(context: int, number: int = 4) -> np.ndarray:
    """Those of a Llama 3 that was trained on so many tokens first, by transformers' own frequencies."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": context, "rope_theta": 10_000.0}
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope, max_position_embeddings=999
    )
    made = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    return 10_000.0 ** (-np.arange(number) / number) / made


def of_experts(writer: Any) -> None:
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)


def yarn(writer: Any) -> None:
    import gguf

    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(16)


def infinite(writer: Any) -> None:
    writer.kv_data[0].pop("llama.rope.freq_base")
    writer.add_rope_freq_base(float("inf"))


ONES = np.ones(WIDTH, dtype=np.float32)
REFUSED: list[tuple[str, Mapping[str, Any], Say, str]] = [
    ("missing", {"blk.1.ffn_up.weight": None}, silent, r"lacks 1 tensors of a llama .*layers\.1\.mlp\.up_proj\.weight"),
    ("too many", {"blk.0.attn_q.bias": ONES}, silent, r"is a llama, but has 1 tensors .*: blk\.0\.attn_q\.bias"),
    (
        "another shape",
        {"blk.0.attn_k.weight": np.ones((WIDTH // 2, WIDTH), dtype=np.float32)},
        silent,
        r"has 'model\.layers\.0\.self_attn\.k_proj\.weight' in the shape \[16, 32\], but a llama .* has \[32, 32\]",
    ),
    ("experts", {}, of_experts, r"llama\.expert_count = 4"),
    ("a known setting", {}, lambda writer: writer.add_logit_scale(0.5), r"llama\.logit_scale = 0\.5"),
    ("a window", {}, lambda writer: writer.add_sliding_window(4), r"llama\.attention\.sliding_window = 4"),
    ("alpha", {}, lambda writer: writer.add_float32("llama.rope.scaling.alpha", 9.0), r"rope\.scaling\.alpha = 9"),
    ("an infinite base", {}, infinite, r"rope\.freq_base is inf, which cannot be meant"),
    ("two epsilons", {}, lambda writer: writer.add_layer_norm_eps(0.5), r"llama\.attention\.layer_norm_epsilon = 0\.5"),
    ("an odd rotation", {"rope_freqs.weight": np.array([1, 3, 2, 7])}, silent, r"1 tensors .*: rope_freqs\.weight"),
    ("an adapter", {}, lambda writer: writer.add_type("adapter"), r"not a model, but an adapter .*llama-export-lora"),
    ("an old adapter", {}, lambda writer: writer.add_string("adapter.type", "lora"), "but an adapter"),
    ("pictures", {}, lambda writer: writer.add_type("mmproj"), "the part of a model that reads pictures"),
    ("another kind", {}, lambda writer: writer.add_type("soup"), "of the type 'soup'"),
]


@pytest.mark.parametrize(("what", "more", "say", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_another_model_than_the_file_says_is_refused_by_name(
    what: str, more: Mapping[str, Any], say: Say, said: str, tmp_path: Path
) -> None:
    more = {name: values if values is None else np.asarray(values, np.float32) for name, values in more.items()}
    write_llama(tmp_path / "model/tiny.gguf", more=more, say=say)
    with pytest.raises(SpecError, match=said) as refused:
        found(tmp_path / "model", tmp_path)
    assert refused.value.metadata["file"] == "tiny.gguf" and "tiny.gguf" in str(refused.value)
    assert "cannot be converted" not in str(refused.value)


def test_a_vocabulary_alone_is_not_a_model(tmp_path: Path) -> None:
    nothing = dict.fromkeys(write_llama(tmp_path / "model/tiny.gguf"))
    write_llama(tmp_path / "model/tiny.gguf", more=nothing)
    with pytest.raises(SpecError, match=r"tiny\.gguf has no tensors: .* a vocabulary alone"):
        found(tmp_path / "model", tmp_path)


def test_settings_that_nobody_knows_are_named(tmp_path: Path) -> None:
    write_llama(tmp_path / "model/tiny.gguf", say=lambda writer: writer.add_uint32("llama.warp_speed", 9))
    assert "settings that are not known were not read: llama.warp_speed" in found(tmp_path / "model", tmp_path).note


ROTATIONS: list[tuple[str, Mapping[str, Any], Say, Mapping[str, Any]]] = [
    ("linear", {}, lambda writer: writer.add_rope_scaling_factor(4.0), {"rope_type": "linear", "factor": 4.0}),
    ("yarn", {}, yarn, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
    (
        "llama3",
        {"rope_freqs.weight": factors(8192)},
        silent,
        {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    ),
    ("ones", {"rope_freqs.weight": [1, 1, 1, 1]}, silent, {"rope_type": "default"}),
]


@pytest.mark.parametrize(("what", "more", "say", "wanted"), ROTATIONS, ids=[row[0] for row in ROTATIONS])
def test_scaled_rotations_are_kept(
    what: str, more: Mapping[str, Any], say: Say, wanted: Mapping[str, Any], tmp_path: Path
) -> None:
    write_llama(
        tmp_path / "model/tiny.gguf",
        more={name: np.asarray(values, dtype=np.float32) for name, values in more.items()},
        say=say,
    )
    config = transformers.AutoConfig.from_pretrained(found(tmp_path / "model", tmp_path).folder.path)
    assert config.rope_parameters.items() >= wanted.items()


@pytest.mark.parametrize("context", [32, 8192, 65536])
def test_frequencies_of_llama_3_are_computed_as_the_file_has_them(context: int, tmp_path: Path) -> None:
    write_llama(tmp_path / "model/tiny.gguf", more={"rope_freqs.weight": factors(context).astype(np.float32)})
    model = transformers.AutoModel.from_pretrained(found(tmp_path / "model", tmp_path).folder.path)
    plain = 10_000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(model.rotary_emb.inv_freq.numpy(), plain / factors(context), rtol=1e-4)


def read(tmp_path: Path, architecture: str, say: Say, tensors: Mapping[str, Any]) -> Any:
    path = tmp_path / "model.gguf"
    write_settings(path, architecture, say, tensors)
    with path.open("rb") as file:
        header = read_header(file, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
        return configuration(tmp_path, header, file, "tiny.gguf").config


def layers(number: int) -> Say:
    def say(writer: Any) -> None:
        writer.kv_data[0].pop("llama.block_count")
        writer.add_block_count(number)

    return say


def longrope(writer: Any) -> None:
    writer.add_rope_dimension_count(4)
    writer.add_rope_scaling_orig_ctx_len(16)
    writer.add_rope_scaling_attn_factors(1.25)


def width(length: int) -> Say:
    def say(writer: Any) -> None:
        writer.add_key_length(length)
        writer.add_value_length(length)

    return say


LONG = {"rope_factors_long.weight": [2, 3], "rope_factors_short.weight": [1, 1.5]}
GATED = {"enc.blk.0.ffn_gate.weight": np.zeros((4, 4))}
CONFIGS: list[tuple[str, Say, Mapping[str, Any], Mapping[str, Any]]] = [
    ("phi3", lambda writer: writer.add_sliding_window(4), {}, {"sliding_window": 4, "pad_token_id": None}),
    ("phi3", longrope, LONG, {"original_max_position_embeddings": 16}),
    ("qwen3", width(24), {}, {"head_dim": 24, "vocab_size": 9}),
    ("gemma2", width(16), {}, {"head_dim": 16, "query_pre_attn_scalar": 16}),
    ("t5", width(8), GATED, {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}),
    ("t5", width(8), {}, {"feed_forward_proj": "relu", "is_gated_act": False}),
]


@pytest.mark.parametrize(("architecture", "say", "tensors", "wanted"), CONFIGS)
def test_settings_become_part_of_the_configuration(
    architecture: str, say: Say, tensors: Mapping[str, Any], wanted: Mapping[str, Any], tmp_path: Path
) -> None:
    config = read(tmp_path, architecture, say, tensors)
    assert {name: getattr(config, name) for name in wanted} == wanted
    if say is longrope:
        assert config.rope_parameters["long_factor"] == [2.0, 3.0]
        assert config.rope_parameters["attention_factor"] == 1.25
        assert config.rope_parameters["partial_rotary_factor"] == 0.5


def test_a_setting_that_a_class_does_not_keep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderInvalid, match=r"phi3\.rope\.scaling\.factor = 4\.0"):
        read(tmp_path, "phi3", yarn, {})
    with pytest.raises(FolderInvalid, match=r"lacks llama\.attention\.layer_norm_rms_epsilon"):
        read(tmp_path, "llama", lambda writer: writer.kv_data[0].pop("llama.attention.layer_norm_rms_epsilon"), {})
    with pytest.raises(FolderInvalid, match=r"num_hidden_layers is 1,000,000,000; at most"):
        read(tmp_path, "llama", layers(10**9), {})
    with pytest.raises(FolderInvalid, match=r"llama\.rope\.dimension_count = 4"):
        read(tmp_path, "llama", lambda writer: (width(8)(writer), writer.add_rope_dimension_count(4)), {})


def test_how_texts_are_split_is_known_or_there_is_no_tokenizer(tmp_path: Path) -> None:
    def folder(split: str) -> sources.Found:
        place = tmp_path / f"of-{split}"
        table = np.zeros((257, HEADS * 8), dtype=np.float32)
        write_llama(place / "tiny.gguf", vocabulary=byte_pairs(split), more={"token_embd.weight": table})
        return found(place, tmp_path)

    def tokens(split: str) -> list[str]:
        return build_tokenizer(folder(split).folder).tokenize("12")

    assert tokens("gpt-2") == ["12"] and tokens("smollm") == ["1", "2"]
    unnamed = folder("")
    assert "how its tokenizer splits texts: as that of GPT-2" in unnamed.note and build_tokenizer(unnamed.folder)
    strange = folder("of-my-own")
    assert "splits texts ('of-my-own') is not known: put the tokenizer.json" in strange.note
    with pytest.raises(FolderInvalid, match=r"tokenizer of tiny\.gguf splits .*or give a `tokenizer`") as refused:
        build_tokenizer(strange.folder)
    assert refused.value.reason == "TOKENIZER_MISSING"


def test_the_files_beside_win_and_are_pinned(tmp_path: Path) -> None:
    place = tmp_path / "model"
    write_llama(place / "tiny.gguf", vocabulary=silent)
    spec, where = spec_pb2.JobSpec(model=spec_pb2.ModelSource(uri=str(place))), locations(tmp_path)
    with pytest.raises(FolderInvalid, match=r"tiny\.gguf has no vocabulary: put the tokenizer\.json of its model"):
        build_tokenizer(found(place, tmp_path).folder)
    seen = [model_fingerprint(spec, where)]
    gpt2_tokenizer().save_pretrained(place)
    (place / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (place / "generation_config.json").write_text('{"temperature": 0.5}')
    write_llama(place / "tiny.gguf")
    made = found(place, tmp_path)
    assert build_tokenizer(made.folder).get_vocab() == gpt2_tokenizer().get_vocab()
    assert "0.5" in made.folder.read_text("generation_config.json") and made.folder.has("chat_template.jinja")
    seen.append(model_fingerprint(spec, where))
    (place / "generation_config.json").write_text('{"temperature": 0.6}')
    seen.append(model_fingerprint(spec, where))
    assert "0.6" in found(place, tmp_path).folder.read_text("generation_config.json") and len(set(seen)) == 3


@pytest.mark.parametrize("name", ["Llama 3.2 1B (Q8).gguf", "MODEL.GGUF", "模型.gguf"])
def test_a_file_may_be_called_as_people_call_it(name: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model" / name)
    (tmp_path / "model/._hidden.gguf").write_bytes(b"of another system")
    (tmp_path / "model/config.json").write_text("{}")
    assert "the config.json beside it was not read" in found(tmp_path / "model", tmp_path).note
