"""Metrics of generated texts against expected ones: BLEU and chrF by sacrebleu, and lengths.

Scores are from 0 to 100, as in sacrebleu and the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.sequences import SequenceSamples
from shardyard_trainer.tasks.base import WriteBatch
from shardyard_trainer.tasks.metrics import LossSum
from shardyard_trainer.tasks.module import ModuleOutput

_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn", "ko", "kor", "th", "tha"), "char"),
}
"""sacrebleu's tokenizers by language, in two letters or in three.

Other languages use that of the machine translation conferences (13a).
"""


class Written(NamedTuple):
    """Texts of one evaluation, in the order of its samples."""

    sources: Sequence[str]
    targets: Sequence[str]
    texts: Sequence[str]


Score = Callable[[Written], Mapping[str, float]]


class WrittenMetrics(LossSum):
    """`loss` (nats a target token), `generated_tokens` (the mean length), and the metrics that `score` computes.

    `main` are those of them that evaluations can be compared by.
    """

    def __init__(
        self,
        samples: SequenceSamples,
        write: WriteBatch,
        read: Callable[[Sequence[int]], str],
        *,
        score: Score,
        main: Sequence[str],
    ) -> None:
        super().__init__()
        self._main = main
        self.write = write
        self._samples = samples
        self._read = read
        self._score = score
        self._texts: list[tuple[int, int, str]] = []

    def update(self, batch: MicroBatch, output: ModuleOutput) -> None:
        """Takes one micro batch with the sequences that were written for it."""
        super().update(batch, output)
        assert output.sequences is not None
        for sample, tokens in zip(batch.samples, output.sequences, strict=True):
            self._texts.append((sample, len(tokens), self._read(tokens)))

    def directions(self) -> Mapping[str, int]:
        """The loss, and the main numbers of the texts."""
        return {"loss": -1, **dict.fromkeys(self._main, 1)}

    def part(self) -> Any:
        """Sums of the loss and of tokens; sample, length and text of all that was written."""
        return *super().part(), self._texts

    def compute(self, parts: Sequence[Any]) -> dict[str, float]:
        """The metrics over all ranks' parts."""
        found = sorted(each for part in parts for each in part[2])
        pairs = [self._samples.texts(sample) for sample, _, _ in found]
        written = Written(
            [source for source, _ in pairs], [target for _, target in pairs], [text for _, _, text in found]
        )
        lengths = sum(length for _, length, _ in found) / max(len(found), 1)
        return {"loss": self.mean(parts), "generated_tokens": lengths, **self._score(written)}


def translation_scores(written: Written, language: str) -> dict[str, float]:
    """BLEU and chrF of the texts, and of the sources as they are."""
    from sacrebleu.metrics.bleu import BLEU  # Imported here: it takes half a second, which only evaluations should pay.
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf, targets = BLEU(tokenize=_tokenizer(language)), CHRF(), [list(written.targets)]
    return {
        "bleu": float(bleu.corpus_score(written.texts, targets).score),
        "chrf": float(chrf.corpus_score(written.texts, targets).score),
        "copied_bleu": float(bleu.corpus_score(written.sources, targets).score),
        "copied_chrf": float(chrf.corpus_score(written.sources, targets).score),
    }


def bleu_signature(language: str) -> str:
    """How `bleu` was computed, in sacrebleu's words."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU(tokenize=_tokenizer(language))
    bleu.corpus_score(["a"], [["a"]])  # Only now does it know the number of references.
    return str(bleu.get_signature())


def _tokenizer(language: str) -> str:
    return _TOKENIZERS.get(language.lower().replace("-", "_").partition("_")[0], "13a")
