"""What to watch next: a small GPT-2 over films, on the 100,000 ratings of MovieLens.

`recbole` carries them, with the films' titles (GroupLens: Harper and Konstan, 2015; not to be redistributed).
"""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path
from typing import NamedTuple

import assets
import show
import story

import shardyard
from shardyard.spec_sources import Architecture
from shardyard.specs import Data, JobSpec, Optimization, Recommendation, Resources

TITLE = "Fetch 100,000 ratings of films"
WHAT = "small GPT-2 over films"
METRIC = "hr_10"
LIKED = ("Toy Story", "Aladdin", "Lion King, The")
RATINGS = assets.Package(
    requirement="recbole==1.2.1",
    filename="recbole-1.2.1-py3-none-any.whl",
    sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    options=("--only-binary", ":all:"),
)
FILES = ("ml-100k.inter", "ml-100k.item")


class Material(NamedTuple):
    """The ratings as RecBole has them, and each film's title by its id."""

    ratings: Path
    titles: dict[str, str]


def prepare(folder: Path) -> Material:
    """Fetches ratings and titles, and uses them as they are. Raises AssetsUnavailable."""
    found = assets.cached("ml-100k", RATINGS, unpack)
    with (found / FILES[1]).open(encoding="utf-8", newline="") as file:
        titles = {row["item_id:token"]: row["movie_title:token_seq"] for row in csv.DictReader(file, delimiter="\t")}
    print(f"  {len(titles)} films; the last one of each user is held out")
    return Material(found / FILES[0], titles)


def job(material: Material) -> JobSpec:
    """Trains from scratch: no pretrained model has films for tokens."""
    return JobSpec(
        Recommendation(max_history=50),
        model=Architecture("gpt2", {"n_layer": 2, "n_head": 2, "n_embd": 64}, dropout=0.3),
        train_data=Data(material.ratings),
        optimization=Optimization(epochs=60, global_batch_size=64, learning_rate=1e-3),
        resources=Resources(workers=1),
    )


def compare(client: shardyard.Client, outcome: story.Outcome, material: Material) -> tuple[float, dict[str, float]]:
    """Compares with always naming the films that most users have seen."""
    return outcome.metrics[METRIC], {"always the most popular films": outcome.metrics["popular_hr_10"]}


def ask(client: shardyard.Client, model: str, material: Material) -> None:
    """Prints what to watch after three films. Raises WrongAnswer for a film that was seen."""
    ids = {title: film for film, title in material.titles.items()}
    (answer,) = client.model(model).predict([shardyard.Items([ids[title] for title in LIKED])], top_k=5)
    print(f"  after {', '.join(LIKED)}:")
    for each in answer.items:
        if material.titles[each.item] in LIKED:
            raise show.WrongAnswer(f"{material.titles[each.item]!r} is in the history")
        print(f"    {material.titles[each.item]} ({each.score:.3f})")


def unpack(archive: Path, folder: Path) -> None:
    """Takes ratings and titles out of the wheel."""
    with zipfile.ZipFile(archive) as wheel:
        for name in FILES:
            assets.copy(wheel, f"recbole/dataset_example/ml-100k/{name}", folder / name)
