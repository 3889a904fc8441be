"""Pictures of every kind as people see them, and as the numbers that a model's processor makes of them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image, PngImagePlugin

from helpers.picture_jobs import content
from shardyard_trainer.data.pictures import PictureInvalid, check_picture, read_picture
from shardyard_trainer.inputs.image_settings import default_settings, processed, read_settings
from shardyard_trainer.models.door import FolderInvalid


def half_red(mode: str) -> Image.Image:
    image = Image.new("RGB", (8, 4), (200, 40, 40))
    return image.convert(mode)


def turned() -> bytes:
    image = Image.new("RGB", (8, 4), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    return content(image, "JPEG", exif=exif, quality=95)


def sixteen() -> bytes:
    return content(Image.fromarray(np.full((4, 8), 200 * 256 + 7, np.uint16)))


def clear() -> bytes:
    return content(Image.new("RGBA", (8, 4), (0, 0, 0, 0)))


def clear_palette() -> bytes:
    image = Image.new("P", (8, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return content(image, "GIF", transparency=0)


def moving() -> bytes:
    first, second = Image.new("RGB", (8, 4), (200, 40, 40)), Image.new("RGB", (8, 4), (0, 255, 0))
    return content(first, "GIF", save_all=True, append_images=[second])


READ: list[tuple[str, bytes, int, tuple[int, int], tuple[int, ...]]] = [
    ("grey", content(Image.new("L", (8, 4), 77)), 3, (8, 4), (77, 77, 77)),
    ("colour as grey", content(half_red("RGB")), 1, (8, 4), (88,)),
    ("palette", content(half_red("RGB").quantize(4)), 3, (8, 4), (200, 40, 40)),
    ("cmyk", content(half_red("CMYK"), "TIFF"), 3, (8, 4), (200, 40, 40)),
    ("webp", content(half_red("RGB"), "WEBP", lossless=True), 3, (8, 4), (200, 40, 40)),
    ("bits", content(Image.new("1", (8, 4), 1)), 3, (8, 4), (255, 255, 255)),
    ("16 bit", sixteen(), 3, (8, 4), (200, 200, 200)),
    ("transparent", clear(), 3, (8, 4), (255, 255, 255)),
    ("transparent palette", clear_palette(), 3, (8, 4), (255, 255, 255)),
    ("animated", moving(), 3, (8, 4), (200, 40, 40)),
    ("turned", turned(), 3, (4, 8), (255, 255, 255)),
]


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_a_picture_of_many_bits_takes_a_few_bytes_a_pixel_while_it_is_read(kind: Any) -> None:
    pixels = np.full((1000, 1000), 200 * 256, kind)
    saved = content(Image.fromarray(pixels), "TIFF")
    tracemalloc.start()
    try:
        shown = read_picture(saved, channels=1)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert shown.getpixel((0, 0)) == 200 and most - len(saved) < 14 * pixels.size


@pytest.mark.parametrize(("name", "written", "channels", "size", "pixel"), READ, ids=[each[0] for each in READ])
def test_pictures_of_every_kind_are_read_as_people_see_them(
    name: str, written: bytes, channels: int, size: tuple[int, int], pixel: tuple[int, ...]
) -> None:
    check_picture(written)
    found = read_picture(written, channels=channels)
    assert found.size == size
    seen = found.getpixel((1, 1))
    assert np.allclose(seen, pixel, atol=3), seen


def test_float_pixels_and_text_in_png_are_refused_or_passed_over() -> None:
    with pytest.raises(PictureInvalid, match="floating-point"):
        check_picture(content(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 1000)
    check_picture(content(half_red("RGB"), pnginfo=notes))


PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViT", {"size": {"height": 32, "width": 32}}),
    ("ViT", {"size": 20, "resample": 3, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
    ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}),
    ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("DeiT", {"size": 36, "crop_size": 32}),
    ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    ("Bit", {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 48}}),
    ("MobileNetV2", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("EfficientNet", {"size": {"height": 32, "width": 32}, "include_top": True}),
    ("Levit", {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}),
    ("Beit", {"size": {"height": 32, "width": 32}, "do_center_crop": False}),
]


@pytest.mark.parametrize(
    ("kind", "values"), PROCESSORS, ids=[f"{kind}-{at}" for at, (kind, _) in enumerate(PROCESSORS)]
)
def test_pictures_become_the_numbers_that_transformers_makes_of_them(
    kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    values = {"image_processor_type": f"{kind}ImageProcessor", **values}
    shown = Image.fromarray(np.random.default_rng(1).integers(0, 256, (45, 61, 3), dtype=np.uint8))
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**values)
    settings = read_settings(values, channels=3)
    ours = processed(shown, settings)
    wanted = theirs(shown, return_tensors="pt")["pixel_values"][0].numpy()
    np.testing.assert_allclose(ours, wanted, atol=2e-5)
    # What is written gives the same numbers in plain transformers, and to us again.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings.to_dict()))
    again = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    np.testing.assert_allclose(again(shown, return_tensors="pt")["pixel_values"][0].numpy(), ours, atol=2e-5)
    assert processed(shown, read_settings(settings.to_dict(), channels=3)).tolist() == ours.tolist()


SETTINGS = [
    ({"image_processor_type": "MyProcessor"}, "MyProcessor"),
    ({"size": {"height": 10**9, "width": 3}}, "size"),
    ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
    ({"image_mean": [0.5]}, "image_mean"),
    ({"resample": 99}, "resample"),
    ({"do_resize": "yes"}, "do_resize"),
    ({"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True}, "rescale_offset"),
    ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}, "cuts nothing"),
    ({"rescale_factor": "1/255"}, "rescale_factor"),
]


@pytest.mark.parametrize(("values", "said"), SETTINGS, ids=[said for _, said in SETTINGS])
def test_settings_of_unknown_kinds_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(FolderInvalid, match=said):
        read_settings(values, channels=3)


def test_default_settings_squeeze_the_whole_picture() -> None:
    assert processed(Image.new("RGB", (50, 20)), default_settings((16, 16), 3)).shape == (3, 16, 16)
