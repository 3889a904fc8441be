"""`--set`: values of a spec file that the command line replaces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardyard.errors import InvalidArgument
from shardyard.specfile import overridden, parse_spec
from shardyard.v1 import job_pb2

SPEC = """\
job_id: mine
job:
  spec:
    fine_tuning: {text_classification: {}}
    model: hub:bert
    optimization: {learning_rate: 1e-4, max_steps: 10}
"""


def test_overrides_apply_in_order() -> None:
    overrides = [
        "spec.optimization.max_steps=100",
        "job.spec.optimization.maxSteps=200",
        "priority=high",
        "job_id=other",
    ]
    draft = parse_spec(SPEC, Path("spec.yaml")).draft(project="default", overrides=overrides)
    assert draft.job.spec.optimization.max_steps == 200
    assert (draft.job.priority, draft.job_id) == (job_pb2.PRIORITY_HIGH, "other")


@pytest.mark.parametrize("override", ["spec.optimization.max_steps", "=3", "spec..x=1", "spec.x=[1"])
def test_an_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(InvalidArgument):
        overridden({"job": {}}, override)


@pytest.mark.parametrize(
    ("before", "override", "after"),
    [
        ({"train_data": "a.csv"}, "spec.train_data.header=true", {"train_data": {"uri": "a.csv", "header": "true"}}),
        ({"evalData": "a.csv"}, "spec.eval_data.path=b", {"evalData": {"uri": "a.csv", "path": "b"}}),
        ({"model": "./bert"}, "spec.model.dropout=0.1", {"model": {"uri": "./bert", "dropout": "0.1"}}),
        ({"model": "./bert"}, "spec.model.hub.id=owner/bert", {"model": {"hub": {"id": "owner/bert"}}}),
        ({"train_data": "a.csv"}, "spec.train_data.dataset=d", {"train_data": {"dataset": "d"}}),
        ({"train_data": None}, "spec.train_data.uri=b", {"train_data": {"uri": "b"}}),
    ],
)
def test_an_override_keeps_the_source_that_is_written_as_a_string(before: Any, override: str, after: Any) -> None:
    assert overridden({"job": {"spec": before}}, override) == {"job": {"spec": after}}


@pytest.mark.parametrize("spec", [{"optimization": "fast"}, {"optimization": ["fast"]}, {"optimization": 2.0}])
def test_an_override_below_a_value_without_fields_is_refused(spec: Any) -> None:
    with pytest.raises(InvalidArgument, match="which has no field `epochs`"):
        overridden({"job": {"spec": spec}}, "spec.optimization.epochs=1")


def test_a_source_that_an_override_goes_into_is_still_uploaded_and_keeps_its_line(tmp_path: Path) -> None:
    source = parse_spec("job:\n  spec:\n    train_data: a.csv\n", tmp_path / "spec.yaml")
    with pytest.raises(InvalidArgument, match=r"a\.csv.*\(spec\.yaml:3\)"):
        source.draft(project="default", overrides=["spec.train_data.header=true"])
    (tmp_path / "a.csv").write_text("text\n")
    draft = source.draft(project="default", overrides=["spec.train_data.header=true"])
    assert [upload.path for upload in draft.uploads] == [tmp_path / "a.csv"]
    assert draft.job.spec.train_data.header
