"""What a fork has of the process that it is a copy of, and what it must not have."""

from __future__ import annotations

import os

import pytest

from shardyard_coordinator.launch.heritage import Origin, heritage


def test_what_imports_set_is_no_other_environment_and_goes_to_the_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    origin, watcher = Origin.now(), dict(os.environ)
    monkeypatch.setenv("PYTORCH_SET_BY_AN_IMPORT", "1")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/of/this/process/alone")
    assert origin.set_since() == {"PYTORCH_SET_BY_AN_IMPORT": "1"}
    assert origin.why_not({"heritage": heritage(), "environment": watcher}) == ""
    other = watcher | {"PYTORCH_SET_BY_AN_OPERATOR": "1"}
    refused = origin.why_not({"heritage": heritage(), "environment": other})
    assert refused == "the watcher's environment has another PYTORCH_SET_BY_AN_OPERATOR"
