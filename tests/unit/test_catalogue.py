"""The fields of the catalogue of models: forms, sources, and what can be counted. Not its opinions."""

from __future__ import annotations

import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers

from shardyard.task_paths import task_paths
from shardyard.worker.v1 import worker_pb2
from shardyard_coordinator.serve.validation.choosing import language_complaint
from shardyard_trainer.choosing.candidates import NEW, Candidate, published
from shardyard_trainer.choosing.catalogue import UNCHECKABLE, Entry, load_catalogue
from shardyard_trainer.choosing.estimates import Wanted, estimate
from shardyard_trainer.choosing.ranking import reference_scores

CATALOGUE = load_catalogue()
ENTRIES = CATALOGUE.entries
CONTENT = json.loads(resources.files("shardyard_trainer.choosing").joinpath("catalogue.json").read_text("utf-8"))
HEADS = {"AutoModelForSequenceClassification": 1, "AutoModelForImageClassification": 1000}
NODE = worker_pb2.NodeShape(memory_bytes=8 * 2**30, cpus=2)
# No published weights start these: a recommender knows its own items alone.
OF_NEW_MODELS = {"recommendation", "masked_item"}


def candidates(task: str) -> list[Candidate]:
    return list(published(CATALOGUE, task))


def is_planned(candidate: Candidate, task: str) -> bool:
    found = estimate(candidate, Wanted(task, 2000, 0, NODE, worker_pb2.Locations()))
    return found.num_parameters > 0 and found.reading_s > 0 and found.memory.total > 0


def counted(entry: Entry) -> int:
    """The parameters of transformers' class on the meta device, with the head that the entry says."""
    config = transformers.CONFIG_MAPPING[entry.model_type](**entry.architecture)
    if entry.counted_as in HEADS:
        config.num_labels = HEADS[entry.counted_as]
    if entry.is_new:  # Items and positions are those of an imagined catalogue.
        config.vocab_size, config.max_position_embeddings = (10_001, 50) if entry.model_type == "gpt2" else (10_002, 51)
    with torch.device("meta"):
        model = getattr(transformers, entry.counted_as).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_are_enough_models_of_enough_families() -> None:
    assert len(ENTRIES) >= 40 and len({entry.family for entry in ENTRIES}) >= 12
    assert [name for name, times in Counter(entry.id for entry in ENTRIES).items() if times > 1] == []


def test_every_task_has_two_candidates_or_a_stated_reason() -> None:
    tasks = {path[-1] for path in task_paths()} - {"model_evaluation", "model_export", "model_copy"}
    numbers = Counter(task for entry in ENTRIES for task in entry.tasks)
    assert set(numbers) == tasks and min(numbers.values()) >= 2
    assert {task for entry in ENTRIES if entry.is_new for task in entry.tasks} == OF_NEW_MODELS


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_an_entry_has_fields_of_the_right_form(entry: Entry) -> None:
    assert entry.tasks and entry.family and entry.model_type in transformers.CONFIG_MAPPING
    assert isinstance(entry.parameters, int) and entry.parameters > 0 and isinstance(entry.gated, bool)
    assert entry.weights in {"safetensors", "pickle", "unknown", "new"}
    assert entry.is_new or (entry.id.count("/") == 1 and entry.licence in CATALOGUE.commercial_use)
    reads_texts = not entry.is_new and not entry.image_size
    assert bool(entry.languages) == reads_texts and (entry.context > 0) == reads_texts
    assert [code for code in entry.languages if language_complaint(code)] == []
    for score in entry.scores:
        assert score.benchmark and score.metric and score.source and isinstance(score.value, int | float)
        assert not score.higher_is_better or 0 < score.value <= 100
    assert len({score.benchmark for score in entry.scores}) == len(entry.scores)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_a_licence_has_a_source_or_is_unchecked(entry: Entry) -> None:
    assert set(entry.unchecked) <= set(UNCHECKABLE) and list(entry.unchecked) == sorted(set(entry.unchecked))
    assert entry.licence_source == entry.licence_source.strip()
    if entry.is_new:
        assert not entry.licence and not entry.licence_source and not entry.unchecked
    else:
        assert bool(entry.licence_source) == ("licence" not in entry.unchecked)


def test_every_licence_of_the_map_of_commercial_use_is_that_of_a_model() -> None:
    assert set(CATALOGUE.commercial_use) == {entry.licence for entry in ENTRIES if not entry.is_new}


def test_every_reference_has_a_result_on_its_benchmark() -> None:
    for lists in (CATALOGUE.comparisons, CATALOGUE.other_comparisons):
        for compared in lists.values():
            assert set(reference_scores(CATALOGUE, compared)) == {each.benchmark for each in compared}


def test_a_group_of_languages_names_its_source() -> None:
    assert [name for name, group in CONTENT["language_groups"].items() if not group["source"]] == []


def test_parameters_are_those_of_the_architecture() -> None:
    wrong = {entry.id: counted(entry) / entry.parameters for entry in ENTRIES}
    assert {name: ratio for name, ratio in wrong.items() if abs(ratio - 1) > 0.01} == {}


@pytest.mark.parametrize("task", sorted({task for entry in ENTRIES for task in entry.tasks}))
def test_the_trainer_plans_each_kind_of_model_for_each_of_its_tasks(task: str) -> None:
    """One of each model type, the smallest; `prove` plans all."""
    smallest: dict[str, Candidate] = {}
    sizes = {(NEW if entry.is_new else "hub:") + entry.id: entry.parameters for entry in ENTRIES}
    for candidate in sorted(candidates(task), key=lambda each: sizes[each.name]):
        smallest.setdefault(candidate.model_type, candidate)
    assert smallest and all(is_planned(candidate, task) for candidate in smallest.values())


@pytest.mark.prove
@pytest.mark.parametrize("task", sorted({task for entry in ENTRIES for task in entry.tasks}))
def test_the_trainer_plans_every_model_for_each_of_its_tasks(task: str) -> None:
    assert all(is_planned(candidate, task) for candidate in candidates(task))


def test_the_catalogue_lies_beside_its_reader() -> None:
    package = Path(str(resources.files("shardyard_trainer.choosing")))
    assert (package / "catalogue.json").is_file() and (package / "catalogue.py").is_file()
