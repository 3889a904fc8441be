"""Folders that are removed and made again under a running service are read again at once, not after a restart."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import shardyard
from helpers.served import served
from helpers.tiny_folders import save_folder


def write_rows(root: Path, number: int) -> None:
    root.mkdir(parents=True)
    rows = [(f"the dog is {label}", label) for label in ("good", "bad") * (number // 2)]
    with (root / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def test_a_data_root_and_a_storage_that_are_recreated_are_used_at_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_rows(root, 20)
    save_folder(tmp_path / "bert", "BertModel")
    with (
        served(tmp_path / "service", "local", "--data-root", str(root)) as service,
        shardyard.Client(service.address) as client,
    ):
        model = client.upload_model(tmp_path / "bert")
        spec = shardyard.JobSpec(
            shardyard.TextClassification(max_length=16),
            model=f"model:{model.id}",
            train_data=f"server:{root / 'reviews.csv'}",
            optimization=shardyard.Optimization(max_steps=2, global_batch_size=8),
        )
        assert client.plan(spec).num_train_samples == 18
        shutil.rmtree(root)
        write_rows(root, 40)
        assert client.plan(spec).num_train_samples == 36

        before = model.embed(["the dog"])[0]
        storage = service.state / "storage"
        storage.rename(service.state / "moved")
        shutil.copytree(service.state / "moved", storage, copy_function=shutil.copy2)
        assert client.plan(spec).num_train_samples == 36
        assert model.embed(["the dog"])[0] == before
