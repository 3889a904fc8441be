"""The words of the trainer's messages."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from shardyard_trainer.data.errors import nearest


def test_of_endless_names_the_first_are_compared() -> None:
    def names() -> Iterator[str]:
        yield "film-12"
        for number in count():
            assert number < 100_000, "a catalogue of millions would be compared"
            yield f"{number:09}"

    assert nearest("film-21", names()) == "; did you mean film-12?"
