"""Small tasks for the engine's tests: models of random tokens of unequal lengths, and of random pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.labels import SINGLE_LABEL
from shardyard_trainer.inputs.base import MicroBatch, SampleRef, sum_of
from shardyard_trainer.inputs.tagged import IGNORED
from shardyard_trainer.tasks.adaptation import adapt
from shardyard_trainer.tasks.base import compute_again
from shardyard_trainer.tasks.module import ModuleOutput, TaskModule
from shardyard_trainer.tasks.picture_module import PictureModule
from shardyard_trainer.tasks.token_classification import TokenClassifierModule

VOCAB = 61
TAG_WEIGHTS = np.array([0.3, 2.7, 1.1], np.float32)


class RandomSamples:
    def __init__(self, num_samples: int, *, kind: str, seed: int = 5) -> None:
        generator = np.random.default_rng(seed)
        self._lengths = generator.integers(4, 25, num_samples).astype(np.int32)
        self.texts = [generator.integers(1, VOCAB, length) for length in self._lengths]
        self.labels = np.array([int(text[0]) % 2 for text in self.texts])
        self._kind = kind
        self.num_samples = num_samples
        self.num_tokens = int(self._lengths.sum())

    def lengths(self) -> np.ndarray:
        return self._lengths

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        longest = max(self._lengths[ref.sample] for ref in samples)
        ids_BT = torch.zeros(len(samples), longest, dtype=torch.long)
        for row, ref in enumerate(samples):
            ids_BT[row, : self._lengths[ref.sample]] = torch.from_numpy(self.texts[ref.sample])
        mask_BT = ids_BT != 0
        num_tokens = int(mask_BT.sum())
        if self._kind == "gpt2":
            inputs = {"input_ids": ids_BT}
            return MicroBatch(inputs, num_tokens - len(samples), num_tokens, ids_BT.numel())
        if self._kind == "tags":
            # Every third token begins a word; its tag is that of the token, and weighs as much.
            labels_BT = torch.where(mask_BT & (torch.arange(longest) % 3 == 1), ids_BT % 3, IGNORED)
            inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_BT}
            num_units = sum_of(TAG_WEIGHTS, labels_BT[labels_BT != IGNORED].numpy())
            return MicroBatch(inputs, num_units, num_tokens, ids_BT.numel())
        labels_B = torch.tensor([self.labels[ref.sample] for ref in samples])
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT.long(), "labels": labels_B}
        return MicroBatch(inputs, len(samples), num_tokens, ids_BT.numel())


class RandomPictures:
    """Pictures of noise, one class of them brighter than the other."""

    def __init__(self, num_samples: int, *, seed: int = 5) -> None:
        generator = np.random.default_rng(seed)
        self.labels = generator.integers(0, 2, num_samples)
        noise = 0.2 * generator.normal(size=(num_samples, 3, 8, 8))
        self.pixels = (noise + 0.2 * self.labels[:, None, None, None]).astype(np.float32)
        self.num_samples = self.num_tokens = num_samples

    def lengths(self) -> None:
        return None

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        chosen = [ref.sample for ref in samples]
        inputs = {
            "pixel_values": torch.from_numpy(self.pixels[chosen]),
            "labels": torch.from_numpy(self.labels[chosen]),
        }
        return MicroBatch(inputs, len(chosen), len(chosen), len(chosen) * 5)


class TinyGpt2(TaskModule):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.lm = GPT2LMHeadModel(
            GPT2Config(
                n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=VOCAB,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
        self.backbone = self.lm.transformer

    def forward(self, input_ids: torch.Tensor, return_outputs: bool = False) -> ModuleOutput:
        logits_BTV = self.lm(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(
            logits_BTV.reshape(-1, VOCAB), input_ids[:, 1:].reshape(-1), ignore_index=0, reduction="sum"
        )
        return ModuleOutput(loss, {} if return_outputs else None)


class TinyBert(TaskModule):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.backbone = BertModel(
            BertConfig(
                num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64,
                max_position_embeddings=32, vocab_size=VOCAB,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        self.head = nn.Linear(32, 2)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        return_outputs: bool = False,
    ) -> ModuleOutput:
        hidden_BTD = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight_BT1 = attention_mask.unsqueeze(-1).to(hidden_BTD.dtype)
        logits_BC = self.head((hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1))
        loss = functional.cross_entropy(logits_BC, labels, reduction="sum")
        return ModuleOutput(loss, {"logits": logits_BC} if return_outputs else None)


def tiny_tagger(dropout: float, **sizes: Any) -> TokenClassifierModule:
    """The module of the task itself, with weights for its tags."""
    config = BertConfig(**{
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64, "num_labels": 3,
        "max_position_embeddings": 32, "vocab_size": VOCAB,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **sizes,
    })  # fmt: skip
    return TokenClassifierModule(BertForTokenClassification(config), TAG_WEIGHTS)


def tiny_adapters(dropout: float) -> TokenClassifierModule:
    """The same with adapters beside its linear layers, the head trained whole, and a first layer that is frozen."""
    module = tiny_tagger(dropout)
    adapt(module, spec_pb2.FineTuning(lora=spec_pb2.Lora(rank=4, dropout=dropout), freeze=spec_pb2.Freeze(layers=1)))
    return module


def tiny_pictures(name: str, dropout: float) -> PictureModule:
    """The module of the task itself: a ViT, or a ResNet with batch normalisation."""
    model: Any
    if name == "norms":
        model = ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=2)
        )
    else:
        model = ViTForImageClassification(
            ViTConfig(
                num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64, image_size=8,
                patch_size=4, num_labels=2, initializer_range=0.1,
                hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
            )
        )  # fmt: skip
    return PictureModule(model, problem=SINGLE_LABEL, label_smoothing=0.1, needs_two=True)


class TinyLesson:
    """A tagger of other weights and sizes, whose labels are in another order, as the teacher of `tags`."""

    columns = (2, 0, 1)
    temperature = 3.0
    weight = 0.7

    def __init__(self, num_samples: int = 100) -> None:
        self.task = TinyTask("tags", num_samples)

    def make_module(self) -> TaskModule:
        torch.manual_seed(12)
        module = tiny_tagger(0.5, hidden_size=48, initializer_range=0.3)
        return module.eval().requires_grad_(False)


class MeanLoss:
    write = None

    def __init__(self) -> None:
        self.loss = 0.0
        self.units = 0.0

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        self.loss += float(output.loss_sum)
        self.units += batch.num_units

    def part(self) -> Any:
        return self.loss, self.units

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        loss = sum(loss for loss, _ in parts) / sum(units for _, units in parts)
        return {"loss": loss, "goodness": -loss}

    def directions(self) -> dict[str, int]:
        return {"loss": -1, "goodness": 1}


class TinyTask:
    tokenizer = None

    def __init__(self, name: str, num_samples: int = 100) -> None:
        self.name = name
        self.unit = "token" if name in {"gpt2", "tags", "lora", "taught", "again"} else "sample"
        kind = "tags" if name in {"lora", "taught", "again"} else name
        self.lesson = TinyLesson(num_samples) if name == "taught" else None
        self.train: Any
        self.eval: Any
        if name in {"pictures", "norms"}:
            self.train, self.eval = RandomPictures(num_samples), RandomPictures(20, seed=6)
        else:
            self.train, self.eval = RandomSamples(num_samples, kind=kind), RandomSamples(20, kind=kind, seed=6)

    def metrics(self) -> MeanLoss:
        return MeanLoss()

    def describe(self) -> dict[str, Any]:
        return {"task": self.name}

    def judge(self, metrics: Mapping[str, float]) -> None:
        """Nothing to say: the loop's own watch is enough."""

    def module(self, dropout: float = 0.0) -> TaskModule:
        torch.manual_seed(11)
        if self.name in {"tags", "taught"}:
            return tiny_tagger(dropout)
        if self.name == "again":
            module = tiny_tagger(dropout)
            compute_again(module)
            return module
        if self.name == "lora":
            return tiny_adapters(dropout)
        if self.name in {"pictures", "norms"}:
            return tiny_pictures(self.name, dropout)
        return TinyGpt2(dropout) if self.name == "gpt2" else TinyBert(dropout)
