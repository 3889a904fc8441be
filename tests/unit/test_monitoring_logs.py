"""The lines of the log: one each, without secrets, and as JSON without anything that a user wrote."""

from __future__ import annotations

import io
import json
import logging
import sys
import time
from collections.abc import Iterator

import pytest

from shardyard_coordinator.log_context import logged_about
from shardyard_coordinator.monitoring.logs import JsonLines, TextLines
from shardyard_coordinator.redaction import one_line, redacted

OURS = "shardyard_coordinator.somewhere"
TOKENS = (
    "hf_" + "aB3" * 10,
    f"sy_{'a2' * 6}_{'A-_9' * 10}abc",
    "sk-" + "aB3d" * 12,
    "sk-" + "0123456789abcdef" * 2,
    "sk-proj-" + "aB3_" * 31,
    "sk-ant-api03-" + "aB-3" * 23,
    "sk_live_" + "aB3" * 8,
    "AIza" + "aB3_-" * 7,
    "ghp_" + "Z1" * 18,
    "AKIA" + "ABCD1234" * 2,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
)


@pytest.fixture(params=[TextLines, JsonLines], ids=["text", "json"])
def written(request: pytest.FixtureRequest) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(request.param())
    log = logging.getLogger(OURS)
    log.addHandler(handler)
    log.propagate = False
    yield log, stream
    log.removeHandler(handler)
    log.propagate = True


def formatted(
    formatter: logging.Formatter, message: str, *values: object, name: str = OURS, error: bool = False
) -> str:
    record = logging.LogRecord(name, logging.WARNING, "file.py", 1, message, values, sys.exc_info() if error else None)
    return formatter.format(record)


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\r", "\x85", "\u2028", "\x0b", "\x1b[2K"])
def test_no_text_makes_a_second_line(written: tuple[logging.Logger, io.StringIO], separator: str) -> None:
    log, stream = written
    log.warning("a name: %s", f"x{separator}2026-01-01 ERROR forged")
    with logged_about(principal=f"a{separator}b"):
        log.warning("again")
    lines = stream.getvalue().removesuffix("\n")
    assert len(lines.splitlines()) == 2 and "\x1b" not in lines


def test_a_traceback_in_text_is_indented_so_that_none_of_its_lines_passes_for_one() -> None:
    try:
        raise ValueError("first\n2026-01-01 00:00:00,000 ERROR forged")
    except ValueError:
        first, *others = formatted(TextLines(), "failed", error=True).splitlines()
    assert first.endswith("failed") and others and all(line.startswith("  ") for line in others)


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_are_removed_by_their_shape(token: str) -> None:
    for text in (token, f"Bearer {token}", f"https://me:{token}@host/x", f"password={token}&x=1", f"a {token}, b"):
        assert token not in redacted(text), text


@pytest.mark.parametrize("name", ["token", "access_token", "HF_TOKEN", "X-Amz-Security-Token", "password", "SECRET"])
def test_values_that_are_named_as_secrets_are_hidden(name: str) -> None:
    assert redacted(f"a?{name}=hunter2&b=1") == f"a?{name}=…&b=1"


@pytest.mark.parametrize(
    "text",
    [
        "a plain sentence about task_names and sk learn",
        "the model `hf-internal-testing/tiny-random-bert` is not there",
        "the model hf-internal-testing/tiny-random-LlamaForCausalLM-with-a-long-name",
        "the data set hf_internal_testing_with_a_very_long_name_of_its_own",
        "sk-learn, sk-learn-contrib/imbalanced-learn-of-a-long-name, sk_learn_pipelines_and_more",
        "the file easy_abcdefghijkl.csv; risk-assessment-of-many-things-in-one-word",
        "send `Bearer TOKEN`; basic authentication is not accepted",
        "see https://host:7400/path@x and user@host",
        "pad_token=[PAD], eos_token=</s>, next_page_token=abc, max_tokens=512, stop_token_ids=[1]",
        "org.apache.kafka.ConsumerGroupCommand, authorType, 0123456789abcdef0123456789abcdef",
    ],
)
def test_names_that_only_look_like_tokens_stay(text: str) -> None:
    assert redacted(text) == text


def test_looking_for_secrets_takes_time_in_proportion_to_the_text() -> None:
    begin_s = time.thread_time()
    for part in ("sk-", "sk-a", "eyJ.", "://a:", "://:", "sy_aaaaaaaaaaaa_", "basic ", "token="):
        redacted(part * 20_000)
    assert time.thread_time() - begin_s < 1.0


def test_private_keys_are_removed_whole_even_if_their_end_is_cut_off() -> None:
    key = "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIA\n"
    assert "MHcC" not in redacted(f"x {key}-----END EC PRIVATE KEY----- y") and "MHcC" not in redacted(key)


def test_a_json_line_has_what_it_is_about_and_no_text_that_could_be_a_users() -> None:
    with logged_about(request_id="r-1", job_uid="f" * 32, attempt=2):
        line = json.loads(
            formatted(JsonLines(), "attempt %s of %s: %s", 2, "my private job", OSError(28, "x", "/secret"))
        )
    assert (line["request_id"], line["job_uid"], line["attempt"]) == ("r-1", "f" * 32, 2)
    assert line["event"] == "attempt %s of %s: %s" and line["numbers"] == [2]
    assert line["exception"] == {"type": "OSError", "stack": [], "errno": "ENOSPC"}
    assert line["time"].endswith("Z") and line["level"] == "warning"
    assert "private" not in json.dumps(line) and "secret" not in json.dumps(line)


def test_an_exception_is_named_with_its_place_but_not_with_its_words() -> None:
    try:
        try:
            raise KeyError("zanzibar")
        except KeyError as inner:
            raise ValueError("zanzibar again") from inner
    except ValueError:
        line = json.loads(formatted(JsonLines(), "error %s", "0f0f", error=True))
    assert line["exception"]["type"] == "ValueError" and line["exception"]["cause"] == "KeyError"
    [frame] = line["exception"]["stack"]
    assert frame.startswith("tests/unit/test_monitoring_logs.py:")
    assert "zanzibar" not in json.dumps(line) and "0f0f" not in json.dumps(line)


def test_of_a_librarys_message_only_the_first_line_is_kept() -> None:
    text = "Task exception was never retrieved\nfuture: <Task exception=ValueError('a user')>"
    assert json.loads(formatted(JsonLines(), text, name="asyncio"))["event"] == "Task exception was never retrieved"


def test_what_a_line_is_about_ends_with_its_block() -> None:
    with logged_about(request_id="outer"):
        with logged_about(job_uid="inner"):
            assert "request_id=outer job_uid=inner" in formatted(TextLines(), "x")
        assert "job_uid" not in formatted(TextLines(), "x")
    assert "request_id" not in formatted(TextLines(), "x")


def test_one_line_keeps_readable_text_of_every_language() -> None:
    assert one_line("größer als 世界") == "größer als 世界" and one_line("a\tb") == "a\\tb"
