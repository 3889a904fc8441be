"""Types of tensors in safetensors files: complex ones are read, and what is not read is refused with what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.weights import WeightsInvalid, check_finite, read_header

NAME = "model.safetensors"


def test_complex_tensors_are_read_and_have_to_be_finite(tmp_path: Path) -> None:
    turns = torch.polar(torch.ones(8), torch.linspace(0, 1, 8))
    save_file({"turns": turns}, tmp_path / NAME)
    (tensor,) = read_header(open_folder(tmp_path), NAME)
    assert (tensor.dtype, tensor.shape) == ("C64", (8,))
    check_finite(open_folder(tmp_path), NAME, [tensor])
    turns.imag[3] = torch.nan
    save_file({"turns": turns}, tmp_path / NAME)
    with pytest.raises(WeightsInvalid, match="not finite"):
        check_finite(open_folder(tmp_path), NAME, [tensor])


def test_a_type_that_is_not_read_is_refused_with_those_that_are(tmp_path: Path) -> None:
    header = json.dumps({"scale": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WeightsInvalid, match=r"F8_E8M0.*save the model in float32, float16 or bfloat16"):
        read_header(open_folder(tmp_path), NAME)
