"""LoRA through the service: adapters learn beside frozen weights, and leave merged with the model."""

from __future__ import annotations

import dataclasses
import random

import peft
import pytest
import torch
import transformers

import shardyard
from helpers.tiny_folders import WORDS, save_folder
from helpers.workplace import Workplace

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_adapters_are_learnt_beside_frozen_weights_and_merged(place: Workplace) -> None:
    save_folder(place.folder / "words", "BertModel")
    draw = random.Random(5)
    texts = [" ".join(draw.choices(WORDS, k=6)) for _ in range(500)]
    rows = [f'"{text}",{"has" if "dog" in text else "lacks"}' for text in texts]
    for name, part in (("dogs.csv", rows[:400]), ("held-dogs.csv", rows[400:])):
        (place.folder / name).write_text("\n".join(["text,label", *part]) + "\n")
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.TextClassification(pooling="cls"),
            model=place.folder / "words",
            train_data=place.folder / "dogs.csv",
            eval_data=place.folder / "held-dogs.csv",
            lora=shardyard.Lora(rank=4, dropout=0.05, targets=["query", "key", "value"], keep_adapter=True),
            optimization=shardyard.Optimization(epochs=10, learning_rate=2e-2, global_batch_size=20, seed=3),
            parallelism=shardyard.Parallelism(zero_stage=3),
            resources=shardyard.Resources(workers=2),
        )
        plan = client.plan(spec)
        # Six layers of 16 by 16 with two matrices of rank 4 each; the pooler and the head, which are trained whole.
        assert plan.num_trainable_parameters == 6 * 2 * 4 * 16 + (16 * 16 + 16) + (2 * 16 + 2)
        assert plan.memory is not None and plan.memory.gradients_bytes < plan.memory.parameters_bytes / 2
        # The service's own processes are on the machine of its workers.
        assert plan.memory.reserved_bytes >= 768 << 20 and plan.memory.available_bytes > 0
        assert client.submit(spec, job_id="adapters").wait(timeout=300).state == "succeeded"
        model = client.model("adapters")
        assert model.info.metrics["accuracy"] > 0.85
        assert model.info.num_parameters == plan.num_parameters - 6 * 2 * 4 * 16
        answers = model.predict(texts[400:])
        right = sum(f",{answer.label}" in row for answer, row in zip(answers, rows[400:], strict=True))
        assert right / 100 == pytest.approx(model.info.metrics["accuracy"], abs=1e-9)
        assert len(model.embed(texts[:2])) == 2
        folder = model.download(place.folder / "downloaded")
        # The merged folder is an ordinary model to go on from, and so is the one before with the adapter alone.
        head = dataclasses.replace(spec, model="model:adapters", lora=None, freeze=shardyard.Freeze(backbone=True))
        frozen = client.plan(head)
        assert frozen.num_trainable_parameters == 2 * 16 + 2
        assert "NEW_HEAD" not in [warning.reason for warning in frozen.warnings]
        kept = shardyard.Adapter(folder / "adapter", place.folder / "words")
        reasons = [warning.reason for warning in client.plan(dataclasses.replace(spec, model=kept, lora=None)).warnings]
        assert "MODEL_CONVERTED" in reasons and "NEW_HEAD" not in reasons
    base = transformers.AutoModelForSequenceClassification.from_pretrained(place.folder / "words")
    read = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = read(**tokenizer(texts[400:403], return_tensors="pt")).logits
    assert logits.flatten().tolist() == pytest.approx(
        [each for answer in answers[:3] for each in answer.logits], abs=1e-4
    )
