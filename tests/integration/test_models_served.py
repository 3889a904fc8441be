"""Odd model folders through the service: uploaded, embedded, planned, trained and asked by the public calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import shardyard
from helpers.folder_doors import set_config
from helpers.small_pictures import save_vit, write_folders
from helpers.tiny_folders import save_folder
from helpers.workplace import Workplace


def sentence_folder(root: Path) -> Path:
    """A folder of sentence-transformers: the first token's vector, scaled."""
    folder = save_folder(root, "BertModel")
    parts = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in parts]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return folder


def test_odd_folders_are_taken_as_they_are_by_the_service(place: Workplace) -> None:
    with shardyard.Client(place.address) as client:
        sentence = sentence_folder(place.folder / "sentence")
        vector = torch.tensor(client.upload_model(sentence).embed(["the dog"])[0].values)
        tokenizer = transformers.AutoTokenizer.from_pretrained(sentence)
        with torch.no_grad():
            model = transformers.AutoModel.from_pretrained(sentence).eval()
            states = model(**tokenizer("the dog", return_tensors="pt"))
        first = states.last_hidden_state[0, 0]
        assert torch.allclose(vector, first / first.norm(), atol=1e-5)

        deep = save_folder(place.folder / "deep", "BertForMaskedLM")
        config = json.loads((deep / "config.json").read_text())
        (deep / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
        with pytest.raises(shardyard.ShardyardError) as refused:
            client.upload_model(deep)
        assert "encoder.layer.1" in str(refused.value)

        other = save_folder(place.folder / "other", "BertForSequenceClassification", num_labels=3)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "id2label": {"0": "bad", "1": "good"}}))
        with pytest.raises(shardyard.ShardyardError) as refused:
            client.upload_model(other)
        assert "[3, 16]" in str(refused.value) and "[2, 16]" in str(refused.value)

        untied = save_folder(place.folder / "untied", "GPT2LMHeadModel", tie_word_embeddings=False)
        config = json.loads((untied / "config.json").read_text())
        (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        job = client.submit(
            shardyard.JobSpec(
                shardyard.CausalLm(sequence_length=16),
                model=untied,
                train_data=place.folder / "book.txt",
                optimization=shardyard.Optimization(max_steps=2),
            )
        ).wait(timeout=240)
        assert job.state == "succeeded"


def test_a_whole_file_is_trained_and_asked_beside_the_parts_of_an_earlier_save(place: Workplace) -> None:
    folder, earlier = (save_folder(place.folder / name, "BertForMaskedLM") for name in ("whole", "earlier"))
    other = transformers.AutoModelForMaskedLM.from_pretrained(earlier)
    torch.nn.init.normal_(other.bert.embeddings.word_embeddings.weight)
    other.save_pretrained(earlier, max_shard_size="8KB")
    for part in [*earlier.glob("model-*"), earlier / "model.safetensors.index.json"]:
        part.rename(folder / part.name)
    spec = shardyard.JobSpec(
        shardyard.MaskedLm(sequence_length=16),
        model=folder,
        train_data=place.folder / "book.txt",
        # So small a rate leaves the weights as they are.
        optimization=shardyard.Optimization(max_steps=1, learning_rate=1e-30),
    )
    with shardyard.Client(place.address) as client:
        assert "WEIGHTS_TWICE" in [warning.reason for warning in client.plan(spec).warnings]
        job = client.submit(spec)
        assert job.wait(timeout=240).state == "succeeded"
        answers = [model.predict(["the [MASK] is"])[0] for model in (client.upload_model(folder), job.model())]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = plain(**tokenizer("the [MASK] is", return_tensors="pt")).logits
    wanted, ids = logits[0, 2].softmax(-1).topk(5)
    for answer in answers:
        found = answer.masks[0]
        assert [each.token_id for each in found] == ids.tolist()
        assert [each.score for each in found] == pytest.approx(wanted.tolist(), rel=1e-4)


def test_labels_that_are_numbers_or_occur_twice_are_answered_with(place: Workplace) -> None:
    numbered = save_folder(place.folder / "numbered", "BertForSequenceClassification")
    set_config(id2label={"0": 7, "1": 9}, label2id={"7": 0, "9": 1})(numbered)
    birds = place.folder / "birds"
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=24, patch_size=8, num_labels=3, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(birds)
    set_config(id2label={"0": "crane", "1": "maillot", "2": "crane"}, label2id={"crane": 2, "maillot": 1})(birds)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (birds / "preprocessor_config.json").write_text(json.dumps(processor))
    (rose, *_) = write_folders(place.folder / "garden", 1)
    with shardyard.Client(place.address) as client:
        (answer,) = client.upload_model(numbered).predict(["a dog"])
        assert set(answer.scores) == {"7", "9"} and answer.label in answer.scores
        (answer,) = client.upload_model(birds).predict([rose])
        assert list(answer.scores) == ["crane", "maillot", "crane (2)"]


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module."])
def test_weights_below_a_wrapper_are_refused_with_what_wraps_them(place: Workplace, wrapper: str) -> None:
    folder = save_folder(place.folder / f"in-{wrapper}", "BertForMaskedLM")
    tensors = load_file(folder / "model.safetensors")
    save_file({f"{wrapper}{name}": each for name, each in tensors.items()}, folder / "model.safetensors")
    with (
        shardyard.Client(place.address) as client,
        pytest.raises(shardyard.InvalidArgument, match=f"all names of the file begin with '{wrapper}'"),
    ):
        client.upload_model(folder)


def test_pictures_that_are_not_decoded_are_refused_by_name_or_left_out_as_allowed(place: Workplace) -> None:
    folder = place.folder / "phone"
    write_folders(folder, 10)
    (folder / "rose" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    save_vit(place.folder / "vit")

    def spec(**more: float) -> shardyard.JobSpec:
        return shardyard.JobSpec(
            shardyard.ImageClassification(),
            model=place.folder / "vit",
            train_data=shardyard.Data(folder, **more),
            optimization=shardyard.Optimization(max_steps=2, global_batch_size=4),
        )

    with shardyard.Client(place.address) as client:
        with pytest.raises(shardyard.InvalidArgument, match=r"rose/IMG_1\.HEIC: not a JPEG, PNG, WebP"):
            client.plan(spec())
        plan = client.plan(spec(max_bad_rows_share=0.1))
        (told,) = [warning.message for warning in plan.warnings if warning.reason == "BAD_ROWS_LEFT_OUT"]
        assert "1 of 31" in told and "IMG_1.HEIC" in told
        job = client.submit(spec(max_bad_rows_share=0.1))
        assert job.wait(timeout=240).state == "succeeded"
        assert set(job.model().predict([folder / "rose" / "000.jpg"])[0].scores) == {"daisy", "rose", "violet"}
