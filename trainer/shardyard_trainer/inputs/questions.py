"""Questions with their contexts, tokenised once: windows on disk, the answer's place in each, and the texts.

A sample is a question with all of its windows. Shape suffixes: W windows, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.question_rows import AskedQuestion, read_questions
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.contexts import ContextCutter, CutContext
from shardyard_trainer.inputs.holdout import by_lot
from shardyard_trainer.inputs.loading import load_rows, token_writer

IGNORED = -100
QUESTIONS_VERSION = 1
_BATCH = 256
_ELSEWHERE = -1
"""The label of a window without the answer: the question has none, or another window has it."""

_LOST = -2
"""The label of all windows of a question if none of them has the whole answer."""


class QuestionTexts:
    """The questions and contexts of a source; can be iterated any number of times."""

    def __init__(self, files: Sequence[DataFile], source: spec_pb2.DataSource) -> None:
        self._files = files
        self._source = source

    def __iter__(self) -> Iterator[str]:
        last = ""
        for asked in read_questions(self._files, self._source, field="spec.train_data"):
            yield asked.question
            if asked.context != last:
                yield (last := asked.context)


@dataclass(frozen=True)
class Questions:
    """Windows of contexts.

    Arrays of the store. Of a token: `types`, `begins` and `ends` (its characters in the context; 0 outside of it). Of
    a window: `questions` (its question), `firsts` and `lasts` (its context's first position, and the one after the
    last), `starts` and `stops` (positions of the answer, or why it has none), `counted` and `unknown` tokens. Of a
    question: `contexts`, `cut` (whether it was), `golds` (how many answers). `places` are the answers' characters,
    `texts` the contexts end to end (UTF-8), `sizes` their bytes.
    """

    store: TokenStore

    @property
    def num_questions(self) -> int:
        """The number of questions."""
        return int(self.store.meta["num_questions"])

    @property
    def num_unanswered(self) -> int:
        """The number of questions without an answer."""
        return int(self.store.meta["num_unanswered"])

    @cached_property
    def windows(self) -> np.ndarray:
        """The first window of each question, then the number of all windows; int64."""
        return np.searchsorted(self.store.arrays["questions"], np.arange(self.num_questions + 1))

    @cached_property
    def _gold_ends(self) -> np.ndarray:
        return np.cumsum(self.store.arrays["golds"], dtype=np.int64)

    @cached_property
    def _text_ends(self) -> np.ndarray:
        return np.cumsum(self.store.arrays["sizes"], dtype=np.int64)

    def context(self, question: int) -> str:
        """The context of a question."""
        at = int(self.store.arrays["contexts"][question])
        end = int(self._text_ends[at])
        return bytes(self.store.arrays["texts"][end - int(self.store.arrays["sizes"][at]) : end]).decode()

    def answers(self, question: int) -> list[tuple[int, int]]:
        """The character offsets of a question's answers in its context."""
        end = int(self._gold_ends[question])
        first = end - int(self.store.arrays["golds"][question])
        places = self.store.arrays["places"][2 * first : 2 * end].reshape(-1, 2)
        return [(int(start), int(stop)) for start, stop in places]

    def lost(self, questions: np.ndarray) -> np.ndarray:
        """The given questions whose answer is in no window as a whole."""
        is_lost: np.ndarray = self.store.arrays["starts"][self.windows[questions]] == _LOST
        return np.asarray(questions[is_lost])


def load_questions(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    *,
    length: int,
    overlap: int,
    cache_dir: Path,
    field: str,
) -> Questions:
    """Reads, checks and tokenises a source once. Raises DataError."""

    def write(target: Path, rows: Iterator[AskedQuestion], bad: BadRows) -> None:
        writer = _Writer(target, tokenizer, ContextCutter(tokenizer, length, overlap), bad, field)
        while batch := list(islice(rows, _BATCH)):
            writer.add(batch)
        writer.finish()

    store = load_rows(
        files,
        source,
        tokenizer,
        lambda bad: read_questions(files, source, field=field, bad=bad),
        write,
        cache=cache_dir / "questions",
        field=field,
        version=QUESTIONS_VERSION,
        window=[length, overlap],
    )
    return Questions(store)


