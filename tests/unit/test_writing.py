"""Encoder-decoders of every supported architecture: the loss, and what they write, are those of transformers itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from helpers.tiny_architectures import SIZES
from shardyard_trainer.inputs.sequences import IGNORED, sequence_batch
from shardyard_trainer.models import architectures
from shardyard_trainer.tasks.sampling import Sampling
from shardyard_trainer.tasks.seq2seq_module import Seq2SeqModule
from shardyard_trainer.tasks.writing import step, write_texts

PAD, END, VOCAB = 0, 1, 40
NEW = 12


def tiny(model_type: str, *, start: int = PAD) -> Any:
    """A model that is sure of its tokens: of wide random weights."""
    kind = transformers.CONFIG_MAPPING[model_type]
    known = kind().to_dict()
    sizes: dict[str, Any] = {name: size for name, size in SIZES.items() if isinstance(known.get(name), int)}
    names = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    sizes |= {name: size for name, size in names.items() if name in known}
    ids = {"pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 2, "decoder_start_token_id": start}
    if "decoder_vocab_size" in known:
        ids["decoder_vocab_size"] = VOCAB
    config = kind(**sizes, vocab_size=VOCAB, **ids, forced_eos_token_id=None)
    torch.manual_seed(3)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for name, bias in model.named_buffers():
            if name == "final_logits_bias":
                bias.add_(torch.randn_like(bias))
    return model


def batch(seed: int = 7) -> Any:
    draw = np.random.default_rng(seed)
    pairs = [[draw.integers(3, VOCAB, size), np.append(draw.integers(3, VOCAB, size // 2), END)] for size in (9, 4, 6)]
    return sequence_batch(pairs, padding=PAD, start=PAD)


@pytest.mark.parametrize("model_type", sorted(architectures.SEQ2SEQ))
def test_the_loss_is_that_of_transformers_logits_at_the_labels_alone(model_type: str) -> None:
    model, inputs = tiny(model_type), batch().inputs
    labels = inputs["labels"]
    assert (inputs["decoder_input_ids"] >= 0).all() and (labels == IGNORED).any()
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits = model(**given).logits.flatten(0, 1)
    for smoothing in (0.0, 0.2):
        wanted = functional.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=smoothing)
        model.zero_grad()
        wanted.backward(retain_graph=True)
        gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
        module = Seq2SeqModule(model, label_smoothing=smoothing).train()
        for each in module.modules():
            if isinstance(each, torch.nn.Dropout):
                each.p = 0.0
        for part in (model.get_encoder(), model.get_decoder()):
            for each in part.modules():
                each.training = False
        model.zero_grad()
        found = module(**inputs).loss_sum
        found.backward()
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
        for own, (name, parameter) in zip(gradients, model.named_parameters(), strict=True):
            if own is not None:
                assert parameter.grad is not None, name
                torch.testing.assert_close(parameter.grad, own, rtol=2e-4, atol=2e-4)
        module.eval()
        plain = functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        assert module(**inputs).loss_sum.item() == pytest.approx(plain.item(), rel=1e-5)


def written(model: Any, inputs: dict[str, torch.Tensor], how: Sampling, start: int) -> list[list[int]]:
    with torch.no_grad():
        parts = write_texts(partial(step, model), inputs, how, start=start)
        while True:
            try:
                next(parts)
            except StopIteration as end:
                return list(end.value)


def generated(model: Any, inputs: dict[str, torch.Tensor], start: int, **settings: Any) -> list[list[int]]:
    rows = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=NEW,
        do_sample=False,
        decoder_start_token_id=start,
        pad_token_id=PAD,
        eos_token_id=END,
        **settings,
    )
    found = [row[1:].tolist() for row in rows]
    return [row[: row.index(END)] if END in row else row for row in found]


@pytest.mark.parametrize("model_type", sorted(architectures.SEQ2SEQ))
def test_what_is_written_is_what_transformers_generates(model_type: str) -> None:
    for start in (PAD, END):
        model = tiny(model_type, start=start)
        inputs = batch().inputs
        how = Sampling(NEW, 0.0, 1.0, 0, ends=frozenset({END}), repetition_penalty=1.3)
        assert written(model, inputs, how, start) == generated(
            model, inputs, start, num_beams=1, repetition_penalty=1.3
        )


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early"),
    [(2, 1.0, False), (5, 2.5, False), (5, -1.0, False), (3, 0.0, False), (4, 1.0, True)],
)
def test_beams_are_those_of_transformers(num_beams: int, length_penalty: float, early: bool) -> None:
    model = tiny("bart")
    with torch.no_grad():
        # Texts end soon, and at different places.
        model.final_logits_bias[0, END] += 4
    lengths = set()
    for seed in range(4):
        inputs = batch(seed).inputs
        how = Sampling(
            NEW, 0.0, 1.0, 0, ends=frozenset({END}), no_repeat_ngram_size=3,
            num_beams=num_beams, length_penalty=length_penalty, stops_early=early,
        )  # fmt: skip
        settings = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early}
        wanted = generated(model, inputs, PAD, no_repeat_ngram_size=3, **settings)
        assert written(model, inputs, how, PAD) == wanted
        lengths |= {len(text) for text in wanted}
    # Without a bonus for length a text is the less likely the longer it is: here the empty one is the best.
    assert len(lengths) > 1 or length_penalty <= 0
