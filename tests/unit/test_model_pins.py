"""A model or tokenizer that is no longer what a job was submitted with, or what the service keeps, is never used."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.listings import folders_listed
from helpers.small_specs import locations
from helpers.tiny_folders import bert_tokenizer, save_folder
from shardyard.v1 import model_service_pb2, plan_pb2, spec_pb2, transfer_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.infer import embed, predict
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.models.door import FolderInvalid, open_folder
from shardyard_trainer.models.known_files import check_known, file_names
from shardyard_trainer.planning.pins import check_same_model, model_fingerprint, tokenizer_fingerprint

WEIGHTS = "model.safetensors"


def flip(path: Path) -> None:
    """Changes one byte, as a disk does."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def stored(folder: Path) -> list[transfer_pb2.StoredFile]:
    """As they were registered."""
    return [
        transfer_pb2.StoredFile(
            path=path.name, size_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in folder.iterdir()
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = save_folder(tmp_path / "model", "BertForMaskedLM")
    (made / "README.md").write_text("nobody reads this")
    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return made


def accepted(folder: Path) -> tuple[spec_pb2.JobSpec, worker_pb2.Locations, plan_pb2.JobPlan]:
    """A spec with a model and a tokenizer of the user's own, as it was planned."""
    spec = spec_pb2.JobSpec(
        model=spec_pb2.ModelSource(uri=str(folder)),
        tokenizer=spec_pb2.TokenizerSource(uri=str(folder.parent / "tokenizer")),
    )
    where = locations(folder.parent)
    plan = plan_pb2.JobPlan(
        model_fingerprint=model_fingerprint(spec, where), tokenizer_fingerprint=tokenizer_fingerprint(spec, where)
    )
    assert plan.model_fingerprint and plan.tokenizer_fingerprint
    return spec, where, plan


CHANGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("a byte of the weights", lambda folder: flip(folder / WEIGHTS), "MODEL_CHANGED"),
    ("the weights cut", lambda folder: cut(folder / WEIGHTS), "MODEL_CHANGED"),
    ("the configuration", lambda folder: flip(folder / "config.json"), "MODEL_CHANGED"),
    ("the tokenizer", lambda folder: flip(folder.parent / "tokenizer" / "tokenizer.json"), "MODEL_CHANGED"),
    ("further weights", lambda folder: (folder / "more.safetensors").write_bytes(b"x"), "MODEL_CHANGED"),
    ("no weights", lambda folder: (folder / WEIGHTS).unlink(), "MODEL_CHANGED"),
    ("no model", lambda folder: folder.rename(folder.with_name("away")), "MODEL_NOT_FOUND"),
    ("no tokenizer", lambda folder: (folder.parent / "tokenizer").rename(folder / "t"), "MODEL_NOT_FOUND"),
]


@pytest.mark.parametrize(("what", "change", "cause"), CHANGES, ids=[what for what, *_ in CHANGES])
def test_what_has_changed_since_the_submission_is_refused(
    folder: Path, what: str, change: Callable[[Path], object], cause: str
) -> None:
    spec, where, plan = accepted(folder)
    change(folder)
    with pytest.raises(RunFailed) as failed:
        check_same_model(spec, where, plan)
    assert failed.value.cause == cause
    assert "submit" in failed.value.next_step


def test_unread_files_and_file_times_do_not_count(folder: Path) -> None:
    spec, where, plan = accepted(folder)
    (folder / "README.md").write_text("changed")
    os.utime(folder / WEIGHTS, (1, 1))
    check_same_model(spec, where, plan)
    assert accepted(folder)[2].model_fingerprint == plan.model_fingerprint


def test_a_plan_of_an_earlier_version_is_compared_with_nothing(folder: Path) -> None:
    spec, where, plan = accepted(folder)
    flip(folder / WEIGHTS)
    check_same_model(spec, where, plan_pb2.JobPlan())
    with pytest.raises(RunFailed):
        check_same_model(spec, where, plan)


def test_a_folder_of_many_files_is_not_listed_again_for_each(tmp_path: Path) -> None:
    for index in range(50):
        (tmp_path / f"part-{index}.safetensors").write_bytes(b"x")
    with folders_listed() as listed:
        check_known(open_folder(tmp_path), stored(tmp_path))
    assert len(listed) <= 2


def test_a_linked_part_is_pinned_as_it_is_read(tmp_path: Path) -> None:
    for place in ("model", "elsewhere"):
        (tmp_path / place).mkdir()
    (tmp_path / "elsewhere/config.json").write_text("{}")
    (tmp_path / "model/1_Pooling").symlink_to(tmp_path / "elsewhere")
    assert file_names(open_folder(tmp_path / "model", roots=(tmp_path,))) == ["1_Pooling/config.json"]


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_damage_on_the_services_own_storage_is_named(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    known = stored(folder)
    check_known(open_folder(folder), known)
    damage(folder / name)
    with pytest.raises(FolderInvalid, match=name) as refused:
        check_known(open_folder(folder), known)
    assert refused.value.reason == "MODEL_CHANGED" and refused.value.metadata["file"] == name
    name_of_model = "projects/default/models/m"
    where = locations(folder.parent, **{name_of_model: folder})
    where.known_files[str(folder)].files.extend(known)
    spec = spec_pb2.JobSpec(model=spec_pb2.ModelSource(model=name_of_model))
    with pytest.raises(RunFailed, match=name) as failed:
        check_same_model(spec, where, plan_pb2.JobPlan(model_fingerprint="0" * 64))
    assert failed.value.cause == "MODEL_CHANGED"


def test_no_answer_comes_from_a_damaged_file_even_of_a_model_that_was_loaded(folder: Path) -> None:
    known = stored(folder)
    text = model_service_pb2.Instance(text="the [MASK] is cute")
    asked = worker_pb2.PredictCall(
        folder=str(folder), request=model_service_pb2.PredictRequest(instances=[text]), files=known
    )
    turned = worker_pb2.EmbedCall(
        folder=str(folder), request=model_service_pb2.EmbedRequest(instances=[text]), files=known
    )
    first = worker_pb2.PredictReply.FromString(predict(asked.SerializeToString()))
    assert first.response.predictions and not first.violations
    flip(folder / WEIGHTS)
    for violations in (
        worker_pb2.PredictReply.FromString(predict(asked.SerializeToString())).violations,
        worker_pb2.EmbedReply.FromString(embed(turned.SerializeToString())).violations,
    ):
        (violation,) = violations
        assert (violation.field, violation.reason) == ("model", "MODEL_CHANGED") and WEIGHTS in violation.message
    flip(folder / WEIGHTS)
    again = worker_pb2.PredictReply.FromString(predict(asked.SerializeToString()))
    assert again.response == first.response


def cached_hub_model(folder: Path, cache: Path) -> tuple[spec_pb2.JobSpec, Path]:
    """The folder as the Hub's cache keeps it: links into blobs, weights by their sha256, the rest by git's hash."""
    commit = "c" * 40
    root = cache / "hub" / "models--me--bert"
    snapshot = root / "snapshots" / commit
    for made in (snapshot, root / "blobs", cache / "hub" / "complete"):
        made.mkdir(parents=True)
    (cache / "hub" / "complete" / commit).touch()
    for path in folder.iterdir():
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if path.suffix != ".safetensors":
            name = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        (root / "blobs" / name).write_bytes(content)
        (snapshot / path.name).symlink_to(Path("../../blobs") / name)
    return spec_pb2.JobSpec(model=spec_pb2.ModelSource(hub=spec_pb2.HubModel(id="me/bert", revision=commit))), snapshot


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_damaged_file_of_the_hubs_cache_is_known_by_its_name(folder: Path, name: str) -> None:
    where = locations(folder.parent)
    spec, snapshot = cached_hub_model(folder, folder.parent / "cache")
    assert model_fingerprint(spec, where)
    flip((snapshot / name).resolve())
    with pytest.raises(SpecError, match=f"cached file {name}") as refused:
        model_fingerprint(spec, where)
    assert refused.value.reason == "MODEL_CHANGED"
