"""What leaves the server tells nothing of the machine, and honest messages leave as they are."""

from __future__ import annotations

import time

import pytest

from shardyard_coordinator.domain.errors import FieldViolation, refused_fields
from shardyard_coordinator.domain.reasons import Reason
from shardyard_coordinator.serve import status
from shardyard_coordinator.serve.scrub import scrub

# As libraries write them, and what is left.
TEXTS = {
    "an object": ("<_io.BytesIO object at 0x7f3a5c0d1e40> is not a file", "<_io.BytesIO object> is not a file"),
    "an address": ("invalid pointer 0x00007ffd1234abcd in header", "invalid pointer an address in header"),
    "a Python file": (
        "failed in /opt/venv/lib/python3.11/site-packages/transformers/modeling_utils.py:412: no head",
        "failed in a library: no head",
    ),
    "a distribution's file": ("see /usr/lib/python3/dist-packages/yaml/reader.py", "see a library"),
    "a native library": ("cannot load /usr/lib/x86_64-linux-gnu/libcudart.so.12", "cannot load a library"),
    "a frame": ('File "/srv/venv/a.py", line 3, in load: no such key', "a library: no such key"),
    "a traceback": (
        "the tokenizer failed: Traceback (most recent call last):\n  File \"x\", line 1\nKeyError: 'a'",
        "the tokenizer failed: the service's log has the details",
    ),
    "advice": (
        "This tokenizer needs sentencepiece. Please install it with `pip install sentencepiece==0.2.0`. Correct it.",
        "This tokenizer needs sentencepiece. Correct it.",
    ),
    "nothing but advice": ("pip install -U torch", "the service's log has the details"),
    "other package managers": ("no decoder; try `conda install ffmpeg`", "no decoder;"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_details_of_the_machine_do_not_leave(what: str) -> None:
    said, left = TEXTS[what]
    assert scrub(said) == left


HONEST = [
    "`0x1` is not an id; an id has 1 to 63 of a-z, 0-9 and -",
    "the file libfoo.so of the model is not allowed; leave it out",
    "`/data/lib/reviews.csv` is not under an allowed data root; ask the operator",
    "7 items; at most 4 are allowed; add fewer",
    "this folder has a SentencePiece model; install the extra: `pip install 'shardyard[sentencepiece]'`",
    "the port is taken; choose another one with --listen",
]


@pytest.mark.parametrize("text", HONEST)
def test_honest_messages_leave_as_they_are(text: str) -> None:
    assert scrub(text) == text


def test_every_text_of_an_error_is_looked_at_on_its_way_out() -> None:
    bad = "no head in /venv/lib/python3.11/site-packages/torch/nn.py at 0x7f0000000000"
    refused = refused_fields([FieldViolation("spec.model", bad, Reason.MODEL_INVALID, {"where": bad})])
    _, message, ((_, details),) = status.encode(refused)
    assert "site-packages" not in message and "0x7f" not in message
    assert b"site-packages" not in details and b"0x7f" not in details


def test_a_huge_text_costs_no_more_than_what_is_left_of_it() -> None:
    assert len(status.cut("pip install " * 1_000_000, 480).encode()) <= 480


@pytest.mark.parametrize("word", ["/" * 32_000, "/a.so.1x" * 4_000, "/lib/python" * 3_000, 'File "' * 5_000])
def test_a_long_word_takes_time_in_proportion_to_its_length(word: str) -> None:
    begin_s = time.thread_time()
    scrub(f"x.so {word}")
    assert time.thread_time() - begin_s < 0.1
