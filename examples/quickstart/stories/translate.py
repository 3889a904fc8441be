"""A small T5 learns from scratch to translate dates, places and amounts from English to French.

No package index has a pretrained encoder-decoder or a corpus of sentences. `Babel` (BSD-3) has the Unicode CLDR: how
languages write dates, countries and units. The story makes pairs of phrases of it: `Sunday, July 14, 2030, 6:30 PM` is
`dimanche 14 juillet 2030, 18:30`. A model of 1 M parameters learns them in minutes, and no other French.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import assets
import show
import story
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn.feature_extraction.text import TfidfVectorizer

import shardyard
from shardyard.spec_sources import Architecture
from shardyard.specs import Data, JobSpec, Optimization, Resources, TrainedTokenizer, Translation

TITLE = "Make phrases in English and French"
WHAT = "small T5, from scratch"
METRIC = "bleu"
NUM_TRAIN, NUM_TEST, ASKED = 12_000, 300, 6
ONE_IN = 20
UNITS = ("length-kilometer", "mass-kilogram", "duration-hour", "speed-kilometer-per-hour", "volume-liter")
NUM_PLACES = 250
FIRST, NUM_MINUTES = datetime(1900, 1, 1), 150 * 365 * 24 * 60
T5 = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4}
BABEL = assets.Package(
    requirement="babel==2.18.0",
    filename="babel-2.18.0-py3-none-any.whl",
    sha256="e2b422b277c2b9a9630c1d7903c2a00d0830c409c59ac8cae9081c92f1aeba35",
    options=("--only-binary", ":all:"),
)
LANGUAGES = ("en", "fr")
# Runs on the unpacked package in a process of its own: reads wishes as JSON, writes each as a text per language.
WRITE = """\
import json, sys
from datetime import datetime
from babel import Locale, dates, lists, units
languages = [Locale.parse(name) for name in sys.argv[1:]]
codes = sorted(code for code in languages[0].territories
               if len(code) == 2 and code.isalpha() and all(code in each.territories for each in languages))
def moment(language, when):
    when = datetime.fromisoformat(when)
    both = dates.format_time(when, "short", locale=language), dates.format_date(when, "full", locale=language)
    return dates.get_datetime_format("full", locale=language).format(*both)
def places(language, *numbers):
    return lists.format_list([language.territories[codes[number]] for number in numbers], locale=language)
def amount(language, number, unit):
    return units.format_unit(number, unit, locale=language)
