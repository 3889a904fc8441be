"""Small inputs that people really have (`shared/cases`), each through the public calls of one real service."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

import shardyard
from helpers.served import BIN, Served, served
from helpers.small_specs import OVERRIDES, sentences, shared_data

pytestmark = pytest.mark.prove

JOB_S = 300.0
BERT = shardyard.Architecture("bert", OVERRIDES["bert"])
BYTES = shardyard.TrainedTokenizer("byte_bpe", 300)
TWO_STEPS = shardyard.Optimization(max_steps=2, global_batch_size=4)


@pytest.fixture(scope="module")
def cases() -> Path:
    return shared_data("../cases").resolve()


@pytest.fixture(scope="module")
def service(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = ["--data-root", str(cases), "--data-root", str(tmp_path_factory.getbasetemp())]
    with served(tmp_path_factory.mktemp("service"), "local", *data) as found:
        yield found


@pytest.fixture
def client(service: Served) -> Iterator[shardyard.Client]:
    with shardyard.Client(service.address) as found:
        yield found


def labelled(train: Path, *, model: Any = BERT, **task: Any) -> shardyard.JobSpec:
    """Texts and their classes; a folder of a model has a tokenizer of its own."""
    return shardyard.JobSpec(
        shardyard.TextClassification(**task),
        model=model,
        tokenizer=BYTES if model is BERT else None,
        train_data=train,
        optimization=TWO_STEPS,
    )


def language(task: Any, model: Any, train: Path, tokenizer: Any = None) -> shardyard.JobSpec:
    """Two steps of pretraining."""
    return shardyard.JobSpec(task, model=model, tokenizer=tokenizer, train_data=train, optimization=TWO_STEPS)


def on_server(path: Path) -> str:
    return f"server:{path}"


def reasons(plan: shardyard.Plan) -> list[str]:
    return [warning.reason for warning in plan.warnings]


def finished(client: shardyard.Client, spec: shardyard.JobSpec) -> shardyard.Model:
    """The model of the job, once it has succeeded."""
    job = client.submit(spec)
    assert job.wait(timeout=JOB_S).state == "succeeded"
    return job.model()


def corpus(folder: Path) -> Path:
    (folder / "corpus.txt").write_text("\n".join(sentences(60)) + "\n")
    return folder / "corpus.txt"


@pytest.mark.parametrize("name", ["comma.csv", "json-list.csv", "onehot-columns.csv", "multi-hot.jsonl"])
def test_01_every_layout_of_several_labels_gives_the_same_classes(
    client: shardyard.Client, cases: Path, name: str
) -> None:
    spec = labelled(cases / "01-multi-label-layouts" / name, problem="multi_label")
    labels = client.plan(spec).labels
    assert set(labels) == ({"0", "1", "2"} if name == "multi-hot.jsonl" else {"sports", "politics", "health"})


def test_02_a_sentence_transformers_folder_answers_as_it_says(client: shardyard.Client, cases: Path) -> None:
    folder = cases / "02-sentence-transformers-pooling/model"
    text = "the quick brown fox"
    vector = client.upload_model(folder).embed([text])[0].values
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        first = model(**tokens).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(vector, first / np.linalg.norm(first), atol=1e-5)


def test_03_an_eager_model_is_trained_with_documents_apart(
    client: shardyard.Client, cases: Path, tmp_path: Path
) -> None:
    folder = cases / "03-eager-attention"
    plain = shutil.copytree(folder / "model", tmp_path / "plain")
    settings = json.loads((plain / "config.json").read_text())
    assert settings.pop("attn_implementation") == "eager"
    (plain / "config.json").write_text(json.dumps(settings))
    losses = []
    for model in (folder / "model", plain):
        spec = language(shardyard.MaskedLm(sequence_length=32), on_server(model), folder / "corpus.txt")
        assert "DOCUMENTS_NOT_SEPARATED" not in reasons(client.plan(spec))
        job = client.submit(spec)
        job.wait(timeout=JOB_S)
        losses.append([point.value for point in job.metrics("loss")["loss"].points])
    # With the attention of the settings, neighbouring documents of a window would change the losses.
    assert len(losses[0]) == 2 and losses[0] == losses[1]


def test_04_one_label_is_judged_by_its_own_f1(client: shardyard.Client, cases: Path) -> None:
    spec = labelled(cases / "04-one-label-f1/one.jsonl", problem="multi_label")
    metrics = finished(client, spec).info.metrics
    assert metrics["f1_micro"] == 0.0, "no model finds one text in twenty after two steps"


def test_05_an_output_layer_of_its_own_is_kept(client: shardyard.Client, cases: Path, tmp_path: Path) -> None:
    folder = cases / "05-tied-config-own-lm-head/model"
    spec = language(shardyard.CausalLm(sequence_length=32), on_server(folder), corpus(tmp_path))
    assert "OUTPUT_LAYER_UNTIED" in reasons(client.plan(spec))
    exported = finished(client, spec).download(tmp_path / "exported")
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is False
    with safe_open(exported / "model.safetensors", "pt") as file:
        assert any("lm_head" in name or "embed_out" in name for name in file.keys())  # noqa: SIM118


def test_06_ids_may_have_gaps(client: shardyard.Client, cases: Path) -> None:
    folder = cases / "06-tokenizer-with-a-gap"
    spec = language(
        shardyard.CausalLm(sequence_length=32),
        shardyard.Architecture("gpt2", OVERRIDES["gpt2"]),
        folder / "corpus.txt",
        on_server(folder / "tokenizer"),
    )
    assert finished(client, spec).predict(["the "], max_new_tokens=3)[0].text


def test_07_a_column_that_nobody_asked_for_is_left_alone(client: shardyard.Client, cases: Path) -> None:
    plan = client.plan(labelled(cases / "07-parquet-columns-nobody-asked-for/far-date.parquet"))
    assert plan.num_train_samples > 0 and len(plan.labels) > 1


@pytest.mark.parametrize("name", ["nohead", "nohead3"])
def test_08_a_head_without_weights_is_a_new_one(client: shardyard.Client, cases: Path, name: str) -> None:
    folder = cases / "08-heads-that-are-not-there"
    spec = labelled(folder / "c.csv", model=on_server(folder / name))
    plan = client.plan(spec)
    assert "NEW_HEAD" in reasons(plan) and plan.labels == ("neg", "pos")
    assert finished(client, spec).predict(["the quick brown fox"])[0].label in ("neg", "pos")


def test_09_weights_that_the_model_does_not_read_are_refused(
    client: shardyard.Client, cases: Path, tmp_path: Path
) -> None:
    folder = cases / "09-backbone-tensors-not-read/model"
    with pytest.raises(shardyard.ShardyardError, match="distance_embedding"):
        client.plan(language(shardyard.MaskedLm(sequence_length=32), on_server(folder), corpus(tmp_path)))
    with pytest.raises(shardyard.ShardyardError, match="distance_embedding"):
        client.upload_model(folder)


@pytest.mark.parametrize("name", ["codegen", "xlm"])
def test_10_architectures_with_ways_of_their_own_train_and_answer(
    client: shardyard.Client, cases: Path, tmp_path: Path, name: str
) -> None:
    task = {"codegen": shardyard.CausalLm, "xlm": shardyard.MaskedLm}[name](sequence_length=16)
    model = finished(client, language(task, on_server(cases / "10-codegen-xlm" / name), corpus(tmp_path)))
    assert np.isfinite(model.embed(["the quick brown fox"])[0].values).all()


def test_11_settings_of_generation_are_kept(client: shardyard.Client, cases: Path, tmp_path: Path) -> None:
    folder = cases / "11-generation-config/model"
    model = finished(client, language(shardyard.CausalLm(sequence_length=16), on_server(folder), corpus(tmp_path)))
    exported = json.loads((model.download(tmp_path / "exported") / "generation_config.json").read_text())
    given = json.loads((folder / "generation_config.json").read_text())
    assert given == {name: exported.get(name) for name in given}


def test_12_the_order_of_the_heads_labels_is_taken(client: shardyard.Client, cases: Path) -> None:
    folder = cases / "12-label-order"
    plan = client.plan(labelled(folder / "c.csv", model=on_server(folder / "order")))
    assert plan.labels == ("pos", "neg") and "NEW_HEAD" not in reasons(plan)
    plan = client.plan(labelled(folder / "c3.csv", model=on_server(folder / "numlabels")))
    assert len(plan.labels) == 3 and "NEW_HEAD" not in reasons(plan)


@pytest.mark.parametrize("name", ["mixed", "mixed2", "mixed3"])
def test_13_labels_that_look_alike_are_one(client: shardyard.Client, cases: Path, name: str) -> None:
    plan = client.plan(labelled(cases / "13-lookalike-labels" / name))
    assert len(plan.labels) == 2 and "LOOKALIKE_LABELS" in reasons(plan)


def test_14_a_space_before_a_quote_belongs_to_no_label(client: shardyard.Client, cases: Path) -> None:
    plan = client.plan(labelled(cases / "14-csv-space-before-quote/space.csv"))
    assert plan.labels == ("neg", "pos") and plan.num_train_samples == 2


@pytest.mark.parametrize(
    ("name", "labels", "rows"), [("pretty.json", ("0", "1"), 4), ("rows.jsonl.gz", ("neg", "pos"), 40)]
)
def test_15_lists_and_packed_files_are_read(
    client: shardyard.Client, cases: Path, name: str, labels: tuple[str, ...], rows: int
) -> None:
    plan = client.plan(labelled(cases / "15-other-containers" / name))
    assert plan.labels == labels and plan.num_train_samples + plan.num_eval_samples == rows


def test_16_capitals_are_kept_and_cut_texts_are_said(client: shardyard.Client, cases: Path, tmp_path: Path) -> None:
    folder = cases / "16-unknown-words-and-cut-texts"
    plan = client.plan(labelled(folder / "long.csv"))
    assert "TEXTS_CUT" in reasons(plan) and plan.train_stats is not None and plan.train_stats.cut_share > 0.9
    known, unknown = tmp_path / "known.csv", tmp_path / "unknown.csv"
    known.write_text("text,label\n" + "The Dog runs In Berlin .,a\nthe Dog runs .,b\n" * 4)
    unknown.write_text("text,label\n" + "the cat sleeps,a\na Dog eats,b\n" * 4)
    plan = client.plan(labelled(known, model=on_server(folder / "cased")))
    assert "UNKNOWN_TOKENS" not in reasons(plan) and plan.train_stats is not None
    assert plan.train_stats.unknown_share == 0.0
    assert "UNKNOWN_TOKENS" in reasons(client.plan(labelled(unknown, model=on_server(folder / "cased"))))


@pytest.mark.parametrize(
    ("source", "name"), [("test_sentencepiece_bpe.model", "sentencepiece.bpe.model"), ("spiece.model", "spm.model")]
)
def test_17_a_folder_with_a_sentencepiece_file_alone_is_a_model(
    client: shardyard.Client, tmp_path: Path, source: str, name: str
) -> None:
    tokenizers = shared_data("tokenizers/sentencepiece")
    settings = transformers.XLMRobertaConfig(vocab_size=40_000, type_vocab_size=1, **OVERRIDES["bert"])
    transformers.XLMRobertaModel(settings).save_pretrained(tmp_path / "model")
    shutil.copy(tokenizers / source, tmp_path / "model" / name)
    train = tmp_path / "train.csv"
    train.write_text("text,label\n" + "".join(f"{text},{i % 2}\n" for i, text in enumerate(sentences(12))))
    model = finished(client, labelled(train, model=tmp_path / "model"))
    assert (model.download(tmp_path / "exported") / "tokenizer.json").is_file()
    assert model.predict(["the quick brown fox"])[0].label in ("0", "1")


def test_18_this_machine_is_reached_whatever_proxy_is_set(service: Served) -> None:
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy", "all_proxy"), "http://127.0.0.1:9")
    behind = replace(service, extra={**service.extra, **proxies})
    for command in ("jobs", "doctor"):
        done = behind.run(str(BIN / "shardyard"), command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_19_a_vocabulary_is_at_most_as_large_as_asked(client: shardyard.Client, cases: Path, tmp_path: Path) -> None:
    spec = language(
        shardyard.MaskedLm(sequence_length=16),
        BERT,
        cases / "19-vocab-size-at-most/corpus.txt",
        shardyard.TrainedTokenizer("wordpiece", 64),
    )
    exported = finished(client, spec).download(tmp_path / "exported")
    assert len(json.loads((exported / "tokenizer.json").read_text())["model"]["vocab"]) <= 64


@pytest.mark.parametrize("name", ["fnet", "yoso"])
def test_20_models_that_read_their_padding_are_refused_by_name(
    client: shardyard.Client, cases: Path, name: str
) -> None:
    with pytest.raises(shardyard.InvalidArgument, match=name):
        client.plan(labelled(cases / "08-heads-that-are-not-there/c.csv", model=shardyard.Architecture(name, {})))
