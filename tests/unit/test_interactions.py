"""Interactions as people have them, planned as jobs: formats, times, filters, splits; bad rows are refused by line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.small_specs import architecture, locations, parse
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import SampleRef
from shardyard_trainer.planning.plan import plan
from shardyard_trainer.tasks.ingredients import prepare

NOON = 1_700_000_000
ROWS = [
    ("u1", "a", 4, 1), ("u2", "b", 1, 3), ("u1", "c", 5, 3), ("u2", "a", 3, 1),
    ("u1", "b", 2, 2), ("u3", "d", 4, 5), ("u2", "c", 4, 2), ("u4", "a", 5, 9), ("u4", "b", 5, 9),
]  # fmt: skip
"""User, item, rating and minute; sorted by time: u1 a b c, u2 a c b, u3 d, u4 a b (in the order of the rows)."""
HISTORIES = {"u1": "abc", "u2": "acb", "u4": "ab"}

Field = Mapping[str, Any]


def written(folder: Path, name: str, lines: Sequence[str]) -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path


def csv_of(folder: Path, rows: Sequence[Sequence[object]] = ROWS, header: str = "user,item,rating,time") -> Path:
    return written(folder, "a.csv", [header, *(f"{u},{i},{r},{NOON + 60 * int(str(t))}" for u, i, r, t in rows)])


def typed(folder: Path) -> Path:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    return written(folder, "a.inter", [header, *(f"{u}\t{i}\t{r}\t{NOON + t}" for u, i, r, t in ROWS)])


def in_order(name: str, between: str) -> Callable[[Path], Path]:
    rows = sorted(ROWS, key=lambda row: row[3])
    return lambda folder: written(folder, name, [f"{u}{between}{i}" for u, i, _, _ in rows])


def objects(folder: Path) -> Path:
    return written(
        folder,
        "a.jsonl",
        [json.dumps({"userId": u, "movieId": i, "timestamp": (NOON + t) * 1000}) for u, i, _, t in ROWS],
    )


def dates(folder: Path) -> Path:
    days = [f"{u},{i},2026-01-0{min(t, 9)}{'T10:00:00Z' if u == 'u1' else ''}" for u, i, _, t in ROWS]
    return written(folder, "a.csv", ["user,item,date", *days])


def parquet(kind: pa.DataType) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        times = [datetime.fromtimestamp(NOON + 86_400 * t, UTC) for *_, t in ROWS]
        table = {
            "user": [u for u, *_ in ROWS],
            "item": pa.array([row[1] for row in ROWS]).dictionary_encode(),
            "time": pa.array(times).cast(kind),
        }
        pq.write_table(pa.table(table), folder / "a.parquet")
        return folder / "a.parquet"

    return write


def bare(folder: Path) -> Path:
    return written(folder, "u.data", [f"{u}\t{i}\t{r}\t{NOON + t}" for u, i, r, t in ROWS])


def shop(folder: Path) -> Path:
    minutes = (f"2019-10-01 00:{t:02}:00 UTC,view,{i},{u}" for u, i, _, t in ROWS)
    return written(folder, "a.csv", ["event_time,event_type,product_id,user_id", *minutes])


def with_names(*names: str) -> Callable[[Path], Path]:
    return lambda folder: csv_of(folder, header=",".join(names))


def packed(folder: Path) -> Path:
    (folder / "a.csv.gz").write_bytes(gzip.compress(csv_of(folder).read_bytes()))
    return folder / "a.csv.gz"


POSITIONS = {"user": "column_1", "item": "column_2", "rating": "column_3", "time": "column_4"}
FORMATS: dict[str, tuple[Callable[[Path], Path], Field]] = {
    "a header": (csv_of, {}),
    "packed": (packed, {}),
    "typed header": (typed, {}),
    "lines of pairs": (in_order("a.txt", " "), {}),
    "pairs with tabs": (in_order("a.inter", "\t"), {}),
    "pairs with colons": (in_order("ratings.dat", "::"), {"format": "DATA_FORMAT_INTERACTIONS"}),
    "objects with other names": (objects, {}),
    "names of Amazon": (with_names("user_id", "parent_asin", "rating", "timestamp"), {}),
    "names of visits": (with_names("visitorid", "itemid", "event", "timestamp"), {}),
    "names of books": (with_names("USER_ID", "Book_ID", "Rating", "Date_added"), {}),
    "typed names with commas": (with_names("user_id:token", "item_id:token", "rating:float", "timestamp:float"), {}),
    "typed names, a comma between": (
        lambda folder: with_names("user_id:token", "item_id:token", "x:float", "timestamp:float")(folder).rename(
            folder / "a.inter"
        ),
        {},
    ),
    "a shop's events": (shop, {}),
    "dates": (dates, {}),
    "timestamps": (parquet(pa.timestamp("ns", "UTC")), {}),
    "timestamps without a zone": (parquet(pa.timestamp("s")), {}),
    "days": (parquet(pa.date32()), {}),
    "no header": (bare, {"format": "DATA_FORMAT_TSV", "header": False, "columns": POSITIONS}),
    "interactions without a header": (bare, {"format": "DATA_FORMAT_INTERACTIONS", "columns": POSITIONS}),
}


def spec_of(train: Path, task: Field | None = None, source: Field | None = None, **changes: Any) -> spec_pb2.JobSpec:
    spec: dict[str, Any] = {
        "fineTuning": {"recommendation": {"maxHistory": 4, **(task or {})}},
        "model": architecture("gpt2"),
        "trainData": {"uri": str(train), **(source or {})},
        "optimization": {"maxSteps": 4, "globalBatchSize": 2},
    }
    return parse({**spec, **changes})


def planned(folder: Path, spec: spec_pb2.JobSpec) -> worker_pb2.PlanResult:
    request = worker_pb2.PlanRequest(spec=spec, locations=locations(folder))
    return worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))


def sequences(folder: Path, spec: spec_pb2.JobSpec) -> tuple[list[str], list[tuple[str, str]]]:
    """What is learnt, and (history, target) of what is evaluated on, as a rank has it: a letter an item."""
    prepared = prepare(spec, locations(folder))
    items = ["-", *prepared.inputs.items]
    learnt = []
    for sample in range(prepared.train.num_samples):
        batch = prepared.train.micro_batch([SampleRef(0, sample)]).inputs
        learnt.append("".join(items[token] for token in [*batch["input_ids"][0], batch["labels"][0, -1]]))
    targets = []
    for sample in range(prepared.eval.num_samples if prepared.eval is not None else 0):
        batch = prepared.eval.micro_batch([SampleRef(0, sample)]).inputs
        targets.append(("".join(items[token] for token in batch["input_ids"][0]), items[batch["labels"][0, -1]]))
    return learnt, targets


@pytest.mark.parametrize("name", FORMATS)
def test_histories_are_read_from_each_format_in_the_order_of_time(name: str, tmp_path: Path) -> None:
    write, source = FORMATS[name]
    found = planned(tmp_path, spec_of(write(tmp_path), source=source))
    assert not found.violations, found.violations
    learnt, targets = sequences(tmp_path, found.plan.resolved_spec)
    # Of two interactions none is held out, of one nothing is learnt.
    assert sorted(learnt) == ["ab", "ab", "ac"] and sorted(targets) == [("ab", "c"), ("ac", "b")]
    assert (found.plan.num_train_samples, found.plan.num_eval_samples) == (3, 2)
    assert planned(tmp_path, found.plan.resolved_spec).plan == found.plan
    left = [path for path in (tmp_path / "cache" / "histories").iterdir() if not path.name.startswith(".")]
    assert len(left) == 1, "once for all of them: the rank reads what the plan has left"


def test_defaults_are_resolved_and_the_split_is_named(tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(csv_of(tmp_path), {"maxHistory": None})).plan
    task = found.resolved_spec.fine_tuning.recommendation
    assert (task.max_history, task.min_user_interactions, task.min_item_interactions) == (50, 1, 1)
    assert (task.split, task.exclude_seen) == (spec_pb2.Recommendation.SPLIT_LEAVE_ONE_OUT, True)
    described = prepare(found.resolved_spec, locations(tmp_path)).describe()
    assert described["split"] == "leave_one_out" and described["ranked"] == "all items"
    assert {warning.reason for warning in found.warnings} == {"SHORT_HISTORIES"}
    # Positions for the history, a token for each of four items and one for the padding.
    assert found.num_parameters - 2 * (12 * 32 * 32 + 13 * 32) - 2 * 32 == (50 + 5) * 32


WARNED: dict[str, tuple[Callable[[Path], Path], Field, str, str]] = {
    "no time": (in_order("a.txt", " "), {}, "NO_TIMES", "in the order of time"),
    "one interaction": (csv_of, {}, "SHORT_HISTORIES", "1 users have one interaction"),
    "rows twice": (lambda f: csv_of(f, [*ROWS, ROWS[0]]), {}, "DUPLICATE_ROWS", "1 duplicate rows"),
    "longer than is seen": (csv_of, {"maxHistory": 2, "split": "SPLIT_TIME"}, "HISTORIES_CUT", "more than max_history"),
    "had before": (
        lambda f: csv_of(f, [*ROWS, ("u1", "a", 5, 20)]),
        {},
        "REPEATED_ITEMS",
        "1 of 2 evaluated interactions are of items that the user had before",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_odd_about_the_data_is_said(name: str, tmp_path: Path) -> None:
    write, task, reason, message = WARNED[name]
    extra = [("u9", item, 5, minute) for minute, item in enumerate("abcdabcd")]
    train = write(tmp_path) if reason != "HISTORIES_CUT" else csv_of(tmp_path, [*ROWS, *extra])
    found = planned(tmp_path, spec_of(train, task))
    assert not found.violations, found.violations
    told = {warning.reason: warning.message for warning in found.plan.warnings}
    assert message in told.get(reason, ""), told


def test_rare_users_and_items_and_low_ratings_are_left_out_until_none_is_rare(tmp_path: Path) -> None:
    train = csv_of(tmp_path)
    # Without ratings under 3: u1 a c, u2 a c, u3 d, u4 a b; b and d are then rare, and so are u3 and u4.
    found = planned(tmp_path, spec_of(train, {"minRating": 3, "minItemInteractions": 2, "minUserInteractions": 2},
                                      evaluation={"holdout": 0}))  # fmt: skip
    assert not found.violations, found.violations
    learnt, targets = sequences(tmp_path, found.plan.resolved_spec)
    assert learnt == ["ac", "ac"] and targets == [] and found.plan.num_eval_samples == 0
    (violation,) = planned(tmp_path, spec_of(train, {"minUserInteractions": 9})).violations
    assert "none of 9 interactions is left" in violation.message and "fewer than 9" in violation.message


def test_a_split_by_time_holds_out_the_latest_of_all_users(tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(csv_of(tmp_path), {"split": "SPLIT_TIME"}, evaluation={"holdout": 0.4})).plan
    learnt, targets = sequences(tmp_path, found.resolved_spec)
    # The cut is at minute 3: the third of u1 and u2 are after it, and u3's and u4's first, which have no history.
    assert sorted(learnt) == ["ab", "ac"]
    assert sorted(targets) == [("a", "b"), ("ab", "c"), ("ac", "b")]
    refused = planned(tmp_path, spec_of(in_order("b.txt", " ")(tmp_path), {"split": "SPLIT_TIME"})).violations
    assert [(each.field, "no column `time`" in each.message) for each in refused] == [
        ("spec.fine_tuning.recommendation.split", True)
    ]


def test_a_split_by_time_that_leaves_nothing_to_learn_from_says_so(tmp_path: Path) -> None:
    at_once = csv_of(tmp_path, [(user, item, rating, 7) for user, item, rating, _ in ROWS])
    (refused,) = planned(tmp_path, spec_of(at_once, {"split": "SPLIT_TIME"})).violations
    assert "the split by time leaves no user with two interactions" in refused.message


def test_the_last_two_of_each_user_are_validation_and_test(tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(csv_of(tmp_path), {"split": "SPLIT_LEAVE_TWO_OUT"}))
    assert not found.violations, found.violations
    task = found.plan.resolved_spec.fine_tuning.recommendation
    assert task.split == spec_pb2.Recommendation.SPLIT_LEAVE_TWO_OUT
    learnt, targets = sequences(tmp_path, found.plan.resolved_spec)
    # Of u1 and u2 one item is left to learn from; u4 has two, of which none is held out.
    assert learnt == ["ab"]
    assert sorted(targets) == [("a", "b"), ("a", "c"), ("ab", "c"), ("ac", "b")]
    prepared = prepare(found.plan.resolved_spec, locations(tmp_path))
    assert sorted(zip(prepared.eval.lengths().tolist(), prepared.eval.is_last.tolist(), strict=True)) == [
        (1, False), (1, False), (2, True), (2, True),
    ]  # fmt: skip
    assert prepared.describe()["split"] == "leave_two_out"
    of_three = csv_of(tmp_path, [row for row in ROWS if row[0] in {"u1", "u2"}])
    (refused,) = planned(tmp_path, spec_of(of_three, {"split": "SPLIT_LEAVE_TWO_OUT"})).violations
    assert "leaves no user with two interactions to learn from" in refused.message


def test_evaluation_data_follows_what_its_users_had_before(tmp_path: Path) -> None:
    train = csv_of(tmp_path)
    later = [("u1", "d", 5, 50), ("u1", "new", 5, 51), ("u1", "a", 5, 52), ("u7", "a", 5, 1), ("u7", "c", 5, 2)]
    held_out = written(
        tmp_path, "b.csv", ["user,item,time", *(f"{u},{i},{NOON + 60 * int(t)}" for u, i, _, t in later)]
    )
    found = planned(tmp_path, spec_of(train, evalData={"uri": str(held_out)}))
    assert not found.violations, found.violations
    learnt, targets = sequences(tmp_path, found.plan.resolved_spec)
    assert sorted(learnt) == ["ab", "abc", "acb"]
    # An item unknown to training is neither a target nor part of a history: it counts as missed.
    assert sorted(targets) == [("a", "c"), ("abc", "d"), ("abcd", "a")]
    told = {warning.reason for warning in found.plan.warnings}
    assert {"UNKNOWN_ITEMS", "REPEATED_ITEMS"} <= told
    both = planned(tmp_path, spec_of(train, {"split": "SPLIT_TIME"}, evalData={"uri": str(held_out)})).violations
    assert [each.field for each in both] == ["spec.fine_tuning.recommendation.split"]


BAD_ROWS: dict[str, tuple[str, str]] = {
    "no user": (",a,3,1700000000", "the user is missing"),
    "no item": ("u1, ,3,1700000000", "the item is missing"),
    "a long id": (f"u1,{'x' * 300},3,1700000000", "has 300 characters; at most 256"),
    "no time": ("u1,a,3,", "the time is missing; write it as a number, or as 2026-01-31"),
    "milliseconds": (
        "u1,a,3,1700000000000",
        "is in milliseconds since 1970, but '1700000060' in an earlier row is in sec",
    ),
    "no time at all": ("u1,a,3,0", "the time '0' is another number"),
    "a date beside numbers": ("u1,a,3,2026-01-31", "is a date, but"),
    "an American date": ("u1,a,3,01/31/2026", "write it as a number, or as 2026-01-31"),
    "not a number": ("u1,a,3,nan", "the time is 'nan'"),
    "an underscore": ("u1,a,3,1_700_000_000", "the time is"),
    "a rating in words": ("u1,a,good,1700000000", "the rating is 'good'; give a number"),
    "a column too few": ("u1,a,3", "3 values in a row of 4 columns"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_or_left_out_if_that_is_allowed(name: str, tmp_path: Path) -> None:
    row, message = BAD_ROWS[name]
    train = csv_of(tmp_path)
    with train.open("a") as file:
        file.write(row + "\n")
    (violation,) = planned(tmp_path, spec_of(train, {"minRating": 1})).violations
    assert violation.field == "spec.train_data" and message in violation.message
    assert "a.csv, line 11" in violation.message
    found = planned(tmp_path, spec_of(train, {"minRating": 1}, {"maxBadRowsShare": 0.2}))
    assert not found.violations, found.violations
    assert "BAD_ROWS_LEFT_OUT" in {warning.reason for warning in found.plan.warnings}


def test_what_else_does_not_fit_is_refused_by_its_field(tmp_path: Path) -> None:
    train = csv_of(tmp_path)
    lonely = written(tmp_path, "lonely.csv", ["user,item", *(f"u{n},a" for n in range(5))])
    two = written(tmp_path, "two.csv", ["user,item", *(f"u{n},{item}" for n in range(5) for item in "ab")])
    nameless = bare(tmp_path)
    for spec, field, message in (
        (spec_of(train, {"maxHistory": 1}), "spec.fine_tuning.recommendation.max_history", "too small"),
        (spec_of(train, tokenizer={"train": {}}), "spec.tokenizer", "items have no tokenizer"),
        (spec_of(train, model=architecture("bert")), "spec.fine_tuning.recommendation", "use one such as gpt2"),
        (
            spec_of(train, model=architecture("gpt2", vocab_size=99)),
            "spec.model.architecture.overrides.vocab_size",
            "the catalogue has 4 items",
        ),
        (spec_of(lonely), "spec.train_data", "none of 5 users has two interactions"),
        (spec_of(two), "spec.train_data", "no user has 3 interactions"),
        (spec_of(two, {"minRating": 3}), "spec.train_data.columns", "`rating`"),
        (spec_of(train, source={"columns": {"text": "item"}}), "spec.train_data.columns", "roles user, item, time"),
        (spec_of(nameless, source={"format": "DATA_FORMAT_INTERACTIONS"}), "spec.train_data.columns", "column_1"),
        (spec_of(train, evalData={"uri": str(lonely)}), "spec.eval_data", "have no times, but"),
    ):
        found = {each.field: each.message for each in planned(tmp_path, spec).violations}
        if message == "have no times, but":
            assert "time" in found.get(field, ""), found
            continue
        assert message in found.get(field, ""), found


def test_ids_are_one_whatever_file_they_are_from(tmp_path: Path) -> None:
    rows = [json.dumps({"user": 7, "item": item, "time": at}) for at, item in enumerate([50, 172, 50.0, 181])]
    written(tmp_path, "a.jsonl", rows)
    found = planned(tmp_path, spec_of(tmp_path / "a.jsonl"))
    assert not found.violations, found.violations
    prepared = prepare(found.plan.resolved_spec, locations(tmp_path))
    assert prepared.inputs.items == ("50", "172", "181")


def test_the_list_of_the_most_frequent_items_is_ranked_as_anything_else(tmp_path: Path) -> None:
    found = planned(tmp_path, spec_of(csv_of(tmp_path))).plan
    prepared = prepare(found.resolved_spec, locations(tmp_path))
    # Learnt from are a 3 times, b twice (of u1 and u4), c once (of u2); each user's own items are left out.
    ranks = prepared.eval.ranks_by(prepared.train.popularity(4))
    assert sorted(ranks.tolist()) == [1, 1]
    both = prepare(planned(tmp_path, spec_of(csv_of(tmp_path), {"excludeSeen": False})).plan.resolved_spec,
                   locations(tmp_path))  # fmt: skip
    assert sorted(both.eval.ranks_by(np.array([0, 3, 2, 1, 0])).tolist()) == [2, 3]
