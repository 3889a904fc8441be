"""The workloads of `bench/gpu.py`, and its other sides: a plain PyTorch loop and transformers' `Trainer`.

All sides train a fresh model of one configuration on the same texts with one batch size. The others make their batches
as their documentation does: blocks of tokens for language models, padded texts in random order for classification.
"""

from __future__ import annotations

import csv
import itertools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from helpers.gpu_runs import SPECS
from helpers.small_specs import parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.tasks.ingredients import prepare

MEASURED_STEPS = 30


@dataclass(frozen=True)
class Size:
    """A workload: what the model's configuration overrides, its tokens, and how it is trained."""

    overrides: dict[str, int]
    vocab: int
    length: int
    batch: int
    steps: int
    num_texts: int


@dataclass(frozen=True)
class Shape:
    """What the operations of a token depend on beside the parameters."""

    num_layers: int
    width: int
    length: int


@dataclass(frozen=True)
class Sides:
    """The specs by name, and how many steps are not counted."""

    specs: dict[str, Callable[[Path], spec_pb2.JobSpec]]
    warm_up: int

    @classmethod
    def full(cls) -> Sides:
        """GPT-2 small (Radford et al., 2019) and BERT base (Devlin et al., 2018), from scratch."""
        steps = 10 + MEASURED_STEPS
        gpt2 = Size({"n_positions": 1024}, vocab=50_257, length=1024, batch=32, steps=steps, num_texts=8_000)
        bert = Size({}, vocab=30_522, length=128, batch=128, steps=steps, num_texts=6_000)
        return cls({"gpt2": lambda folder: _gpt2(folder, gpt2), "bert": lambda folder: _bert(folder, bert)}, warm_up=10)

    @classmethod
    def tiny(cls) -> Sides:
        """The tiny models of the tests."""
        return cls({name: _tiny(make) for name, make in SPECS.items()}, warm_up=2)

    def shape_of(self, attempt: worker_pb2.AttemptSpec) -> Shape:
        """Read from the task of a planned attempt."""
        task = prepare(attempt.plan.resolved_spec, attempt.locations)
        config = task.choice.config
        return Shape(config.num_hidden_layers, config.hidden_size, task.length)


