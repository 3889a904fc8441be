"""What an earlier version stored of specs is read as the first release writes it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_coordinator.store import migrate

FILE = Path(migrate.__file__).parent / "migrations" / "versions" / "0003_specs_of_the_first_release.py"
_FIELD = descriptor_pb2.FieldDescriptorProto
OLD = {
    "Columns": [("text", 1, ""), ("text_pair", 2, ""), ("label", 3, ""), ("labels", 4, "*")],
    "Data": [("uri", 1, ""), ("columns", 12, "Columns")],
    "Causal": [],
    "Masked": [("mask_probability", 1, "double"), ("whole_word", 2, "bool")],
    "Pretraining": [("causal_lm", 1, "Causal"), ("masked_lm", 2, "Masked"), ("sequence_length", 10, "int")],
    "Classification": [("labels", 2, "*")],
    "FineTuning": [("text_classification", 1, "Classification"), ("max_length", 10, "int")],
    "Extraction": [("data", 1, "Data"), ("max_length", 4, "int")],
    "Spec": [
        ("pretraining", 1, "Pretraining"),
        ("fine_tuning", 2, "FineTuning"),
        ("feature_extraction", 3, "Extraction"),
        ("train_data", 12, "Data"),
        ("eval_data", 13, "Data"),
    ],
    "Plan": [("resolved_spec", 1, "Spec"), ("total_steps", 6, "int")],
}
_TYPES = {"": _FIELD.TYPE_STRING, "*": _FIELD.TYPE_STRING, "int": _FIELD.TYPE_INT64}
_TYPES |= {"double": _FIELD.TYPE_DOUBLE, "bool": _FIELD.TYPE_BOOL}


def old_messages() -> dict[str, Any]:
    """The messages as they were, as far as they changed."""
    file = descriptor_pb2.FileDescriptorProto(name="old.proto", package="old", syntax="proto3")
    for name, fields in OLD.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            made = message.field.add(name=field, number=number, label=_FIELD.LABEL_OPTIONAL)
            if kind == "*":
                made.label = _FIELD.LABEL_REPEATED
            if kind in _TYPES:
                made.type = _TYPES[kind]
            else:
                made.type, made.type_name = _FIELD.TYPE_MESSAGE, f".old.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"old.{name}")) for name in OLD}


def migration() -> Any:
    found = importlib.util.spec_from_file_location("migration", FILE)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_lengths_and_columns_of_stored_specs_keep_their_meaning() -> None:
    old, new = old_messages(), migration()

    def read(spec: dict[str, Any]) -> spec_pb2.JobSpec:
        data = old["Spec"](**spec).SerializeToString()
        return spec_pb2.JobSpec.FromString(new._new(data, new._spec))

    causal = read({"pretraining": {"causal_lm": {}, "sequence_length": 300}, "train_data": {"uri": "/d/a.txt"}})
    assert causal.pretraining.causal_lm.sequence_length == 300 and causal.train_data.uri == "/d/a.txt"
    masked = read({"pretraining": {"masked_lm": {"mask_probability": 0.2, "whole_word": True}, "sequence_length": 64}})
    expected = spec_pb2.MaskedLm(mask_probability=0.2, whole_word=True, sequence_length=64)
    assert masked.pretraining.masked_lm == expected
    labels = ["toxic", "insult"]
    several = read(
        {
            "fine_tuning": {"text_classification": {"labels": ["a", "b"]}, "max_length": 90},
            "train_data": {"columns": {"text": "comment", "labels": labels}},
            "eval_data": {"columns": {"text": "words", "text_pair": "more", "label": "kind", "labels": labels}},
        }
    )
    task = several.fine_tuning.text_classification
    assert (list(task.labels), list(task.label_columns), task.max_length) == (["a", "b"], labels, 90)
    assert dict(several.train_data.columns) == {"text": "comment"}
    assert dict(several.eval_data.columns) == {"text": "words", "text_pair": "more", "label": "kind"}
    features = read({"feature_extraction": {"data": {"columns": {"text": "body"}}, "max_length": 12}})
    assert dict(features.feature_extraction.data.columns) == {"text": "body"}
    assert features.feature_extraction.max_length == 12


def test_stored_plans_say_what_their_jobs_leave() -> None:
    old, new = old_messages(), migration()
    for spec, output in (
        ({"pretraining": {"causal_lm": {}, "sequence_length": 8}}, plan_pb2.JOB_OUTPUT_MODEL),
        ({"feature_extraction": {"data": {}}}, plan_pb2.JOB_OUTPUT_DATASET),
    ):
        data = old["Plan"](resolved_spec=spec, total_steps=7).SerializeToString()
        plan = plan_pb2.JobPlan.FromString(new._new(data, new._plan))
        assert (plan.output, plan.total_steps) == (output, 7)
    assert new._new(None, new._plan) is None
