"""The way that others take: a BERT fine-tuned by transformers' `Trainer` inside Ray Train's `TorchTrainer`.

    python bench/ray_train_job.py WORKLOAD.json STAMP [--plain]

Appends the wall-clock time at which the first training step was done to the file STAMP. `--plain`: without Ray.
Submitted by `ray job submit`, so it is self-contained and imports only files of the bench beside it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(workload_file: str, stamp: str, *, plain: bool) -> None:
    """Run the training once, in this process or as two workers of Ray Train."""
    config = {"workload": json.loads(Path(workload_file).read_text(encoding="utf-8")), "stamp": stamp}
    if plain:
        train(config)
        return
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    TorchTrainer(
        train,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=config["workload"]["workers"]),
        run_config=RunConfig(storage_path=config["workload"]["folder"]),
    ).fit()


def train(config: dict[str, Any]) -> None:
    """A few steps of `Trainer` as its documentation uses it."""
    import csv

    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    workload, stamp = config["workload"], config["stamp"]

    class Stamp(TrainerCallback):
        """Writes down when the first step was done."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Once, by the first rank."""
            if state.global_step == 1 and state.is_world_process_zero:
                with Path(stamp).open("a", encoding="utf-8") as file:
                    file.write(f"{time.time()}\n")

    torch.set_num_threads(workload["threads"])
    with Path(workload["labelled"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    tokenizer = AutoTokenizer.from_pretrained(workload["model"])
    model = AutoModelForSequenceClassification.from_pretrained(workload["model"], num_labels=2, dtype=torch.float32)
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=workload["sequence_length"])
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(row["label"] == "good")}
        for ids, row in zip(encoded["input_ids"], rows, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(Path(workload["folder"]) / "out"),
        per_device_train_batch_size=workload["batch_size"] // workload["workers"],
        max_steps=5,
        learning_rate=workload["learning_rate"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[Stamp()],
    ).train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], plain="--plain" in sys.argv[3:])
