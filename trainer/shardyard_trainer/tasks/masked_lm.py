"""Pretraining by predicting masked tokens (Devlin et al., 2018), masks drawn anew in every pass over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers

from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.inputs.packed import Blocks, Corpus, corpus_stats
from shardyard_trainer.models import architectures, loading
from shardyard_trainer.models.sources import ModelChoice
from shardyard_trainer.tasks.base import MicroBatch, ModuleOutput, SampleRef
from shardyard_trainer.tasks.modules import MaskedLm
from shardyard_trainer.tasks.parts import LossSum, TaskWarning, accept_weights, positions_from

_MASKED, _RANDOM = 0.8, 0.1
_STREAM_TRAIN, _STREAM_EVAL = 0x3A5C, 0xE7A1


class MaskedSamples:
    """Packed sequences of one split with masks; a document sees itself only."""

    def __init__(
        self,
        corpus: Corpus,
        length: int,
        *,
        seed: int,
        is_train: bool,
        choice: ModelChoice,
        tokenizer: Any,
        probability: float,
    ) -> None:
        self.corpus = corpus
        self.blocks = Blocks(corpus, length, seed=seed, shuffle=is_train, overlap=0)
        self._length = length
        self._counter = TokenCounter(tokenizer)
        self._seed = (seed, _STREAM_TRAIN if is_train else _STREAM_EVAL)
        self._probability = probability
        self._mask_token = int(tokenizer.mask_token_id)
        self._padding = int(tokenizer.pad_token_id or 0)
        self._special = np.asarray(sorted(tokenizer.all_special_ids))
        self._ordinary = np.setdiff1d(np.asarray(list(tokenizer.get_vocab().values())), self._special)
        self._is_packed = choice.config.model_type in architectures.PACKED_BY_MASK
        self._offset = architectures.position_offset(choice.config)
        self.num_samples = self.blocks.num_blocks
        self.num_tokens = self.num_samples * length if is_train else corpus.num_tokens

    def lengths(self) -> None:
        """All are equally long."""
        return

    def stats(self) -> DataStats:
        """What they hold."""
        return corpus_stats(self.corpus, self.blocks, self._counter, num_tokens=self.num_tokens)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` [B, T], `masked_places` and `targets` [M]; where documents meet, mask and positions."""
        shape = (len(samples), self._length)
        ids = np.full(shape, self._padding)
        positions = np.tile(np.arange(self._length), (len(samples), 1))
        documents = np.zeros(shape, np.int64)
        masked_places, targets = [], []
        num_tokens = 0
        for row, sample in enumerate(samples):
            places, starts = self.blocks.block(sample.data_epoch, sample.sample)
            tokens = self.corpus.tokens[places].astype(np.int64)
            size = len(tokens)
            chosen, shown = self._mask(tokens, places, starts, sample)
            ids[row, :size] = shown
            positions[row, :size] = positions_from(starts)
            # Padding at the end of the last evaluation sequence is a document of its own.
            documents[row, :size], documents[row, size:] = np.cumsum(starts), -1
            masked_places.append(row * self._length + chosen)
            targets.append(tokens[chosen])
            num_tokens += size
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "masked_places": torch.from_numpy(np.concatenate(masked_places)),
            "targets": torch.from_numpy(np.concatenate(targets)),
        }
        if (documents != documents[:, :1]).any():
            inputs |= self._separated(positions, documents)
        return MicroBatch(inputs, len(inputs["targets"]), num_tokens, ids.size)

    def _separated(self, positions: np.ndarray, documents: np.ndarray) -> dict[str, torch.Tensor]:
        if not self._is_packed:
            return {"attention_mask": torch.from_numpy((documents >= 0).astype(np.int64))}
        # Boolean and with sdpa: eager attention would add it as a number, positions alone keep nothing apart.
        mask = documents[:, None, :, None] == documents[:, None, None, :]
        return {"attention_mask": torch.from_numpy(mask), "position_ids": torch.from_numpy(positions + self._offset)}

    def _mask(
        self, tokens: np.ndarray, places: np.ndarray, starts: np.ndarray, sample: SampleRef
    ) -> tuple[np.ndarray, np.ndarray]:
        """The chosen positions, and the tokens as the model sees them."""
        random = np.random.default_rng([*self._seed, sample.data_epoch, sample.sample])
        candidates = np.flatnonzero(~np.isin(tokens, self._special))
        wanted = max(1, round(self._probability * len(candidates)))
        if self.corpus.continues is None:
            chosen = np.sort(random.permutation(candidates)[:wanted])
        else:
            chosen = self._whole_words(candidates, places, starts, wanted, random)
        shown = tokens.copy()
        draw = random.random(len(chosen))
        shown[chosen[draw < _MASKED]] = self._mask_token
        exchanged = chosen[(draw >= _MASKED) & (draw < _MASKED + _RANDOM)]
        shown[exchanged] = random.choice(self._ordinary, len(exchanged))
        return chosen, shown

    def _whole_words(
        self, candidates: np.ndarray, places: np.ndarray, starts: np.ndarray, wanted: int, random: np.random.Generator
    ) -> np.ndarray:
        assert self.corpus.continues is not None
        begins = (self.corpus.continues[places] == 0) | starts
        words = np.cumsum(begins)[candidates]
        names, sizes = np.unique(words, return_counts=True)
        # The first word is taken whatever its size; after it one that would pass the wanted number is passed over.
        taken: list[int] = []
        left = wanted
        for word in random.permutation(len(names)):
            if sizes[word] <= left or not taken:
                taken.append(word)
                left -= sizes[word]
            if left <= 0:
                break
        return candidates[np.isin(words, names[taken])]


class MaskedMetrics(LossSum):
    """`loss` (nats a masked token) and `masked_accuracy`."""

    def __init__(self) -> None:
        super().__init__()
        self._correct: list[torch.Tensor] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch."""
        super().update(batch, output)
        assert output.outputs is not None
        self._correct.append(output.outputs["correct"].detach())

    def part(self) -> Any:
        """Sums of loss, masked tokens and right answers."""
        return *super().part(), int(torch.stack(self._correct).sum()) if self._correct else 0

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        masked = max(1, sum(part[1] for part in parts))
        return {"loss": self.mean(parts), "masked_accuracy": sum(part[2] for part in parts) / masked}


class MaskedLmTask:
    """The task `masked_lm`."""

    name = "masked_lm"
    unit = "token"

    def __init__(
        self, choice: ModelChoice, tokenizer: Any, train: MaskedSamples, evaluation: MaskedSamples | None, length: int
    ) -> None:
        self.choice, self.warnings = accept_weights(choice, self.name)
        self.tokenizer = tokenizer
        self.train = train
        self.eval = evaluation
        self.length = length
        self.labels: tuple[str, ...] = ()
        model_type = choice.config.model_type
        if model_type not in architectures.PACKED_BY_MASK:
            message = f"{model_type} is not known to keep packed documents apart: they see one another"
            self.warnings.append(TaskWarning("DOCUMENTS_NOT_SEPARATED", message, "spec.model"))

    def make_module(self, *, meta: bool) -> MaskedLm:
        """The model with its masked-LM head."""
        model, _ = loading.load(transformers.AutoModelForMaskedLM, self.choice, meta=meta)
        return MaskedLm(model)

    def metrics(self) -> MaskedMetrics:
        """A fresh gatherer."""
        return MaskedMetrics()

    def export_config(self) -> Mapping[str, Any]:
        """What `shardyard.json` says."""
        return {"task": self.name, "max_length": self.length}
