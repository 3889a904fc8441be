"""Any content of a spec file is read, or refused with the fields that are wrong; nothing else is raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardyard._convert import to_plain
from shardyard._parse import draft_job
from shardyard.errors import InvalidArgument
from shardyard.specfile import parse_spec
from shardyard.v1 import job_pb2


def names_of(descriptor: Descriptor, seen: set[str]) -> set[str]:
    """The names of all fields of a message and of those in it."""
    if descriptor.full_name in seen:
        return set()
    seen.add(descriptor.full_name)
    inner = [names_of(field.message_type, seen) for field in descriptor.fields if field.message_type is not None]
    return {field.name for field in descriptor.fields}.union(*inner)


NAMES = sorted(names_of(job_pb2.Job.DESCRIPTOR, set()))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "mean",
            "90s",
            "hub:a",
            "server:/x",
            "dataset:d",
            "projects/p/models/m",
            "1e-4",
            "bert",
            "/",
            "",
            "\ud800",
            "server:/\udcff",
        ]
    )
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "\udcff"]) | st.text(max_size=5), inner)
    ),
    max_leaves=25,
)


def outcome(data: Any) -> str:
    """`read`, or `refused` with what is wrong; anything else is raised."""
    try:
        draft = draft_job(data, base=Path("/nowhere"), project="default")
    except InvalidArgument as error:
        return "refused" if all(violation.message for violation in error.violations) else "refused without words"
    return "read" if isinstance(draft.job.SerializeToString(), bytes) else "unreadable"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES)
def test_any_data_is_read_or_refused(tree: Any) -> None:
    assert outcome({"job": {"spec": tree}}) in ("read", "refused")
    assert outcome({"job": tree}) in ("read", "refused")


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abj:{}[]-\"'&*!#|>%@ \n\t\\0123\x00é", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        parse_spec(text, Path("spec.yaml")).draft(project="default")
    except InvalidArgument as error:
        assert error.message


def test_what_is_shown_reads_back_as_the_same() -> None:
    job = job_pb2.Job(display_name="x", priority=job_pb2.PRIORITY_HIGH)
    job.labels["a"] = "b"
    job.spec.fine_tuning.text_classification.labels.extend(["1", "no"])
    job.spec.model.architecture.model_type = "bert"
    job.spec.model.architecture.overrides.update({"hidden_size": 32, "act": "gelu", "tie": True, "ids": [1, 2]})
    job.spec.optimization.learning_rate = 0.0
    job.spec.max_run_time.FromMilliseconds(1500)
    assert draft_job({"job": to_plain(job)}, base=Path("/nowhere"), project="default").job == job
