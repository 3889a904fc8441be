"""Folders of encoder-decoders that people bring: who answers with them, and what of them is trained and kept."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from helpers.pair_specs import TINY, TINY_BART, filled_with_pairs, prepared, t5_folder, translation
from helpers.plan_requests import ask, places
from helpers.small_specs import locations
from helpers.tiny_folders import WORDS, bert_tokenizer
from shardyard.v1 import model_service_pb2 as pb
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.data.sources import resolve_source
from shardyard_trainer.data.text_pair_rows import PairNames
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.inputs.sequences import Lengths, Marker, Marks, SequenceInputs, language_ids, load_sequences
from shardyard_trainer.inputs.tokenization import load_tokenizer
from shardyard_trainer.models.door import open_folder
from shardyard_trainer.models.folder import read_folder
from shardyard_trainer.models.loaded import load_model
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.model_evaluation import prepare_evaluation
from shardyard_trainer.tasks.seq2seq import PreparedSequences
from shardyard_trainer.tasks.text_writer import TextWriter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled_with_pairs(tmp_path_factory.mktemp("sequences"))


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


def multilingual(folder: Path, *, frame: str = "en_XX $A </s>") -> Path:
    """A tiny mBART, whose tokenizer puts the language first, as mBART-50's and NLLB's do, or where `frame` says."""
    words = ["[PAD]", "[UNK]", "</s>", "en_XX", "ro_RO", *WORDS]
    backend = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(["en_XX", "ro_RO"])
    backend.post_processor = processors.TemplateProcessing(single=frame, special_tokens=[("en_XX", 3), ("</s>", 2)])
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


def test_a_language_that_ends_texts_is_what_the_decoder_starts_with(root: Path) -> None:
    multilingual(root / "mbart-1", frame="$A </s> en_XX")
    spec = translation({"uri": "ROOT/mbart-1"}, tokenizer={})
    named = {"source_token": "en_XX", "target_token": "ro_RO"}
    spec["fine_tuning"] = {"translation": {"max_source_length": 6, "max_target_length": 8, **named}}
    task = prepared(root, spec)
    batch = task.train.micro_batch([SampleRef(0, 0)]).inputs
    assert batch["input_ids"][0, -2:].tolist() == [2, 3] and batch["labels"][0, -2:].tolist() == [2, 4]
    assert batch["decoder_input_ids"][0].tolist() == [4, *batch["labels"][0, :-1].tolist()]
    assert task.sampling().forced_first is None and task.inputs.writing["decoder_start_token_id"] == 4


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
    assert Marker(tokenizer, 9, 6)([2, 7, 8, 3]) == [9, 2, 7, 8, 3]
    assert Marker(tokenizer, 9, 4)([2, 7, 8, 3]) == [9, 2, 7, 3]
    assert Marker(tokenizer, None, 4)([2, 7, 3]) == [2, 7, 3]


def counted(tokenizer: Any) -> Counter[str]:
    """Counts from now on how often the tokenizer is asked for the tokens around an empty text and its vocabulary."""
    asked: Counter[str] = Counter()
    usual: Any = type(tokenizer)

    class Counted(usual):  # type: ignore[misc]
        def __call__(self, text: Any = None, *args: Any, **settings: Any) -> Any:
            asked["empty"] += isinstance(text, str) and not text
            return super().__call__(text, *args, **settings)

        def get_vocab(self) -> Any:
            asked["vocabulary"] += 1
            return super().get_vocab()

    tokenizer.__class__ = Counted
    return asked


@pytest.mark.parametrize("number", [1, 40])
def test_a_tokenizer_is_asked_for_its_languages_once_however_many_texts_there_are(number: int, tmp_path: Path) -> None:
    found = open_folder(multilingual(tmp_path / "mbart"))
    rows = [{"source": WORDS[at % 5], "target": WORDS[at % 7]} for at in range(number)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = spec_pb2.DataSource(uri=str(tmp_path / "a.jsonl"))
    tokenizer = load_tokenizer(found)
    asked = counted(tokenizer)
    pairs = load_sequences(
        resolve_source(source, locations(tmp_path)), source, PairNames(("source",), ("target",)), tokenizer,
        lengths=Lengths(8, 8), marks=Marks(3, 4), prefix="", cache_dir=tmp_path / "cache", field="spec.train_data",
    )  # fmt: skip
    assert pairs.num_pairs == number and asked["empty"] == 2
    assert [int(pairs.store.tokens[at]) for at in pairs.store.offsets[:2]] == [3, 4]

    loaded = load_model(read_folder(found), "AutoModelForSeq2SeqLM")
    trained = replace(loaded, folder=replace(loaded.folder, trained={"source_token": "ro_RO"}))
    inputs = SequenceInputs.load(found, loaded.folder)
    asked = counted(inputs.tokenizer)
    writer = TextWriter("translation", trained, inputs)
    for row in rows:
        (encoded,) = writer.read([pb.Instance(text=row["source"])])
        assert encoded.ids[0] == 4
    assert asked == {"empty": 1, "vocabulary": 1}


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
    result = ask(root, translation({"uri": f"ROOT/{folder.name}"}, tokenizer={}))
    assert not result.violations, result.violations
    assert result.plan.num_parameters == sum(parameter.numel() for parameter in module.parameters())


def test_beams_are_refused_for_a_model_that_continues_texts(root: Path) -> None:
    reply = asked(root / "gpt2", predict, "the dog", generation=pb.GenerationParameters(num_beams=2))
    assert [each.field for each in reply.violations] == ["generation.num_beams"]
