"""A model of the Hub is fetched within bounds: refused for the sizes that the Hub says, stopped if it says none."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.loopback_hub import COMMIT, MODEL, LoopbackHub, loopback_hub
from shardyard.v1 import spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.models.hub import MOST_VARIABLE, resolve_hub


def folder(root: Path) -> Path:
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "bert"}')
    (root / "model.safetensors").write_bytes(b"x" * 300_000)
    (root / "pytorch_model.bin").write_bytes(b"x" * 900_000)
    return root


def fetched(hub: LoopbackHub, cache: Path, monkeypatch: pytest.MonkeyPatch, *, most: int) -> Path:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv(MOST_VARIABLE, str(most))
    return resolve_hub(spec_pb2.HubModel(id=MODEL), cache).folder.path


def kept_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file() and not path.is_symlink())


def test_a_model_over_the_bound_is_refused_before_a_byte_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_hub(folder(tmp_path / "model")) as hub:
        with pytest.raises(SpecError) as refused:
            fetched(hub, tmp_path / "cache", monkeypatch, most=200_000)
        assert (refused.value.field, refused.value.reason) == ("spec.model.hub", "QUOTA_EXCEEDED")
        assert "300,022 bytes in 2 files" in refused.value.message and "200,000" in refused.value.message
        assert MOST_VARIABLE in refused.value.message and hub.requests == 1
        assert kept_bytes(tmp_path / "cache") == 0
        # What is not fetched does not count.
        path = fetched(hub, tmp_path / "cache", monkeypatch, most=400_000)
        assert path.name == COMMIT and not (path / "pytorch_model.bin").exists()


def test_a_model_that_the_disk_has_no_room_for_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_hub(folder(tmp_path / "model")) as hub:
        hub.said_bytes["model.safetensors"] = 2**50
        with pytest.raises(SpecError) as refused:
            fetched(hub, tmp_path / "cache", monkeypatch, most=2**60)
        assert refused.value.reason == "STORAGE_FULL" and f"{2**50 + 22:,} bytes" in refused.value.message
        assert "make space" in refused.value.message and int(refused.value.metadata["free_bytes"]) < 2**50


def test_a_file_that_is_larger_than_the_hub_says_is_stopped_at_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loopback_hub(folder(tmp_path / "model")) as hub:
        hub.said_bytes["model.safetensors"] = 0
        with pytest.raises(SpecError) as refused:
            fetched(hub, tmp_path / "cache", monkeypatch, most=200_000)
        assert refused.value.reason == "QUOTA_EXCEEDED" and "longer than the sizes" in refused.value.message
        assert kept_bytes(tmp_path / "cache") <= 201_000


def test_files_that_are_larger_together_than_the_hub_says_are_stopped_at_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder(tmp_path / "model")
    for number in range(12):
        name = f"model-{number:05}-of-00012.safetensors"
        (path / name).write_bytes(b"%d" % number * 150_000)
    with loopback_hub(path) as hub:
        hub.said_bytes.update({file.name: 10 for file in path.iterdir()})
        with pytest.raises(SpecError) as refused:
            fetched(hub, tmp_path / "cache", monkeypatch, most=400_000)
        assert refused.value.reason == "QUOTA_EXCEEDED" and "longer than the sizes" in refused.value.message
        assert kept_bytes(tmp_path / "cache") <= 410_000
        # Said truly, it is fetched: what is counted is what is written, and not the bar of files.
        hub.said_bytes.clear()
        assert fetched(hub, tmp_path / "other", monkeypatch, most=3_000_000).name == COMMIT
