"""What a rank may open: what its job needs, and nothing else of the account that the service runs under."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path

import psutil
import pytest

import shardyard
from helpers.confined import is_confined, is_warm, looking_launch
from helpers.launches import TESTS, collect
from helpers.served import BIN, rank_pids, served, wait_for_step
from helpers.tiny_folders import save_folder
from shardyard_coordinator.launch.confine import landlock_version
from shardyard_coordinator.launch.local import LocalLauncher
from shardyard_coordinator.seams import SystemClock

pytestmark = pytest.mark.skipif(landlock_version() < 2, reason="the kernel's Landlock has no rules for ranks")


def linked_packages(folder: Path) -> Path:
    """A folder of packages whose files are elsewhere, as an installer makes it that links from its cache."""
    site = folder / "site"
    site.mkdir(parents=True)
    # Links that lead to themselves are passed over: first or last in the folder's order, which is the file system's.
    for name in ("loop", "a_loop", "z_loop"):
        (site / name).symlink_to(site / name)
    (site / "linked_by_file").mkdir()
    for name in ("linked_as_a_whole", "linked_by_file"):
        (folder / "installer-cache" / name).mkdir(parents=True)
        (folder / "installer-cache" / name / "__init__.py").write_text("")
    (site / "linked_as_a_whole").symlink_to(folder / "installer-cache" / "linked_as_a_whole")
    (site / "linked_by_file" / "__init__.py").symlink_to(folder / "installer-cache" / "linked_by_file" / "__init__.py")
    for name in ("last_loop", "b_loop", "y_loop"):
        (site / name).symlink_to(site / name)
    return site


async def test_a_rank_opens_what_its_job_needs_and_nothing_else(tmp_path: Path) -> None:
    state, real_root, root = tmp_path / "state", tmp_path / "disk" / "data", tmp_path / "root"
    storage = state / "storage"
    for folder in (state, real_root):
        folder.mkdir(parents=True)
    root.symlink_to(real_root)
    (root / "rows.csv").write_text("text")
    (state / "store.db").write_text("tokens")
    (state / "other-id").write_text("ours")
    job, mine, others = storage / "jobs" / "one", storage / "models" / "mine", storage / "models" / "others"
    denied, done = "PermissionError", "done"
    rows = [
        ("read", root / "rows.csv", done),
        ("read", real_root / "rows.csv", done),
        ("read", others / "config.json", done),
        ("read", state / "store.db", denied),
        ("read", Path("/etc/passwd"), denied),
        ("read", Path(f"/proc/{os.getpid()}/environ"), denied),
        ("list", tmp_path, denied),
        ("list", Path.home(), denied),
        ("write", job / "notes", done),
        ("write", job / "e000001" / "notes", done),
        ("write", storage / "cache" / "tokens", done),
        ("write", root / "rows.csv", denied),
        ("write", storage / "store-id", denied),
        ("write", others / "config.json", denied),
        ("write", storage / "models" / "new", denied),
        ("remove", others / "config.json", denied),
        ("temporary", Path(), done),
        ("share", Path(f"sy-{os.getpid()}"), done),
        ("meet", Path(), done),
        ("write", Path("/dev/null"), done),
        ("write", Path("/proc/self/comm"), done),
        ("name thread", Path(), done),
        ("ask name", Path(), done),
        ("import", Path("linked_as_a_whole"), done),
        ("import", Path("linked_by_file"), done),
        ("put", mine, done),
        ("read", mine / "model.safetensors", done),
        ("put features", storage / "models" / "features", done),
        ("make device", job / "disk", denied),
        ("claim", storage / "store-id", done),
        # As after a storage was mounted again.
        ("claim", state / "other-id", "STORAGE_UNAVAILABLE"),
    ]
    launcher = LocalLauncher(
        clock=SystemClock(),
        cpus=1,
        program="helpers.looking_rank",
        environment={"PYTHONPATH": f"{TESTS}:{linked_packages(tmp_path)}"},
        hidden=str(state),
    )
    launch = looking_launch(storage, root, [(verb, path) for verb, path, _ in rows])
    await launcher.ensure(launch)
    try:
        await collect(launcher, launch.key)
        seen = json.loads((Path(launch.attempt_dir) / "seen.json").read_text())
        assert {f"{verb} {path}": found for (verb, path, _), found in zip(rows, seen, strict=True)} == {
            f"{verb} {path}": expected for verb, path, expected in rows
        }
    finally:
        await launcher.close(stop_cluster=True)


def test_the_ranks_of_a_real_job_are_confined_and_doctor_says_so(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    save_folder(tmp_path / "bert", "BertModel")
    with (root / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("text", "label"), *((f"the dog is {word}", word) for word in ("good", "bad") * 40)]
        )
    with (
        served(tmp_path / "service", "local", "--data-root", str(root)) as service,
        shardyard.Client(service.address) as client,
    ):
        spec = shardyard.JobSpec(
            shardyard.TextClassification(max_length=16),
            model=tmp_path / "bert",
            train_data=f"server:{root / 'reviews.csv'}",
            resources=shardyard.Resources(workers=2),
            optimization=shardyard.Optimization(max_steps=60, global_batch_size=8),
        )
        job = client.submit(spec, job_id="confined")
        wait_for_step(job, 1)
        ranks = [psutil.Process(pid) for pid in rank_pids(service.state, job.uid).values()]
        for rank in ranks:
            assert is_confined(rank) and is_warm(rank)
            assert rank.rlimit(psutil.RLIMIT_CORE) == (0, 0)
            files = {file.path for file in rank.open_files()}
            # The environment itself may be there.
            strange = [path for path in files if path.startswith("/tmp/") and not path.startswith(sys.prefix)]
            assert not [path for path in strange if str(service.state) not in path]
        assert job.wait(timeout=240).state == "succeeded"
        assert len(ranks) == 2
        assert job.model().predict(["the dog is good"])[0].label in {"good", "bad"}
        assert not list((service.state / "storage" / "models").glob(".*"))
        done = service.run(str(BIN / "shardyard"), "doctor")
        assert "ranks read the same" in " ".join(done.stdout.split())
