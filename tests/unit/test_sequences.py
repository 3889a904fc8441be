"""Pairs of texts and missing spans as an encoder and a decoder see them, what a plan says of them, and who answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from google.protobuf import json_format
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from helpers.plan_requests import ask, filled, places
from helpers.small_specs import locations, sentences
from helpers.tiny_folders import WORDS, bert_tokenizer
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.sequences import IGNORED, language_ids, marked
from shardyard_trainer.inputs.spans import num_spans, sentinel
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.tasks.model_evaluation import prepare_evaluation
from shardyard_trainer.tasks.picture_module import Kept
from shardyard_trainer.tasks.seq2seq import PreparedSequences

TINY = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
TINY_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
FRESH = {"architecture": {"modelType": "t5", "overrides": TINY}}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = filled(tmp_path_factory.mktemp("sequences"))
    rows = [{"source": text, "target": " ".join(reversed(text.split()))} for text in sentences(80)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    t5_folder(root / "t5")
    return root


def t5_folder(folder: Path, kind: str = "T5ForConditionalGeneration") -> Path:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, **TINY
    )
    getattr(transformers, kind)(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def translation(model: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "fine_tuning": {"translation": {}},
        "model": model or FRESH,
        "tokenizer": {"train": {"vocabSize": 300}},
        "train_data": {"uri": "ROOT/pairs.jsonl"},
        "optimization": {"max_steps": 10},
    }
    return spec | changes


def spans(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "pretraining": {"span_corruption": {"sequence_length": 64}},
        "model": FRESH,
        "tokenizer": {"train": {"vocabSize": 400}},
        "train_data": {"uri": "ROOT/corpus.txt"},
        "optimization": {"max_steps": 10},
    }
    return spec | changes


def prepared(root: Path, spec: dict[str, Any]) -> Any:
    text = json.dumps(spec).replace("ROOT", str(root))
    return prepare(json_format.Parse(text, spec_pb2.JobSpec()), locations(root))


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


def asked(folder: Path, call: Any, *texts: str, **fields: Any) -> Any:
    instances = [pb.Instance(text=text) for text in texts]
    if call is predict:
        request = pb.PredictRequest(model="projects/default/models/m", instances=instances, **fields)
        question: Any = worker_pb2.PredictCall(folder=str(folder), request=request, max_response_bytes=10**6)
        return worker_pb2.PredictReply.FromString(predict(question.SerializeToString()))
    request = pb.EmbedRequest(model="projects/default/models/m", instances=instances, **fields)
    question = worker_pb2.EmbedCall(folder=str(folder), request=request, max_response_bytes=10**6)
    return worker_pb2.EmbedReply.FromString(embed(question.SerializeToString()))


def test_an_uploaded_t5_writes_and_its_encoder_gives_vectors(root: Path, tmp_path: Path) -> None:
    result = worker_pb2.InspectModelResult.FromString(
        inspect_model(worker_pb2.InspectModelRequest(folder=str(root / "t5")).SerializeToString())
    )
    assert not result.violations and result.model.task == "translation"
    texts = ["the dog is cute", "a film", "the cat sleeps"]
    beams = pb.GenerationParameters(max_new_tokens=6, num_beams=3)
    reply = asked(root / "t5", predict, *texts, generation=beams)
    assert not reply.violations
    model = transformers.T5ForConditionalGeneration.from_pretrained(root / "t5").eval()
    tokenizer = bert_tokenizer()
    for text, prediction in zip(texts, reply.response.predictions, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        rows = model.generate(inputs["input_ids"], max_new_tokens=6, num_beams=3)
        assert prediction.generated_text == tokenizer.decode(rows[0], skip_special_tokens=True).strip()
    wanted = model.get_encoder()(input_ids=tokenizer(texts[0], return_tensors="pt")["input_ids"]).last_hidden_state
    for folder in (root / "t5", t5_folder(tmp_path / "bare", "T5Model")):
        vectors = asked(folder, embed, texts[0], output=spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE)
        assert not vectors.violations
        assert list(vectors.response.embeddings[0].shape) == [6, 16]
    vectors = asked(root / "t5", embed, texts[0], output=spec_pb2.FeatureExtraction.OUTPUT_LAST_HIDDEN_STATE)
    found = torch.tensor(vectors.response.embeddings[0].values)
    torch.testing.assert_close(found, wanted[0].flatten(), rtol=1e-4, atol=1e-5)
    refused = asked(root / "t5", predict, "a", generation=pb.GenerationParameters(num_beams=2, temperature=1))
    assert [each.field for each in refused.violations] == ["generation.temperature"]


def multilingual(folder: Path) -> Path:
    """A tiny mBART, whose tokenizer puts the language first, as mBART-50's and NLLB's do."""
    words = ["[PAD]", "[UNK]", "</s>", "en_XX", "ro_RO", *WORDS]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["en_XX", "ro_RO"])
    backend.post_processor = processors.TemplateProcessing(
        single="en_XX $A </s>", special_tokens=[("en_XX", 3), ("</s>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    config = transformers.MBartConfig(
        vocab_size=len(words), pad_token_id=0, eos_token_id=2, bos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2, max_position_embeddings=32, **TINY_BART,
    )  # fmt: skip
    transformers.MBartForConditionalGeneration(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_multilingual_model_reads_and_writes_with_the_tokens_of_its_languages(root: Path) -> None:
    multilingual(root / "mbart")
    spec = translation({"uri": "ROOT/mbart"}, tokenizer={})
    spec["fine_tuning"] = {"translation": {"max_source_length": 6, "max_target_length": 8}}
    assert places(ask(root, spec)) == [("spec.fine_tuning.translation.source_token", "SPEC_INVALID")]
    tokens = {"source_token": "ro_RO", "target_token": "en_YY"}
    spec["fine_tuning"]["translation"] |= tokens
    (violation,) = ask(root, spec).violations
    assert violation.field == "spec.fine_tuning.translation.target_token" and "did you mean en_XX?" in violation.message
    spec["fine_tuning"]["translation"] |= {"source_token": "en_XX", "target_token": "ro_RO"}
    task = prepared(root, spec)
    batch = task.train.micro_batch([SampleRef(0, at) for at in range(4)]).inputs
    assert batch["input_ids"][:, 0].tolist() == [3] * 4 and batch["labels"][:, 0].tolist() == [4] * 4
    assert batch["decoder_input_ids"][:, :2].tolist() == [[2, 4]] * 4
    assert task.sampling().forced_first == 4 and task.describe()["target_token"] == "ro_RO"
    module = build_module(task, spec_pb2.JobSpec()).eval()
    with torch.no_grad():
        written = task.write(module, task.train.micro_batch([SampleRef(0, 0)]), bool)
    assert written[0][0] == 4


def test_a_marian_with_its_two_vocabularies_is_refused_by_name(root: Path) -> None:
    folder = root / "marian"
    folder.mkdir()
    config = transformers.MarianConfig(vocab_size=30, pad_token_id=29, decoder_start_token_id=29, **TINY_BART)
    transformers.MarianMTModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({f"w{at}": at for at in range(30)}))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(b"")
    (violation,) = ask(root, translation({"uri": "ROOT/marian"}, tokenizer={})).violations
    assert violation.reason == "TOKENIZER_MISSING" and "a marian has two vocabularies" in violation.message


def test_a_model_is_evaluated_with_the_lengths_and_the_prefix_of_its_training(root: Path) -> None:
    about = {"format": 1, "task": "translation", "max_length": 9, "max_target_length": 7, "source_prefix": "the "}
    (t5_folder(root / "trained") / "shardyard.json").write_text(json.dumps(about))
    spec = spec_pb2.JobSpec(model=spec_pb2.ModelSource(uri=str(root / "trained")))
    spec.model_evaluation.data.uri = str(root / "pairs.jsonl")
    task = prepare_evaluation(spec, locations(root)).task
    assert isinstance(task, PreparedSequences)
    assert (task.lengths.source, task.lengths.target, task.sampling().max_new_tokens) == (9, 7, 7)
    assert task.eval is not None and task.eval.num_samples == 80
    batch = task.eval.micro_batch([SampleRef(0, 0)]).inputs
    assert batch["input_ids"][0, 1] == task.inputs.tokenizer.convert_tokens_to_ids("the")


def test_a_token_of_a_language_takes_the_place_of_the_tokenizers_own_or_comes_first() -> None:
    tokenizer = bert_tokenizer()
    assert language_ids(tokenizer) == frozenset()
    assert marked([2, 7, 8, 3], 9, tokenizer, 6) == [9, 2, 7, 8, 3]
    assert marked([2, 7, 8, 3], 9, tokenizer, 4) == [9, 2, 7, 3]
    assert marked([2, 7, 3], None, tokenizer, 4) == [2, 7, 3]


@pytest.mark.parametrize("kind", ["T5", "MT5", "UMT5"])
def test_an_output_layer_of_its_own_is_trained_and_kept(kind: str, root: Path, tmp_path: Path) -> None:
    """As T5 1.1, FLAN-T5 and mT5 have one: their output is not their embeddings, and not scaled."""
    tokenizer, folder = bert_tokenizer(), root / f"{kind.lower()}-own"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu", **TINY,
    )  # fmt: skip
    cls = getattr(transformers, f"{kind}ForConditionalGeneration")
    state = {name: tensor.clone() for name, tensor in cls(config).state_dict().items() if "embed_tokens" not in name}
    state["lm_head.weight"] = torch.randn_like(state["lm_head.weight"])
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**config.to_dict(), "tie_word_embeddings": False, "architectures": [cls.__name__]}
    values.pop("scale_decoder_outputs", None)
    (folder / "config.json").write_text(json.dumps(values))
    tokenizer.save_pretrained(folder)
    task = prepared(root, translation({"uri": f"ROOT/{folder.name}"}, tokenizer={}))
    module = build_module(task, spec_pb2.JobSpec()).eval()
    inputs = task.train.micro_batch([SampleRef(0, at) for at in range(4)]).inputs
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    logits = cls.from_pretrained(folder).eval()(**given).logits
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
    assert module(**inputs).loss_sum.item() == pytest.approx(plain.item(), rel=1e-5)
    assert not ask(root, translation({"uri": f"ROOT/{folder.name}"}, tokenizer={})).violations


def test_beams_are_refused_for_a_model_that_continues_texts(root: Path) -> None:
    reply = asked(root / "gpt2", predict, "the dog", generation=pb.GenerationParameters(num_beams=2))
    assert [each.field for each in reply.violations] == ["generation.num_beams"]
