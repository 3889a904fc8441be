"""Traces when the collector is not there, and what a caller's `traceparent` may be."""

from __future__ import annotations

import time

import pytest

from shardyard_coordinator.monitoring.tracing import FLUSH_S, Tracing, checked, end, traceparent_of
from shardyard_coordinator.settings import Settings

GOOD = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def test_a_collector_that_is_gone_delays_nothing_but_the_end_and_that_by_seconds() -> None:
    tracing = Tracing("http://127.0.0.1:9", "0")
    begun_s = time.thread_time()
    for _ in range(5000):  # More than wait at once: the rest is dropped.
        end(tracing.begin("x"))
    assert time.thread_time() - begun_s < 5
    closing_s = time.monotonic()
    tracing.close()
    assert time.monotonic() - closing_s < FLUSH_S + 2


def test_a_parents_trace_is_continued_as_it_was_sampled() -> None:
    tracing = Tracing("http://127.0.0.1:9", "0")
    try:
        assert traceparent_of(tracing.begin("child", GOOD))[:35] == GOOD[:35]
        assert traceparent_of(tracing.begin("child", GOOD[:-2] + "00")) == ""
        assert traceparent_of(tracing.begin("first"))[:35] != GOOD[:35]
    finally:
        tracing.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        GOOD[3:],
        GOOD.upper(),
        "01" + GOOD[2:],
        GOOD + "-x",
        GOOD + "\n",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "x" * 8000,
    ],
)
def test_what_is_not_a_traceparent_is_ignored(text: str) -> None:
    assert checked(text) == "" and checked(GOOD) == GOOD


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("otlp_endpoint", "127.0.0.1:4317", "http://HOST:PORT"),
        ("otlp_endpoint", "http://collector/", "http://HOST:PORT"),
        ("otlp_endpoint", "http://me:hf_abcdefghijklmnopqrst@collector:4317", "HEADERS"),
        ("admin_listen", "7401", "HOST:PORT"),
        ("admin_listen", "127.0.0.1:99999", "65535"),
        ("log_format", "xml", "json"),
        ("log_level", "debug", "info"),
    ],
)
def test_settings_of_monitoring_that_cannot_be_are_refused(field: str, value: str, word: str) -> None:
    with pytest.raises(ValueError, match=word) as refused:
        Settings(**{field: value})  # type: ignore[arg-type]
    # Pydantic itself repeats the input; what our messages say is shown to the operator.
    assert "abcdefghijklmnopqrst" not in "".join(each["msg"] for each in refused.value.errors())  # type: ignore[attr-defined]
