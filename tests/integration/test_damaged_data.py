"""An upload that was damaged on the service's storage is reported as damaged, and no plan uses it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import shardyard
from helpers.served import Served, served
from helpers.small_specs import sentences
from helpers.tiny_folders import save_folder


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), "local", "--cpus", "1") as running:
        yield running


def flip(path: Path) -> None:
    """One bit, as a disk loses it: size and time of the file stay."""
    found, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "sha256": flip,
    "bytes": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_data_set_is_named_and_not_planned_with_nor_blamed_on_its_rows(
    service: Served, tmp_path: Path, how: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentences(150)) + f"\n{how}\n")
    spec = shardyard.JobSpec(
        shardyard.CausalLm(sequence_length=16),
        model=shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 16}),
        tokenizer=shardyard.TrainedTokenizer("characters"),
        train_data=corpus,
        optimization=shardyard.Optimization(max_steps=2, global_batch_size=2),
    )
    with shardyard.Client(service.address) as client:
        uploaded = client.upload_dataset(corpus)
        named = replace(spec, train_data=uploaded.info.name)
        client.plan(named)
        [kept] = service.state.glob(f"storage/datasets/{uploaded.info.uid}/*")
        whole = kept.read_bytes()
        DAMAGE[how](kept)
        # The very same spec too: its plan is kept, and looked at again with its files.
        another = replace(named, optimization=shardyard.Optimization(max_steps=3, global_batch_size=2))
        for again in (named, another):
            with pytest.raises(shardyard.FailedPrecondition) as refused:
                client.plan(again)
        [violation] = refused.value.violations
        assert violation.reason == "DATA_CHANGED" and "the service's copy is damaged" in violation.message
        assert kept.name in violation.message and how in violation.message and "upload it again" in violation.message
        kept.write_bytes(whole)
        client.plan(named)
        client.plan(another)


def test_a_model_that_is_gone_is_missed_though_its_plan_is_kept(service: Served, tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\n" + "the dog is good,yes\nthe cat is bad,no\n" * 10)
    with shardyard.Client(service.address) as client:
        model = client.upload_model(save_folder(tmp_path / "bert", "BertModel"))
        spec = shardyard.JobSpec(
            shardyard.TextClassification(max_length=8),
            model=model,
            train_data=client.upload_dataset(tmp_path / "reviews.csv"),
            optimization=shardyard.Optimization(max_steps=2),
        )
        client.plan(spec)
        client.plan(spec)
        [weights] = service.state.glob(f"storage/models/{model.info.uid}/model.safetensors")
        weights.rename(tmp_path / "weights")
        with pytest.raises(shardyard.ShardyardError) as refused:
            client.plan(spec)
        [violation] = refused.value.violations
        assert violation.field == "job.spec.model.model" and "model.safetensors" in violation.message
        (tmp_path / "weights").rename(weights)
        client.plan(spec)