class _Writer:
    """Writes the store, one batch of questions after the other."""

    def __init__(self, target: Path, tokenizer: Any, cutter: ContextCutter, bad: BadRows, field: str) -> None:
        self._writer = token_writer(target, tokenizer)
        self._counter = TokenCounter(tokenizer)
        self._cutter = cutter
        self._bad = bad
        self._field = field
        self._contexts: dict[bytes, int] = {}
        self._num_questions = self._num_unanswered = 0
        self._first_unanswered = ""

    def add(self, batch: Sequence[AskedQuestion]) -> None:
        """Appends questions with their windows; one whose context has no token is a bad row. Raises DataError."""
        kept = self._with_windows(batch)
        if not kept:
            return
        windows, of, starts, stops = [], [], [], []
        for asked, found in kept:
            span = found.span(*asked.answers[0]) if asked.answers else None
            places = [window.places(span) if span else None for window in found.windows]
            none = _LOST if asked.answers and not any(places) else _ELSEWHERE
            starts += [place[0] if place else none for place in places]
            stops += [place[1] if place else none for place in places]
            windows += found.windows
            of += [self._num_questions] * len(places)
            self._add_question(asked)
        writer = self._writer
        writer.add([window.ids for window in windows], questions=of)
        writer.add_array("types", np.fromiter((t for window in windows for t in window.type_ids), np.uint8))
        spans = np.concatenate([_by_token(window.offsets, window.first, len(window.ids)) for window in windows])
        writer.add_array("begins", np.ascontiguousarray(spans[:, 0]))
        writer.add_array("ends", np.ascontiguousarray(spans[:, 1]))
        writer.add_array("firsts", np.asarray([window.first for window in windows], np.int32))
        writer.add_array("lasts", np.asarray([window.end for window in windows], np.int32))
        writer.add_array("starts", np.asarray(starts, np.int32))
        writer.add_array("stops", np.asarray(stops, np.int32))
        writer.add_array("cut", np.asarray([found.was_cut for _, found in kept], np.uint8))
        words, unknown = self._counter.count([window.ids for window in windows])
        writer.add_array("counted", words)
        writer.add_array("unknown", unknown)

    def finish(self) -> None:
        """Finishes the files; without it the store is not readable. Raises DataError for too many bad rows."""
        self._bad.finish(self._num_questions, self._field)
        if not self._num_questions:
            raise DataError("no row has a question", field=self._field)
        self._writer.finish(
            num_questions=self._num_questions,
            num_unanswered=self._num_unanswered,
            first_unanswered=self._first_unanswered,
            bad_rows=self._bad.note(self._num_questions),
        )

    def _with_windows(self, batch: Sequence[AskedQuestion]) -> list[tuple[AskedQuestion, CutContext]]:
        cut = self._cutter.cut([(asked.question, asked.context) for asked in batch])
        kept = []
        for asked, found in zip(batch, cut, strict=True):
            if found.windows:
                kept.append((asked, found))
                continue
            text = "the context has no token that the tokenizer knows; leave the question out, or correct its context"
            self._bad.skip(DataError(text, file=asked.file, line=asked.line, field=self._field))
        return kept

    def _add_question(self, asked: AskedQuestion) -> None:
        raw = asked.context.encode()
        digest = hashlib.blake2b(raw, digest_size=16).digest()
        if digest not in self._contexts:
            self._contexts[digest] = len(self._contexts)
            self._writer.add_array("texts", np.frombuffer(raw, np.uint8))
            self._writer.add_array("sizes", np.asarray([len(raw)], np.int32))
        self._writer.add_array("contexts", np.asarray([self._contexts[digest]], np.int32))
        self._writer.add_array("golds", np.asarray([len(asked.answers)], np.int32))
        self._writer.add_array("places", np.asarray(asked.answers, np.int32).reshape(-1))
        if not asked.answers:
            self._first_unanswered = self._first_unanswered or f"{asked.file}, line {asked.line}"
            self._num_unanswered += 1
        self._num_questions += 1


def _by_token(offsets: Sequence[tuple[int, int]], first: int, length: int) -> np.ndarray:
    """The character offsets of each token of a window, int32 [T, 2]."""
    spans = np.zeros((length, 2), np.int32)
    spans[first : first + len(offsets)] = np.asarray(offsets, np.int32).reshape(-1, 2)
    return spans


