"""How a model writes texts: the settings of its generation_config.json, or of its config.json in older folders.

Every setting of transformers that changes what is written is obeyed (`tasks.sampling`) or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardyard_trainer.data.errors import shorten
from shardyard_trainer.models.door import Folder, FolderInvalid
from shardyard_trainer.models.settings import is_of, wrong_type

_FILE = "generation_config.json"

_KNOWN: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), (int,)),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id"), (int, list)),
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "num_beams"), (int,)),
    **dict.fromkeys(
        (
            *("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
            "encoder_repetition_penalty",
        ),
        (int, float),
    ),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_return_sequences"), (int,)),
    **dict.fromkeys(("do_sample", "use_cache", "remove_invalid_values", "renormalize_logits"), (bool,)),
    **dict.fromkeys(
        (
            *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
            "exponential_decay_length_penalty",
        ),
        (list,),
    ),
    "early_stopping": (str, bool),
}

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "encoder_repetition_penalty": (0.0, 100.0),
    # Every token searches its text for runs of that length.
    "no_repeat_ngram_size": (0, 100),
    "encoder_no_repeat_ngram_size": (0, 100),
    "num_beams": (1, 1000),
    "length_penalty": (-10.0, 10.0),
}

_NOT_OBEYED: Mapping[str, tuple[Any, ...]] = {
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "force_words_ids": ([],),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "stop_strings": ([],),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": ({},),
}
"""Settings that change what transformers writes, and the values at which they do not."""

_MOST_RUNS = 10_000
"""Runs of tokens that each new token is compared with."""


def generation_settings(folder: Folder) -> dict[str, Any]:
    """The known settings that are set, of generation_config.json or, without it, of config.json. Raises FolderInvalid.

    Folders from before transformers 4.25 have them in config.json; transformers reads these too.
    """
    file = _FILE if folder.has(_FILE) else "config.json"
    if not folder.has(file):
        return {}
    values = folder.read_object(file)
    for name, neutral in _NOT_OBEYED.items():
        if values.get(name) is not None and values[name] not in neutral:
            raise FolderInvalid(
                f"{file} has {name}: {shorten(str(values[name]))}, which no text is written with here; leave it out, "
                "and the texts are written without it",
                file=file,
            )
    found = {name: values[name] for name in _KNOWN if values.get(name) is not None}
    for name, value in found.items():
        _check(file, name, value)
    if found.get("do_sample") and found.get("num_beams", 1) > 1:
        raise FolderInvalid(
            f"{file} has do_sample: true beside num_beams: {found['num_beams']}, but beams are not drawn here; set "
            "do_sample to false, or num_beams to 1",
            file=file,
        )
    return found


def end_tokens(config: Any, settings: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The tokens that end a text: the settings', else the configuration's, and the one that training ends with."""
    own = settings.get("eos_token_id", getattr(config, "eos_token_id", None))
    ids = list(own) if isinstance(own, Sequence) else [own]
    return list(dict.fromkeys(token for token in (*ids, tokenizer.eos_token_id) if token is not None))


def _check(file: str, name: str, value: Any) -> None:
    """Raises FolderInvalid for a value that nothing can be written with."""
    if not is_of(value, _KNOWN[name]):
        raise wrong_type(file, name, value, _KNOWN[name])
    low, high = _RANGES.get(name, (-math.inf, math.inf))
    if name in _RANGES and not low <= value <= high:  # so written, NaN fails too
        raise FolderInvalid(
            f"{file} has {name}: {value:g}, which is not from {low:g} to {high:g}; correct it, or leave it out",
            file=file,
        )
    if isinstance(value, list | str) and not (rule := _RULES.get(name, _IDS))[0](value):
        raise FolderInvalid(
            f"{file} has {name}: {shorten(str(value))}, which is not {rule[1]}; correct it, or leave it out", file=file
        )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _is_run(value: Any) -> bool:
    return _are_ids(value) and len(value) > 0 and min(value) >= 0


def _is_number(value: Any) -> bool:
    return is_of(value, (int, float)) and math.isfinite(value)


def _are_runs(value: Any) -> bool:
    return len(value) <= _MOST_RUNS and all(map(_is_run, value))


def _are_biases(value: Any) -> bool:
    pairs = all(isinstance(each, list) and len(each) == 2 for each in value)
    return pairs and len(value) <= _MOST_RUNS and all(_is_run(run) and _is_number(bias) for run, bias in value)


def _is_decay(value: Any) -> bool:
    if len(value) != 2 or type(value[0]) is not int or not _is_number(value[1]):
        return False
    return bool(value[0] >= 0 and value[1] > 0)


_IDS = (_are_ids, "a list of token ids")
_RULES: Mapping[str, tuple[Any, str]] = {
    "bad_words_ids": (_are_runs, f"a list of lists of token ids, {_MOST_RUNS:,} at most, such as [[7], [8, 9]]"),
    "sequence_bias": (_are_biases, f"a list of tokens with a number, {_MOST_RUNS:,} at most, such as [[[7, 8], -5.0]]"),
    "exponential_decay_length_penalty": (_is_decay, "a number of tokens with a factor over 0, such as [20, 1.1]"),
    "early_stopping": (lambda value: value == "never", 'true, false or "never"'),
}
