"""Pairs of answers, tokenised once: each is two conversations that begin alike, the chosen one first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.preference_rows import Pair, read_preferences
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.chat_template import ChatTemplate
from shardyard_trainer.inputs.chats import BATCH_ROWS, IGNORED, Chats, ChatTokeniser
from shardyard_trainer.inputs.loading import load_rows

PREFERENCES_VERSION = 2


def load_preferences(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    template: ChatTemplate,
    *,
    length: int,
    cache_dir: Path,
    field: str,
) -> Chats:
    """Reads, checks and tokenises a source once: sequences 2 i and 2 i + 1 are pair i. Raises DataError."""
    store = load_rows(
        files,
        source,
        tokenizer,
        lambda bad: read_preferences(files, source, field=field, bad=bad),
        lambda target, pairs, bad: _write(ChatTokeniser(tokenizer, template, length, bad, field), pairs, target),
        cache=cache_dir / "chats",
        field=field,
        version=PREFERENCES_VERSION,
        kind="preferences",
        template=template.source,
        length=length,
    )
    return Chats(store)


def _write(tokeniser: ChatTokeniser, pairs: Iterator[Pair], target: Path) -> None:
    """Writes all pairs. Raises DataError for too many bad rows, and if no pair is left to learn."""
    writer, counts, most = tokeniser.writer(target), tokeniser.counts, tokeniser.length
    while batch := list(islice(pairs, BATCH_ROWS)):
        chosen = tokeniser.encode([pair.chosen for pair in batch])
        # A row whose first side is left out is left out once.
        both = [(pair.rejected, first) for pair, first in zip(batch, chosen, strict=True) if first is not None]
        rejected = tokeniser.encode([row for row, _ in both])
        whole = [(one, other) for (_, one), other in zip(both, rejected, strict=True) if other is not None]
        kept = []
        for one, other in whole:
            if not tokeniser.is_learnt(one) or not tokeniser.is_learnt(other):
                counts["unlearnt"] += 1
            elif one.ids[:most] == other.ids[:most]:
                counts["same"] += 1
            else:
                kept += [one, other]
        counts["rows"] += len(whole)
        counts["repeated"] += sum(_repeats_prompt(pair) for pair in batch)
        if kept:
            tokeniser.write(writer, kept)
    total = counts["rows"]
    tokeniser.bad.finish(total, tokeniser.field)
    if counts["unlearnt"] + counts["same"] == total:
        message = (
            f"in none of {total:,} pairs the two answers differ within the first {most:,} tokens, so there is nothing "
            "to learn; raise max_length, or shorten what comes before the answers"
        )
        raise DataError(message, field=tokeniser.field)
    writer.finish(**tokeniser.meta(total))


def _repeats_prompt(pair: Pair) -> bool:
    """Whether both answers begin with the text of the message that they answer."""
    place = pair.chosen.learnt.index(True)
    asked = pair.chosen.messages[place - 1]["content"].strip()
    return all(row.messages[place]["content"].lstrip().startswith(asked) for row in pair)


class PreferenceSamples:
    """Pairs of one split, padded on the right to the longest answer of a micro batch.

    `before` are the log-probabilities of the two answers under the model as it was before training, float32
    [num_samples, 2]; NaN until they are known.
    """

    compared = "log_probs"

    def __init__(self, chats: Chats, pairs: np.ndarray, *, padding: int, before: float = np.nan) -> None:
        self.chats = chats
        self._pairs = pairs
        self._padding = padding
        lengths = chats.store.lengths().reshape(-1, 2)[pairs]
        # Both rows of a pair are as wide as the longer one.
        self._lengths: np.ndarray = lengths.max(1) * 2
        self.num_samples = len(pairs)
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        self._before = np.full((len(pairs), 2), before, np.float32)

    def take_before(self, values: np.ndarray) -> None:
        """Takes the log-probabilities of the model before training."""
        self._before = values

    def lengths(self) -> np.ndarray:
        """The positions that each pair takes, int32."""
        return self._lengths

    def stats(self) -> DataStats:
        """Statistics of the pairs; a pair is cut if one of its conversations is."""
        arrays = self.chats.store.arrays
        cut, counted, unknown = (arrays[name].reshape(-1, 2)[self._pairs] for name in ("cut", "counted", "unknown"))
        return DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_cut=int(cut.any(1).sum()),
            num_words=int(counted.sum(dtype=np.int64)),
            num_unknown=int(unknown.sum(dtype=np.int64)),
        )

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids` and `labels` (the next tokens of answers) [2 B, T], chosen before rejected; `before` [B, 2].

        Nothing attends to the padding: it comes last, and the model reads from left to right.
        """
        store, chosen = self.chats.store, [sample.sample for sample in samples]
        rows = (2 * self._pairs[chosen][:, None] + np.arange(2)).reshape(-1).tolist()
        sizes = [int(store.offsets[row + 1] - store.offsets[row]) for row in rows]
        shape = (len(rows), max(sizes))
        ids, labels = np.full(shape, self._padding), np.full(shape, IGNORED)
        for i, (row, size) in enumerate(zip(rows, sizes, strict=True)):
            part = slice(store.offsets[row], store.offsets[row + 1])
            tokens, learnt = store.tokens[part].astype(np.int64), store.arrays["learnt"][part] > 0
            ids[i, :size] = tokens
            labels[i, : size - 1] = np.where(learnt[1:], tokens[1:], IGNORED)
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "before": torch.from_numpy(self._before[chosen]),
        }
        return MicroBatch(inputs, len(chosen), sum(sizes), ids.size, tuple(chosen))
