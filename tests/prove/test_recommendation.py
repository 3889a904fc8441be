"""Items on MovieLens as the examples have them; recommendation beside a plain PyTorch loop of the same budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import shardyard
from helpers.plain_recommender import popular_hit_rate, read_histories, train_and_measure
from helpers.served import BIN, Served
from helpers.small_specs import shared_data

EXAMPLES = Path(__file__).parents[2] / "examples"
ONE_POINT = 0.01
pytestmark = pytest.mark.prove


def test_films_are_recommended_as_well_as_by_a_plain_loop(service: Served) -> None:
    histories, found = trained(service, "recommendation")
    plain = train_and_measure(histories, longest=50, epochs=60, batch=64, rate=1e-3, dropout=0.3, seed=0)
    print(f"ours {found}, plain {plain}")
    assert found["hr_10"] > plain["hr_10"] - ONE_POINT
    assert found["ndcg_10"] > plain["ndcg_10"] - ONE_POINT


def test_masked_items_teach_what_comes_next(service: Served) -> None:
    _, found = trained(service, "masked-items")
    print(found)
    assert found["hr_10"] > 1.5 * found["popular_hr_10"]


def trained(service: Served, name: str) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The films of each user, and the numbers of an example on them: beyond the most popular films, as in `Predict`."""
    data = shared_data("ml-100k") / "ml-100k.inter"
    submit = (str(BIN / "shardyard"), "submit", str(EXAMPLES / f"{name}.yaml"), "--train", str(data))
    done = service.run(*submit, timeout_s=1800)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = service.run(str(BIN / "shardyard"), "get", name, "--json")
    found: dict[str, float] = json.loads(done.stdout)["evaluation"]["metrics"]
    histories = read_histories(data)
    assert found["popular_hr_10"] == pytest.approx(popular_hit_rate(histories), abs=0.003)
    assert found["hr_10"] > 1.5 * found["popular_hr_10"]
    with shardyard.Client(service.address) as client:
        answers = client.model(name).predict([shardyard.Items(items[:-1]) for items in histories.values()])
    hits = [
        items[-1] in {each.item for each in answer.items}
        for items, answer in zip(histories.values(), answers, strict=True)
    ]
    assert sum(hits) / len(hits) == pytest.approx(found["hr_10"], abs=1e-9)
    return histories, found
