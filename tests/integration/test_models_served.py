"""Odd model folders through the service: uploaded, embedded, planned, trained and asked by the public calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import shardyard
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
