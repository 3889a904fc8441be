"""Tasks as they are built from specs: samples, order, labels and metrics."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import small_specs
from helpers.small_specs import causal_spec, classification_spec, locations, masked_spec, write_corpus, write_labelled
from shardyard.v1 import spec_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.tasks.base import Prepared, build_module
from shardyard_trainer.tasks.ingredients import prepare


def build(tmp_path: Path, spec: spec_pb2.JobSpec) -> Prepared:
    return prepare(spec, locations(tmp_path))


def refs(number: int, data_epoch: int = 0) -> list[SampleRef]:
    return [SampleRef(data_epoch, i) for i in range(number)]


def test_every_token_of_the_training_stream_is_a_target_once_a_pass(tmp_path: Path) -> None:
    spec = causal_spec(write_corpus(tmp_path), evaluation={"holdout": 0})
    task = build(tmp_path, spec)
    batch = task.train.micro_batch(refs(task.train.num_samples))
    stored = np.array(task.train.corpus.tokens)  # type: ignore[attr-defined]
    targets = Counter(batch.inputs["labels"].flatten().tolist())
    whole = Counter(stored.tolist())
    rest = len(stored) % 32
    assert sum((whole - targets).values()) == rest
    assert not targets - whole
    assert batch.num_units == batch.num_tokens == task.train.num_samples * 32


def test_another_pass_is_another_order_and_the_same_pass_the_same(tmp_path: Path) -> None:
    spec = causal_spec(write_corpus(tmp_path))
    first, again = build(tmp_path, spec), build(tmp_path, spec)
    ids = first.train.micro_batch(refs(4)).inputs["input_ids"]
    assert torch.equal(ids, again.train.micro_batch(refs(4)).inputs["input_ids"])
    assert not torch.equal(ids, first.train.micro_batch(refs(4, data_epoch=1)).inputs["input_ids"])
    spec.optimization.seed = 4
    assert not torch.equal(ids, build(tmp_path, spec).train.micro_batch(refs(4)).inputs["input_ids"])


def test_a_sample_does_not_depend_on_those_beside_it(tmp_path: Path) -> None:
    for spec in (causal_spec(write_corpus(tmp_path)), masked_spec(write_corpus(tmp_path))):
        task = build(tmp_path, spec)
        together = task.train.micro_batch([SampleRef(1, 2), SampleRef(1, 5)])
        alone = task.train.micro_batch([SampleRef(1, 5)])
        assert torch.equal(together.inputs["input_ids"][1], alone.inputs["input_ids"][0])
        assert together.num_units == alone.num_units + task.train.micro_batch([SampleRef(1, 2)]).num_units


def test_evaluation_takes_every_token_but_the_first_once_and_in_order(tmp_path: Path) -> None:
    task = build(tmp_path, causal_spec(write_corpus(tmp_path)))
    assert task.eval is not None
    batch = task.eval.micro_batch(refs(task.eval.num_samples))
    labels = batch.inputs["labels"].flatten()
    stored = torch.from_numpy(np.array(task.eval.corpus.tokens).astype(np.int64))  # type: ignore[attr-defined]
    assert torch.equal(labels[labels != -100], stored[1:])
    assert batch.num_tokens == task.eval.num_tokens == len(stored) - 1


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    task = build(tmp_path, causal_spec(write_corpus(tmp_path, 100), evaluation={"holdout": 0.2}))
    assert task.eval is not None
    text = task.inputs.tokenizer.decode(task.eval.corpus.tokens.tolist(), skip_special_tokens=False)  # type: ignore[attr-defined]
    assert text == "".join(f"<|endoftext|>{s}" for s in small_specs.sentences(100)[80:])


def test_of_one_document_the_last_part_is_held_out(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    spec = causal_spec(corpus, tokenizer={"train": {"algorithm": "ALGORITHM_CHARACTERS"}})
    spec.train_data.document = spec_pb2.DOCUMENT_UNIT_FILE
    task = build(tmp_path, spec)
    text = corpus.read_text()
    assert task.eval is not None
    assert task.train.corpus.num_tokens + task.eval.corpus.num_tokens == len(text) + 1  # type: ignore[attr-defined]
    assert text.endswith(task.inputs.tokenizer.decode(task.eval.corpus.tokens.tolist()))  # type: ignore[attr-defined]
    assert "position_ids" not in task.train.micro_batch(refs(1)).inputs


def test_with_two_different_frame_tokens_no_document_predicts_the_next(tmp_path: Path) -> None:
    task = build(tmp_path, causal_spec(write_corpus(tmp_path)))
    task.inputs.tokenizer.bos_token = "<|unk|>"
    from shardyard_trainer.inputs.packed import causal_frame
    from shardyard_trainer.tasks.causal_lm import CausalSamples

    assert causal_frame(task.inputs.tokenizer).after == (task.inputs.tokenizer.eos_token_id,)
    samples = CausalSamples(
        task.train.corpus,  # type: ignore[attr-defined]
        32,
        seed=0,
        is_train=True,
        choice=task.choice,
        tokenizer=task.inputs.tokenizer,
    )
    inputs = samples.micro_batch(refs(8)).inputs
    begins = inputs["position_ids"][:, 1:] == 0
    assert (inputs["labels"][:, :-1][begins] == -100).all()


def test_fifteen_percent_are_masked_in_the_known_shares(tmp_path: Path) -> None:
    task = build(tmp_path, masked_spec(write_corpus(tmp_path, 2000)))
    batch = task.train.micro_batch(refs(task.train.num_samples))
    ids, targets = batch.inputs["input_ids"].flatten(), batch.inputs["targets"]
    shown = ids[batch.inputs["masked_places"]]
    assert len(targets) / batch.num_tokens == pytest.approx(0.15 * 0.8, rel=0.15)  # a fifth are frames
    assert (shown == task.inputs.tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.03)
    assert (shown == targets).float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert not set(targets.tolist()) & set(task.inputs.tokenizer.all_special_ids)


def test_masks_are_new_in_every_pass_and_the_same_in_every_evaluation(tmp_path: Path) -> None:
    task = build(tmp_path, masked_spec(write_corpus(tmp_path)))
    assert task.eval is not None
    again = build(tmp_path, masked_spec(write_corpus(tmp_path)))
    assert again.eval is not None
    places = task.eval.micro_batch(refs(2)).inputs["masked_places"]
    assert torch.equal(places, again.eval.micro_batch(refs(2)).inputs["masked_places"])
    first = task.train.micro_batch([SampleRef(0, 0)]).inputs["masked_places"]
    assert not torch.equal(first, task.train.micro_batch([SampleRef(1, 0)]).inputs["masked_places"])


def test_whole_words_are_masked_whole(tmp_path: Path) -> None:
    spec = masked_spec(
        write_corpus(tmp_path), tokenizer={"train": {"vocabSize": 64, "algorithm": "ALGORITHM_WORDPIECE"}}
    )
    spec.pretraining.masked_lm.whole_word = True
    spec.pretraining.masked_lm.mask_probability = 0.4
    task = build(tmp_path, spec)
    pieces = 0
    for i in range(10):
        places, starts = task.train.blocks.block(0, i)  # type: ignore[attr-defined]
        chosen = set(task.train.micro_batch([SampleRef(0, i)]).inputs["masked_places"].tolist())
        continues = (task.train.corpus.continues[places] == 1) & ~starts  # type: ignore[attr-defined]
        pieces += int(continues.sum())
        for position in np.flatnonzero(continues):
            assert (int(position) in chosen) == (int(position) - 1 in chosen)
    assert pieces > 0


def test_a_classifiers_labels_are_those_of_the_data_sorted(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.csv", [(f"text {i}", label) for i, label in enumerate(["10", "9", "2"] * 5)])
    assert build(tmp_path, classification_spec(train)).schema.labels == ("2", "9", "10")  # type: ignore[attr-defined]
    train = write_labelled(tmp_path / "b.csv", [(f"text {i}", label) for i, label in enumerate(["b", "a", "10"] * 5)])
    assert build(tmp_path, classification_spec(train)).schema.labels == ("10", "a", "b")  # type: ignore[attr-defined]
    given = classification_spec(train, classify={"labels": ["b", "10", "a"]})
    assert build(tmp_path, given).schema.labels == ("b", "10", "a")  # type: ignore[attr-defined]
    train = write_labelled(tmp_path / "c.csv", [(f"text {i}", "nan" if i % 2 else "none") for i in range(9)])
    given = classification_spec(train, classify={"labels": ["nan", "none"]})
    assert build(tmp_path, given).schema.labels == ("nan", "none")  # type: ignore[attr-defined]


def test_texts_are_padded_on_the_right_and_cut_to_the_longest(tmp_path: Path) -> None:
    task = build(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv")))
    lengths = task.train.lengths()
    assert lengths is not None and lengths.max() <= 16
    batch = task.train.micro_batch(refs(8))
    mask = batch.inputs["attention_mask"]
    assert mask.sum(1).tolist() == lengths[:8].tolist()
    assert batch.inputs["input_ids"].shape == (8, max(lengths[:8]))
    assert (batch.num_tokens, batch.num_positions, batch.num_units) == (int(mask.sum()), mask.numel(), 8)
    assert (batch.inputs["input_ids"][mask == 0] == task.inputs.tokenizer.pad_token_id).all()


def test_the_texts_of_a_pair_have_different_types(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,text_pair,label\n" + "".join(f"the fox,a dog,{i % 5}.5\n" for i in range(20)))
    spec = classification_spec(path, classify={"problem": "PROBLEM_REGRESSION"})
    task = build(tmp_path, spec)
    inputs = task.train.micro_batch(refs(2)).inputs
    assert set(inputs["token_type_ids"][0].tolist()) == {0, 1}
    assert inputs["labels"].dtype == torch.float32
    module = build_module(task, spec).eval()
    output = module(**inputs, return_outputs=True)
    expected = ((output.outputs["logits"][:, 0] - inputs["labels"]) ** 2).sum()
    assert output.loss_sum.item() == pytest.approx(expected.item())


def test_several_labels_are_a_row_of_zeros_and_ones(tmp_path: Path) -> None:
    rows = [("the fox", "a|b"), ("a dog", "b"), ("old trees", ""), ("near home", "c|a")] * 6
    spec = classification_spec(
        write_labelled(tmp_path / "a.csv", rows), classify={"problem": "PROBLEM_MULTI_LABEL"}, evaluation={"holdout": 0}
    )
    task = build(tmp_path, spec)
    inputs = task.train.micro_batch(refs(4)).inputs
    assert inputs["labels"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    module = build_module(task, spec).eval()
    metrics = task.metrics()
    batch = task.train.micro_batch(refs(4))
    metrics.update(batch, module(**batch.inputs, return_outputs=True))
    assert set(metrics.compute([metrics.part()])) == {"loss", "f1_micro", "f1_macro"}


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "roberta"])
@pytest.mark.parametrize("pooling", ["POOLING_MEAN", "POOLING_CLS", "POOLING_LAST"])
def test_padding_changes_nothing_and_metrics_are_put_together_over_ranks(
    tmp_path: Path, model_type: str, pooling: str
) -> None:
    spec = classification_spec(
        write_labelled(tmp_path / "a.csv"),
        small_specs.architecture(model_type) | {"dropout": 0},
        classify={"pooling": pooling},
        tokenizer={"train": {"vocabSize": 300}},
    )
    task = build(tmp_path, spec)
    module = build_module(task, spec).eval()
    metrics, halves = task.metrics(), [task.metrics(), task.metrics()]
    with torch.no_grad():
        batch = task.train.micro_batch(refs(8))
        together = module(**batch.inputs, return_outputs=True)
        metrics.update(batch, together)
        for i in range(8):
            single = task.train.micro_batch([SampleRef(0, i)])
            alone = module(**single.inputs, return_outputs=True)
            halves[i % 2].update(single, alone)
            logits = together.outputs["logits"][i : i + 1]
            torch.testing.assert_close(alone.outputs["logits"], logits, rtol=1e-4, atol=1e-5)
    expected, found = metrics.compute([metrics.part()]), metrics.compute([half.part() for half in halves])
    assert found == pytest.approx(expected, rel=1e-5)
    assert set(found) == {"loss", "accuracy", "f1_macro", "mcc"}


def test_the_held_out_rows_are_drawn_by_lot_and_are_not_trained_on(tmp_path: Path) -> None:
    rows = [(f"fox number {i}", "a" if i < 50 else "b") for i in range(100)]
    task = build(tmp_path, classification_spec(write_labelled(tmp_path / "a.csv", rows)))
    assert task.eval is not None
    assert (task.train.num_samples, task.eval.num_samples) == (90, 10)
    held = task.eval.micro_batch(refs(10)).inputs["labels"].tolist()
    assert set(held) == {0, 1}


def test_the_module_is_the_same_for_the_same_seed_whatever_was_drawn_before(tmp_path: Path) -> None:
    spec = causal_spec(write_corpus(tmp_path))
    task = build(tmp_path, spec)
    first = build_module(task, spec).state_dict()
    torch.rand(7)
    second = build_module(task, spec).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    spec.optimization.seed = 99
    other = build_module(task, spec).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_module_without_memory_counts_the_same_parameters(tmp_path: Path) -> None:
    spec = classification_spec(write_labelled(tmp_path / "a.csv"))
    task = build(tmp_path, spec)
    counted = build_module(task, spec, meta=True)
    assert all(parameter.is_meta for parameter in counted.parameters())
    real = build_module(task, spec)
    assert sum(p.numel() for p in counted.parameters()) == sum(p.numel() for p in real.parameters())


def _train(tmp_path: Path, spec: spec_pb2.JobSpec, steps: int) -> tuple[float, float]:
    task = build(tmp_path, spec)
    module = build_module(task, spec).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for step in range(steps):
        samples = [SampleRef(step // 4, (step * 16 + i) % task.train.num_samples) for i in range(16)]
        batch = task.train.micro_batch(samples)
        loss = module(**batch.inputs).loss_sum / batch.num_units
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("kind", ["causal", "masked", "classification"])
def test_each_task_learns(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    if kind == "classification":
        rows = [(s, "has fox" if "fox" in s else "none") for s in small_specs.sentences(200)]
        spec = classification_spec(write_labelled(tmp_path / "a.csv", rows))
    else:
        spec = (causal_spec if kind == "causal" else masked_spec)(write_corpus(tmp_path))
    first, last = _train(tmp_path, spec, 40)
    assert last < 0.8 * first


def test_the_same_data_for_training_and_evaluation_is_warned_of(tmp_path: Path) -> None:
    train = write_labelled(tmp_path / "a.csv")
    task = build(tmp_path, classification_spec(train, evalData={"uri": str(train)}))
    assert [warning.reason for warning in task.warnings] == ["SAME_DATA"]
