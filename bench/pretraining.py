"""What pretraining is for: accuracy by the number of labels, with and without it, written into docs/pretraining.md.

    python bench/pretraining.py [--data FOLDER] [--seeds 3] [--write]

A small BERT is pretrained on texts without their labels, then fine-tuned on some of the labels; beside it the same
architecture, with the same tokenizer, starts from random weights: once with the same steps of fine-tuning, once with
as many as pretraining and fine-tuning have together. Everything goes through a service and its SDK. FOLDER has AG News
(`ag_news/test.csv`) and WikiText-2 (`wikitext2/valid.txt`); default: $SHARDYARD_TEST_DATA, or shared/data beside the
repository.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import shardyard

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "quickstart"))

from service import running  # noqa: E402  the quickstart's, from beside

from measure import machine  # noqa: E402

PAGE = HERE.parent / "docs" / "pretraining.md"
BEGIN, END = "<!-- study begin -->", "<!-- study end -->"

SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512}
LABELS = (100, 300, 1000, 3000, 6000)
TESTED = 1600
LENGTH, BATCH, STEPS = 64, 32, 400
PRETRAINED_STEPS, PRETRAINED_RATE = 8000, 1e-3
PRETRAINED, SCRATCH, LONG = "pretrained", "from scratch", "from scratch, as long as both"
STARTS = {PRETRAINED: ((3e-4, 1e-3), STEPS), SCRATCH: ((3e-4, 1e-3), STEPS), LONG: ((3e-4,), STEPS + PRETRAINED_STEPS)}
"""Learning rates to choose from, and steps with labels."""

Found = Mapping[str, Mapping[int, Sequence[float]]]
"""Accuracies by start and number of labels, one for each seed."""


def main() -> int:
    """Pretrains once, fine-tunes all, prints; the exit code says whether pretraining is better at every number."""
    parser = argparse.ArgumentParser(description=__doc__)
    beside = HERE.parent.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("SHARDYARD_TEST_DATA") or beside))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="into docs/pretraining.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        folder = Path(name)
        train = split(arguments.data, folder)
        with running(folder / "state", launcher="local") as service, shardyard.Client(service.address) as client:
            study = Study(client, folder, train)
            loss = study.pretrain()
            found = {start: {n: study.accuracies(start, n, arguments.seeds) for n in LABELS} for start in STARTS}
    text = page(found, loss)
    print(text)
    if arguments.write:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    others = (found[start] for start in STARTS if start != PRETRAINED)
    return int(any(mean(found[PRETRAINED][n]) <= mean(other[n]) for other in others for n in LABELS))


def split(data: Path, folder: Path) -> list[list[str]]:
    """Writes the texts without labels and the rows to test on; returns those to train on, in an order of their own."""
    with (data / "ag_news" / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = [[f"{title}. {text}", label] for label, title, text in csv.reader(file)]
    random.Random(0).shuffle(rows)
    tested, train = rows[:TESTED], rows[TESTED:]
    write(folder / "test.csv", tested)
    wiki = (data / "wikitext2" / "valid.txt").read_text(encoding="utf-8").splitlines()
    texts = [*(text for text, _ in train), *(line for line in wiki if len(line) > 100)]
    (folder / "texts.txt").write_text("\n".join(" ".join(text.split()) for text in texts) + "\n", encoding="utf-8")
    return train


def write(path: Path, rows: list[list[str]]) -> Path:
    """Rows as CSV with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    return path


class Study:
    """The jobs of the study, on one service."""

    def __init__(self, client: shardyard.Client, folder: Path, train: list[list[str]]) -> None:
        self._client = client
        self._folder = folder
        self._train = train

    def pretrain(self) -> float:
        """Pretrains, and registers the fresh twin with the same tokenizer beside it; the loss on held-out texts."""
        spec = shardyard.JobSpec(
            shardyard.MaskedLm(sequence_length=LENGTH),
            model=shardyard.Architecture("bert", {**SIZES, "max_position_embeddings": LENGTH}),
            tokenizer=shardyard.TrainedTokenizer("wordpiece", vocab_size=8000),
            train_data=self._folder / "texts.txt",
            optimization=shardyard.Optimization(
                max_steps=PRETRAINED_STEPS, global_batch_size=BATCH, learning_rate=PRETRAINED_RATE
            ),
            evaluation=shardyard.EvaluationPolicy(holdout=0.02, every=PRETRAINED_STEPS // 4),
            resources=shardyard.Resources(workers=2),
        )
        self._done(spec, "pretrained")
        print(f"pretrained: {self._client.model('pretrained').info.metrics}", file=sys.stderr, flush=True)
        return self._client.model("pretrained").info.metrics["loss"]

    def accuracies(self, start: str, labels: int, seeds: int) -> list[float]:
        """Of the learning rate that is best on average; each seed draws other labels and another order."""
        of_rates = [[self._accuracy(start, labels, rate, seed) for seed in range(seeds)] for rate in STARTS[start][0]]
        best = max(of_rates, key=mean)
        print(f"{start}, {labels} labels: {best} of {of_rates}", file=sys.stderr, flush=True)
        return best

    def _accuracy(self, start: str, labels: int, rate: float, seed: int) -> float:
        name = f"{start.replace(',', '').replace(' ', '-')}-{labels}-{seed}-{rate:.0e}".replace("e-0", "e")
        chosen = random.Random(seed).sample(self._train, min(labels, len(self._train)))
        is_fresh, steps = start != PRETRAINED, STARTS[start][1]
        fresh = shardyard.Architecture("bert", {**SIZES, "max_position_embeddings": LENGTH})
        spec = shardyard.JobSpec(
            shardyard.TextClassification(max_length=LENGTH, pooling="mean"),
            model=fresh if is_fresh else "model:pretrained",
            tokenizer="model:pretrained" if is_fresh else None,
            train_data=write(self._folder / f"{name}.csv", chosen),
            eval_data=self._folder / "test.csv",
            optimization=shardyard.Optimization(
                max_steps=steps, global_batch_size=BATCH, learning_rate=rate, seed=seed
            ),
            evaluation=shardyard.EvaluationPolicy(every=steps),
        )
        self._done(spec, name)
        return self._client.model(name).info.metrics["accuracy"]

    def _done(self, spec: shardyard.JobSpec, name: str) -> None:
        job = self._client.submit(spec, job_id=name).wait(check=False)
        if job.state != "succeeded":
            raise SystemExit(f"{name} ended as {job.state}: {job.info.failure}")


def page(found: Found, loss: float) -> str:
    """The table and the plot, as Markdown."""
    rows = [f"| {n:,} | {' | '.join(_interval(found[start][n]) for start in STARTS)} |" for n in LABELS]
    lines = [f"line [{', '.join(f'{mean(found[start][n]):.3f}' for n in LABELS)}]" for start in STARTS]
    return "\n".join(
        [
            f"{datetime.now(UTC):%Y-%m-%d}, {machine()}. Loss of the masked tokens on held-out texts: {loss:.2f}.",
            "",
            "| Labels | Pretrained, then fine-tuned | From scratch | From scratch, as many steps as both |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "```mermaid",
            "xychart-beta",
            '    title "Accuracy by the number of labels; the highest line is pretrained"',
            f"    x-axis [{', '.join(map(str, LABELS))}]",
            '    y-axis "accuracy" 0.2 --> 1',
            *(f"    {line}" for line in lines),
            "```",
        ]
    )


def mean(values: Sequence[float]) -> float:
    """Of the seeds."""
    return statistics.mean(values)


def _interval(values: Sequence[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    raise SystemExit(main())
