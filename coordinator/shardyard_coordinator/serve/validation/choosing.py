"""Rules of RecommendModels that the protos cannot express: tasks, codes of languages, what belongs together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.duration_pb2 import Duration

from shardyard.task_paths import task_paths
from shardyard.v1 import choosing_pb2, spec_pb2
from shardyard_coordinator.domain.errors import FieldViolation
from shardyard_coordinator.serve.validation.text import show

TWO_LETTERS: Final[Mapping[str, str]] = {
    "aar": "aa", "abk": "ab", "afr": "af", "aka": "ak", "amh": "am", "ara": "ar", "arg": "an", "asm": "as",
    "ava": "av", "ave": "ae", "aym": "ay", "aze": "az", "bak": "ba", "bam": "bm", "bel": "be", "ben": "bn",
    "bis": "bi", "bod": "bo", "bos": "bs", "bre": "br", "bul": "bg", "cat": "ca", "ces": "cs", "cha": "ch",
    "che": "ce", "chu": "cu", "chv": "cv", "cor": "kw", "cos": "co", "cre": "cr", "cym": "cy", "dan": "da",
    "deu": "de", "div": "dv", "dzo": "dz", "ell": "el", "eng": "en", "epo": "eo", "est": "et", "eus": "eu",
    "ewe": "ee", "fao": "fo", "fas": "fa", "fij": "fj", "fin": "fi", "fra": "fr", "fry": "fy", "ful": "ff",
    "gla": "gd", "gle": "ga", "glg": "gl", "glv": "gv", "grn": "gn", "guj": "gu", "hat": "ht", "hau": "ha",
    "hbs": "sh", "heb": "he", "her": "hz", "hin": "hi", "hmo": "ho", "hrv": "hr", "hun": "hu", "hye": "hy",
    "ibo": "ig", "ido": "io", "iii": "ii", "iku": "iu", "ile": "ie", "ina": "ia", "ind": "id", "ipk": "ik",
    "isl": "is", "ita": "it", "jav": "jv", "jpn": "ja", "kal": "kl", "kan": "kn", "kas": "ks", "kat": "ka",
    "kau": "kr", "kaz": "kk", "khm": "km", "kik": "ki", "kin": "rw", "kir": "ky", "kom": "kv", "kon": "kg",
    "kor": "ko", "kua": "kj", "kur": "ku", "lao": "lo", "lat": "la", "lav": "lv", "lim": "li", "lin": "ln",
    "lit": "lt", "ltz": "lb", "lub": "lu", "lug": "lg", "mah": "mh", "mal": "ml", "mar": "mr", "mkd": "mk",
    "mlg": "mg", "mlt": "mt", "mon": "mn", "mri": "mi", "msa": "ms", "mya": "my", "nau": "na", "nav": "nv",
    "nbl": "nr", "nde": "nd", "ndo": "ng", "nep": "ne", "nld": "nl", "nno": "nn", "nob": "nb", "nor": "no",
    "nya": "ny", "oci": "oc", "oji": "oj", "ori": "or", "orm": "om", "oss": "os", "pan": "pa", "pli": "pi",
    "pol": "pl", "por": "pt", "pus": "ps", "que": "qu", "roh": "rm", "ron": "ro", "run": "rn", "rus": "ru",
    "sag": "sg", "san": "sa", "sin": "si", "slk": "sk", "slv": "sl", "sme": "se", "smo": "sm", "sna": "sn",
    "snd": "sd", "som": "so", "sot": "st", "spa": "es", "sqi": "sq", "srd": "sc", "srp": "sr", "ssw": "ss",
    "sun": "su", "swa": "sw", "swe": "sv", "tah": "ty", "tam": "ta", "tat": "tt", "tel": "te", "tgk": "tg",
    "tgl": "tl", "tha": "th", "tir": "ti", "ton": "to", "tsn": "tn", "tso": "ts", "tuk": "tk", "tur": "tr",
    "twi": "tw", "uig": "ug", "ukr": "uk", "urd": "ur", "uzb": "uz", "ven": "ve", "vie": "vi", "vol": "vo",
    "wln": "wa", "wol": "wo", "xho": "xh", "yid": "yi", "yor": "yo", "zha": "za", "zho": "zh", "zul": "zu",
}  # fmt: skip
"""The languages of ISO 639-1, by their codes of three letters in ISO 639-3."""

_CODE: Final = re.compile(r"[a-z]{2,3}")
_LIMITS: Final = ("max_latency", "max_time")


def violations(request: choosing_pb2.RecommendModelsRequest) -> Iterator[FieldViolation]:
    """All that is wrong with a request beyond the rules of its proto."""
    task = request.task.replace("-", "_")
    known = {path[-1]: path for path in task_paths()}
    if request.task and task not in known:
        near = difflib.get_close_matches(task, known, n=1)
        step = f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(sorted(known))}"
        yield FieldViolation("task", f"{show(request.task)} is not a task; {step}")
    elif task in known:
        yield from _of_modality(request, _message(known[task]))
    for at, code in enumerate(request.languages):
        if complaint := language_complaint(code):
            yield FieldViolation(f"languages[{at}]", complaint)
    for name in _LIMITS:
        given: Duration = getattr(request, name)
        if request.HasField(name) and not _is_over_zero(given):
            seconds = given.seconds + given.nanos / 1e9
            yield FieldViolation(name, f"`{seconds:g} s` must be over 0; give more, or leave it out for any")
    for name, is_given in (("max_time", request.HasField("max_time")), ("max_cost", request.max_cost > 0)):
        if is_given and not request.rows:
            yield FieldViolation(name, "needs `rows`: how long it takes depends on them; give them, or leave this out")


def language_complaint(code: str) -> str | None:
    """The error in a language's code; None if it is valid."""
    lower = code.lower()
    if not code:
        return "is empty; give a code of ISO 639 such as `en`, or leave it out for any language"
    if lower in TWO_LETTERS:
        return f"{show(code)} has a code of two letters; use `{TWO_LETTERS[lower]}`"
    if _CODE.fullmatch(code) and (len(code) == 3 or code in TWO_LETTERS.values()):
        return None
    first = re.split(r"[-_]", lower)[0]
    if first != code and (first in TWO_LETTERS.values() or first in TWO_LETTERS):
        return f"{show(code)} is not a language's code alone; use `{TWO_LETTERS.get(first, first)}`"
    return f"{show(code)} is not a code of ISO 639; use one such as `en`, `de` or `yue`"


def _of_modality(request: choosing_pb2.RecommendModelsRequest, message: Descriptor) -> Iterator[FieldViolation]:
    """What makes no sense for a task on pictures or items, which its own message tells apart."""
    pictures, items = "image_size" in message.fields_by_name, "max_history" in message.fields_by_name
    if request.languages and (pictures or items):
        what = "pictures" if pictures else "items"
        yield FieldViolation("languages", f"{what} have no language; leave it out")
    if request.tokens_per_row and pictures:
        yield FieldViolation("tokens_per_row", f"`{request.tokens_per_row}`: pictures have no tokens; leave it out")


def _message(path: tuple[str, ...]) -> Descriptor:
    """The message of a task, by the members that lead to it."""
    message: Descriptor = spec_pb2.JobSpec.DESCRIPTOR
    for name in path:
        message = message.fields_by_name[name].message_type
    return message


def _is_over_zero(duration: Duration) -> bool:
    return duration.seconds >= 0 and duration.nanos >= 0 and duration.seconds + duration.nanos > 0
