"""Pretraining by predicting the next token (Radford et al., 2018), on packed sequences without padding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.inputs.packed import Blocks, Corpus, corpus_stats
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import MicroBatch, SampleRef
from shardyard_trainer.tasks.losses import IGNORED
from shardyard_trainer.tasks.modules import CausalLm
from shardyard_trainer.tasks.parts import LossSum, TaskWarning, accept_weights, positions_from

_LONGEST_EXPONENT = 700.0


class CausalSamples:
    """Packed sequences of one split. Where documents meet inside of one, the positions restart."""

    def __init__(
        self, corpus: Corpus, length: int, *, seed: int, is_train: bool, choice: ModelChoice, tokenizer: Any
    ) -> None:
        self.corpus = corpus
        self.blocks = Blocks(corpus, length, seed=seed, shuffle=is_train, overlap=1)
        self._length = length
        self._counter = TokenCounter(tokenizer)
        self._is_packed = choice.config.model_type in architectures.PACKED_BY_POSITIONS
        # Where one token ends a document and begins the next (GPT-2), to predict it is to predict the end.
        eos = tokenizer.eos_token_id
        self._joint = eos if eos is not None and tokenizer.bos_token_id in (None, eos) else None
        begins = np.isin(corpus.tokens[corpus.starts], tokenizer.all_special_ids)
        unscored = begins[:1] if self._joint is not None else begins
        # Those that stand for text or are predicted: a token that only begins a document is neither.
        self.num_scored = corpus.num_tokens - int(unscored.sum())
        self.num_samples = self.blocks.num_blocks
        self.num_tokens = self.num_samples * length if is_train else max(0, corpus.num_tokens - 1)

    def lengths(self) -> None:
        """All are equally long."""
        return

    def stats(self) -> DataStats:
        """What they hold."""
        return corpus_stats(self.corpus, self.blocks, self._counter, num_tokens=self.num_tokens)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `labels` (the next tokens) and, where documents meet, `position_ids`, each int64 [B, T]."""
        shape = (len(samples), self._length)
        ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORED)
        positions = np.tile(np.arange(self._length), (len(samples), 1))
        num_tokens = 0
        for row, sample in enumerate(samples):
            places, starts = self.blocks.block(sample.data_epoch, sample.sample)
            tokens = self.corpus.tokens[places].astype(np.int64)
            size = len(tokens) - 1
            foreign = starts[1:] & (tokens[1:] != self._joint) if self._joint is not None else starts[1:]
            # Behind the end of the last evaluation sequence stands anything: nothing before it can see it.
            ids[row, :size], ids[row, size:] = tokens[:-1], tokens[-1]
            labels[row, :size] = np.where(foreign, IGNORED, tokens[1:])
            positions[row, :size] = positions_from(starts[:-1])
            num_tokens += size
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._is_packed and (positions[:, -1] != self._length - 1).any():
            inputs["position_ids"] = torch.from_numpy(positions)
        return MicroBatch(inputs, int((labels != IGNORED).sum()), num_tokens, ids.size)


class CausalMetrics(LossSum):
    """`loss` (nats a token), `perplexity`, and `bits_per_byte` of the text where its bytes are known."""

    def __init__(self, tokens_per_byte: float) -> None:
        super().__init__()
        self._tokens_per_byte = tokens_per_byte

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        loss = self.mean(parts)
        found = {"loss": loss, "perplexity": math.exp(min(loss, _LONGEST_EXPONENT))}
        if self._tokens_per_byte:
            found["bits_per_byte"] = loss / math.log(2) * self._tokens_per_byte
        return found


class CausalLmTask:
    """The task `causal_lm`."""

    name = "causal_lm"
    unit = "token"

    def __init__(
        self, choice: ModelChoice, tokenizer: Any, train: CausalSamples, evaluation: CausalSamples | None, length: int
    ) -> None:
        self.choice, self.warnings = accept_weights(choice, self.name)
        self.tokenizer = tokenizer
        self.train = train
        self.eval = evaluation
        self.length = length
        self.labels: tuple[str, ...] = ()
        if choice.config.model_type not in architectures.PACKED_BY_POSITIONS:
            self.warnings.append(
                TaskWarning(
                    "DOCUMENTS_NOT_SEPARATED",
                    f"{choice.config.model_type} is not known to keep packed documents apart: they see one another",
                    "spec.model",
                )
            )

    def make_module(self, *, meta: bool) -> CausalLm:
        """The model with its own output layer."""
        model, _ = loading.load(transformers.AutoModelForCausalLM, self.choice, meta=meta)
        loading.ensure_pad_id(model, self.tokenizer)
        return CausalLm(model, plain_output_layer=self.choice.config.model_type in architectures.PLAIN_OUTPUT_LAYER)

    def metrics(self) -> CausalMetrics:
        """A fresh gatherer."""
        split = self.eval or self.train
        return CausalMetrics(split.num_scored / split.corpus.num_bytes if split.corpus.num_bytes else 0.0)

    def export_config(self) -> Mapping[str, Any]:
        """What `shardyard.json` says."""
        return {"task": self.name, "max_length": self.length}
