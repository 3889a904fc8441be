"""Models of pictures through the service, labels apart: vectors by Embed and as a data set of features."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import transformers

import shardyard
from helpers.small_pictures import write_folders
from helpers.workplace import Workplace, workplace

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    with workplace(tmp_path_factory.mktemp("pictures")) as place:
        yield place


def test_pictures_have_vectors(place: Workplace) -> None:
    paths = write_folders(place.folder / "garden", 2)
    save_vit(place.folder / "vit")
    with shardyard.Client(place.address) as client:
        model = client.upload_model(place.folder / "vit")
        vectors = model.embed([paths[0], paths[1].read_bytes(), *paths[2:]])
        assert {len(each.values) for each in vectors} == {16} and vectors[0] != vectors[1]
        places = model.embed(paths[:1], output="last_hidden_state")[0]
        assert places.shape == (10, 16) and places.values[:16] == pytest.approx(vectors[0].values, abs=1e-5)
        job = client.submit(
            shardyard.FeatureExtraction(data=place.folder / "garden"), model=model.name, job_id="garden-features"
        )
        assert job.wait(timeout=300).state == "succeeded"
        client.dataset("garden-features").download(place.folder / "features")
    rows = pq.read_table(place.folder / "features").to_pylist()
    assert [row["path"] for row in rows] == [str(path.relative_to(place.folder / "garden")) for path in paths]
    for row, vector in zip(rows, vectors, strict=True):
        assert row["vector"] == pytest.approx(vector.values, abs=1e-5)
    done = place.run(f"shardyard embed {model.id} garden/rose garden/violet/001.jpg")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3, done.stderr
    assert lines[0].startswith("[16]\t[") and lines[0].endswith("garden/rose/000.jpg")
    done = place.run(f"shardyard embed {model.id} 'a rose'")
    assert done.returncode != 0 and "reads pictures" in done.stderr


def save_vit(folder: Path) -> None:
    """A backbone that says nothing of a task, with three places each way."""
    config = transformers.ViTConfig(image_size=24, patch_size=8, num_hidden_layers=1, **VIT)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
