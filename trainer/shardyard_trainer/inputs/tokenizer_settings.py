"""Reads tokenizer_config.json, special_tokens_map.json and added_tokens.json: known keys of known types only.

Paths (`vocab`, `vocab_file`, `tokenizer_file`, `name_or_path`), classes of a folder's own (`auto_map`) and everything
unknown is ignored. A known key of another type is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.folder import refuse_code

CONFIG = "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SWITCHES = frozenset(
    {
        *("do_lower_case", "strip_accents", "tokenize_chinese_chars", "keep_accents", "remove_space", "legacy"),
        *("add_prefix_space", "add_bos_token", "add_eos_token", "split_by_punct"),
    }
)
"""Booleans, used only for a tokenizer built from a vocabulary: a tokenizer.json already contains them."""

_TOKEN_FLAGS = frozenset({"single_word", "lstrip", "rstrip", "normalized", "special"})
_INPUT_NAMES = frozenset({"input_ids", "token_type_ids", "attention_mask"})
_MOST_TOKENS = 100_000
_MOST_TEMPLATE_BYTES = 1024 * 1024


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a folder's tokenizer. `added` has tokens by id that the vocabulary file may not have."""

    class_name: str = ""
    roles: Mapping[str, str | AddedToken] = field(default_factory=dict)
    extra: tuple[str | AddedToken, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    switches: Mapping[str, bool] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)


def read_settings(folder: Folder) -> TokenizerSettings:
    """The settings of a folder; those of transformers' defaults if it has no such file. Raises FolderInvalid."""
    values = folder.read_object(CONFIG) if folder.has(CONFIG) else {}
    refuse_code(folder, CONFIG, values)
    added = dict(_decoder(values.get("added_tokens_decoder")))
    tokens = {name: _token(CONFIG, name, values[name]) for name in ROLES if values.get(name)}
    extra = _extra(CONFIG, values)
    if not added and folder.has("special_tokens_map.json"):
        # As in transformers: the map is used unless the configuration has the newer form with all tokens.
        special = folder.read_object("special_tokens_map.json")
        tokens |= {name: _token("special_tokens_map.json", name, special[name]) for name in ROLES if special.get(name)}
        extra = _extra("special_tokens_map.json", special) or extra
    if not added and folder.has("added_tokens.json"):
        added = _added(folder.read_object("added_tokens.json"), {str(token) for token in (*tokens.values(), *extra)})
    by_name = {str(token): token for token in added.values()}
    return TokenizerSettings(
        class_name=_text(values, "tokenizer_class"),
        roles={name: by_name.get(str(token), token) for name, token in tokens.items()},
        extra=extra,
        added=added,
        switches={name: _switch(name, values[name]) for name in SWITCHES if values.get(name) is not None},
        common=_common(folder, values),
    )


def _common(folder: Folder, values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if values.get("clean_up_tokenization_spaces") is not None:
        found["clean_up_tokenization_spaces"] = _switch(
            "clean_up_tokenization_spaces", values["clean_up_tokenization_spaces"]
        )
    length = values.get("model_max_length")
    if length is not None:
        if isinstance(length, bool) or not isinstance(length, int | float) or not length > 0:
            raise _wrong(CONFIG, "model_max_length", length, "a number of tokens")
        found["model_max_length"] = int(length) if length < 2**53 else int(1e30)
    names = values.get("model_input_names")
    if names is not None:
        if not isinstance(names, list) or not names or not all(str(name) in _INPUT_NAMES for name in names):
            raise _wrong(CONFIG, "model_input_names", names, f"a list of {', '.join(sorted(_INPUT_NAMES))}")
        found["model_input_names"] = names
    template = _template(folder, values.get("chat_template"))
    return found | ({"chat_template": template} if template else {})


def _template(folder: Folder, value: Any) -> Any:
    # Kept as text: what reads conversations renders it, in a sandbox (`inputs.chat_template`).
    if folder.has("chat_template.jinja"):
        return folder.read_text("chat_template.jinja", most_bytes=_MOST_TEMPLATE_BYTES)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        named = [(each.get("name"), each.get("template")) for each in value]
        if all(isinstance(name, str) and isinstance(text, str) for name, text in named):
            return dict(named)
    raise _wrong(CONFIG, "chat_template", value, "a text, or a list of named texts")


def _decoder(value: Any) -> list[tuple[int, AddedToken]]:
    if value is None:
        return []
    if not isinstance(value, dict) or len(value) > _MOST_TOKENS:
        raise _wrong(CONFIG, "added_tokens_decoder", value, f"an object of up to {_MOST_TOKENS:,} tokens by id")
    found = []
    for index, token in value.items():
        if not index.isascii() or not index.isdigit() or len(index) > 9 or not isinstance(token, dict):
            raise _wrong(CONFIG, f"added_tokens_decoder.{shorten(index)}", token, "a token under its id")
        found.append((int(index), _added_token(CONFIG, f"added_tokens_decoder.{index}", token)))
    return sorted(found, key=lambda pair: pair[0])


def _added(values: Mapping[str, Any], special: set[str]) -> dict[int, AddedToken]:
    name = "added_tokens.json"
    if len(values) > _MOST_TOKENS or not all(type(index) is int and 0 <= index < 10**9 for index in values.values()):
        raise FolderInvalid(f"{name} is not an object of up to {_MOST_TOKENS:,} tokens and their ids", file=name)
    pairs = sorted(values.items(), key=lambda pair: pair[1])
    return {index: AddedToken(text, normalized=text not in special, special=text in special) for text, index in pairs}


def _extra(file: str, values: Mapping[str, Any]) -> tuple[str | AddedToken, ...]:
    for name in ("extra_special_tokens", "additional_special_tokens"):
        value = values.get(name)
        if isinstance(value, dict):
            value = list(value.values())  # named by picture and sound models
        if not value:
            continue
        if not isinstance(value, list) or len(value) > _MOST_TOKENS:
            raise _wrong(file, name, value, f"a list of up to {_MOST_TOKENS:,} tokens")
        return tuple(_token(file, f"{name}[{index}]", each) for index, each in enumerate(value))
    return ()


def _token(file: str, name: str, value: Any) -> str | AddedToken:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, dict):
        return _added_token(file, name, value)
    raise _wrong(file, name, value, "a token")


def _added_token(file: str, name: str, value: Mapping[str, Any]) -> AddedToken:
    content = value.get("content")
    flags = {flag: value[flag] for flag in _TOKEN_FLAGS if value.get(flag) is not None}
    if not isinstance(content, str) or not content or not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(file, name, dict(value), "a token: an object with content and true or false flags")
    return AddedToken(content, **flags)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(CONFIG, name, value, "true or false")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name) or ""
    if not isinstance(value, str):
        raise _wrong(CONFIG, name, value, "a text")
    return value


def _wrong(file: str, name: str, value: Any, wanted: str) -> FolderInvalid:
    return FolderInvalid(
        f"{file} has {name}: {shorten(str(value))!r}, which is not {wanted}; correct it, or leave it out", file=file
    )
