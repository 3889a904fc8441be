"""One walk finds all that a spec names, whatever the task; a task is found by the oneofs that lead to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor

from shardyard.task_paths import leaf_of
from shardyard.v1 import spec_pb2
from shardyard_coordinator.control.spec_walk import task_of, tasks, walk

_PROJECT = "projects/default"


def test_a_walk_finds_each_text_with_its_field_and_each_source_once() -> None:
    spec = spec_pb2.JobSpec()
    spec.feature_extraction.data.dataset = f"{_PROJECT}/datasets/texts"
    spec.model.hub.id = "me/bert"
    spec.tokenizer.model = f"{_PROJECT}/models/words"
    spec.train_data.uri = "/data/a.csv"
    spec.eval_data.dataset = f"{_PROJECT}/datasets/texts"
    found = walk(spec)
    assert found.uris == [("job.spec.train_data.uri", "/data/a.csv")]
    assert sorted(found.names) == [
        ("job.spec.eval_data.dataset", f"{_PROJECT}/datasets/texts"),
        ("job.spec.feature_extraction.data.dataset", f"{_PROJECT}/datasets/texts"),
        ("job.spec.tokenizer.model", f"{_PROJECT}/models/words"),
    ]
    assert found.uses == (f"{_PROJECT}/datasets/texts", f"{_PROJECT}/models/words")
    assert found.hubs == [spec.model.hub]
    assert len(found.sources) == 5


@pytest.mark.parametrize(("repo", "is_path"), [("/hub/resnet", True), ("owner/name:" + "0" * 40, False)])
def test_a_repository_of_pytorch_hub_is_a_path_or_a_name(repo: str, is_path: bool) -> None:
    spec = spec_pb2.JobSpec()
    spec.model.torch_hub.repo = repo
    found = walk(spec)
    assert found.uris == [("job.spec.model.torch_hub.repo", repo)] * is_path and not found.names


def places(message: Descriptor, names: set[str], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where the contract has a text of one of these names, below a message."""
    for field in message.fields:
        if field.name in names and field.type == field.TYPE_STRING and not field.is_repeated:
            yield (*path, field.name)
        elif field.message_type and field.message_type.file.package == "shardyard.v1":
            yield from places(field.message_type, names, (*path, field.name))


@pytest.mark.parametrize("place", list(places(spec_pb2.JobSpec.DESCRIPTOR, {"uri", "model", "dataset"})), ids=".".join)
def test_no_place_of_the_contract_is_left_out_of_the_walk(place: tuple[str, ...]) -> None:
    spec = spec_pb2.JobSpec()
    owner = spec
    for name in place[:-1]:
        owner = getattr(owner, name)
    setattr(owner, place[-1], "here")
    found = walk(spec)
    assert found.uris + found.names + found.targets == [(".".join(("job.spec", *place)), "here")]


@pytest.mark.parametrize("task", tasks())
def test_a_task_is_found_by_the_oneofs_that_lead_to_it(task: str) -> None:
    for family in ("", "pretraining", "fine_tuning"):
        spec = spec_pb2.JobSpec()
        owner = getattr(spec, family) if family else spec
        if task in owner.DESCRIPTOR.fields_by_name:
            getattr(owner, task).SetInParent()
            assert task_of(spec) == task
            return
    pytest.fail(f"no family has {task}")


@pytest.mark.parametrize(("family", "missing"), [("", "task"), ("pretraining", "objective"), ("fine_tuning", "task")])
def test_a_spec_without_a_task_says_which_choice_is_missing(family: str, missing: str) -> None:
    spec = spec_pb2.JobSpec()
    if family:
        getattr(spec, family).SetInParent()
    leaf = leaf_of(spec)
    assert (leaf.members, leaf.missing, task_of(spec)) == ((family,) if family else (), missing, "")
