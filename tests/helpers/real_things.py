"""Slices of real pictures and of real histories for the integration table."""

from __future__ import annotations

import shutil
from pathlib import Path

import shardyard
from helpers.plain_recommender import read_histories
from helpers.real_slices import TINY_BERT, Story, steps
from helpers.small_specs import shared_data


def pictures(folder: Path, part: str, number: int) -> list[Path]:
    """So many handwritten digits of each class, under the folder of their class."""
    found = []
    for digit in range(10):
        (folder / str(digit)).mkdir(parents=True, exist_ok=True)
        for path in sorted((shared_data("mnist_png_sample") / part / str(digit)).iterdir())[:number]:
            found.append(Path(shutil.copy(path, folder / str(digit))))
    return found


def digits(folder: Path) -> Story:
    """Handwritten digits."""
    pictures(folder / "digits", "train", 20)
    held_out = pictures(folder / "digits-held", "test", 4)
    overrides = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    spec = shardyard.JobSpec(
        shardyard.ImageClassification(image_size=28),
        model=shardyard.Architecture("resnet", overrides),
        train_data=folder / "digits",
        eval_data=folder / "digits-held",
        optimization=steps(30, 1e-2, batch=16),
    )

    def numbers(model: shardyard.Model) -> dict[str, float]:
        answers = model.predict(held_out)
        right = sum(answer.label == path.parent.name for answer, path in zip(answers, held_out, strict=True))
        return {"accuracy": right / len(held_out)}

    return Story(spec, numbers)


def digits_without_labels(folder: Path) -> Story:
    """Handwritten digits with masked parts."""
    pictures(folder / "seen", "train", 10)
    pictures(folder / "seen-held", "test", 2)
    overrides = {**TINY_BERT, "image_size": 28, "patch_size": 4}
    spec = shardyard.JobSpec(
        shardyard.MaskedImage(mask_patch=4, image_size=28),
        model=shardyard.Architecture("vit", overrides, dropout=0.0),
        train_data=folder / "seen",
        eval_data=folder / "seen-held",
        optimization=steps(30, 1e-2, batch=16),
    )
    return Story(spec)


def films(folder: Path) -> Story:
    """What people of MovieLens saw next, by a model that reads from left to right."""
    model = shardyard.Architecture("gpt2", {"n_layer": 1, "n_head": 2, "n_embd": 32}, dropout=0.0)
    return _histories(folder, shardyard.Recommendation(max_history=20), model)


def masked_films(folder: Path) -> Story:
    """The same films, by a model that reads in both directions."""
    model = shardyard.Architecture("bert", TINY_BERT, dropout=0.0)
    return _histories(folder, shardyard.MaskedItem(max_history=20, mask_probability=0.3), model)


def _histories(
    folder: Path, task: shardyard.Recommendation | shardyard.MaskedItem, model: shardyard.Architecture
) -> Story:
    header, *rows = (shared_data("ml-100k") / "ml-100k.inter").read_text().splitlines()
    # Those of the first users, in the file's own order.
    chosen = [row for row in rows if int(row.split("\t")[0]) <= 80]
    path = folder / "films.inter"
    path.write_text("\n".join([header, *chosen]) + "\n")
    spec = shardyard.JobSpec(task, model=model, train_data=path, optimization=steps(40, 1e-2, batch=16))

    def numbers(model: shardyard.Model) -> dict[str, float]:
        histories = [items for items in read_histories(path).values() if len(items) > 2]
        answers = model.predict([shardyard.Items(items[:-1]) for items in histories], top_k=10)
        ranks = []
        for items, answer in zip(histories, answers, strict=True):
            ranked = [each.item for each in answer.items]
            ranks.append(1 + ranked.index(items[-1]) if items[-1] in ranked else 0)
        return {
            "hr_10": sum(rank > 0 for rank in ranks) / len(ranks),
            "mrr_10": sum(1 / rank for rank in ranks if rank) / len(ranks),
        }

    return Story(spec, numbers)