def plain_speed(kind: str, attempt: worker_pb2.AttemptSpec, *, warm_up: int) -> float:
    """Real tokens a second of a loop over transformers' own model and loss, bf16 by autocast on a GPU."""
    spec = attempt.plan.resolved_spec
    device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
    model = _model(kind, attempt).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    micro = attempt.plan.batch.micro_batch_size
    batches = itertools.cycle(list(_batches(kind, attempt)))
    speeds = []
    for _ in range(warm_up + MEASURED_STEPS if device.type == "cuda" else warm_up + 2):
        started, tokens = time.perf_counter(), 0
        batch = next(batches)
        parts = [
            {name: tensor[start : start + micro] for name, tensor in batch.items()}
            for start in range(0, len(batch["input_ids"]), micro)
        ]
        for part in parts:
            inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in part.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**inputs).loss / len(parts)
            loss.backward()
            tokens += int(part["attention_mask"].sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        speeds.append(tokens / (time.perf_counter() - started))
    return sorted(speeds[warm_up:])[len(speeds[warm_up:]) // 2]


def trainer_speed(kind: str, attempt: worker_pb2.AttemptSpec, *, warm_up: int) -> float:
    """Real tokens a second of transformers' `Trainer`, bf16 on a GPU. Raises: ImportError without accelerate."""
    import accelerate  # noqa: F401 - the Trainer needs it; this error is clearer than its own.
    from transformers import Trainer, TrainerCallback, TrainingArguments

    spec = attempt.plan.resolved_spec
    on_gpu = spec.resources.gpus_per_worker > 0
    steps = warm_up + (MEASURED_STEPS if on_gpu else 2)
    rows = [
        {name: tensor[index] for name, tensor in batch.items()}
        for batch in _batches(kind, attempt)
        for index in range(len(batch["input_ids"]))
    ]
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Called by the Trainer."""
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    counted: list[int] = []

    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.stack([feature[name] for feature in features]) for name in features[0]}
        counted.append(int(batch["attention_mask"].sum()))
        return batch

    micro, batch_size = attempt.plan.batch.micro_batch_size, attempt.plan.batch.global_batch_size
    with tempfile.TemporaryDirectory(prefix="sy") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=max(batch_size // micro, 1),
            max_steps=steps,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=_model(kind, attempt), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Clock()]
        )
        trainer.train()
    per_step = sum(counted) / len(counted) * max(batch_size // micro, 1)
    return per_step * (steps - warm_up) / (ends[-1] - ends[warm_up - 1])


def _model(kind: str, attempt: worker_pb2.AttemptSpec) -> torch.nn.Module:
    """A fresh model of the attempt's configuration, with transformers' own head and loss."""
    config = prepare(attempt.plan.resolved_spec, attempt.locations).choice.config
    auto = AutoModelForCausalLM if kind == "gpt2" else AutoModelForSequenceClassification
    model: torch.nn.Module = auto.from_config(AutoConfig.for_model(**{**config.to_dict(), "num_labels": 2}))
    return model


def _batches(kind: str, attempt: worker_pb2.AttemptSpec) -> Iterator[dict[str, torch.Tensor]]:
    """Global batches of the attempt's samples in their stored order, padded to the longest text of each."""
    task = prepare(attempt.plan.resolved_spec, attempt.locations)
    size = attempt.plan.batch.global_batch_size
    longest = task.length
    generator = torch.Generator().manual_seed(0)
    lengths = task.train.lengths()
    vocab = int(task.choice.config.vocab_size)
    for start in range(0, min(task.train.num_samples, 40 * size) - size + 1, size):
        if lengths is None:
            ids_BT = torch.randint(5, vocab, (size, longest), generator=generator)
            yield {"input_ids": ids_BT, "labels": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
            continue
        lengths_B = torch.as_tensor(lengths[start : start + size]).long()
        # Of one width over all batches, so that rows can be stacked in any order, as the Trainer does.
        ids_BT = torch.randint(5, vocab, (size, int(max(lengths))), generator=generator)
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B[:, None]).long()
        labels_B = torch.randint(0, 2, (size,), generator=generator)
        yield {"input_ids": ids_BT * mask_BT, "attention_mask": mask_BT, "labels": labels_B}


def _gpt2(folder: Path, size: Size) -> spec_pb2.JobSpec:
    texts = _texts(size, shortest=200, longest=400)
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(texts) + "\n")
    _save_tokenizer(folder / "tokenizer", size.vocab, end="<|endoftext|>")
    return parse(
        {
            "pretraining": {"causalLm": {"sequenceLength": size.length}},
            "model": {"architecture": {"modelType": "gpt2", "overrides": size.overrides}, "dropout": 0},
            "trainData": {"uri": str(folder / "corpus.txt")},
            **_common(folder, size),
        }
    )


def _bert(folder: Path, size: Size) -> spec_pb2.JobSpec:
    folder.mkdir()
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = ((text, ("even", "odd")[index % 2]) for index, text in enumerate(_texts(size, shortest=16, longest=126)))
        csv.writer(file).writerows([("text", "label"), *rows])
    _save_tokenizer(folder / "tokenizer", size.vocab, end="[SEP]")
    return parse(
        {
            "fineTuning": {"textClassification": {"pooling": "POOLING_CLS", "maxLength": size.length}},
            "model": {"architecture": {"modelType": "bert", "overrides": size.overrides}},
            "trainData": {"uri": str(folder / "texts.csv")},
            **_common(folder, size),
        }
    )


def _common(folder: Path, size: Size) -> dict[str, Any]:
    """One evaluation and one checkpoint, the canary's: they are not what is measured."""
    rarely = str(10 * size.steps)
    return {
        "tokenizer": {"uri": str(folder / "tokenizer")},
        "optimization": {"maxSteps": str(size.steps), "globalBatchSize": size.batch, "learningRate": 1e-4},
        "checkpoints": {"every": rarely},
        "evaluation": {"every": rarely, "holdout": 0.01},
    }


def _texts(size: Size, *, shortest: int, longest: int) -> list[str]:
    """Random words, one a token; speed does not depend on what they say."""
    rng = random.Random(0)
    return [
        " ".join(f"w{rng.randrange(size.vocab - 10)}" for _ in range(rng.randint(shortest, longest)))
        for _ in range(size.num_texts)
    ]


def _save_tokenizer(folder: Path, vocab: int, *, end: str) -> None:
    """A tokenizer with exactly that many tokens, the special ones first."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|endoftext|>"]
    words = {word: index for index, word in enumerate([*special, *(f"w{n}" for n in range(vocab - len(special)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = (
        f'"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "eos_token": "{end}"'
    )
    (folder / "tokenizer_config.json").write_text(f"{{{names}}}\n", encoding="utf-8")


def _tiny(make: Callable[[Path, int], spec_pb2.JobSpec]) -> Callable[[Path], spec_pb2.JobSpec]:
    def spec(folder: Path) -> spec_pb2.JobSpec:
        folder.mkdir()
        return make(folder, 6)

    return spec
