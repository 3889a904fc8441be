"""Models of the Hub, of data roots and of uploads through the public calls of a real service."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import shardyard
from helpers.adapters import adapt
from helpers.ggufs import write_llama
from helpers.loopback_hub import COMMIT, MODEL, loopback_hub
from helpers.served import served
from helpers.small_specs import sentences, shared_data
from helpers.tiny_folders import WORDS, gpt2_tokenizer, save_folder

JOB_S = 240.0
GARDEN = Path(__file__).parents[1] / "checkpoints"
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@dataclass(frozen=True)
class Place:
    """A folder under a data root, files outside it, and the service's address."""

    root: Path
    outside: Path
    address: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("folders")
    (folder / "outside").mkdir()
    root = folder / "root"
    root.mkdir()
    rows = [(f"the {word} dog is {label}", label) for word in ("very", "not", "my") for label in ("good", "bad") * 8]
    with (root / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (root / "book.txt").write_text("\n".join(sentences(200)))
    with loopback_hub(save_folder(folder / "bert", "BertModel")) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        with served(folder / "service", "local", "--data-root", str(root), environment=environment) as service:
            yield Place(root, folder / "outside", service.address)


def spec(place: Place, model: Any, **changes: Any) -> shardyard.JobSpec:
    return shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=model,
        train_data=f"server:{place.root / 'reviews.csv'}",
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=8),
        **changes,
    )


def snapshot(root: Path, source: Path) -> Path:
    """A model as the Hub's cache keeps it: a folder of links into the blobs beside it."""
    blobs, folder = root / "models--me--bert/blobs", root / f"models--me--bert/snapshots/{COMMIT}"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return folder


def test_a_hub_model_is_planned_trained_and_asked(place: Place) -> None:
    with shardyard.Client(place.address) as client:
        plan = client.plan(spec(place, f"hub:{MODEL}"))
        assert plan.resolved_spec["model"]["hub"] == {"id": MODEL, "revision": COMMIT}
        job = client.submit(spec(place, f"hub:{MODEL}"), job_id="from-the-hub")
        assert job.wait(timeout=JOB_S).state == "succeeded"
        (prediction,) = job.model().predict(["my dog is good"])
        assert prediction.label in {"good", "bad"}


def test_a_tensorflow_checkpoint_is_planned_trained_exported_and_asked(place: Place, tmp_path: Path) -> None:
    shutil.copytree(shared_data("tf1_bert_tiny"), place.root / "tf1")
    model = shardyard.TensorflowCheckpoint(str(place.root / "tf1/bert_model.ckpt"), dropout=0.0)
    wanted = spec(place, model, resources=shardyard.Resources(workers=2))
    with shardyard.Client(place.address) as client:
        plan = client.plan(wanted)
        assert plan.resolved_spec["model"]["checkpoint"] == {"uri": str(place.root / "tf1/bert_model.ckpt.index")}
        (note,) = [each.message for each in plan.warnings if each.reason == "MODEL_CONVERTED"]
        assert "92 slots of the optimizer" in note
        job = client.submit(wanted, job_id="from-tensorflow")
        assert job.wait(timeout=JOB_S).state == "succeeded"
        texts = ["all work and no play", "makes jack a dull boy"]
        answers = job.model().predict(texts)
        folder = job.model().download(tmp_path / "exported")
    assert "the TensorFlow checkpoint `bert_model.ckpt.index`" in (folder / "README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    exported = transformers.BertModel.from_pretrained(folder).eval()
    assert exported.config.num_hidden_layers == 2 and exported.config.hidden_act == "gelu"
    assert tokenizer.tokenize(texts[1]) == ["makes", "jack", "a", "dull", "boy"]
    assert all(answer.label in {"good", "bad"} and set(answer.scores) == {"good", "bad"} for answer in answers)


def test_an_adapter_and_its_base_are_planned_trained_exported_and_asked(place: Place, tmp_path: Path) -> None:
    base, texts = save_folder(tmp_path / "base", "BertModel"), ["my dog is good", "the film is not bad"]
    lora = {"num_labels": 2, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    beside = adapt(tmp_path / "lora", base, "AutoModelForSequenceClassification", **lora)
    with torch.inference_mode():
        asked = transformers.AutoTokenizer.from_pretrained(base)(texts, padding=True, return_tensors="pt")
        expected = beside(**asked).logits.softmax(dim=1)
    (place.root / "kept.csv").write_text(
        (place.root / "reviews.csv").read_text().replace(",good", ",LABEL_0").replace(",bad", ",LABEL_1")
    )
    wanted = shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=shardyard.Adapter(tmp_path / "lora", f"hub:{MODEL}", dropout=0.0),
        train_data=f"server:{place.root / 'kept.csv'}",
        # So small a rate that what is exported is still what the adapter and its base say.
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=8, learning_rate=1e-9),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(place.address) as client:
        plan = client.plan(wanted)
        assert plan.resolved_spec["model"]["adapter"]["base"]["hub"] == {"id": MODEL, "revision": COMMIT}
        (note,) = [each.message for each in plan.warnings if each.reason == "MODEL_CONVERTED"]
        assert "merged from a LoRA adapter" in note and "4 layers changed, 2 tensors replaced" in note
        job = client.submit(wanted, job_id="adapted")
        assert job.wait(timeout=JOB_S).state == "succeeded"
        answers = job.model().predict(texts)
        folder = job.model().download(tmp_path / "exported")
        (tmp_path / "lora/adapter_config.json").write_text('{"peft_type": "IA3"}')
        with pytest.raises(shardyard.InvalidArgument) as caught:
            client.plan(wanted)
    found = torch.tensor([[answer.scores[f"LABEL_{label}"] for label in range(2)] for answer in answers])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert "with the LoRA adapter of `projects/default/datasets/" in (folder / "README.md").read_text()
    (violation,) = caught.value.violations
    assert violation.field == "job.spec.model.adapter" and "only LORA is read" in violation.message


def test_a_transformer_of_model_garden_learns_to_translate(place: Place, tmp_path: Path) -> None:
    shutil.copytree(GARDEN / "transformer", place.root / "transformer")
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = Tokenizer(
        WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, **{c: i + 3 for i, c in enumerate(letters)}}, "<unk>")
    )
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(place.root / "transformer")
    rows = [[letters[(7 * row + step) % 26] for step in range(4)] for row in range(60)]
    with (place.root / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("source", "target"), *((" ".join(row), " ".join(row[::-1])) for row in rows)])
    wanted = shardyard.JobSpec(
        shardyard.Translation(),
        model=shardyard.TensorflowCheckpoint(str(place.root / "transformer")),
        train_data=f"server:{place.root / 'pairs.csv'}",
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=8),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(place.address) as client:
        job = client.submit(wanted, job_id="from-a-transformer")
        assert job.wait(timeout=JOB_S).state == "succeeded"
        assert len(job.model().predict(["a b c d"])) == 1
        folder = job.model().download(tmp_path / "exported")
        # The service's own module makes the model, never the file beside the weights.
        (folder / "garden_transformer.py").write_text("raise RuntimeError")
        assert client.upload_model(folder).info.task == "translation"