class QuestionSamples:
    """Some questions: each a sample with all of its windows, which are padded on the right to the longest of a batch.

    `rest` is the place of the token that means no answer, from the end if it is negative; None: windows without their
    question's answer are not learnt.
    """

    def __init__(
        self, data: Questions, questions: np.ndarray, *, rest: int | None, with_types: bool, padding: int
    ) -> None:
        self.data = data
        self.questions = questions
        self._rest = rest
        self._with_types = with_types
        self._padding = padding
        ends = np.concatenate([[0], np.cumsum(data.store.lengths(), dtype=np.int64)])[data.windows]
        self._lengths = (ends[questions + 1] - ends[questions]).astype(np.int32)
        self.num_samples = len(questions)
        self.num_tokens = int(self._lengths.sum(dtype=np.int64))

    def lengths(self) -> np.ndarray:
        """The tokens in all windows of each question, int32."""
        return np.asarray(self._lengths)

    @property
    def num_windows(self) -> int:
        """The number of windows of all questions."""
        windows = self.data.windows
        return int((windows[self.questions + 1] - windows[self.questions]).sum())

    def rows(self, samples: Sequence[int]) -> np.ndarray:
        """The windows of samples in their order, as rows of the store; int64."""
        windows, questions = self.data.windows, self.questions[list(samples)]
        parts = (np.arange(windows[each], windows[each + 1]) for each in questions)
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def stats(self) -> DataStats:
        """Statistics of the questions; the task itself warns about cut ones."""
        arrays = self.data.store.arrays
        rows = self.rows(range(self.num_samples))
        return DataStats(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_cut=int(arrays["cut"][self.questions].sum()),
            num_words=int(arrays["counted"][rows].sum(dtype=np.int64)),
            num_unknown=int(arrays["unknown"][rows].sum(dtype=np.int64)),
            warns_itself=True,
        )

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """All windows of the samples: `input_ids`, `attention_mask` [W, T], for models that have them `token_type_ids`;
        `contexts` [W, 2], the first position of the context and the one after its last; `rests` [W], the position of
        the token that means no answer; `starts` and `stops` [W], places of the answer, or IGNORED.
        """
        store, chosen = self.data.store, [sample.sample for sample in samples]
        rows = self.rows(chosen)
        lengths = (store.offsets[rows + 1] - store.offsets[rows]).astype(np.int64)
        shape = (len(rows), int(lengths.max()))
        ids, mask, types = np.full(shape, self._padding), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            part = slice(store.offsets[row], store.offsets[row] + length)
            ids[i, :length], types[i, :length], mask[i, :length] = store.tokens[part], store.arrays["types"][part], 1
        rests = np.zeros_like(lengths) if self._rest is None else np.where(self._rest < 0, lengths, 0) + self._rest
        starts, stops = (self._labels(store.arrays[name][rows].astype(np.int64), rests) for name in ("starts", "stops"))
        bounds = np.stack([store.arrays["firsts"][rows], store.arrays["lasts"][rows]], axis=1).astype(np.int64)
        arrays = {"input_ids": ids, "attention_mask": mask, "starts": starts, "stops": stops}
        arrays |= {"contexts": bounds, "rests": rests} | ({"token_type_ids": types} if self._with_types else {})
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        num_units = int((starts != IGNORED).sum())
        return MicroBatch(inputs, num_units, int(lengths.sum()), ids.size, tuple(chosen))

    def _labels(self, labels: np.ndarray, rests: np.ndarray) -> np.ndarray:
        elsewhere = IGNORED if self._rest is None else rests
        return np.asarray(np.where(labels >= 0, labels, np.where(labels == _ELSEWHERE, elsewhere, IGNORED)))


def split_questions(data: Questions, holdout: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits questions at random for training and evaluation; those of one context stay together.

    Raises DataError if none is left to train on.
    """
    contexts = np.asarray(data.store.arrays["contexts"])
    known = np.unique(contexts)
    _, held_out = by_lot(len(known), holdout, seed, what="context")
    is_held = np.isin(contexts, known[held_out])
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)
