"""The original BERT in NumPy (Devlin et al., 2018), from the tensors of its TensorFlow 1 checkpoint by their own names.

Shape suffixes: B texts, T positions, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

Tensors = Mapping[str, np.ndarray]


def hidden_states(tensors: Tensors, ids_BT: np.ndarray, *, heads: int) -> np.ndarray:
    """The last layer's vectors [B, T, D] of texts without padding, all of the first type."""
    table = {name.removeprefix("bert/"): values.astype(np.float64) for name, values in tensors.items()}
    places = table["embeddings/position_embeddings"][: ids_BT.shape[1]]
    hidden_BTD = table["embeddings/word_embeddings"][ids_BT] + places + table["embeddings/token_type_embeddings"][0]
    hidden_BTD = _norm(table, "embeddings/LayerNorm", hidden_BTD)
    for layer in range(sum(name.endswith("intermediate/dense/kernel") for name in table)):
        here = f"encoder/layer_{layer}"
        seen_BTD = _attention(table, f"{here}/attention", hidden_BTD, heads)
        hidden_BTD = _norm(table, f"{here}/attention/output/LayerNorm", hidden_BTD + seen_BTD)
        inner = _dense(table, f"{here}/intermediate/dense", hidden_BTD)
        inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        inner = _dense(table, f"{here}/output/dense", inner)
        hidden_BTD = _norm(table, f"{here}/output/LayerNorm", hidden_BTD + inner)
    return hidden_BTD


def _attention(table: Tensors, here: str, hidden_BTD: np.ndarray, heads: int) -> np.ndarray:
    size, length, width = hidden_BTD.shape
    query, key, value = (
        _dense(table, f"{here}/self/{name}", hidden_BTD).reshape(size, length, heads, -1)
        for name in ("query", "key", "value")
    )
    scores_BHTT = np.einsum("bthd,bshd->bhts", query, key) / math.sqrt(width // heads)
    shares_BHTT = np.exp(scores_BHTT - scores_BHTT.max(-1, keepdims=True))
    shares_BHTT /= shares_BHTT.sum(-1, keepdims=True)
    seen_BTD = np.einsum("bhts,bshd->bthd", shares_BHTT, value).reshape(size, length, width)
    return _dense(table, f"{here}/output/dense", seen_BTD)


def _dense(table: Tensors, name: str, given: np.ndarray) -> np.ndarray:
    found: np.ndarray = given @ table[f"{name}/kernel"] + table[f"{name}/bias"]
    return found


def _norm(table: Tensors, name: str, given: np.ndarray) -> np.ndarray:
    centred = given - given.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    found: np.ndarray = scaled * table[f"{name}/gamma"] + table[f"{name}/beta"]
    return found