def test_a_gguf_file_is_trained_and_an_uploaded_one_answers(place: Place, tmp_path: Path) -> None:
    write_llama(place.root / "gguf/tiny.gguf", quantised=True)
    with shardyard.Client(place.address) as client:
        uploaded = client.upload_model(place.root / "gguf")
        assert (uploaded.info.model_type, uploaded.info.task) == ("llama", "causal_lm")
        assert len(uploaded.predict(["the dog"], max_new_tokens=2)) == 1
        for number, model in enumerate((f"server:{place.root / 'gguf'}", uploaded)):
            job = client.submit(spec(place, model), job_id=f"from-gguf-{number}")
            assert job.wait(timeout=JOB_S).state == "succeeded"
        folder = job.model().download(tmp_path / "exported")
    assert (folder / "model.safetensors").is_file() and not list(folder.glob("*.gguf"))


def test_an_incomplete_gguf_file_is_refused_at_every_door(place: Place) -> None:
    folder = place.root / "cut gguf"
    write_llama(folder / "Tiny 1B.GGUF", more={"blk.1.ffn_up.weight": None})
    with shardyard.Client(place.address) as client:
        said = r"Tiny 1B\.GGUF lacks 1 tensors of a llama .*layers\.1\.mlp\.up_proj"
        with pytest.raises(shardyard.InvalidArgument, match=said):
            client.upload_model(folder)
        with pytest.raises(shardyard.InvalidArgument, match=said):
            client.plan(spec(place, f"server:{folder}"))
        write_llama(folder / "Tiny 1B.GGUF", vocabulary=lambda _writer: None)
        with pytest.raises(
            shardyard.InvalidArgument, match=r"Tiny 1B\.GGUF has no vocabulary: put the tokenizer\.json"
        ):
            client.upload_model(folder)
        table = np.ones((257, 32), dtype=np.float32)
        write_llama(folder / "Tiny 1B.GGUF", vocabulary=lambda _writer: None, more={"token_embd.weight": table})
        gpt2_tokenizer().save_pretrained(folder)
        assert len(client.upload_model(folder).predict(["the dog"], max_new_tokens=2)) == 1


def test_a_cached_snapshot_under_a_data_root_is_a_model_and_a_tokenizer(place: Place, tmp_path: Path) -> None:
    folder = snapshot(place.root / "hub-cache", save_folder(tmp_path / "bert", "BertModel"))
    with shardyard.Client(place.address) as client:
        plan = client.plan(spec(place, f"server:{folder}", tokenizer=f"server:{folder}"))
        assert plan.num_parameters > 0


