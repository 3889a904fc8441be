"""Reads how a sentence-transformers folder makes its vectors: pooling, normalisation, length, lower case.

`modules.json` names the parts in their order. Supported: a Transformer, a Pooling by one of four means, then optionally
Normalize (and Dropout, which answers pass). Everything else changes the vectors in a way that is not computed here, so
the folder is refused by the part's name: never are other vectors given than those that its authors published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from tokenizers import normalizers

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import Folder, FolderInvalid

_FILE = "modules.json"
_LENGTHS = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_TRANSFORMERS = frozenset(
    {"Transformer", "BERT", "RoBERTa", "DistilBERT", "ALBERT", "XLMRoBERTa", "XLNet", "CamemBERT"}
)
_POOLINGS: Mapping[str, str] = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_BARE = "remove modules.json to use the transformer alone"


@dataclass(frozen=True)
class SentenceSettings:
    """What the folder's parts do with the token vectors, and `max_length` and `lower_case` with the texts before."""

    pooling: str
    normalize: bool
    max_length: int | None
    lower_case: bool


def read_sentence(folder: Folder) -> SentenceSettings | None:
    """The settings of a sentence-transformers folder; None if it is not one. Raises FolderInvalid."""
    if not folder.has(_FILE):
        return None
    kinds = []
    pooling = ""
    for module in _modules(folder):
        kind, path = str(module.get("type")).rpartition(".")[2], str(module.get("path") or "")
        kinds.append(kind)
        if kind in _TRANSFORMERS and path:
            raise _refused(
                f"its transformer is in {shorten(path)!r}; move the files of that folder up beside {_FILE}, and write "
                "the type sentence_transformers.models.Transformer with an empty path for it there"
            )
        if kind == "Pooling":
            pooling = _pooling_of(folder.read_object(f"{path}/config.json" if path else "config.json"))
        elif kind not in {"Transformer", "Normalize", "Dropout"}:
            raise _refused(f"its part {shorten(kind)} is not computed here; {_BARE}")
    order = [kind for kind in kinds if kind != "Dropout"]
    if order[:2] != ["Transformer", "Pooling"] or order[2:] not in ([], ["Normalize"]):
        raise _refused(f"its parts are {shorten(', '.join(kinds))}, not Transformer, Pooling, Normalize; {_BARE}")
    _refuse_prompt(folder)
    length, lower_case = _length_of(folder)
    return SentenceSettings(pooling, "Normalize" in order, length, lower_case)


def lower_case(tokenizer: Any) -> None:
    """Makes a tokenizer lower-case every text first."""
    backend = tokenizer.backend_tokenizer
    lower = normalizers.Lowercase()
    backend.normalizer = lower if backend.normalizer is None else normalizers.Sequence([lower, backend.normalizer])


def _modules(folder: Folder) -> list[Mapping[str, Any]]:
    modules = folder.read_json(_FILE)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules) or not modules:
        raise FolderInvalid(f"{_FILE} is not a list of modules; {_BARE}", file=_FILE)
    return modules


def _pooling_of(config: Mapping[str, Any]) -> str:
    given = config.get("pooling_mode")
    if given is not None:
        names = given if isinstance(given, list) else [given]
    else:
        names = [name for flag, name in _FLAGS.items() if config.get(flag, flag == "pooling_mode_mean_tokens")]
    if len(names) != 1:
        raise _refused(f"it joins {len(names)} poolings ({shorten(', '.join(map(str, names)))}); {_BARE}")
    if (pooling := _POOLINGS.get(str(names[0]))) is None:
        raise _refused(f"its pooling {shorten(str(names[0]))!r} is not mean, cls, max or last; {_BARE}")
    return pooling


def _length_of(folder: Folder) -> tuple[int | None, bool]:
    name = next((name for name in _LENGTHS if folder.has(name)), "")
    if not name:
        return None, False
    settings = folder.read_object(name)
    length, lower = settings.get("max_seq_length"), settings.get("do_lower_case", False)
    if (length is not None and (type(length) is not int or length < 1)) or not isinstance(lower, bool | NoneType):
        raise FolderInvalid(
            f"{name} has max_seq_length {shorten(str(length))} and do_lower_case {shorten(str(lower))}; give a whole "
            "number and true or false, or leave them out",
            file=name,
        )
    return length, bool(lower)


def _refuse_prompt(folder: Folder) -> None:
    name = "config_sentence_transformers.json"
    if not folder.has(name):
        return
    settings = folder.read_object(name)
    if (prompt := settings.get("default_prompt_name")) is not None:
        raise FolderInvalid(
            f"{name} puts the prompt {shorten(str(prompt))!r} before every text, which is not done here; set "
            "default_prompt_name to null, and write the prompt before your texts",
            file=name,
        )


def _refused(why: str) -> FolderInvalid:
    return FolderInvalid(f"a sentence-transformers folder: {why}", file=_FILE)
