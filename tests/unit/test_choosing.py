"""The ranking of models, by small invented catalogues: who is left out and why, and what the order comes from."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

import pytest

from helpers.invented_models import SOURCE, asked, bert, invented, names, points, scored
from helpers.plan_requests import ask, filled, fine_tuning, where
from helpers.tiny_folders import save_folder
from shardyard.cli.flags import JobFlags
from shardyard.specfile import overridden
from shardyard.v1 import model_service_pb2, plan_pb2, spec_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.choosing.candidates import Candidate
from shardyard_trainer.choosing.estimates import Wanted, estimate

MIDDLE = bert("middle", scores=[scored(80.0)])


def test_half_the_errors_are_ten_points_and_none_published_cost_five() -> None:
    better, worse = bert("better", scores=[scored(90.0)]), bert("worse", scores=[scored(60.0)])
    found = asked(invented(worse, bert("silent"), MIDDLE, better))
    assert names(found) == ["better", "middle", "silent", "worse"]
    assert [points(found, name)["quality"] for name in names(found)] == [10.0, 0.0, -5.0, -10.0]
    first, _, silent, last = found.recommendations
    assert first.pros[0] == "0.50 times the errors of middle: Bench 90"
    assert "no published result on Bench" in silent.cons[0] and "2.00 times the errors" in last.cons[0]


def test_results_of_another_benchmark_are_not_compared() -> None:
    found = asked(invented(MIDDLE, bert("other", scores=[scored(99.0, "Bench (test)")])))
    assert points(found, "other")["quality"] == -5.0


def test_less_is_better_where_the_benchmark_says_so() -> None:
    reference = bert("middle", scores=[scored(20.0, higher=False)])
    found = asked(invented(reference, bert("sure", scores=[scored(10.0, higher=False)])))
    assert names(found) == ["sure", "middle"] and points(found, "sure")["quality"] == 10.0


def test_each_doubling_of_the_time_costs_a_point_and_equal_models_are_ordered_by_size_and_name() -> None:
    large = bert("large", width=128, layers=8, scores=[scored(80.0)])
    found = asked(invented(large, bert("twin", scores=[scored(80.0)]), MIDDLE), rows=100_000)
    assert names(found) == ["middle", "twin", "large"]
    times = [each.time.expected.ToMilliseconds() for each in found.recommendations]
    assert times[2] > 2 * times[0]
    assert points(found, "large")["cost"] == pytest.approx(-math.log2(times[2] / times[0]), abs=0.02)
    assert found == asked(invented(large, bert("twin", scores=[scored(80.0)]), MIDDLE), rows=100_000)


def test_each_condition_leaves_out_and_is_counted_once() -> None:
    catalogue = invented(
        MIDDLE,
        bert("pickled", weights="pickle", licence="cc-by-nc-4.0"),
        bert("german", languages=["de"]),
        bert("polyglot", languages=["@many"]),
        bert("private", licence="cc-by-nc-4.0"),
        bert("short", context=64),
        bert("picture", model_type="vit", architecture={"hidden_size": 32, "num_attention_heads": 2}),
    )
    found = asked(catalogue, languages=["en"], commercial_use=True, tokens_per_row=100)
    assert names(found) == ["middle", "polyglot"] and found.num_candidates == 7
    assert [(each.reason, each.count) for each in found.left_out] == [
        ("WEIGHTS", 1), ("LANGUAGE", 1), ("LICENCE", 1), ("CONTEXT", 1), ("UNSUITED", 1)
    ]  # fmt: skip
    assert [each.message for each in found.left_out][1] == "1 does not know en"
    assert names(asked(catalogue, languages=["sw", "de"])) == ["polyglot"]
    assert names(asked(catalogue, licences=["cc-by-nc-4.0"])) == ["private"]


def test_what_needs_too_much_memory_is_proposed_with_lora_or_left_out() -> None:
    large = bert("large", width=512, layers=8, scores=[scored(95.0)])
    whole, tight, none = (
        asked(invented(MIDDLE, large), memory=memory) for memory in (8 * 2**30, 1000 * 2**20, 720 * 2**20)
    )
    assert names(whole) == names(tight) == ["large", "middle"] and names(none) == ["middle"]
    assert "lora" not in whole.recommendations[0].command
    first = tight.recommendations[0]
    assert first.spec.fine_tuning.lora.rank == 8 and "--set spec.fine_tuning.lora.rank=8" in first.command
    assert points(tight, "large")["settings"] == -2.0
    assert first.memory.verdict == plan_pb2.MEMORY_VERDICT_FITS and first.memory.total_bytes < 1000 * 2**20
    assert [(each.reason, each.count) for each in none.left_out] == [("MEMORY", 1)]
    assert "754,974,720 bytes" in none.left_out[0].message


def test_budgets_of_time_cost_and_latency_leave_out() -> None:
    large = bert("large", width=256, layers=8, scores=[scored(95.0)])
    catalogue = invented(MIDDLE, large)
    slow = asked(catalogue, rows=100_000).recommendations[0]
    assert slow.name == "hub:lab/large" and not slow.time.HasField("cost")
    seconds = slow.time.expected.seconds
    over = asked(catalogue, rows=100_000, max_time={"seconds": seconds - 1})
    assert names(over) == ["middle"] and [each.reason for each in over.left_out] == ["TIME"]
    assert len(names(asked(catalogue, rows=100_000, max_time={"seconds": seconds + 1}))) == 2
    priced = asked(catalogue, rows=100_000, price=2.0)
    cost = priced.recommendations[0].time.cost
    assert cost == pytest.approx(2.0 * slow.time.slot_hours) and priced.recommendations[0].time.currency == "EUR"
    assert [each.reason for each in asked(catalogue, rows=100_000, price=2.0, max_cost=cost / 2).left_out] == ["COST"]
    reads = slow.latency.ToMicroseconds()
    late = asked(catalogue, rows=100_000, max_latency={"nanos": 500 * reads})
    assert names(late) == ["middle"] and [each.reason for each in late.left_out] == ["LATENCY"]


def test_other_languages_have_a_comparison_of_their_own() -> None:
    many = {"languages": ["@many"]}
    catalogue = invented(
        bert("middle", **many, scores=[scored(80.0), scored(60.0, "Cross")]),
        bert("abroad", **many, scores=[scored(70.0), scored(80.0, "Cross")]),
        other="Cross",
    )
    assert names(asked(catalogue, languages=["en"])) == ["middle", "abroad"]
    assert names(asked(catalogue, languages=["sw"])) == ["abroad", "middle"]


def test_large_models_on_few_rows_lose_points_unless_lora_trains_little_of_them() -> None:
    huge = bert("huge", width=2048, layers=5, scores=[scored(80.0)])
    few, many = (asked(invented(MIDDLE, huge), rows=rows, memory=64 * 2**30) for rows in (200, 5000))
    assert points(few, "huge")["data"] == -3.0 and "on 200 rows" in " ".join(few.recommendations[1].cons)
    assert "data" not in points(many, "huge")
    with_lora = asked(invented(MIDDLE, huge), rows=200, memory=3 * 2**30)
    assert with_lora.recommendations[1].spec.fine_tuning.lora.rank == 8 and "data" not in points(with_lora, "huge")


def test_terms_and_unchecked_weights_cost_a_point_each_and_are_said() -> None:
    entry = bert("doubtful", scores=[scored(80.0)], gated=True, licence="cc-by-nc-4.0", weights="unknown")
    found = asked(invented(MIDDLE, entry))
    assert points(found, "doubtful")["terms"] == -3.0 and "terms" not in points(found, "middle")
    words = " ".join(found.recommendations[1].cons)
    assert "accepted its terms" in words and "(cc-by-nc-4.0) has terms of its own" in words and "safetensors" in words


def test_a_licence_without_a_source_is_said_costs_a_point_and_meets_no_condition_on_licences() -> None:
    guessed = bert("guessed", scores=[scored(80.0)], licence_source="", unchecked=["context", "licence"])
    vague = bert("vague", scores=[scored(80.0)], unchecked=["context"])
    catalogue = invented(MIDDLE, guessed, vague)
    found = asked(catalogue)
    assert names(found) == ["middle", "vague", "guessed"]
    assert [list(each.unchecked) for each in found.recommendations] == [[], ["context"], ["context", "licence"]]
    assert [each.licence_source for each in found.recommendations] == [SOURCE, SOURCE, ""]
    assert points(found, "guessed")["terms"] == -1.0 and "terms" not in points(found, "vague")
    cons = [found.recommendations[at].cons for at in (1, 2)]
    assert "not checked against any source: context" in cons[0]
    assert "not checked against any source: context, licence" in cons[1]
    for strict in (asked(catalogue, commercial_use=True), asked(catalogue, licences=["mit"])):
        assert names(strict) == ["middle", "vague"]
        assert [(each.reason, each.count) for each in strict.left_out] == [("LICENCE", 1)]
        assert "unchecked" in strict.left_out[0].message


def test_the_projects_own_models_come_first_if_they_were_trained_for_it(tmp_path: Path) -> None:
    save_folder(tmp_path / "bare", "BertModel")
    save_folder(tmp_path / "tagger", "BertForTokenClassification")
    save_folder(tmp_path / "broken", "BertModel")
    (tmp_path / "broken" / "config.json").write_text("{")
    prefix = "projects/default/models/"
    models = [
        model_service_pb2.Model(name=f"{prefix}bare", model_type="bert"),
        model_service_pb2.Model(name=f"{prefix}sorted", model_type="bert", task="text_classification",
                                metrics={"accuracy": 0.9}, source_job="projects/default/jobs/sorted"),
        model_service_pb2.Model(name=f"{prefix}tagger", model_type="bert", task="token_classification"),
        model_service_pb2.Model(name=f"{prefix}broken", model_type="bert"),
    ]  # fmt: skip
    folders = {model.name: tmp_path / model.name.rpartition("/")[2] for model in models}
    folders[f"{prefix}sorted"] = tmp_path / "bare"
    best = bert("best", scores=[scored(95.0)])
    found = asked(invented(MIDDLE, best), models=models, folders=folders, languages=["de", "en"])
    assert [each.name.rpartition("/")[2] for each in found.recommendations] == ["sorted", "bare", "tagger"]
    first, second, third = found.recommendations
    assert first.pros[0] == "a text_classification model of this project (accuracy 0.9)"
    assert first.spec.model.model == f"{prefix}sorted" and f"--model {prefix}sorted" in first.command
    assert "without a head" in second.pros[0] and "its head is not used" in third.cons[0]
    assert {each.reason: each.count for each in found.left_out} == {"LANGUAGE": 2, "UNSUITED": 1}


def test_a_new_model_needs_data_for_its_parameters() -> None:
    def recommender(name: str, width: int) -> dict[str, object]:
        settings = {"n_embd": width, "n_layer": 2, "n_head": 2}
        made = bert(name, model_type="gpt2", architecture=settings, tasks=["recommendation"], weights="new")
        return {**made, "languages": [], "context": 0, "licence": "", "licence_source": ""}

    catalogue = invented(recommender("small", 32), recommender("wide", 128))
    few, many = (asked(catalogue, "recommendation", rows=rows) for rows in (500, 500_000))
    assert names(few) == names(many) == ["new:lab/small", "new:lab/wide"]
    assert points(few, "wide")["data"] < points(few, "small")["data"] < 0 and "data" not in points(many, "wide")
    assert few.recommendations[0].spec.model.architecture.model_type == "gpt2"
    assert few.assumptions.epochs == 50 and few.recommendations[0].spec.optimization.epochs == 50


@pytest.mark.parametrize("request_", [{}, {"tokens_per_row": 100}, {"memory": 700 * 2**20}], ids=str)
def test_the_command_is_one_that_the_command_line_reads(request_: dict[str, int]) -> None:
    large = bert("large", width=512, layers=8, scores=[scored(95.0)])
    for each in asked(invented(MIDDLE, large), **request_).recommendations:
        words = shlex.split(each.command)
        assert words[:2] == ["shardyard", "submit"] and words.count("DATA") == 1
        flags, sets = {}, []
        for name, value in zip(words[2::2], words[3::2], strict=True):
            if name == "--set":
                sets.append(value)
            else:
                flags[name.removeprefix("--").replace("-", "_")] = float(value) if name == "--epochs" else value
        data = JobFlags(**flags).merged({})
        for override in sets:
            data = overridden(data, override)
        spec = data["job"]["spec"]
        assert spec["model"] == {"uri": each.name} and spec["optimization"]["epochs"] == 3.0
        length = each.spec.fine_tuning.text_classification.max_length
        assert spec["fine_tuning"]["text_classification"] == ({"max_length": str(length)} if length else {})
        assert ("lora" in spec["fine_tuning"]) == each.spec.fine_tuning.HasField("lora")


def test_notes_say_what_was_not_known() -> None:
    catalogue = invented(MIDDLE, bert("other"))
    assert any("rows were not given" in note for note in asked(catalogue).notes)
    assert any("memory of the cluster's nodes is not known" in note for note in asked(catalogue, memory=0).notes)
    limited = asked(catalogue, rows=10, max_results=1)
    assert len(limited.recommendations) == 1 and limited.notes == [
        "1 more models meet the request; raise max_results to see them"
    ]
    assert not asked(catalogue, rows=10).notes


def test_an_estimate_is_what_the_planner_says_of_real_data(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    root = filled(tmp_path / "root")
    text = "the dog is cute " * 5
    rows = [f"{text},{'good' if at % 2 else 'bad'}" for at in range(60)]
    (root / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    architecture = spec_pb2.Architecture(model_type="bert")
    architecture.overrides.update(bert("x")["architecture"])
    model = {"architecture": {"model_type": "bert", "overrides": dict(bert("x")["architecture"])}}
    spec = fine_tuning(model=model, tokenizer={"train": {"vocab_size": 300}}, optimization={"epochs": 3})
    for node in ({"memory_bytes": 8 * 2**30, "cpus": 2}, {"memory_bytes": 430 * 10**6, "cpus": 2}):
        planned = ask(root, spec, node)
        assert not planned.violations
        length = planned.plan.train_stats.lengths.longest
        source = spec_pb2.ModelSource(architecture=architecture)
        candidate = Candidate("new:x", "", "bert", "", "", False, "new", frozenset(), 0, 0, (), (), "", source, source)
        wanted = Wanted("text_classification", 60, length, worker_pb2.NodeShape(**node), where(root))
        found = estimate(candidate, wanted)
        assert found.memory.to_proto() == planned.plan.memory
        assert found.num_parameters == planned.plan.num_parameters


def test_rows_that_are_shorter_than_a_task_takes_get_its_shortest_length() -> None:
    reader = bert("reader", tasks=["question_answering"])
    found = asked(invented(reader), "question_answering", tokens_per_row=1)
    assert found.recommendations[0].spec.fine_tuning.question_answering.max_length == 16
    assert "--set spec.fine_tuning.question_answering.max_length=16" in found.recommendations[0].command
