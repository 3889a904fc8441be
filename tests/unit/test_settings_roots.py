"""Data roots that contain what no job may read: refused if callers have names, else said at every start."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardyard_coordinator.greeting import warnings_of
from shardyard_coordinator.settings import Settings


def given(folder: Path, *roots: Path, **more: object) -> Settings:
    return Settings(state_dir=folder / "state", data_roots=tuple(map(str, roots)), **more)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "admin-token").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path)
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "server.key").touch()
    return tmp_path


@pytest.mark.parametrize("root", [".", "state", "linked", "/", "data/.."])
def test_a_root_with_the_state_is_refused_with_names_and_said_without(folder: Path, root: str) -> None:
    with pytest.raises(ValueError, match=r"contains the state directory .*--state-dir"):
        given(folder, folder / "data", folder / root, auth=True)
    [warning] = warnings_of(given(folder, folder / "data", folder / root))
    assert "contains the state directory" in warning and "every job can read it" in warning


def test_the_state_behind_a_link_is_found(folder: Path) -> None:
    (folder / "elsewhere").symlink_to(folder / "data")
    with pytest.raises(ValueError, match="contains the state directory"):
        Settings(state_dir=folder / "elsewhere" / "state", data_roots=(str(folder / "data"),), auth=True)


def test_a_root_with_the_key_is_refused_and_all_is_said_at_once(folder: Path) -> None:
    files = {"tls_cert": folder / "keys" / "server.pem", "tls_key": folder / "keys" / "server.key"}
    with pytest.raises(ValueError, match="contains the key") as refused:
        given(folder, folder / "keys", folder, listen="0.0.0.0:7400", **files)
    assert str(refused.value).count("the data root") == 3


def test_a_root_with_the_secrets_alone_is_refused(folder: Path) -> None:
    (folder / "state" / "secrets").mkdir()
    with pytest.raises(ValueError, match="contains the secrets") as refused:
        given(folder, folder / "state" / "secrets", auth=True)
    assert "the state directory" not in str(refused.value)


def test_a_root_with_the_storage_is_said_if_projects_are_kept_apart(folder: Path) -> None:
    there = {"storage_root": folder / "data" / "storage"}
    assert warnings_of(given(folder, folder / "data", **there)) == []
    for root in (folder / "data", folder / "data" / "storage" / "models"):
        [warning] = warnings_of(given(folder, root, auth=True, **there))
        assert "has parts of the storage" in warning


def test_roots_beside_the_state_are_taken(folder: Path) -> None:
    assert warnings_of(given(folder, folder / "data", auth=True)) == []
    assert warnings_of(given(folder, folder / "stat", auth=True)) == []


def test_ranks_that_start_cold_because_they_could_read_the_state_are_said(folder: Path) -> None:
    assert any("ranks start cold" in each for each in warnings_of(given(folder, folder)))
    [warning] = warnings_of(given(folder, folder / "data", storage_root=folder))
    assert "the storage contains the state directory, so ranks start cold" in warning
