"""Models of pictures through the service, labels apart: vectors, and pretraining on pictures before fine-tuning."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

import shardyard
from helpers.small_pictures import save_vit, write_folders
from helpers.task_table import ROWS
from helpers.workplace import Workplace

VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


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


def test_what_pictures_without_labels_taught_is_fine_tuned_with_a_few(place: Workplace) -> None:
    write_folders(place.folder / "unlabelled", 30)
    held_out = write_folders(place.folder / "held", 6, first=200)
    optimization = shardyard.Optimization(epochs=8, learning_rate=5e-3, global_batch_size=16, seed=3)
    overrides = {"image_size": 24, "patch_size": 4, "num_hidden_layers": 2, **VIT, "hidden_size": 32}
    with shardyard.Client(place.address) as client:
        job = client.submit(
            shardyard.MaskedImage(mask_patch=4, flip=0.5),
            model=shardyard.Architecture("vit", overrides),
            train_data=place.folder / "unlabelled",
            optimization=optimization,
            job_id="seen",
            **ROWS["masked_image"].where(),
        )
        assert job.wait(timeout=300).state == "succeeded"
        seen = client.model("seen")
        assert seen.info.task == "masked_image" and seen.info.inputs == ()
        numbers = seen.info.metrics
        assert numbers["loss"] < 0.9 * numbers["one_colour_loss"]
        with pytest.raises(shardyard.InvalidArgument) as caught:
            seen.predict(held_out[:1])
        assert "fine-tune it for image_classification" in caught.value.violations[0].message
        tuned = client.submit(
            shardyard.ImageClassification(),
            model=seen,
            train_data=place.folder / "unlabelled",
            eval_data=place.folder / "held",
            optimization=optimization,
            job_id="named",
        )
        assert tuned.wait(timeout=300).state == "succeeded"
        model = client.model("named")
        # Of three classes.
        assert model.info.metrics["accuracy"] > 0.6
        answers = model.predict(held_out)
        right = sum(answer.label == path.parent.name for answer, path in zip(answers, held_out, strict=True))
        assert right / len(held_out) == pytest.approx(model.info.metrics["accuracy"], abs=1e-9)
    done = place.run("shardyard embed seen held/rose")
    assert done.returncode == 0 and done.stdout.count("[32]\t[") == 6, done.stderr
