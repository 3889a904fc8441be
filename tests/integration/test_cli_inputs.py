"""What the command line reads: flags, spec files and texts; every slip is named, none is a traceback."""

from __future__ import annotations

from pathlib import Path

from helpers.scripted_service import Script, serving
from shardyard.cli.app import run


def test_a_set_value_goes_beside_data_that_a_flag_names(tmp_path: Path) -> None:
    script, data = Script(), tmp_path / "reviews.csv"
    data.write_text("good,1\n")
    arguments = ["submit", "--detach", "--task", "text-classification", "--model", "hub:owner/bert"]
    arguments += [
        "--train",
        str(data),
        "--set",
        "spec.train_data.header=true",
        "--set",
        "spec.train_data.delimiter=';'",
    ]
    with serving(script) as address:
        assert run([*arguments, "--address", address]) == 0
    source = script.asked("CreateJob")[0].job.spec.train_data
    assert source.dataset.startswith("projects/default/datasets/d-")
    assert (source.header, source.delimiter) == (True, ";")
