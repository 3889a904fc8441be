"""The integration table: each task with its workers, its ZeRO stage, and the real data that it learns from.

A new task gets a row, and a function of `real_texts.py` or `real_things.py` that cuts its data. The rows are run by
`tests/integration/test_task_table.py`; `tests/contract/test_tasks.py` says what has to hold for the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import shardyard
from helpers import real_texts, real_things
from helpers.real_slices import Story


class Where(TypedDict):
    """The part of a JobSpec that says on how many workers, and how the model is sharded over them."""

    resources: shardyard.Resources
    parallelism: shardyard.Parallelism


@dataclass(frozen=True)
class Row:
    """Where a task runs, and its story; None for a task that trains nothing."""

    workers: int
    zero_stage: int
    story: Callable[[Path], Story] | None

    def where(self) -> Where:
        """Fields of its JobSpec."""
        return {
            "resources": shardyard.Resources(workers=self.workers),
            "parallelism": shardyard.Parallelism(zero_stage=self.zero_stage),
        }


ROWS: Mapping[str, Row] = {
    "causal_lm": Row(2, 3, real_texts.plays),
    "masked_lm": Row(2, 2, real_texts.articles),
    "span_corruption": Row(1, 1, real_texts.articles_with_gaps),
    "text_classification": Row(2, 1, real_texts.kinds_of_questions),
    "token_classification": Row(1, 2, real_texts.entities),
    "sentence_embedding": Row(2, 1, real_texts.alike),
    "reranking": Row(2, 1, real_texts.passages),
    "question_answering": Row(1, 3, real_texts.questions),
    "instruction": Row(1, 3, real_texts.instructions),
    "preference": Row(2, 2, real_texts.preferences),
    "translation": Row(1, 3, real_texts.translations),
    "summarization": Row(1, 0, real_texts.summaries),
    "image_classification": Row(2, 0, real_things.digits),
    "masked_image": Row(1, 1, real_things.digits_without_labels),
    "recommendation": Row(1, 0, real_things.films),
    "masked_item": Row(1, 2, real_things.masked_films),
    "feature_extraction": Row(2, 0, None),
    "model_evaluation": Row(1, 0, None),
    "model_export": Row(1, 0, None),
    "model_copy": Row(1, 0, None),
}
