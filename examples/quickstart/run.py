"""`make quickstart`: the story of pretrained models, on real ones, as a client of a real service.

    python examples/quickstart/run.py [--full] [--fallback] [--keep] [--task ner|images|recommend|instruct|translate]

Fetches a pretrained BERT and scored movie reviews (or falls back on the docstrings of Python's standard library),
starts a service of its own with an embedded Ray on loopback, pretrains, fine-tunes, predicts and embeds on two workers,
and leaves no process behind. The exit code is not 0 if anything fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import assets
import material
import service
import show
import stories
import story
from baseline import bag_of_words

import shardyard

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "build" / "quickstart"
REVIEWS = (show.HELLO, "A dull, endless film that wastes a fine cast.", "I laughed, I cried, I want to see it again.")
QUESTIONS = ("The film was wonderful.", "What a great movie!", "The train leaves at noon.")
DOCSTRINGS = ("Return the event loop policy of the current process.", "Send a message to the given e-mail address.")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    labels: int
    accuracy: float
    seconds: float | None = None
    peak_memory_bytes: int = 0


def main() -> int:
    """Runs the story and returns the exit code: 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="more comparisons, a few minutes more")
    parser.add_argument("--fallback", action="store_true", help="docstrings of the standard library, nothing fetched")
    parser.add_argument("--task", choices=stories.NAMES, help="another story instead: one task on material of its own")
    parser.add_argument("--keep", action="store_true", help="keep the service's state folder")
    parser.add_argument("--launcher", choices=("ray", "local"), default="ray")
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Nothing here needs the Hub.
    # Short: the paths of Ray's sockets have to fit into 107 characters.
    state = Path(tempfile.mkdtemp(prefix="sy-"))
    try:
        if arguments.task:
            tell_of(arguments.task, arguments, state)
        else:
            tell(arguments, state)
    except (assets.AssetsUnavailable, shardyard.ShardyardError, service.ServiceFailed, show.WrongAnswer) as error:
        print(f"\nThe quickstart failed: {error}", file=sys.stderr)
        print(f"The service's state and logs are in {state}", file=sys.stderr)
        return 1
    if not arguments.keep:
        shutil.rmtree(state, ignore_errors=True)
    print(f"\nDone in {time.monotonic() - began:.0f} s; no process is left.")
    return 0


def tell(arguments: argparse.Namespace, state: Path) -> None:
    """Runs the five chapters on one service."""
    chapter(1, "Fetch a pretrained model and labels")
    bert, data = fetch(fallback=arguments.fallback)
    print(f"  {data.title}: {data.num_few} labels to learn from, {data.num_test} held out")
    with service.running(state / "state", launcher=arguments.launcher) as served:
        print(f"  service ready at {served.address}, state in {served.state}")
        with shardyard.Client(served.address) as client:
            language_model = pretrain(client, data, fallback=bert is None)
            tuned = fine_tune(client, data, bert, language_model, full=arguments.full)
            chapter(4, "Predict, and extract features")
            show.predict(client, tuned, REVIEWS if bert else DOCSTRINGS)
            embedding_model = client.upload_model(bert).name if bert else tuned
            show.features(client, embedding_model, QUESTIONS)
            chapter(5, "The same without the SDK")
            show.raw_call(served.address, tuned, show.HELLO)
            show.in_transformers(client, tuned, OUTPUT / "model")
        print("\nStopping ...", flush=True)


def tell_of(task: str, arguments: argparse.Namespace, state: Path) -> None:
    """Runs the story of one task on a service of its own."""
    with service.running(state / "state", launcher=arguments.launcher) as served:
        with shardyard.Client(served.address) as client:
            stories.tell(task, client, OUTPUT / task)
        print("\nStopping ...", flush=True)


def fetch(*, fallback: bool) -> tuple[Path | None, material.Material]:
    """The BERT's folder and the reviews; None and docstrings if the packages are not available."""
    if not fallback:
        try:
            bert = assets.bert_folder()
            reviews = material.reviews(assets.snippets_folder(), OUTPUT / "reviews")
        except assets.AssetsUnavailable as error:
            print(f"  not available: {error}\n  The same story on the docstrings of Python's standard library instead:")
        else:
            print(f"  a BERT of 22.7 M parameters: {bert}")
            return bert, reviews
    return None, material.docstrings(OUTPUT / "docstrings")


