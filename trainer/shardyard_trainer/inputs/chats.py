"""Conversations, tokenised once: their tokens on disk, and which of these a model learns to predict."""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from shardyard.v1 import spec_pb2
from shardyard_trainer.data.bad_rows import BadRows
from shardyard_trainer.data.chat_turns import FIRST_ROLES
from shardyard_trainer.data.conversations import Conversation, read_conversations
from shardyard_trainer.data.errors import DataError
from shardyard_trainer.data.sources import DataFile
from shardyard_trainer.data.stats import DataStats, TokenCounter
from shardyard_trainer.data.store import TokenStore, TokenWriter
from shardyard_trainer.inputs.base import MicroBatch, SampleRef
from shardyard_trainer.inputs.chat_template import ChatTemplate, Rendered, TemplateFault
from shardyard_trainer.inputs.loading import load_rows, token_writer
from shardyard_trainer.inputs.packed import causal_frame, positions_from
from shardyard_trainer.inputs.text import TextInputs
from shardyard_trainer.inputs.tokenization import encoding_fault
from shardyard_trainer.inputs.vocabularies import encoding_raises

IGNORED = -100
CHATS_VERSION = 3
BATCH_ROWS = 256


@dataclass(frozen=True)
class ChatInputs(TextInputs):
    """A tokenizer with its chat template; `ends` are the tokens that end answers in training."""

    ends: tuple[int, ...] = ()
    files: ClassVar[tuple[str, ...]] = (*TextInputs.files, "chat_template.jinja")

    def generation(self, config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
        """As for texts; an answer also ends with the tokens that ended answers in the training data."""
        found = super().generation(config, settings)
        own = found.get("eos_token_id", [])
        ends = list(dict.fromkeys([*(own if isinstance(own, list) else [own]), *self.ends]))
        return {**found, "eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else found


@dataclass(frozen=True)
class Chats:
    """Tokenised conversations, those without a token to learn left out.

    Arrays of the store: `learnt` (uint8, 1 for a token that is predicted); of each conversation `cut` (uint8),
    `counted` and `unknown` tokens.
    """

    store: TokenStore

    def count(self, name: str) -> int:
        """Conversations of the data (`rows`); those whose answers are all cut off (`unlearnt`); those with an answer
        that does not begin where its prompt ends (`prompts_differ`), or is marked differently (`marks_differ`), or is
        not written with all its thoughts (`lacks_thoughts`) or its whole content (`lacks_texts`); those with the name
        of a special token in a message (`special`).
        """
        return int(self.store.meta["counts"].get(name, 0))

    @property
    def ends(self) -> tuple[int, ...]:
        """The special tokens that answers end with."""
        return tuple(self.store.meta["ends"])

    @property
    def bad_rows(self) -> str:
        """The warning about skipped rows."""
        return str(self.store.meta["bad_rows"])

    @property
    def unread(self) -> str:
        """The warning about columns and keys that nothing reads."""
        return str(self.store.meta["unread"])

    def stats(self, rows: np.ndarray) -> DataStats:
        """Statistics of some of the conversations."""
        arrays = self.store.arrays
        return DataStats(
            num_samples=len(rows),
            num_tokens=int(self.store.lengths()[rows].sum(dtype=np.int64)),
            num_cut=int(arrays["cut"][rows].sum(dtype=np.int64)),
            num_words=int(arrays["counted"][rows].sum(dtype=np.int64)),
            num_unknown=int(arrays["unknown"][rows].sum(dtype=np.int64)),
        )


def load_chats(
    files: Sequence[DataFile],
    source: spec_pb2.DataSource,
    tokenizer: Any,
    template: ChatTemplate,
    *,
    length: int,
    last_only: bool,
    cache_dir: Path,
    field: str,
) -> Chats:
    """Reads, checks and tokenises a source once. Raises DataError."""
    store = load_rows(
        files,
        source,
        tokenizer,
        lambda bad: read_conversations(files, source, field=field, last_only=last_only, bad=bad),
        lambda target, rows, bad: _write(ChatTokeniser(tokenizer, template, length, bad, field), rows, target),
        cache=cache_dir / "chats",
        field=field,
        version=CHATS_VERSION,
        template=template.source,
        length=length,
        last_only=last_only,
    )
    return Chats(store)


class Tokens(NamedTuple):
    """A conversation as tokens, whole, and which of them are learnt, bool [tokens]."""

    ids: list[int]
    learnt: np.ndarray


class ChatTokeniser:
    """Makes tokens of conversations, with marks on the learnt ones. Those that no template takes go to `bad`."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, length: int, bad: BadRows, field: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.length = length
        self.bad = bad
        self.field = field
        self._frame = causal_frame(tokenizer)
        self._special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        names = [re.escape(token) for token in tokenizer.all_special_tokens if len(token) > 1]
        self._named = re.compile("|".join(names) or "(?!)")
        self._counter = TokenCounter(tokenizer)
        self.counts: Counter[str] = Counter()
        self._ends: Counter[int] = Counter()

    def encode(self, rows: Sequence[Conversation]) -> list[Tokens | None]:
        """The tokens of each conversation; None for one that is left out. Raises DataError."""
        rendered = [self._render(row) for row in rows]
        kept = [(found, bool(row.text)) for row, found in zip(rows, rendered, strict=True) if found is not None]
        encoded = iter(self._encode([found for found, _ in kept], [is_text for _, is_text in kept]))
        return [None if found is None else next(encoded) for found in rendered]

    def writer(self, target: Path) -> TokenWriter:
        """A writer of the tokenizer's ids."""
        return token_writer(target, self._tokenizer)

    def write(self, writer: TokenWriter, whole: Sequence[Tokens]) -> None:
        """Writes conversations (one at least), cut to the length."""
        kept = [(ids[: self.length], learnt[: self.length]) for ids, learnt in whole]
        writer.add([ids for ids, _ in kept])
        writer.add_array("learnt", np.concatenate([learnt for _, learnt in kept]).astype(np.uint8))
        writer.add_array("cut", np.asarray([len(ids) > self.length for ids, _ in whole], np.uint8))
        counted, unknown = self._counter.count([ids for ids, _ in kept])
        writer.add_array("counted", counted)
        writer.add_array("unknown", unknown)

    def is_learnt(self, tokens: Tokens) -> bool:
        """Whether a token that is learnt is left of a conversation when it is cut to the length."""
        return bool(tokens.learnt[1 : self.length].any())

    def meta(self, num_rows: int) -> dict[str, Any]:
        """What a store keeps of its conversations, once all are read."""
        ends = [token for token, _ in self._ends.most_common()]
        notes = {"bad_rows": self.bad.note(num_rows), "unread": self.bad.unread()}
        return {"counts": dict(self.counts), "ends": ends, **notes}

    def _render(self, row: Conversation) -> Rendered | None:
        """A conversation as text; None if it is skipped."""
        if row.text:
            return Rendered(row.text, [(0, len(row.text))])
        try:
            found = self._template.find_answers(row.messages, row.learnt, row.tools)
        except TemplateFault as fault:
            message = f"the chat template does not take the conversation: {fault}{self._next_step(row, fault)}"
            self.bad.skip(DataError(message, file=row.file, line=row.line, field=self.field))
            return None
        self.counts["special"] += any(self._named.search(message["content"]) for message in row.messages)
        self.counts["marks_differ"] += found.marks_differ
        self.counts["prompts_differ"] += found.prompts_differ
        self.counts["lacks_thoughts"] += found.lacks_thoughts
        self.counts["lacks_texts"] += found.lacks_texts
        for what in row.unread:
            self.bad.pass_over(what)
        return found

    def _next_step(self, row: Conversation, fault: TemplateFault) -> str:
        """What helps against a fault: to leave out the system message or the tools, if that is all that is at fault."""
        at = 1 if row.messages[0]["role"] in FIRST_ROLES else 0
        last = [False] * (len(row.messages) - 1) + [True]
        if sum(row.learnt) > 1 and self._takes(replace(row, learnt=tuple(last)), 0, row.tools):
            return (
                "; it does if the last answer alone is learnt: set last_turn_only, give each answer a row, or give a "
                "chat_template that writes the same text before and after an answer"
            )
        if at and self._takes(row, at, row.tools):
            return (
                "; it does without its system message: put that at the beginning of the first question, or give a "
                "chat_template that writes it"
            )
        if row.tools and self._takes(row, 0, ()):
            return "; it does without the tools: leave them out, or give a chat_template that writes them"
        if row.tools and at and self._takes(row, at, ()):
            return (
                "; it does without system message and tools: put both at the beginning of the first question, or give "
                "a chat_template that writes them"
            )
        return "" if "; " in str(fault) else "; leave the row out, or give a chat_template that takes it"

    def _takes(self, row: Conversation, begin: int, tools: Sequence[Any]) -> bool:
        try:
            self._template.find_answers(row.messages[begin:], row.learnt[begin:], tools)
        except TemplateFault:
            return False
        return True

    def _encode(self, rendered: Sequence[Rendered], is_text: Sequence[bool]) -> list[Tokens]:
        """Tokens, and which of them are learnt. The template has already written the special tokens."""
        with encoding_raises(encoding_fault):
            encoded = self._tokenizer.backend_tokenizer.encode_batch(
                [each.text for each in rendered], add_special_tokens=False
            )
        found = []
        for each, tokens, is_plain in zip(rendered, encoded, is_text, strict=True):
            ids, places = list(tokens.ids), np.asarray(tokens.offsets, np.int64).reshape(-1, 2)
            learnt = _inside(places, each.answers)
            if is_plain:
                before, after = self._frame
                ids, end = [*before, *ids], list(after or before[:1])
                learnt = np.concatenate([np.zeros(len(before), bool), learnt, np.ones(len(end), bool)])
                ids += end
            elif learnt.any():
                self._note(each, places)
                ids, learnt = self._ended(ids, learnt)
            found.append(Tokens(ids, learnt))
        return found

    def _note(self, rendered: Rendered, places: np.ndarray) -> None:
        """Counts an answer whose first token begins before it: a prompt does not end inside a token."""
        begins = [first for first, _ in rendered.answers]
        straddles = any(bool(((places[:, 0] < begin) & (places[:, 1] > begin)).any()) for begin in begins)
        self.counts["prompts_differ"] += straddles and not rendered.prompts_differ

    def _ended(self, ids: list[int], learnt: np.ndarray) -> tuple[list[int], np.ndarray]:
        """Adds an end token after the last answer if the template has none: a model would otherwise never end."""
        lasts = np.flatnonzero(learnt & ~np.append(learnt[1:], False))
        ends = [ids[last] for last in lasts.tolist() if ids[last] in self._special]
        if not ends and (end := self._tokenizer.eos_token_id) is not None and learnt[-1]:
            ids, learnt, ends = [*ids, int(end)], np.append(learnt, True), [int(end)]
        self._ends.update(ends)
        return ids, learnt


def _write(tokeniser: ChatTokeniser, rows: Iterator[Conversation], target: Path) -> None:
    """Writes all conversations. Raises DataError for too many bad rows, and if no answer is left to learn."""
    writer, counts = tokeniser.writer(target), tokeniser.counts
    while batch := list(islice(rows, BATCH_ROWS)):
        whole = [tokens for tokens in tokeniser.encode(batch) if tokens is not None]
        kept = [tokens for tokens in whole if tokeniser.is_learnt(tokens)]
        counts["rows"] += len(whole)
        counts["unlearnt"] += len(whole) - len(kept)
        if kept:
            tokeniser.write(writer, kept)
    total = counts["rows"]
    tokeniser.bad.finish(total, tokeniser.field)
    if counts["unlearnt"] == total:
        message = (
            f"in none of {total:,} conversations an answer begins within the first {tokeniser.length:,} tokens, so "
            "there is nothing to learn; raise max_length, or shorten what comes before the answers"
        )
        raise DataError(message, field=tokeniser.field)
    writer.finish(**tokeniser.meta(total))


def _inside(places: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a character inside a span, bool [tokens]; `places` are where each begins and ends."""
    inside = np.zeros(len(places), bool)
    for first, last in spans:
        inside |= (places[:, 0] < last) & (places[:, 1] > first)
    return inside & (places[:, 1] > places[:, 0])


class ChatSamples:
    """Conversations of one split, one or several a sample, padded on the right to the longest of a micro batch.

    Nothing attends to the padding: it comes last, and the model reads from left to right. For each further
    conversation in a sample the positions restart, and its first token is not predicted.
    """

    def __init__(self, chats: Chats, rows: np.ndarray, *, padding: int, packed_to: int | None = None) -> None:
        self.chats = chats
        self._rows = rows
        self._padding = padding
        lengths = chats.store.lengths()[rows]
        self._bins = [[at] for at in range(len(rows))] if packed_to is None else pack(lengths, packed_to)
        self._is_packed = packed_to is not None
        self._lengths: np.ndarray = np.asarray([lengths[each].sum() for each in self._bins], np.int32)
        self.num_samples = len(self._bins)
        self.num_tokens = int(self._lengths.sum(dtype=np.int64))

    def lengths(self) -> np.ndarray:
        """The length of each sample in tokens, int32."""
        return self._lengths

    def digests(self) -> np.ndarray:
        """A hash of each conversation, uint64."""
        return self.chats.store.digests(self._rows)

    def stats(self) -> DataStats:
        """Statistics of the conversations, however many of them one sample has."""
        return self.chats.stats(self._rows)

    def micro_batch(self, samples: Sequence[SampleRef]) -> MicroBatch:
        """`input_ids`, `labels` (the next tokens, where they are learnt), and if packed `position_ids` [B, T]."""
        store, chosen = self.chats.store, [sample.sample for sample in samples]
        lengths = self._lengths[chosen]
        shape = (len(chosen), int(lengths.max()))
        ids, labels = np.full(shape, self._padding), np.full(shape, IGNORED)
        starts = np.zeros(shape, bool)
        for i, sample in enumerate(chosen):
            at = 0
            for row in self._rows[self._bins[sample]].tolist():
                part = slice(store.offsets[row], store.offsets[row + 1])
                tokens, learnt = store.tokens[part].astype(np.int64), store.arrays["learnt"][part] > 0
                size = len(tokens)
                ids[i, at : at + size], starts[i, at] = tokens, True
                # The last token predicts nothing: what follows it belongs to another conversation.
                labels[i, at : at + size - 1] = np.where(learnt[1:], tokens[1:], IGNORED)
                at += size
            # The padding restarts the positions too, so that it is not read as a part of the last conversation.
            if at < shape[1]:
                starts[i, at] = True
        inputs = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._is_packed:
            inputs["position_ids"] = torch.from_numpy(np.stack([positions_from(row) for row in starts]))
        return MicroBatch(inputs, int((labels != IGNORED).sum()), int(lengths.sum()), ids.size, tuple(chosen))


def pack(lengths: np.ndarray, most: int) -> list[list[int]]:
    """Packs whole sequences into bins of at most `most` tokens, the longest first, each where it fits best."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for at in np.lexsort((np.arange(len(lengths)), -lengths.astype(np.int64))).tolist():
        length = int(lengths[at])
        # `rooms` has each free room once, sorted: the fullest bin that fits is found without a look at all bins.
        found = bisect_left(rooms, length)
        if found == len(rooms):
            bins.append([])
            chosen, room = len(bins) - 1, most
        else:
            room = rooms[found]
            chosen = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(found)
        bins[chosen].append(at)
        if left := room - length:
            if left not in by_room:
                insort(rooms, left)
            by_room.setdefault(left, []).append(chosen)
    return bins
