"""Fine-tuning an encoder-decoder to translate texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from shardyard_trainer.data.text_pair_rows import RECORD, PairNames
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.sequences import SequenceInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import Output, TaskWarning
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.seq2seq import (
    AUTO,
    USAGE,
    Defaults,
    Found,
    PreparedSequences,
    imagine_pairs,
    prepare_pairs,
)
from shardyard_trainer.tasks.text_metrics import WrittenMetrics, bleu_signature, translation_scores
from shardyard_trainer.tasks.text_writer import TextWriter

_DEFAULTS = Defaults(128, 128)
_SOURCES = ("src", "source_text", "input", "input_text", "inputs")
_TARGETS = ("tgt", "trg", "target_text", "output", "output_text", "reference", "ref", "targets")


class Translation:
    """The task `translation`."""

    name = "translation"
    output = Output.MODEL
    roles = ("source", "target", RECORD)
    auto = AUTO
    pipeline = "translation"
    example = ""
    usage = USAGE
    cuts = True
    holds_out_by_lot = True
    inputs = SequenceInputs

    def prepare(self, job: Ingredients) -> PreparedTranslation:
        """Finds and checks model and data. Raises SpecError."""
        return PreparedTranslation(prepare_pairs(job, names_of(job.wanted), _DEFAULTS), job.warnings, job.wanted)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedTranslation:
        """With pairs of the full lengths. Raises SpecError."""
        return PreparedTranslation(imagine_pairs(job, data, _DEFAULTS), job.warnings, job.wanted)

    def open(self, loaded: Loaded, inputs: SequenceInputs) -> TextWriter:
        """A predictor of translations. Raises FolderInvalid."""
        return TextWriter(self.name, loaded, inputs)


TASK = Translation()


def names_of(wanted: Any) -> PairNames:
    """The data's names for sources and targets, by the languages in the spec."""
    languages = wanted.source_language, wanted.target_language
    sources, targets = ([language.casefold()] if language else [] for language in languages)
    return PairNames((*sources, *_SOURCES), (*targets, *_TARGETS), languages)


class PreparedTranslation(PreparedSequences):
    """The task with its model and data."""

    task = TASK

    def __init__(self, found: Found, warnings: Sequence[TaskWarning], wanted: Any) -> None:
        super().__init__(found, warnings, wanted)
        self._languages: dict[str, str] = {
            name: getattr(wanted, name) for name in ("source_language", "target_language") if getattr(wanted, name)
        }

    def metrics(self) -> WrittenMetrics:
        """A new, empty collector of metrics."""
        score = partial(translation_scores, language=self._target_language)
        return WrittenMetrics(self.eval or self.train, self.write, self.read, score=score, main=("bleu", "chrf"))

    def describe(self) -> Mapping[str, Any]:
        """The content of `shardyard.json`; `bleu` is sacrebleu's signature of the metric."""
        signature = bleu_signature(self._target_language)
        return {"task": TASK.name, **super().describe(), **self._languages, "bleu": signature}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if the translations are not better than the sources themselves."""
        if "bleu" not in metrics or metrics["chrf"] > metrics["copied_chrf"]:
            return None
        message = (
            f"chrF is {metrics['chrf']:.1f}, and {metrics['copied_chrf']:.1f} for the sources themselves: the model "
            "does not translate; more epochs, a higher learning_rate, or a pretrained model may help"
        )
        return TaskWarning("NO_BETTER_THAN_COPYING", message)

    @property
    def _target_language(self) -> str:
        return self._languages.get("target_language", "")
