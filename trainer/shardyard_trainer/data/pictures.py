"""Decodes pictures of many kinds to 8-bit RGB or grey within limits that are checked on the header.

Only the formats of `FORMATS` are tried, so no file starts another program; nothing is decoded before its size is
known.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
from PIL import (  # Importing a plugin registers its format; `Image.open` does not know the others.
    BmpImagePlugin,
    GifImagePlugin,
    Image,
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
"""Bytes of one picture's file at most."""

_STEP = "copy it again, or save it as JPEG or PNG"
_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
    AttributeError,
)
"""What Pillow raises for damaged files, by format."""

_16_BIT = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How a picture is turned, by its orientation in EXIF."""


class PictureInvalid(ValueError):
    """The bytes are not a usable picture; the message says why and the next step."""


def read_picture(content: bytes, *, channels: int) -> Image.Image:
    """Decodes a picture as people see it: rotated by its EXIF, the first frame, transparency on white.

    `channels` is 3 for RGB or 1 for grey. Raises PictureInvalid.
    """
    picture = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture.load()
            return _in_8_bits(_turned(picture)).convert("RGB" if channels == 3 else "L")
    except PictureInvalid:
        raise
    except _FAULTS as error:
        raise _damaged(error) from None


def check_picture(content: bytes) -> None:
    """Raises PictureInvalid if the bytes do not decode to the end; cheaper than `read_picture`."""
    picture = _open(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A JPEG is decoded at an eighth of its size: all bytes are read, few pixels are computed.
            picture.draft("RGB", (max(picture.width // 8, 1), max(picture.height // 8, 1)))
            picture.load()
            if picture.mode == "F":
                _in_8_bits(picture)
    except PictureInvalid:
        raise
    except _FAULTS as error:
        raise _damaged(error) from None


def from_array(pixels_HW: np.ndarray, *, channels: int) -> Image.Image:
    """Converts grey pixels, uint8 [H, W], to a picture with this many channels."""
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


def _turned(picture: Image.Image) -> Image.Image:
    """The picture as its EXIF says. Notes that cannot be read say nothing: other programs show such pictures too.

    Pillow's `exif_transpose` also rewrites all other notes, and fails for those that it reads but cannot write.
    """
    try:
        way = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except _FAULTS:
        return picture
    return picture if way is None else picture.transpose(way)


def _in_8_bits(picture: Image.Image) -> Image.Image:
    if picture.mode in _16_BIT or picture.mode == "I":
        # Pillow's own conversion would clip everything over 255. In the file's own width: eight bytes a pixel, several
        # times over, would be gigabytes for the largest pictures.
        values = np.asarray(picture)
        if picture.mode != "I":
            return Image.fromarray((values >> 8).astype(np.uint8))
        is_8_bit = values.max(initial=0) <= 255
        values = values.clip(0, 255 if is_8_bit else 65535)
        return Image.fromarray((values if is_8_bit else values >> 8).astype(np.uint8))
    if picture.mode == "F":
        raise PictureInvalid("its pixels are floating-point numbers of unknown range; save it with 8 bits")
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
    if "MAX_TEXT_CHUNK" in text:
        return PictureInvalid("its notes or its colour profile take over 1 MiB unpacked; save it without them")
    first = text.strip().split("\n")[0][:120] or type(error).__name__
    return PictureInvalid(f"the picture does not decode ({first}); {_STEP}")
