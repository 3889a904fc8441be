"""Fine-tuning an encoder-decoder to write summaries of texts."""

from __future__ import annotations

from collections.abc import Mapping

from shardyard_trainer.data.text_pair_rows import PairNames
from shardyard_trainer.inputs.imagined import Imagined
from shardyard_trainer.inputs.sequences import SequenceInputs
from shardyard_trainer.models.loaded import Loaded
from shardyard_trainer.tasks.base import Output, TaskWarning
from shardyard_trainer.tasks.ingredients import Ingredients
from shardyard_trainer.tasks.rouge import rouge, sentences
from shardyard_trainer.tasks.seq2seq import AUTO, USAGE, Defaults, PreparedSequences, imagine_pairs, prepare_pairs
from shardyard_trainer.tasks.text_metrics import Written, WrittenMetrics
from shardyard_trainer.tasks.text_writer import TextWriter

NAMES = PairNames(
    (
        "src", "text", "document", "documents", "article", "article_text", "dialogue", "body", "content", "report",
        "input", "inputs", "maintext",
    ),
    ("tgt", "summary", "highlights", "abstract", "abstract_text", "headline", "tldr", "output", "targets"),
)  # fmt: skip
"""Names of the columns in public data sets of summaries."""

_DEFAULTS = Defaults(512, 128)


class Summarization:
    """The task `summarization`."""

    name = "summarization"
    output = Output.MODEL
    roles = ("source", "target")
    auto = AUTO
    pipeline = "summarization"
    example = ""
    usage = USAGE
    cuts = True
    holds_out_by_lot = True
    inputs = SequenceInputs

    def prepare(self, job: Ingredients) -> PreparedSummaries:
        """Finds and checks model and data. Raises SpecError."""
        return PreparedSummaries(prepare_pairs(job, NAMES, _DEFAULTS), job.warnings, job.wanted)

    def imagine(self, job: Ingredients, data: Imagined) -> PreparedSummaries:
        """With pairs of the full lengths. Raises SpecError."""
        return PreparedSummaries(imagine_pairs(job, data, _DEFAULTS), job.warnings, job.wanted)

    def open(self, loaded: Loaded, inputs: SequenceInputs) -> TextWriter:
        """A predictor of summaries. Raises FolderInvalid."""
        return TextWriter(self.name, loaded, inputs)


TASK = Summarization()


class PreparedSummaries(PreparedSequences):
    """The task with its model and data."""

    task = TASK

    def metrics(self) -> WrittenMetrics:
        """A new, empty collector of metrics."""
        main = ("rouge_lsum", "rouge_1", "rouge_2")
        return WrittenMetrics(self.eval or self.train, self.write, self.read, score=summary_scores, main=main)

    def describe(self) -> Mapping[str, object]:
        """The content of `shardyard.json`."""
        return {"task": TASK.name, **super().describe()}

    def judge(self, metrics: Mapping[str, float]) -> TaskWarning | None:
        """Warns if the summaries share nothing with the expected ones."""
        if metrics.get("rouge_1") != 0:
            return None
        message = "rouge_1 is 0: the summaries share no word with the expected ones; more epochs, a higher "
        return TaskWarning("ONE_ANSWER", message + "learning_rate, or a pretrained model may help")


def summary_scores(written: Written) -> dict[str, float]:
    """ROUGE of the summaries, and of the first sentence of each source."""
    first = [next(iter(sentences(source)), "") for source in written.sources]
    found = rouge(written.targets, written.texts)._asdict()
    return found | {f"lead_{name}": value for name, value in rouge(written.targets, first)._asdict().items()}