def pretrain(client: shardyard.Client, data: material.Material, *, fallback: bool) -> str:
    """Runs chapter 2 and returns the language model's name."""
    chapter(2, "Pretrain a small GPT-2 on the text alone (2 workers, ZeRO-2)")
    spec = story.pretraining(data.unlabelled, steps=800 if fallback else 600, vocab_size=2048 if fallback else 4096)
    outcome = story.run_job(client, spec, "small-gpt2")
    show.write_a_sentence(client, outcome.model, "Return the" if fallback else "The film is")
    return outcome.model


def fine_tune(
    client: shardyard.Client, data: material.Material, bert: Path | None, language_model: str, *, full: bool
) -> str:
    """Runs chapter 3 and returns the name of the model that chapter 4 uses."""
    chapter(3, f"Fine-tune on {data.num_few} labels (2 workers, ZeRO-2)")
    jobs = {}
    if bert:
        jobs["pretrained BERT, fine-tuned"] = story.fine_tuning(bert, data, epochs=2, learning_rate=1e-4)
        if full:
            fresh = story.bert_without_its_pretraining(bert)
            jobs["the same BERT, not pretrained"] = story.fine_tuning(
                fresh, data, epochs=2, learning_rate=2e-4, tokenizer=bert
            )
    if full or not bert:
        epochs, rate = (2.0, 1e-3) if bert else (12.0, 1e-3)
        jobs["small GPT-2, pretrained above"] = story.fine_tuning(
            language_model, data, epochs=epochs, learning_rate=rate
        )
        jobs["small GPT-2, not pretrained"] = story.fine_tuning(
            story.SMALL_GPT2, data, epochs=epochs, learning_rate=rate, tokenizer=language_model
        )
    rows, models = baselines(data), []
    for number, (what, spec) in enumerate(jobs.items(), start=1):
        print(f"  -- {what}")
        outcome = story.run_job(client, spec, f"fine-tuning-{number}")
        models.append(outcome.model)
        seconds = outcome.took.total_seconds()
        rows.append(Row(what, data.num_few, outcome.metrics["accuracy"], seconds, outcome.peak_memory_bytes))
    print_table(rows, data)
    check(rows, pretrained=next(iter(jobs)), has_bert=bert is not None)
    return models[0]


def baselines(data: material.Material) -> list[Row]:
    """The rows that a trained model has to beat."""
    return [
        Row("always the most frequent class", 0, data.majority),
        Row("bag of words", data.num_few, bag_of_words(data.few, data.test)),
        Row("bag of words", data.num_all, bag_of_words(data.all, data.test)),
    ]


def print_table(rows: list[Row], data: material.Material) -> None:
    """Prints the accuracy of all rows on the held-out texts, lowest first."""
    print(f"\n  {data.title}, accuracy on {data.num_test} held-out texts")
    print(f"  {'':34}{'labels':>8}{'accuracy':>10}{'time':>8}{'peak memory':>14}")
    for row in sorted(rows, key=lambda row: row.accuracy):
        seconds = f"{row.seconds:.0f} s" if row.seconds is not None else ""
        memory = f"{row.peak_memory_bytes / 1e6:.0f} MB/rank" if row.peak_memory_bytes else ""
        print(f"  {row.what:34}{row.labels or '':>8}{row.accuracy:>10.3f}{seconds:>8}{memory:>14}")


def check(rows: list[Row], *, pretrained: str, has_bert: bool) -> None:
    """Raises WrongAnswer if the pretrained model does not beat the baselines; without a BERT, the first of them."""
    accuracy = {row.what: row.accuracy for row in rows if row.seconds is not None}
    to_beat = max(row.accuracy for row in rows if row.seconds is None) if has_bert else rows[0].accuracy
    if accuracy[pretrained] <= to_beat:
        raise show.WrongAnswer(f"{pretrained} reached {accuracy[pretrained]:.3f}, not more than {to_beat:.3f}")


def chapter(number: int, title: str) -> None:
    """Prints a heading."""
    print(f"\n{number}. {title}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
