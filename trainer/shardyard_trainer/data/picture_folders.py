"""Folders of pictures: which folder is a class, and which picture a row of `metadata.csv` means."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from shardyard_trainer.data.errors import DataError, listed, shorten

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
NOT_READ = (".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".tga", ".psd", ".dcm", ".dng", ".exr")
"""Pictures that are not decoded: a row each, which says so, and not one file less in silence."""

METADATA = frozenset({"metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "metadata.ndjson"})
"""Files that label the pictures in the same folder."""

_SPLITS = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
_LEFT_OUT = frozenset({"__MACOSX"})
_NEXT = "put each picture into a folder named after its class, or give a metadata.csv with file_name and label"


def is_metadata(name: str) -> bool:
    """Whether a file describes pictures."""
    return PurePosixPath(name).name.lower() in METADATA


def is_left_out(folder: str) -> bool:
    """Whether a program created this folder for itself, such as `__MACOSX`."""
    return folder.startswith(".") or folder in _LEFT_OUT


def classes_of(names: Sequence[str]) -> list[str]:
    """The class of each picture: its folder, after removing folders that contain all others and split folders.

    Raises DataError for pictures without a class, and for folders that can be read in two ways.
    """
    places = _without_wrappers([PurePosixPath(name).parts[:-1] for name in names])
    if all(place and place[0].lower() in _SPLITS for place in places):
        bare = next((name for name, place in zip(names, places, strict=True) if len(place) < 2), "")
        if bare and len({place[0] for place in places}) < len(places) and any(len(place) > 1 for place in places):
            what = f"{PurePosixPath(bare).parent.name} has pictures without a class folder"
            raise DataError(f"{what}; choose a folder that has, such as train, with path", file=bare)
        if not bare:
            places = _without_wrappers([place[1:] for place in places])
    for name, place in zip(names, places, strict=True):
        if not place:
            raise DataError(f"the picture has no class: it is not in a class folder; {_NEXT}", file=name)
    _refuse_two_readings(places)
    return [place[0] for place in places]


def check_folders(base: Path, names: Iterable[str]) -> None:
    """Raises DataError for a folder without a picture in or below it: a class without examples."""
    full = {parent for name in names for parent in PurePosixPath(name).parents}
    for folder, folders, files in os.walk(base):
        folders[:] = sorted(each for each in folders if not is_left_out(each))
        place = Path(folder).relative_to(base)
        if place != Path() and PurePosixPath(place) not in full:
            others = sorted(each for each in files if not each.startswith("."))
            known = f"{', '.join(ENDINGS[:6])} and the like"
            what = f": it has {listed(others, most=3)}, but what is read ends in {known}" if others else ""
            text = f"the folder {shorten(str(place))} has no pictures{what}; add some, or remove it"
            raise DataError(text, file=str(place))


def _without_wrappers(places: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Removes folders that contain all others, as unpacked archives have."""
    while places and all(len(place) > 1 for place in places) and len({place[0] for place in places}) == 1:
        places = [place[1:] for place in places]
    return places


def _refuse_two_readings(places: Sequence[tuple[str, ...]]) -> None:
    """Raises DataError if both the outermost and the innermost folder could be the class."""
    deep = {place for place in places if len(place) > 1}
    splits = sorted({place[0] for place in deep if place[0].lower() in _SPLITS})
    if splits:
        others = sorted({place[0] for place in places} - set(splits))
        text = (
            f"the folder {splits[0]} has class folders, but is next to {listed(others, most=5)}; choose one with path"
        )
        raise DataError(text)
    above: dict[str, set[str]] = defaultdict(set)
    for place in deep:
        above[place[-1]].add(place[0])
    for inner, outer in sorted(above.items()):
        if len(outer) > 1:
            raise DataError(
                f"the class may be the outer folder ({listed(sorted(outer), most=3)}) or the inner one "
                f"({shorten(inner)}, which is in each of them); choose one outer folder with path, or give a "
                "metadata.csv with file_name and label"
            )