kinds = {"moment": moment, "places": places, "amount": amount}
wishes = json.load(sys.stdin)
json.dump([[" ".join(kinds[kind](each, *rest).split()) for each in languages] for kind, *rest in wishes], sys.stdout)
"""

Wish = tuple[str | int, ...]
"""The kind of a phrase and its content: a moment, numbers of places, or a number and its unit."""
Pair = tuple[str, str]


class Material(NamedTuple):
    """Two files of pairs, and what they hold."""

    train_file: Path
    test_file: Path
    train: list[Pair]
    test: list[Pair]


def prepare(folder: Path) -> Material:
    """Writes JSONL with a `translation` in both languages. Raises AssetsUnavailable."""
    babel = assets.cached("babel-2.18.0", BABEL, unpack)
    train, test = (
        phrases(babel, wishes(count, held_out=held_out)) for count, held_out in ((NUM_TRAIN, False), (NUM_TEST, True))
    )
    print(f"  {len(train)} phrases to learn from, {len(test)} held out: days, numbers and sets of places of their own")
    files = [write(folder / f"{name}.jsonl", part) for name, part in (("train", train), ("test", test))]
    return Material(*files, train, test)


def job(material: Material) -> JobSpec:
    """Trains a T5 from scratch, with a tokenizer trained on the phrases."""
    source, target = LANGUAGES
    return JobSpec(
        Translation(source_language=source, target_language=target, max_source_length=64, max_target_length=64),
        model=Architecture("t5", T5, dropout=0.0),
        tokenizer=TrainedTokenizer("byte_bpe", vocab_size=1200),
        train_data=Data(material.train_file),
        eval_data=Data(material.test_file),
        optimization=Optimization(epochs=8, global_batch_size=64, learning_rate=2e-3),
        resources=Resources(workers=2),
    )


def compare(client: shardyard.Client, outcome: story.Outcome, material: Material) -> tuple[float, dict[str, float]]:
    """Compares with copying, the most frequent translation, and that of the most similar phrase."""
    answers = {
        "copying the source": [source for source, _ in material.test],
        "always the most frequent translation": most_frequent(material.train, len(material.test)),
        "the translation of the most similar phrase": of_most_similar(material.train, material.test),
    }
    references = [[target for _, target in material.test]]
    print(f"\n  chrF of the {WHAT}: {outcome.metrics['chrf']:.1f}", flush=True)
    for what, texts in answers.items():
        print(f"  chrF of {what}: {CHRF().corpus_score(texts, references).score:.1f}")
    return outcome.metrics[METRIC], {
        what: BLEU().corpus_score(texts, references).score for what, texts in answers.items()
    }


def ask(client: shardyard.Client, model: str, material: Material) -> None:
    """Prints translations of a few held-out phrases. Raises WrongAnswer for an empty one."""
    chosen = material.test[:ASKED]
    answers = client.model(model).predict([source for source, _ in chosen])
    for (source, target), answer in zip(chosen, answers, strict=True):
        if not answer.text:
            raise show.WrongAnswer(f"no translation of {source!r}")
        print(f"  {source}: {answer.text}{'' if answer.text == target else f' (right: {target})'}")


def wishes(count: int, *, held_out: bool) -> list[Wish]:
    """`count` different phrases. A day, number or set of places is held out in all phrases or in none."""
    rng = random.Random(int(held_out))
    found: dict[Wish, None] = {}
    while len(found) < count:
        wish, key = draw(rng)
        if (key % ONE_IN == 0) == held_out:
            found[wish] = None
    return list(found)


def draw(rng: random.Random) -> tuple[Wish, int]:
    """A phrase, and the number of its day, places or amount, which decides whether it is held out."""
    kind = rng.choice(("moment", "moment", "places", "places", "amount"))
    if kind == "moment":
        when = FIRST + timedelta(minutes=rng.randrange(NUM_MINUTES))
        return (kind, when.isoformat()), when.toordinal()
    if kind == "places":
        numbers = rng.sample(range(NUM_PLACES), rng.choice((2, 3)))
        return (kind, *numbers), sum(numbers)
    number = rng.randrange(2, 1000)
    return (kind, number, rng.choice(UNITS)), number


def phrases(babel: Path, wanted: Sequence[Wish]) -> list[Pair]:
    """The wished phrases in both languages. Raises AssetsUnavailable."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WRITE, *LANGUAGES],
        input=json.dumps(wanted),
        env=os.environ | {"PYTHONPATH": str(babel)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise assets.AssetsUnavailable(f"{BABEL.requirement} does not write phrases: {last}")
    return [(source, target) for source, target in json.loads(done.stdout)]


def most_frequent(train: Sequence[Pair], count: int) -> list[str]:
    """`count` copies of the most frequent translation."""
    return [Counter(target for _, target in train).most_common(1)[0][0]] * count


def of_most_similar(train: Sequence[Pair], test: Sequence[Pair]) -> list[str]:
    """For each source the translation of the most similar one: TF-IDF over words and word pairs."""
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    known = vectors.fit_transform([source for source, _ in train])
    nearest = (vectors.transform([source for source, _ in test]) @ known.T).toarray().argmax(axis=1)
    return [train[at][1] for at in nearest]


def unpack(archive: Path, folder: Path) -> None:
    """Takes the code and the data of both languages out of the wheel."""
    data = {f"babel/locale-data/{name}.dat" for name in ("root", *LANGUAGES)} | {"babel/global.dat"}
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.startswith("babel/") and name.endswith(".py")]
        wheel.extractall(folder, [*names, *sorted(data)])


def write(path: Path, pairs: Sequence[Pair]) -> Path:
    """Writes one pair per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for pair in pairs:
            file.write(json.dumps({"translation": dict(zip(LANGUAGES, pair, strict=True))}, ensure_ascii=False) + "\n")
    return path
