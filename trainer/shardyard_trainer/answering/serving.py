"""Many requests to one model at once: waiting ones are computed together, and large ones take turns.

A request (`_Question`) is a generator of `infer`. It yields `None` to let others have a turn, or a `Work`, and is sent
the results; it returns the answer. Works of one key are computed in one pass of at most `INSTANCES_AT_ONCE` instances
and `POSITIONS_AT_ONCE` positions; the caller served longest ago comes first, then its oldest request.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardyard_trainer.inputs.base import INSTANCES_AT_ONCE, POSITIONS_AT_ONCE, Encoded
from shardyard_trainer.tasks.base import Parts

PATIENCE_S = 0.003
"""How long to wait for requests that come at the same time, if the last ones did."""

_SMALL_BYTES = 32 * 1024


@dataclass(frozen=True)
class Work:
    """Texts to compute: `compute(texts, places)` makes one result of each; works of one `key` may be joined.

    `places` are the positions of the texts in their request, which seed what is random about a text.
    """

    key: Hashable
    compute: Callable[[Sequence[Encoded], Sequence[int]], Parts]
    texts: Sequence[Encoded]
    places: Sequence[int]


Steps = Generator[Work | None, list[Any], bytes]


def finish(steps: Steps) -> bytes:
    """The answer to one request, computed alone."""
    results: list[Any] = []
    try:
        work = next(steps)
        while True:
            results = [] if work is None else _run(work)
            work = steps.send(results) if work is not None else next(steps)
    except StopIteration as end:
        answer: bytes = end.value
        return answer


def _run(work: Work) -> list[Any]:
    parts = work.compute(work.texts, work.places)
    while True:
        try:
            next(parts)
        except StopIteration as end:
            return list(end.value)


@dataclass(eq=False)
class _Question:
    number: int
    caller: tuple[str, ...]
    steps: Steps
    size: int
    alone: bool
    begun: bool = False
    work: Work | None = None
    running: bool = False
    served: int = 0


@dataclass(eq=False)
class _Pass:
    """Works that are computed together."""

    questions: list[_Question]
    parts: Parts
    counts: list[int] = field(default_factory=list)


Answer = tuple[int, bytes, BaseException | None]


class Answerer:
    """Waiting requests, and which of them to compute next: `choose` picks the turn, `compute` takes it."""

    def __init__(self, functions: dict[str, Callable[[bytes], Steps]]) -> None:
        self._functions = functions
        self._questions: dict[int, _Question] = {}
        self._passes: list[_Pass] = []
        self._callers: dict[tuple[str, ...], int] = {}
        self._turns = itertools.count(1)
        self._next: list[_Question] | _Pass = []
        self._joined = 1
        self._since_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether there are requests to answer."""
        return bool(self._questions)

    @property
    def patience_s(self) -> float:
        """How long to wait for further questions before the next turn."""
        if self._joined < 2 or any(each.begun for each in self._questions.values()):
            return 0.0
        return max(0.0, self._since_s + PATIENCE_S - time.monotonic())

    def add(self, number: int, function: str, caller: tuple[str, ...], body: bytes, *, alone: bool = False) -> None:
        """Adds a request; `alone`: nothing is computed together with it."""
        if not self._questions:
            self._since_s = time.monotonic()
        steps = self._functions[function](body)
        self._questions[number] = _Question(number, caller, steps, len(body), alone)

    def cancel(self, number: int) -> None:
        """Drops a request; if it is being computed with others, its answer is dropped."""
        question = self._questions.pop(number, None)
        if question is not None and not question.running:
            question.steps.close()
        self._passes = [each for each in self._passes if any(one.number in self._questions for one in each.questions)]

    def choose(self) -> list[int]:
        """Picks the next turn and returns the numbers of its requests."""
        small = [each for each in self._questions.values() if self._is_small(each)]
        if small:
            self._next = small
            return [each.number for each in small]
        first = min(self._questions.values(), key=self._rank)
        if first.running:
            self._next = next(each for each in self._passes if first in each.questions)
        elif first.work is None:
            self._next = [first]
        else:
            self._next = self._join(first)
        questions = self._next.questions if isinstance(self._next, _Pass) else self._next
        return [each.number for each in questions]

    def compute(self) -> list[Answer]:
        """Takes the chosen turn and returns the answers that are ready after it."""
        chosen = self._next
        if isinstance(chosen, _Pass):
            for question in chosen.questions:
                self._serve(question)
            return self._go_on(chosen)
        answers: list[Answer] = []
        for question in chosen:
            # Reading a small request is not a turn at the model: its first turn counts as if nothing had been done.
            if not self._is_small(question):
                self._serve(question)
            question.begun = True
            answers += self._advance(question, None)
        return answers

    def _is_small(self, question: _Question) -> bool:
        return not question.begun and not question.alone and question.size <= _SMALL_BYTES

    def _rank(self, question: _Question) -> tuple[int, ...]:
        """The sort key of a waiting request: the smallest is next."""
        levels = (question.caller[:end] for end in range(1, len(question.caller) + 1))
        return (*(self._callers.get(level, 0) for level in levels), question.served, question.number)

    def _serve(self, question: _Question) -> None:
        question.served = next(self._turns)
        if len(self._callers) > 4096:
            self._callers.clear()
        for end in range(1, len(question.caller) + 1):
            self._callers[question.caller[:end]] = question.served

    def _join(self, first: _Question) -> _Pass:
        """A pass for the work of `first`, and for others that fit into it."""
        assert first.work is not None
        joined, count, longest = [first], len(first.work.texts), _longest(first.work)
        waiting = [each for each in self._questions.values() if each.work is not None and not each.running]
        for other in sorted(waiting, key=self._rank):
            if other is first or first.alone or other.alone or other.work is None or other.work.key != first.work.key:
                continue
            more, wide = count + len(other.work.texts), max(longest, _longest(other.work))
            if more <= INSTANCES_AT_ONCE and more * wide <= POSITIONS_AT_ONCE:
                joined, count, longest = [*joined, other], more, wide
        works = [each.work for each in joined if each.work is not None]
        texts = [text for work in works for text in work.texts]
        places = [place for work in works for place in work.places]
        made = _Pass(joined, first.work.compute(texts, places), [len(work.texts) for work in works])
        for question in joined:
            question.running = True
        self._joined = len(joined)
        self._passes.append(made)
        return made

    def _go_on(self, current: _Pass) -> list[Answer]:
        """One part of a pass; when it is done, the results are passed on to their requests."""
        try:
            next(current.parts)
            return []
        except StopIteration as end:
            results: list[Any] = end.value
        except BaseException as error:  # edge: computing each alone shows whose fault it is.
            return self._fail(current, error)
        self._passes.remove(current)
        answers: list[Answer] = []
        at = 0
        for question, count in zip(current.questions, current.counts, strict=True):
            own, at = results[at : at + count], at + count
            question.running = False
            if question.number in self._questions:
                answers += self._advance(question, own)
        return answers

    def _fail(self, current: _Pass, error: BaseException) -> list[Answer]:
        self._passes.remove(current)
        for question in current.questions:
            question.running = False
            question.alone = True
        if len(current.questions) > 1:
            return []
        question = current.questions[0]
        return [(question.number, b"", error)] if self._questions.pop(question.number, None) else []

    def _advance(self, question: _Question, results: list[Any] | None) -> list[Answer]:
        """Runs a request up to its next work or pause."""
        try:
            question.work = next(question.steps) if results is None else question.steps.send(results)
        except StopIteration as end:
            del self._questions[question.number]
            return [(question.number, end.value, None)]
        except BaseException as error:  # edge: one question's failure, a panic in Rust too, is not its neighbours'.
            del self._questions[question.number]
            return [(question.number, b"", error)]
        return []


def _longest(work: Work) -> int:
    return max((text.num_positions for text in work.texts), default=1)
