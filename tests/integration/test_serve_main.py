"""A whole coordinator as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from pydantic import ValidationError

from helpers.full_disk import small_disk
from helpers.processes import MAIN, ends, environment, running
from helpers.uploads import header, messages, whole
from shardyard.v1 import dataset_service_pb2_grpc, job_service_pb2, job_service_pb2_grpc
from shardyard_coordinator.settings import Settings, is_loopback


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str, Path]]:
    folder = tmp_path_factory.mktemp("state")
    with running(folder) as (process, address):
        yield process, address, folder


def test_it_serves_and_says_where(coordinator: tuple[subprocess.Popen[str], str, Path]) -> None:
    process, address, folder = coordinator
    record = json.loads((folder / "coordinator.json").read_text())
    ticks = int(Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    assert record == {"pid": process.pid, "start_ticks": ticks, "address": address, "projects": ["default"]}
    with grpc.insecure_channel(address) as channel:
        stub = job_service_pb2_grpc.JobServiceStub(channel)
        assert not stub.ListJobs(job_service_pb2.ListJobsRequest(parent="projects/default"), timeout=10).jobs


def test_it_listens_on_loopback_alone_and_is_small(coordinator: tuple[subprocess.Popen[str], str, Path]) -> None:
    process = psutil.Process(coordinator[0].pid)
    listening = [each.laddr.ip for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert [ip.removeprefix("::ffff:") for ip in listening] == ["127.0.0.1"]
    assert process.memory_info().rss < 150 * 1024 * 1024


def test_nothing_that_it_makes_is_open_to_other_accounts(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with running(tmp_path / "state") as (_, address), grpc.insecure_channel(address) as channel:
            stub = dataset_service_pb2_grpc.DatasetServiceStub(channel)
            files = {"a.csv": b"text,label\n", "deep/b.csv": b""}
            stub.CreateDataset(messages(header("corpus", files), *whole(files)), timeout=30)
            made = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
            open_ = [f"{path} {path.stat().st_mode:o}" for path in made if path.stat().st_mode & 0o077]
    finally:
        os.umask(before)
    assert open_ == [] and len(made) > 8


def test_a_second_coordinator_on_the_store_exits_75(coordinator: tuple[subprocess.Popen[str], str, Path]) -> None:
    process, _, folder = coordinator
    second = subprocess.run(MAIN, env=environment(folder), capture_output=True, text=True, timeout=60)
    assert second.returncode == 75 and str(process.pid) in second.stderr


def test_a_taken_address_exits_69(coordinator: tuple[subprocess.Popen[str], str, Path], tmp_path: Path) -> None:
    taken = environment(tmp_path, SHARDYARD_LISTEN=coordinator[1])
    second = subprocess.run(MAIN, env=taken, capture_output=True, text=True, timeout=60)
    assert second.returncode == 69 and coordinator[1] in second.stderr


def test_a_state_folder_that_cannot_be_made_exits_69(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = subprocess.run(MAIN, env=environment(tmp_path / "file"), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 69 and str(tmp_path / "file") in ended.stderr and "Traceback" not in ended.stderr


def to_a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def to_a_pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def to_a_loop(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("place", "put", "word"),
    [
        ("storage/store-id", to_a_folder, "is a folder"),
        ("store.db", to_a_folder, "is a folder"),
        ("store.db", to_a_pipe, "not a regular file"),
        ("store.db-shm", to_a_folder, "is a folder"),
        ("store.db.lock", to_a_loop, "leads back to it"),
        ("coordinator.tmp", to_a_folder, "is a folder"),
        ("compute.log", to_a_folder, "is a folder"),
        ("compute.log", lambda path: path.symlink_to("/nowhere/at/all"), "which is not there"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named_with_the_next_step(
    tmp_path: Path, place: str, put: Callable[[Path], object], word: str
) -> None:
    (tmp_path / "storage").mkdir()
    put(tmp_path / place)
    refused = ends(tmp_path)
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 78 and line.startswith(str(tmp_path / place))
    assert word in line and "move it away" in line


def test_a_storage_behind_a_link_to_itself_is_named_in_words(tmp_path: Path) -> None:
    to_a_loop(tmp_path / "storage")
    refused = ends(tmp_path)
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 69 and str(tmp_path / "storage") in line
    assert "Errno" not in line and "--storage-root" in line


def test_a_store_that_may_only_be_read_ends_the_start_in_words(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        storage = {"SHARDYARD_STORAGE_ROOT": str(tmp_path / "storage")}
        with running(disk / "state", **storage) as (process, _):
            process.terminate()
            assert process.wait(timeout=30) == 0
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        refused = ends(disk / "state", **storage)
    [line] = refused.stderr.splitlines()
    assert refused.returncode == 69 and str(disk / "state") in line and "read-only" in line


def stays_out(state: Path, storage: Path) -> str:
    """What a coordinator says that will not serve with this storage."""
    refused = ends(state, SHARDYARD_STORAGE_ROOT=str(storage))
    assert refused.returncode == 78, refused.stderr
    assert "Traceback" not in refused.stderr
    return refused.stderr


def test_another_stores_storage_and_folders_of_unknown_owners_are_left_alone(tmp_path: Path) -> None:
    with running(tmp_path / "first"):
        pass
    theirs = tmp_path / "first" / "storage" / "models" / ("0" * 32)
    theirs.mkdir()
    os.utime(theirs, (0, 0))
    assert "--storage-root" in stays_out(tmp_path / "second", tmp_path / "first" / "storage")
    unknown = tmp_path / "unknown" / "models" / ("1" * 32)
    unknown.mkdir(parents=True)
    os.utime(unknown, (0, 0))
    assert "`models`" in stays_out(tmp_path / "third", tmp_path / "unknown")
    assert theirs.is_dir() and unknown.is_dir()


def test_a_store_that_another_process_holds_for_a_while_is_waited_for(tmp_path: Path) -> None:
    with running(tmp_path / "state"):
        pass
    [database] = (tmp_path / "state").glob("*.db")
    holder = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(8.0, holder.execute, ["ROLLBACK"])
    timer.start()
    with running(tmp_path / "state") as (_, address):
        assert address.startswith("127.0.0.1:")
    timer.join()
    holder.close()


def test_sigterm_ends_it_in_order_and_nothing_is_left(tmp_path: Path) -> None:
    with running(tmp_path) as (process, _):
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert not (tmp_path / "coordinator.json").exists()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []


def test_another_address_than_loopback_is_refused_without_insecure(tmp_path: Path) -> None:
    open_to_all = environment(tmp_path, SHARDYARD_LISTEN="0.0.0.0:0")
    refused = subprocess.run(MAIN, env=open_to_all, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 78 and "--insecure" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"listen": "192.168.1.5:7400"}, "loopback"),
        ({"listen": ":7400"}, "loopback"),
        ({"listen": "127.0.0.1"}, "HOST:PORT"),
        ({"listen": "127.0.0.1:99999"}, "65535"),
        ({"listen": "127.0.0.1:http"}, "HOST:PORT"),
        ({"data_roots": ("data",)}, "absolute"),
        ({"projects": "Upper"}, "upper case"),
        ({"cpus": 0}, "greater than"),
        ({"launcher": "slurm"}, "ray"),
        ({"nonsense": 1}, "not permitted"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Settings(**changes)  # type: ignore[arg-type]


def test_settings_come_by_keyword_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDYARD_DATA_ROOTS", "/data, /more")
    monkeypatch.setenv("SHARDYARD_STATE_DIR", str(tmp_path))
    settings = Settings(projects=("team",))  # type: ignore[arg-type]
    assert settings.data_roots == ("/data", "/more") and settings.projects == ("default", "team")
    assert settings.storage == tmp_path / "storage" and settings.listen == "127.0.0.1:7400"
    assert Settings(listen="0.0.0.0:1", insecure=True).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("host", "is_local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("", False), ("example.org", False)]
)
def test_loopback_is_distinguished_from_other_addresses(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local
