"""GGUF files are models: dequantised once through transformers, and nothing in their header is believed."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from helpers.folder_doors import spec_for
from helpers.ggufs import HEADS, LAYERS, WIDTH, header, setting, tensor, text, write_llama
from helpers.plan_requests import filled, planned
from helpers.small_specs import locations
from shardyard.v1 import model_service_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.models import sources
from shardyard_trainer.models.gguf_header import HeaderInvalid, read_header
from shardyard_trainer.planning.pins import model_fingerprint

BLOCKS = {0: (1, 4), 8: (32, 34)}
LLAMA = setting("general.architecture", "llama")


def found(folder: Path, root: Path) -> sources.Found:
    return sources.find_folder(spec_pb2.ModelSource(uri=str(folder)), locations(root), field="spec.model")


@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_is_dequantised_once(quantised: bool, tmp_path: Path) -> None:
    meant = write_llama(tmp_path / "model/tiny.gguf", quantised=quantised)
    first = found(tmp_path / "model", tmp_path)
    again = found(tmp_path / "model", tmp_path)
    assert again.folder == first.folder and "converted from GGUF (llama)" in first.note
    weights = load_file(first.folder.path / "model.safetensors")
    np.testing.assert_allclose(weights["model.embed_tokens.weight"], meant["token_embd.weight"], atol=1e-6)
    np.testing.assert_allclose(weights["model.layers.1.mlp.up_proj.weight"], meant["blk.1.ffn_up.weight"], atol=1e-6)
    # GGUF keeps the halves of each head's rotation interleaved, transformers one after the other.
    rows = meant["blk.0.attn_q.weight"].reshape(HEADS, WIDTH // HEADS // 2, 2, WIDTH).swapaxes(1, 2)
    np.testing.assert_allclose(weights["model.layers.0.self_attn.q_proj.weight"], rows.reshape(WIDTH, WIDTH), atol=1e-6)
    config = transformers.AutoConfig.from_pretrained(first.folder.path)
    assert (config.model_type, config.num_hidden_layers) == ("llama", LAYERS)
    assert not hasattr(config, "quantization_config") and not list(first.folder.path.glob("links"))


def test_a_gguf_folder_is_planned_inspected_and_asked(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    root = filled(tmp_path / "here")
    write_llama(root / "model/tiny.gguf", quantised=True)
    result = planned(root, spec_for("causal_lm", root, root / "model"))
    assert not result.violations, result.violations
    assert "MODEL_CONVERTED" in [warning.reason for warning in result.plan.warnings]
    request = worker_pb2.InspectModelRequest(folder=str(root / "model"), cache_dir=str(tmp_path / "cache"))
    model = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))
    assert not model.violations, model.violations
    assert (model.model.model_type, model.model.task) == ("llama", "causal_lm")
    call = worker_pb2.PredictCall(
        folder=str(root / "model"),
        cache_dir=str(tmp_path / "cache"),
        request=model_service_pb2.PredictRequest(model="m", instances=[model_service_pb2.Instance(text="the dog")]),
    )
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    assert not reply.violations and len(reply.response.predictions) == 1


def test_a_gguf_file_is_pinned_by_its_bytes(tmp_path: Path) -> None:
    write_llama(tmp_path / "model/tiny.gguf")
    spec, where = spec_pb2.JobSpec(model=spec_pb2.ModelSource(uri=str(tmp_path / "model"))), locations(tmp_path)
    before = model_fingerprint(spec, where)
    (tmp_path / "model/README.md").write_text("unread")
    assert model_fingerprint(spec, where) == before
    write_llama(tmp_path / "model/tiny.gguf", seed=1)
    assert model_fingerprint(spec, where) != before


def test_which_of_several_files_is_meant_has_to_be_said(tmp_path: Path) -> None:
    write_llama(tmp_path / "model/q8.gguf")
    (tmp_path / "model/q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(SpecError, match=r"2 GGUF files: q4\.gguf, q8\.gguf; keep the one"):
        found(tmp_path / "model", tmp_path)
    for name in ("q8", "q4"):
        (tmp_path / f"model/{name}.gguf").unlink()
    (tmp_path / "model/big-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(SpecError, match="one part of a model; join"):
        found(tmp_path / "model", tmp_path)


HOSTILE: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "it is cut"),
    ("another file", b"PK\3\4" + bytes(100), "does not begin"),
    ("an old version", b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "of version 1; 2 and 3"),
    ("2**60 tensors", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than any model"),
    ("2**60 settings", b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "more than any model"),
    ("a text of 2**60 bytes", header(settings=(struct.pack("<Q", 2**60),)), "a text of"),
    ("a text that is cut", header(settings=(struct.pack("<Q", 999),)), "it is cut"),
    ("a text that is none", header(settings=(struct.pack("<Q", 2) + b"\xff\xfe",)), "not UTF-8"),
    ("a list of 2**60", header(settings=(text("a") + struct.pack("<IIQ", 9, 4, 2**60),)), "more than 10,000,000"),
    ("a list of lists", header(settings=(text("a") + struct.pack("<IIQ", 9, 9, 1),)), "list of the kind 9"),
    ("an unknown kind", header(settings=(text("a") + struct.pack("<I", 77),)), "unknown kind 77"),
    ("no architecture", header(), "no general.architecture"),
    ("alignment 0", header(settings=(LLAMA, text("general.alignment") + struct.pack("<II", 4, 0))), "power of two"),
    ("40 dimensions", header(settings=(LLAMA,), tensors=(tensor("a", (1,) * 40),)), "40 dimensions"),
    ("an unknown quantisation", header(settings=(LLAMA,), tensors=(tensor("a", (2,), kind=99),)), "unknown way 99"),
    ("half a block", header(settings=(LLAMA,), tensors=(tensor("a", (33,), kind=8),)), "not whole blocks of 32"),
    ("2**90 weights", header(settings=(LLAMA,), tensors=(tensor("a", (2**45, 2**45)),)), "it is cut"),
    ("values that are cut", header(settings=(LLAMA,), tensors=(tensor("a", (4,)),), values=b"\0" * 15), "it is cut"),
    ("a setting twice", header(settings=(LLAMA, LLAMA)), "setting 'general.architecture' twice"),
    (
        "a tensor twice",
        header(settings=(LLAMA,), tensors=(tensor("a", (1,)), tensor("a", (1,))), values=bytes(4)),
        "tensor 'a' twice",
    ),
    ("an offset of 2**63", header(settings=(LLAMA,), tensors=(tensor("a", (1,), offset=2**63),)), "it is cut"),
]


@pytest.mark.parametrize(("what", "content", "said"), HOSTILE, ids=[row[0] for row in HOSTILE])
def test_a_bad_header_is_refused_before_a_library_reads_it(what: str, content: bytes, said: str) -> None:
    with pytest.raises(HeaderInvalid, match=said):
        read_header(BytesIO(content), BLOCKS)


def test_a_good_header_says_what_it_is() -> None:
    content = header(settings=(LLAMA,), tensors=(tensor("a", (4, 8)), tensor("b", (2,), offset=128)), values=bytes(136))
    found = read_header(BytesIO(content), BLOCKS)
    assert (found.architecture, found.num_weights) == ("llama", 34)
    assert found.settings == {"general.architecture": "llama"}
    assert found.tensors["a"].shape == (8, 4) and found.numbers(BytesIO(content), "b") == [0.0, 0.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            header(
                settings=(setting("general.architecture", "starship"),), tensors=(tensor("a", (1,)),), values=bytes(4)
            ),
            "cannot be converted: .*starship",
        ),
        (header(settings=(LLAMA,), tensors=(tensor("a", (9,)),)), "tiny.gguf is not a GGUF model: the tensor 'a' ends"),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused_by_name(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tiny.gguf").write_bytes(content)
    with pytest.raises(SpecError, match=said) as refused:
        found(tmp_path / "model", tmp_path)
    assert refused.value.field == "spec.model.uri" and refused.value.metadata["file"] == "tiny.gguf"