TOKENIZERS = ["hub", "uri", "model", "dataset"]


@pytest.mark.parametrize("source", TOKENIZERS)
def test_a_tokenizer_comes_from_each_of_its_sources(place: Place, tmp_path: Path, source: str) -> None:
    folder = save_folder(place.root / f"tokenizer-{source}", "BertModel")
    (folder / "tokenizer.json").unlink()
    words = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    with shardyard.Client(place.address) as client:
        tokenizer = {
            "hub": lambda: f"hub:{MODEL}",
            "uri": lambda: f"server:{folder}",
            "model": lambda: f"model:{client.upload_model(folder).id}",
            "dataset": lambda: f"dataset:{client.upload_dataset(folder).id}",
        }[source]()
        plan = client.plan(spec(place, shardyard.Architecture("bert", SIZES), tokenizer=tokenizer))
        assert plan.resolved_spec is not None and source in plan.resolved_spec["tokenizer"]
        assert plan.num_train_samples > 0


def linked_out(folder: Path, outside: Path, name: str) -> None:
    (folder / name).replace(outside / name)
    (folder / name).symlink_to(outside / name)


LINKS = ["model.safetensors", "tokenizer.json", "config.json", "deep"]


@pytest.mark.parametrize("source", ["model", "tokenizer"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_the_data_root_is_refused_at_any_depth(
    place: Place, tmp_path: Path, name: str, source: str
) -> None:
    folder = save_folder(place.root / f"links-{source}-{name}", "BertModel")
    good = save_folder(place.root / f"good-{source}-{name}", "BertModel")
    if name == "deep":
        (folder / "a/b").mkdir(parents=True)
        (folder / "a/b/c").symlink_to(place.outside)
    else:
        linked_out(folder, tmp_path, name)
    chosen = {"model": good, "tokenizer": good, source: folder}
    with shardyard.Client(place.address) as client, pytest.raises(shardyard.InvalidArgument) as caught:
        client.plan(spec(place, f"server:{chosen['model']}", tokenizer=f"server:{chosen['tokenizer']}"))
    assert caught.value.violations[0].field == f"job.spec.{source}.uri"
    assert "link out" in caught.value.violations[0].message
    assert str(tmp_path) not in str(caught.value)


def changed(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**content, **values}))


ROUTES = ["vocab", "vocab_file", "merges", "merges_file", "tokenizer_file", "name_or_path", "spm_file", "init_inputs"]


@pytest.mark.parametrize("door", ["upload", "uri", "tokenizer"])
def test_no_setting_of_a_folder_makes_the_service_read_another_file(place: Place, tmp_path: Path, door: str) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("\n".join(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "hunter2"]))
    folder = save_folder(place.root / f"routes-{door}", "BertModel")
    (folder / "tokenizer.json").unlink()
    changed(folder, "tokenizer_config.json", tokenizer_class="BertTokenizer", **dict.fromkeys(ROUTES, str(secret)))
    os.utime(secret, (1, 1))
    with shardyard.Client(place.address) as client, pytest.raises(shardyard.ShardyardError) as caught:
        if door == "upload":
            client.upload_model(folder)
        elif door == "uri":
            client.plan(spec(place, f"server:{folder}"))
        else:
            good = save_folder(place.root / "routes-good", "BertModel")
            client.plan(spec(place, f"server:{good}", tokenizer=f"server:{folder}"))
    assert "tokenizer.json" in str(caught.value) and "hunter2" not in str(caught.value)
    assert secret.stat().st_atime == 1, "it was opened"


def test_a_deberta_as_its_authors_publish_it_answers_as_transformers_does(place: Place, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "deberta", "BertModel")
    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        **SIZES, vocab_size=5 + len(WORDS), type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"],
        position_biased_input=False, share_att_key=True, position_buckets=8, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    model = transformers.DebertaV2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with shardyard.Client(place.address) as client, torch.inference_mode():
        uploaded = client.upload_model(folder)
        for text in ("the dog is cute", "not a good film"):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert uploaded.predict([text])[0].logits == pytest.approx(
                model(input_ids=ids).logits[0].tolist(), abs=1e-5
            )


def test_an_uploaded_folder_with_strange_settings_is_read_by_its_known_ones(place: Place, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "strange", "BertForMaskedLM")
    changed(folder, "config.json", _name_or_path="/etc/passwd", transformers_weights="/etc/passwd", to_dict=5)
    changed(folder, "config.json", attn_implementation="somebody/kernels", fusion_config={"a": True})
    changed(folder, "generation_config.json", cache_config={"a": "/etc"}, transformers_version="0.0")
    with shardyard.Client(place.address) as client:
        (prediction,) = client.upload_model(folder).predict(["the [MASK] is cute"])
        assert prediction.masks
