"""Every setting that transformers has for writing: the texts are those of `generate`, or the setting is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from helpers.pair_specs import OF_BART, OF_T5, sure_folder
from shardyard.v1 import model_service_pb2 as pb
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.generation import generation_settings
from shardyard_trainer.tasks.sampling import allowed, drawn_from, sampling_of

TEXTS = ["the dog is cute", "my cat sleeps , not very good", "a bad film", "hello"]
MOST = {"max_length": 12}
# Texts end at many places, so that the search is over at many.
ENDS = {"eos_token_id": [3, *range(5, 9), 14]}

AS_GENERATE: dict[str, list[dict[str, Any]]] = {
    "bad_words_ids": [{"bad_words_ids": [[6], [8], [10], [12], [14]]}, {"bad_words_ids": [[7, 7], [5, 9], [11], [3]]}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": list(range(4, 20))}],
    "decoder_start_token_id": [{"decoder_start_token_id": 5}],
    "early_stopping": [
        {"early_stopping": value, "num_beams": 3, "length_penalty": penalty, **ENDS}
        for value in ("never", True)
        for penalty in (0.5, 3.0)
    ],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": size} for size in (1, 2)],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 5.0}, {"encoder_repetition_penalty": 0.5}],
    "eos_token_id": [{"eos_token_id": [3, 7, 9]}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": [2, 1.9]}],
    "forced_bos_token_id": [{"forced_bos_token_id": 2}, {"forced_bos_token_id": 2, "begin_suppress_tokens": [5, 6, 7]}],
    "forced_eos_token_id": [
        {"forced_eos_token_id": 3, "max_length": 8},
        {"forced_eos_token_id": [3, 9], "eos_token_id": [3, 9]},
    ],
    "length_penalty": [{"length_penalty": value, "num_beams": 4, **ENDS} for value in (3.0, -1.0)],
    "max_length": [{"max_length": 5}],
    "max_new_tokens": [{"max_new_tokens": 3}],
    "min_length": [{"min_length": 9}],
    "min_new_tokens": [{"min_new_tokens": 9, "min_length": 2}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 2}],
    "num_beams": [{"num_beams": 4}],
    "num_return_sequences": [{"num_return_sequences": 2, "num_beams": 4}],
    "renormalize_logits": [{"renormalize_logits": True, "num_beams": 4, "no_repeat_ngram_size": 1}],
    "repetition_penalty": [{"repetition_penalty": 2.5}],
    "sequence_bias": [{"sequence_bias": [[[6], -50.0], [[8], -50.0], [[5, 7], 20.0]]}],
    "suppress_tokens": [{"suppress_tokens": [6, 8, 10, 12, 14]}],
}
"""Settings with which the texts are compared, beside those of a folder; of several texts the first counts."""

DRAWN: dict[str, dict[str, Any]] = {
    "do_sample": {},
    "min_p": {"min_p": 0.2},
    "temperature": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.6},
    "typical_p": {"typical_p": 0.4, "top_k": 30},
}
"""Settings for drawn texts, of which the probabilities are compared."""

REFUSED: dict[str, Any] = {
    "constraints": [{"type": "phrasal"}],
    "diversity_penalty": 5.0,
    "dola_layers": "low",
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "max_time": 2.0,
    "num_beam_groups": 2,
    "penalty_alpha": 0.6,
    "stop_strings": ["dog"],
    "token_healing": True,
    "top_h": 0.4,
    "watermarking_config": {"bias": 2.0},
}

CHANGES_NO_TEXT: dict[str, Any] = {
    "assistant_confidence_threshold": 0.9,
    "assistant_early_exit": 1,
    "assistant_ensemble_weight": 0.5,
    "assistant_lookbehind": 5,
    "bos_token_id": 2,
    "cache_config": {"backend": "quanto"},
    "cache_implementation": "static",
    "compile_config": {"mode": "default"},
    "continuous_batching_config": {"block_size": 8},
    "disable_compile": True,
    "is_assistant": True,
    "low_memory": True,
    "max_cache_len": 4,
    "max_matching_ngram_size": 3,
    "num_assistant_tokens": 7,
    "num_assistant_tokens_schedule": "constant",
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "pad_token_id": 0,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 4,
    "remove_invalid_values": True,
    "return_dict_in_generate": True,
    "speculation_type": "x",
    "target_lookbehind": 4,
    "transformers_version": "4.20.0",
    "use_cache": False,
    "use_mtp": True,
}
"""Settings of speed, of memory, of what `generate` returns, and of numbers that no model here gives (NaN)."""


def made(folder: Path, kind: str) -> Path:
    own = {} if kind == "T5" else {"forced_eos_token_id": None}
    return sure_folder(folder, kind, "ForConditionalGeneration", std=1.0, **own)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: made(root / kind, kind) for kind in ("Bart", "T5")}


def with_settings(folder: Path, **settings: Any) -> Path:
    ids = OF_BART if folder.name == "Bart" else OF_T5
    (folder / "generation_config.json").write_text(json.dumps({**ids, **MOST, **settings}))
    return folder


def asked(folder: Path, texts: list[str] = TEXTS) -> list[str]:
    request = pb.PredictRequest(model="m", instances=[pb.Instance(text=text) for text in texts])
    call = worker_pb2.PredictCall(folder=str(folder), request=request)
    reply = worker_pb2.PredictReply.FromString(predict(call.SerializeToString()))
    assert not reply.violations, reply.violations
    return [prediction.generated_text for prediction in reply.response.predictions]


def generated(folder: Path, texts: list[str] = TEXTS) -> list[str]:
    """What transformers makes of the folder, text by text."""
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        read = tokenizer(text, return_tensors="pt")
        tokens = model.generate(**read)[0][1:].tolist()
        ends = model.generation_config.eos_token_id
        last = next(
            (at for at, token in enumerate(tokens) if token in (ends if isinstance(ends, list) else [ends])), None
        )
        found.append(tokenizer.decode(tokens[:last], skip_special_tokens=True).strip())
    return found


def problems(folder: Path) -> list[worker_pb2.Violation]:
    request = worker_pb2.InspectModelRequest(folder=str(folder))
    return list(worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString())).violations)


def test_no_field_of_transformers_is_forgotten() -> None:
    known = [*AS_GENERATE, *DRAWN, *REFUSED, *CHANGES_NO_TEXT]
    assert len(known) == len(set(known))
    assert set(known) == {name for name in vars(GenerationConfig()) if not name.startswith("_")}


@pytest.mark.parametrize("field", AS_GENERATE)
def test_texts_are_those_of_generate(folders: dict[str, Path], field: str) -> None:
    changed = False
    for folder in folders.values():
        for settings in AS_GENERATE[field]:
            without = {name: value for name, value in settings.items() if name != field}
            plain = asked(with_settings(folder, **without))
            for beams in [{}] if "num_beams" in settings or folder.name == "T5" else [{}, {"num_beams": 3}]:
                with_settings(folder, **settings, **beams)
                found = asked(folder)
                assert found == generated(folder), (folder.name, settings, beams)
                changed |= found != plain
    assert changed or field == "num_return_sequences", "the setting changes something"


@pytest.mark.parametrize(
    "settings",
    [
        {"early_stopping": True, "forced_bos_token_id": 2, "forced_eos_token_id": 3, "length_penalty": 2.0}
        | {"max_length": 14, "min_length": 5, "no_repeat_ngram_size": 3, "num_beams": 4},
        {"forced_eos_token_id": 3, "length_penalty": 0.6, "max_length": 12, "num_beams": 4},
        {"bad_words_ids": [[0]], "forced_eos_token_id": 3, "max_length": 10, "num_beams": 4},
    ],
    ids=["bart-large-cnn", "pegasus-xsum", "opus-mt"],
)
def test_published_settings_write_the_texts_of_generate(folders: dict[str, Path], settings: dict[str, Any]) -> None:
    for folder in folders.values():
        with_settings(folder, **settings)
        assert asked(folder) == generated(folder)


@pytest.mark.parametrize("field", DRAWN)
def test_tokens_are_drawn_as_generate_draws_them(tmp_path: Path, field: str) -> None:
    settings = {"do_sample": True, **DRAWN[field]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    how = sampling_of(pb.GenerationParameters(), generation_settings(open_folder(tmp_path)), frozenset())
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=80))
    model.generation_config = GenerationConfig(**settings)
    config, _ = model._prepare_generation_config(None)
    process = model._get_logits_processor(config, input_ids_seq_length=2)
    for seed in range(5):
        logits_V = torch.randn(80, generator=torch.Generator().manual_seed(seed)) * 2
        wanted_V = process(torch.tensor([[1, 2]]), logits_V[None])[0].softmax(-1)
        likely_V, tokens_V = drawn_from(allowed(logits_V, how, [1, 2], 0), how)
        found_V = torch.zeros(80, dtype=torch.float64).scatter(0, tokens_V, likely_V / likely_V.sum())
        torch.testing.assert_close(found_V.float(), wanted_V)


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_text_is_written_with_is_refused_by_name(folders: dict[str, Path], field: str) -> None:
    folder = with_settings(folders["T5"], **{field: REFUSED[field]})
    (problem,) = problems(folder)
    assert problem.metadata["file"] == "generation_config.json"
    assert f"has {field}: " in problem.message and "leave it out" in problem.message


def test_what_changes_no_text_is_passed_over(folders: dict[str, Path]) -> None:
    plain = asked(with_settings(folders["T5"]))
    assert asked(with_settings(folders["T5"], **CHANGES_NO_TEXT)) == plain
    as_saved = {"diversity_penalty": 0.0, "num_beam_groups": 1, "guidance_scale": 1.0, "epsilon_cutoff": 0.0}
    assert asked(with_settings(folders["T5"], **as_saved, stop_strings=None, penalty_alpha=None)) == plain


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"bad_words_ids": [5]}, "a list of lists of token ids"),
        ({"bad_words_ids": [[]]}, "a list of lists of token ids"),
        ({"sequence_bias": [[[5], "x"]]}, "a list of tokens with a number"),
        ({"sequence_bias": [[[-5], 1.0]]}, "a list of tokens with a number"),
        ({"exponential_decay_length_penalty": [5, 0]}, "a number of tokens with a factor over 0"),
        ({"early_stopping": "always"}, 'true, false or "never"'),
        ({"early_stopping": 2}, "true or false"),
        ({"encoder_repetition_penalty": -1.0}, "not from 0 to 100"),
        ({"do_sample": True, "num_beams": 2}, "beams are not drawn here"),
    ],
    ids=str,
)
def test_a_value_that_no_setting_has_is_refused_with_the_rule(tmp_path: Path, settings: Any, rule: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=rule):
        generation_settings(open_folder(tmp_path))


def test_the_settings_of_folders_before_generation_config_json_are_in_config_json(tmp_path: Path) -> None:
    folder = made(tmp_path / "Bart", "Bart")
    (folder / "generation_config.json").unlink(missing_ok=True)
    own = json.loads((folder / "config.json").read_text())
    old = {"num_beams": 4, "max_length": 9, "no_repeat_ngram_size": 2, "forced_eos_token_id": 3, "length_penalty": 2.0}
    (folder / "config.json").write_text(json.dumps(own))
    plain = asked(folder)
    (folder / "config.json").write_text(json.dumps({**own, **old}))
    found = asked(folder)
    assert found == generated(folder) != plain
    (folder / "config.json").write_text(json.dumps({**own, "guidance_scale": 3.0}))
    (problem,) = problems(folder)
    assert problem.metadata["file"] == "config.json" and "guidance_scale: 3.0" in problem.message
