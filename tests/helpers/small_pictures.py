"""Small pictures that say what they show: a bright shape of a class's own colour and place on a dark ground."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

CLASSES: dict[str, tuple[int, int, int]] = {"daisy": (240, 240, 60), "rose": (230, 40, 60), "violet": (120, 60, 230)}


def picture(name: str, number: int, *, side: int = 24) -> Image.Image:
    """A picture of a class; the same for the same number."""
    draw = np.random.default_rng([number, *name.encode()])
    pixels = draw.integers(0, 70, (side, side, 3), dtype=np.uint8)
    size = side // 2
    top, left = draw.integers(0, side - size + 1, 2)
    shade = np.asarray(CLASSES[name]) * draw.uniform(0.7, 1.0)
    pixels[top : top + size, left : left + size] = shade.astype(np.uint8)
    return Image.fromarray(pixels)


def write_folders(folder: Path, each: int, *, first: int = 0, ending: str = ".jpg", side: int = 24) -> list[Path]:
    """`CLASS/NUMBER.jpg`, `each` of every class."""
    paths = []
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + each):
            path = folder / name / f"{number:03}{ending}"
            picture(name, number, side=side).save(path)
            paths.append(path)
    return paths


def save_vit(folder: Path) -> None:
    """A backbone for pictures of 24 pixels, with three places each way, that says nothing of a task."""
    config = transformers.ViTConfig(
        image_size=24, patch_size=8, num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=32
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
