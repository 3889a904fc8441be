"""Pictures of any kind as 8-bit RGB or grey, decoded within bounds: what is refused is refused from the header.

Only the formats of `FORMATS` are tried, so no file starts another program, and nothing is decoded before its size is
known.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import (  # Each registers its format: `Image.open` knows no other one by itself.
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from PIL.Image import DecompressionBombError

FORMATS = (
    JpegImagePlugin.JpegImageFile.format,
    PngImagePlugin.PngImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
    GifImagePlugin.GifImageFile.format,
    BmpImagePlugin.BmpImageFile.format,
    TiffImagePlugin.TiffImageFile.format,
    PpmImagePlugin.PpmImageFile.format,
)
MOST_PIXELS = 1 << 26
"""8,192 times 8,192: three bytes for each are 200 MB while a picture is decoded."""

MOST_BYTES = 64 * 1024 * 1024
"""Of one picture's file."""

_STEP = "copy it again, or save it as JPEG or PNG"
_FAULTS = (OSError, ValueError, SyntaxError, TypeError, LookupError, EOFError, ArithmeticError, MemoryError)
"""What Pillow raises for damaged files, by format."""

_16_BIT = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})


class PictureInvalid(ValueError):
    """Bytes that are not a picture that can be used; says why and the next step."""


def read_picture(content: bytes, *, channels: int) -> Image.Image:
    """A picture as people see it: turned as its EXIF says, the first frame, on white where it is transparent.

    `channels` is 3 for RGB or 1 for grey. Raises PictureInvalid.
    """
    picture = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            turned = ImageOps.exif_transpose(picture)
            return _in_8_bits(turned).convert("RGB" if channels == 3 else "L")
    except PictureInvalid:
        raise
    except _FAULTS as error:
        raise _damaged(error) from None


def check_picture(content: bytes) -> None:
    """Raises PictureInvalid for bytes that do not decode to the end; cheaper than `read_picture`."""
    picture = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A JPEG is decoded to an eighth: every byte is looked at, few pixels are made.
            picture.draft("RGB", (max(picture.width // 8, 1), max(picture.height // 8, 1)))
            picture.load()
            if picture.mode == "F":
                _in_8_bits(picture)
    except PictureInvalid:
        raise
    except _FAULTS as error:
        raise _damaged(error) from None


def from_array(pixels_HW: np.ndarray, *, channels: int) -> Image.Image:
    """Grey pixels, uint8 [H, W], as a picture."""
    picture = Image.fromarray(pixels_HW)
    return picture.convert("RGB") if channels == 3 else picture


def _open(content: bytes) -> Image.Image:
    if not content:
        raise PictureInvalid(f"the file is empty; {_STEP}")
    if len(content) > MOST_BYTES:
        raise PictureInvalid(f"{len(content):,} bytes; a picture has at most {MOST_BYTES:,}; save a smaller one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Any = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise PictureInvalid(f"not a JPEG, PNG, WebP, GIF, BMP or TIFF picture; {_STEP}") from None
    except DecompressionBombError:
        raise _too_large("over 178,000,000") from None
    except _FAULTS as error:
        raise _damaged(error) from None
    if picture.width * picture.height > MOST_PIXELS:
        raise _too_large(f"{picture.width:,} × {picture.height:,}")
    if not picture.width or not picture.height:
        raise PictureInvalid(f"{picture.width} × {picture.height} pixels; {_STEP}")
    return picture  # type: ignore[no-any-return]


def _in_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode in _16_BIT or picture.mode == "I":
        # Pillow's own conversion would cut everything over 255 off.
        values = np.asarray(picture).astype(np.int64)
        if picture.mode == "I" and values.max(initial=0) <= 255:
            return Image.fromarray(values.clip(0, 255).astype(np.uint8))
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise PictureInvalid("its pixels are floating-point numbers, whose range nothing says; save it with 8 bits")
    if picture.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in picture.info:
        shown = picture.convert("RGBA")
        white = Image.new("RGBA", shown.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, shown).convert("RGB")
    return picture


def _too_large(size: str) -> PictureInvalid:
    return PictureInvalid(f"{size} pixels; a picture has at most {MOST_PIXELS:,}; save a smaller one")


def _damaged(error: BaseException) -> PictureInvalid:
    text = str(error)
    if (
        "truncated" in text.lower()
        or "unexpected end" in text
        or "broken data stream" in text
        or isinstance(error, EOFError)
    ):
        return PictureInvalid(f"the picture is cut short or damaged; {_STEP}")
    first = text.strip().split("\n")[0][:120] or type(error).__name__
    return PictureInvalid(f"the picture does not decode ({first}); {_STEP}")
