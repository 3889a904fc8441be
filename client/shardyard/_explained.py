"""Explanations as a page and on a picture: shares become colours, blue if they raise the output, else orange."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from shardyard._text import shown
from shardyard.errors import FailedPrecondition, invalid
from shardyard.types import Attribution, Explanation, Regions

RAISES, LOWERS = (31, 119, 180), (230, 120, 20)
"""Blue and orange: most people who cannot tell red from green can tell these."""

_STRONGEST = 0.75
"""How opaque the largest share is: what is below it can still be seen."""

_MEDIA = ((b"\xff\xd8", "jpeg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"RIFF", "webp"), (b"BM", "bmp"))
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.8 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }}
p.part {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
b {{ font-weight: normal; unicode-bidi: isolate; border-radius: 3px; padding: 1px 2px; }}
h2 {{ font-size: 1em; color: #666; margin: 1em 0 0; }}
li {{ list-style: none; }}
.seen {{ position: relative; overflow: hidden; }}
.seen svg {{ position: absolute; }}
img, svg {{ width: 100%; display: block; }}
</style></head><body>
{body}
</body></html>
"""


def html_page(explanation: Explanation, picture: str | Path | bytes | None) -> str:
    """The page; nothing in it is loaded from elsewhere, and every text is escaped. Raises: InvalidArgument."""
    most = largest(explanation)
    body = [f"<h1>{escape(headline(explanation))}</h1>", f"<p>{escape(footnote(explanation))}</p>"]
    for part, words in groupby(explanation.attributions, key=lambda each: each.part):
        body.append(f"<h2>{escape(part)}</h2>")
        some = list(words)
        body.append(_list(some, most) if part == "items" else f'<p class="part">{"".join(_running(some, most))}</p>')
    if explanation.regions is not None:
        body.append(_picture(explanation.regions, most, None if picture is None else content(picture)))
    elif picture is not None:
        raise _no_regions()
    return _PAGE.format(title=escape(explanation.target or "Explanation"), body="\n".join(body))


def overlay_png(explanation: Explanation, picture: str | Path | bytes) -> bytes:
    """The picture with its shares on it. Raises: InvalidArgument, FailedPrecondition without Pillow."""
    regions = explanation.regions
    if regions is None:
        raise _no_regions()
    try:
        from PIL import Image, ImageOps  # Nothing else of the client needs it.
    except ModuleNotFoundError:
        text = "drawing on a picture needs Pillow; install it with: pip install pillow"
        raise FailedPrecondition(text, reason="MISSING_PACKAGE") from None
    try:
        with Image.open(io.BytesIO(content(picture))) as file:
            shown_picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise invalid("picture", f"it does not open as a picture: {error}") from None
    if shown_picture.size != (regions.width, regions.height):
        sizes = f"{shown_picture.width} × {shown_picture.height} pixels, but {regions.width} × {regions.height}"
        raise invalid("picture", f"{sizes} were explained; give the same picture")
    most = largest(explanation)
    grid = Image.new("RGBA", (regions.columns, regions.rows))
    grid.putdata([(*colour(value), round(255 * strength(value, most))) for value in regions.values])
    left, top = round(regions.left), round(regions.top)
    size = max(round(regions.right) - left, 1), max(round(regions.bottom) - top, 1)
    layer = Image.new("RGBA", shown_picture.size)
    layer.paste(grid.resize(size, Image.Resampling.NEAREST), (left, top))
    made = io.BytesIO()
    Image.alpha_composite(shown_picture, layer).convert("RGB").save(made, "PNG")
    return made.getvalue()


def headline(explanation: Explanation) -> str:
    """`good: 2.31, and 1.042 for the baseline`: what is explained."""
    of = f"word {explanation.word}: " if explanation.word is not None else ""
    target = explanation.target or ("no answer" if explanation.prediction.answer is not None else "the number")
    return f"{of}{target}: {explanation.output:.4g}, and {explanation.baseline_output:.4g} for the baseline"


def footnote(explanation: Explanation) -> str:
    """The baseline, and how far the shares can be relied on."""
    error = f"{explanation.completeness_error:.2g}"
    how = f"The shares add up to the difference, within {error} of it"
    if not explanation.is_complete:
        how = f"The shares miss the difference by {error} of it: do not rely on them"
    return f"Baseline: {explanation.baseline}. {how} ({explanation.steps} gradients)."


def largest(explanation: Explanation) -> float:
    """The largest share, in either direction."""
    regions: Iterable[float] = () if explanation.regions is None else explanation.regions.values
    shares = [abs(each.score) for each in explanation.attributions] + [abs(value) for value in regions]
    return max(shares, default=0.0)


def strength(share: float, most: float) -> float:
    """How opaque a share is drawn, 0 to 0.75, if the largest is `most`."""
    return _STRONGEST * min(abs(share) / most, 1.0) if most > 0 else 0.0


def colour(share: float) -> tuple[int, int, int]:
    """The colour of a share, as red, green and blue."""
    return LOWERS if share < 0 else RAISES


def pieces(words: Sequence[Attribution]) -> Iterator[tuple[str, Attribution]]:
    """Words with what is before each: a space if there is anything between it and the word before."""
    end = words[0].start if words else 0
    for word in words:
        yield " " if word.start > end else "", word
        end = word.end


def content(picture: str | Path | bytes) -> bytes:
    """The bytes of a picture. Raises: InvalidArgument."""
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).read_bytes()
    except (OSError, ValueError) as error:
        raise invalid("picture", f"`{picture}` cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except TypeError:
        raise invalid("picture", f"{shown(picture)} is neither a path nor bytes") from None


def _no_regions() -> Exception:
    return invalid("picture", "the explanation is not that of a picture; leave the picture out")


def _css(share: float, most: float) -> str:
    return f"rgba({','.join(map(str, colour(share)))},{strength(share, most):.3f})"


def _running(words: Sequence[Attribution], most: float) -> Iterator[str]:
    for before, word in pieces(words):
        style = f'style="background:{_css(word.score, most)}" title="{word.score:+.4g}"'
        yield f"{before}<b {style}>{escape(word.text)}</b>"


def _list(items: Sequence[Attribution], most: float) -> str:
    lines = [
        f'<li><b style="background:{_css(item.score, most)}">{escape(item.text)}</b> '
        f"{'not read' if item.unread else f'{item.score:+.4g}'}</li>"
        for item in items
    ]
    return f"<ul>{''.join(lines)}</ul>"


def _picture(regions: Regions, most: float, picture: bytes | None) -> str:
    cells = "".join(
        f'<rect x="{at % regions.columns}" y="{at // regions.columns}" width="1" height="1" '
        f'fill="{_css(value, most)}"><title>{value:+.4g}</title></rect>'
        for at, value in enumerate(regions.values)
    )
    box = f'viewBox="0 0 {regions.columns} {regions.rows}" preserveAspectRatio="none"'
    if picture is None:
        return f"<svg {box}>{cells}</svg>"
    kind = next((name for magic, name in _MEDIA if picture.startswith(magic)), "png")
    source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
    width, height = max(regions.width, 1), max(regions.height, 1)
    place = (
        f"left:{100 * regions.left / width:.3f}%;top:{100 * regions.top / height:.3f}%;"
        f"width:{100 * (regions.right - regions.left) / width:.3f}%;"
        f"height:{100 * (regions.bottom - regions.top) / height:.3f}%"
    )
    return f'<div class="seen"><img src="{source}" alt=""><svg {box} style="{place}">{cells}</svg></div>'
