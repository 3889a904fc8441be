"""Pairs of texts and missing spans as an encoder and a decoder see them, what a plan says of them, and who answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from helpers.pair_specs import FRESH, TINY, TINY_BART, filled_with_pairs, prepared, translation
from helpers.plan_requests import ask, places
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.sequences import IGNORED
from shardyard_trainer.inputs.spans import num_spans, sentinel
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.picture_module import Kept


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_with_pairs(tmp_path_factory.mktemp("sequences"))


def spans(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "pretraining": {"span_corruption": {"sequence_length": 64}},
        "model": FRESH,
        "tokenizer": {"train": {"vocabSize": 400}},
        "train_data": {"uri": "ROOT/corpus.txt"},
        "optimization": {"max_steps": 10},
    }
    return spec | changes


@pytest.mark.parametrize(("kind", "overrides"), [("t5", TINY), ("bart", TINY_BART)])
def test_the_decoder_reads_the_target_moved_right_and_no_ignored_label(
    root: Path, kind: str, overrides: dict[str, int]
) -> None:
    model = {"architecture": {"modelType": kind, "overrides": overrides}}
    prefix = {"fine_tuning": {"translation": {"source_prefix": "say: ", "max_target_length": 12}}}
    task = prepared(root, translation(model, **prefix))
    tokenizer, config = task.inputs.tokenizer, task.choice.config
    start = tokenizer.pad_token_id if kind == "t5" else tokenizer.eos_token_id
    assert config.decoder_start_token_id == start
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(6)])
    read, labels = batch.inputs["decoder_input_ids"], batch.inputs["labels"]
    assert (read[:, 0] == start).all() and (read >= 0).all() and (labels == IGNORED).any()
    for row in range(6):
        size = int((labels[row] != IGNORED).sum())
        assert read[row, 1:size].tolist() == labels[row, : size - 1].tolist()
        assert labels[row, size - 1] == tokenizer.eos_token_id and size <= 12
        source, target = task.train.texts(row)
        assert tokenizer.decode(batch.inputs["input_ids"][row], skip_special_tokens=True) == f"say: {source}"
        assert target.startswith(tokenizer.decode(labels[row, :size], skip_special_tokens=True).strip())
    assert batch.num_units == int((labels != IGNORED).sum())
    longest = getattr(config, "max_position_embeddings", None)
    assert longest in (None, 128)


def test_a_column_that_nothing_reads_is_named_in_the_plan(root: Path) -> None:
    rows = [{"prefix": "say", "input_text": "a dog", "target_text": "ein Hund"}] * 4
    (root / "prefixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ask(root, translation(train_data={"uri": "ROOT/prefixed.jsonl"}))
    (told,) = [each.message for each in result.plan.warnings if each.reason == "DATA_NOT_READ"]
    assert "column 'prefix' (4 rows)" in told


def test_what_is_cut_is_counted_and_how_texts_are_written_is_resolved(root: Path) -> None:
    wanted = {"max_source_length": 8, "max_target_length": 8, "num_beams": 3}
    result = ask(root, translation(fine_tuning={"translation": wanted}))
    assert not result.violations
    cut = [each for each in result.plan.warnings if each.reason == "TEXTS_CUT"]
    said = [each.message.partition(" are longer than 8 tokens, and the rest is cut; raise")[0] for each in cut]
    assert [" ".join(each.split()[-2:]) for each in said] == [
        "training sources", "training targets", "evaluation sources", "evaluation targets",
    ]  # fmt: skip
    assert {each.field.rpartition(".")[2] for each in cut} == {"max_source_length", "max_target_length"}
    assert result.plan.train_stats.cut_share > 0
    resolved = result.plan.resolved_spec.fine_tuning.translation
    assert (resolved.num_beams, resolved.length_penalty, resolved.max_source_length) == (3, 1, 8)
    again = ask(root, json_format.MessageToDict(result.plan.resolved_spec))
    assert again.plan.SerializeToString(deterministic=True) == result.plan.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("spec", "place", "message"),
    [
        (
            translation({"uri": "ROOT/bert"}, tokenizer=None),
            ("spec.fine_tuning.translation", "OBJECTIVE_UNSUPPORTED"),
            "bert is not an encoder-decoder",
        ),
        (
            translation({"architecture": {"modelType": "led"}}),
            ("spec.fine_tuning.translation", "OBJECTIVE_UNSUPPORTED"),
            "led is an encoder-decoder that is not supported",
        ),
        (
            translation(
                {"architecture": {"modelType": "bart", "overrides": {**TINY_BART, "max_position_embeddings": 64}}},
                fine_tuning={"translation": {"max_source_length": 65}},
            ),
            ("spec.fine_tuning.translation.max_source_length", "SPEC_INVALID"),
            "65 is more than the 64 tokens",
        ),
        (
            translation(train_data={"uri": "ROOT/corpus.txt"}),
            ("spec.train_data", "DATA_INVALID"),
            "the texts have no targets",
        ),
        (
            spans(model={"uri": "ROOT/t5"}, tokenizer=None),
            ("spec.tokenizer", "OBJECTIVE_UNSUPPORTED"),
            "<extra_id_0> is missing",
        ),
        (
            spans(pretraining={"span_corruption": {"sequence_length": 4096}}),
            ("spec.tokenizer", "OBJECTIVE_UNSUPPORTED"),
            "have 205 spans, but of the sentinels the tokenizer has 100",
        ),
        (
            spans(tokenizer={"train": {"vocabSize": 300}}),
            ("spec.tokenizer.train.vocab_size", "SPEC_INVALID"),
            "need 359",
        ),
        (
            spans(model={"uri": "ROOT/gpt2"}, tokenizer=None),
            ("spec.pretraining.span_corruption", "OBJECTIVE_UNSUPPORTED"),
            "causal_lm",
        ),
        (
            spans(pretraining={"masked_lm": {}}),
            ("spec.pretraining.masked_lm", "OBJECTIVE_UNSUPPORTED"),
            "span_corruption",
        ),
    ],
)
def test_what_no_encoder_decoder_can_learn_is_refused(
    root: Path, spec: dict[str, Any], place: tuple[str, str], message: str
) -> None:
    given = {name: value for name, value in spec.items() if value is not None}
    result = ask(root, given)
    assert places(result) == [place], result.violations
    assert message in result.violations[0].message


def test_other_spans_are_removed_in_every_pass_and_nothing_is_lost(root: Path) -> None:
    task = prepared(root, spans())
    vocab = task.inputs.tokenizer.get_vocab()
    marks = [vocab[sentinel(at)] for at in range(100)]
    end = task.inputs.tokenizer.eos_token_id

    def read(sample: SampleRef) -> tuple[list[int], list[int]]:
        inputs = task.train.micro_batch([sample]).inputs
        return inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()

    seen = set()
    for epoch in range(3):
        source, target = read(SampleRef(epoch, 1))
        assert read(SampleRef(epoch, 1)) == (source, target)
        assert source[-1] == end and target[-1] == end
        taken, number = num_spans(64, 0.15, 3.0)
        assert (taken, number) == (10, 3)
        assert [token for token in source if token in marks] == marks[:number]
        assert [token for token in target if token in marks] == marks[:number]
        whole: list[int] = []
        missing = {mark: target[target.index(mark) + 1 :] for mark in marks[:number]}
        for token in source[:-1]:
            whole += _until(missing[token], [*marks, None]) if token in missing else [token]
        places, _ = task.train.blocks.block(epoch, 1)
        assert whole[: len(places)] == task.train.corpus.tokens[places].tolist()
        seen.add(tuple(source))
    assert len(seen) == 3


@pytest.mark.parametrize(("kind", "overrides"), [("t5", TINY), ("bart", TINY_BART)])
def test_the_memory_of_a_plan_is_near_what_the_backward_pass_keeps(
    root: Path, kind: str, overrides: dict[str, int]
) -> None:
    heads = "encoder_attention_heads", "decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim"
    wide = (
        {"d_ff": 512, "d_kv": 32, "num_heads": 4} if kind == "t5" else dict(zip(heads, (4, 4, 512, 512), strict=True))
    )
    model = {"architecture": {"modelType": kind, "overrides": {**overrides, **wide, "d_model": 128}}}
    spec = translation(model, optimization={"max_steps": 1, "global_batch_size": 8, "micro_batch_size": 8})
    planned = ask(root, spec).plan
    task = prepared(root, spec)
    longest = np.argsort(-task.train.lengths())[:8].tolist()
    module = build_module(task, planned.resolved_spec).train()
    kept = Kept(module)
    with kept:
        module(**task.train.micro_batch([SampleRef(0, at) for at in longest]).inputs)
    assert 0.85 < planned.memory.activations_bytes / kept.num_bytes < 1.35


def _until(tokens: list[int], stops: list[int | None]) -> list[int]:
    found: list[int] = []
    for token in tokens[:-1]:
        if token in stops:
            break
        found.append(token)
    else:
        return found
    return found


@pytest.mark.parametrize(
    ("length", "density", "mean", "expected"),
    [
        (1, 0.15, 3.0, (0, 0)),
        (2, 0.15, 3.0, (1, 1)),
        (7, 0.15, 3.0, (1, 1)),
        (512, 0.15, 3.0, (77, 26)),
        (4, 0.5, 1.0, (2, 2)),
        (3, 0.5, 1.0, (2, 1)),
    ],
)
def test_so_many_spans_are_taken_out(length: int, density: float, mean: float, expected: tuple[int, int]) -> None:
    assert num_spans(length, density, mean) == expected


def test_a_last_sequence_of_one_token_has_no_span(root: Path) -> None:
    task = prepared(root, spans(evaluation={"holdout": 0.5}))
    held_out = task.eval
    held_out.corpus = held_out.blocks._corpus = type(held_out.corpus)(
        held_out.corpus.tokens[:65], held_out.corpus.starts[held_out.corpus.starts < 65], None, 65
    )
    batch = held_out.micro_batch([SampleRef(0, 1)])
    assert batch.num_units == 0 and (batch.inputs["labels"] == IGNORED).all()
