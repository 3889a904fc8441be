"""Every state, cause and reason is documented, in the words of the code."""

from __future__ import annotations

import pytest

from helpers.beside import script
from helpers.repository import ROOT
from shardyard_coordinator.domain.causes import VERDICTS, Cause
from shardyard_coordinator.domain.reasons import MEANINGS, Reason
from shardyard_coordinator.domain.states import TRANSITIONS, JobState

reference = script("tools", "reference")


@pytest.mark.parametrize(
    ("page", "words"), [("errors.md", list(Reason)), ("states.md", [*Cause, *JobState])], ids=["errors", "states"]
)
def test_every_member_is_documented_on_its_page(page: str, words: list[str]) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [word for word in words if f"`{word}`" not in text] == []


def test_every_member_has_its_line_in_its_table() -> None:
    assert set(MEANINGS) == set(Reason)
    assert set(VERDICTS) == set(Cause)
    assert set(TRANSITIONS) == set(JobState)


@pytest.mark.parametrize("page", sorted(reference.TABLES))
def test_the_tables_are_what_the_code_says(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert reference.with_tables(text, reference.TABLES[page]) == text


def test_a_page_without_a_place_for_its_table_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for the table reasons"):
        reference.with_tables("# Errors\n", reference.TABLES["errors.md"])
