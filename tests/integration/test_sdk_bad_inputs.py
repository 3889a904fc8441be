"""What a program may hand to the SDK by mistake: each is an InvalidArgument that names field, value and rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from helpers.script import Script
from helpers.scripted_service import a_job, serving
from shardyard import AsyncClient, Client, Data, InvalidArgument, Items, JobSpec, TextClassification, Words
from shardyard.v1 import model_service_pb2

LONE = "\ud800"
TASK: Any = TextClassification()

Call = Callable[[Any], Any]

BAD_CALLS: list[tuple[str, Call, str]] = [
    ("instances[1].text", lambda c: c.model("m").predict(["a", LONE]), r"`\ud800` is not UTF-8; write it in UTF-8"),
    ("instances[0].pair.text_pair", lambda c: c.model("m").predict([("a", LONE)]), "is not UTF-8"),
    ("instances[0]", lambda c: c.model("m").predict([3]), "`3` is neither a text nor a pair"),
    ("instances", lambda c: c.model("m").predict(None), "`None` is given, but a list of texts is needed"),
    (
        "zero_shot.labels",
        lambda c: c.model("m").predict(["a"], labels="a, b"),
        "`a, b` is given, but a list, each text",
    ),
    ("instances[0].words.words", lambda c: c.model("m").predict([Words("a b")]), "`a b` is given, but a list"),
    ("instances[0].items.items", lambda c: c.model("m").predict([Items("a b")]), "`a b` is given, but a list"),
    ("generation.seed", lambda c: c.model("m").predict(["a"], seed=2**70), "is given, but a whole number from"),
    ("fill_mask.top_k", lambda c: c.model("m").predict(["a"], top_k="x"), "`x` is given, but a whole number from"),
    (
        "classification.threshold",
        lambda c: c.model("m").predict(["a"], threshold="x"),
        "`x` is given, but a number is needed",
    ),
    (
        "max_length",
        lambda c: c.model("m").embed(["a"], max_length=2**40),
        "`1099511627776` is given, but",
    ),
    ("normalize", lambda c: c.model("m").embed(["a"], normalize="x"), "`x` is given, but true or false is needed"),
    ("pooling", lambda c: c.model("m").embed(["a"], pooling=LONE), r"`\ud800` is none of"),
    ("name", lambda c: c.job(None), "`None` is given, but text is needed; give an id or a full name"),
    ("name", lambda c: c.job(LONE), "is not UTF-8"),
    ("name", lambda c: c.model(3), "`3` is given, but text is needed"),
    ("name", lambda c: c.dataset(None), "`None` is given, but text is needed"),
    ("filter", lambda c: list(c.jobs(filter=LONE)), "is not UTF-8"),
    ("order_by", lambda c: list(c.jobs(order_by=3)), "`3` is given, but text is needed"),
    ("page_size", lambda c: list(c.jobs(page_size=2**40)), "is given, but a whole number from"),
    ("page_size", lambda c: list(c.models(page_size="x")), "is given, but a whole number from"),
    ("page_size", lambda c: list(c.datasets(page_size=1.5)), "is given, but a whole number from"),
    ("after_sequence", lambda c: list(c.job("story").watch(after="x")), "is given, but a whole number from"),
    ("min_interval", lambda c: list(c.job("story").watch(min_interval=float("nan"))), "a number of seconds"),
    ("min_interval", lambda c: list(c.job("story").watch(min_interval=1e300)), "at most 10,000 years"),
    ("kinds", lambda c: list(c.job("story").watch(kinds=[3])), "`3` is none of"),
    ("kinds", lambda c: list(c.job("story").watch(kinds=[LONE])), r"`\ud800` is none of"),
    ("rank", lambda c: list(c.job("story").logs(rank="x")), "is given, but a whole number from"),
    ("level", lambda c: list(c.job("story").logs(level=3)), "`3` is none of"),
    ("level", lambda c: list(c.job("story").logs(level=LONE)), r"`\ud800` is none of"),
    ("metrics", lambda c: c.job("story").metrics("loss", LONE), "is not UTF-8"),
    ("metrics", lambda c: list(c.job("story").watch_metrics(3)), "is given, but a list, each text, is needed"),
    ("spec", lambda c: c.submit(None), "`None` is not a task; give one such as TextClassification()"),
    ("spec", lambda c: c.submit(JobSpec(None)), "`None` is not a task"),  # type: ignore[arg-type]
    ("spec", lambda c: c.plan("spec.yaml"), "`spec.yaml` is not a task"),
    ("job_id", lambda c: c.submit(TASK, train_data="secret", job_id=LONE), "is not UTF-8"),
    ("job_id", lambda c: c.submit(TASK, job_id=3), "`3` is given, but text is needed"),
    ("job_id", lambda c: c.submit({"job_id": LONE, "job": {}}), "is not UTF-8"),
    ("job.display_name", lambda c: c.submit(TASK, display_name=LONE), "is not UTF-8"),
    ("job.labels", lambda c: c.submit(TASK, labels={LONE: "x"}), "is not UTF-8"),
    ("job.labels.team", lambda c: c.submit(TASK, labels={"team": LONE}), "is not UTF-8"),
    (r"job.\ud800", lambda c: c.submit({"job": {LONE: 1}}), r"unknown field `\ud800`"),
    (r"\ud800", lambda c: c.submit({LONE: 1, "job": {}}), r"unknown field `\ud800`"),
    ("job.priority", lambda c: c.submit(TASK, priority=LONE), r"`\ud800` is none of"),
    ("job.spec.max_run_time", lambda c: c.submit(TASK, max_run_time=LONE), "is not a duration"),
    ("job.spec.model", lambda c: c.submit(TASK, model=f"hub:{LONE}"), "is not UTF-8"),
    ("job.spec.model", lambda c: c.submit(TASK, model=""), "`` is empty; give a path"),
    ("job.spec.train_data", lambda c: c.submit(TASK, train_data=f"server:/{LONE}"), "is not UTF-8"),
    ("job.spec.train_data", lambda c: c.submit(TASK, train_data="\t"), "is empty; give a path"),
    ("job.spec.eval_data.uri", lambda c: c.submit(TASK, eval_data=Data("")), "is empty; give a path"),
    (
        "job.spec.train_data.columns.text",
        lambda c: c.submit(TASK, train_data=Data("server:/d", text=LONE)),
        "is not UTF-8",
    ),
    (
        "job.spec.fine_tuning.text_classification.labels[1]",
        lambda c: c.submit(TextClassification(labels=("a", LONE))),
        "is not UTF-8",
    ),
    (
        "job.spec.model.architecture",
        lambda c: c.submit({"job": {"spec": {"model": {"architecture": LONE}}}}),
        "is not UTF-8",
    ),
    (
        "job.spec.model.architecture.overrides",
        lambda c: c.submit({"job": {"spec": {"model": {"architecture": {"overrides": {"act": LONE}}}}}}),
        "is not UTF-8",
    ),
    (
        "job.spec.model.hub",
        lambda c: c.submit({"job": {"spec": {"model": {"hub": LONE}}}}),
        "is not UTF-8",
    ),
    ("path", lambda c: c.upload_dataset(""), "`` is empty; give a path, `.` for the current folder"),
    ("path", lambda c: c.upload_model("  "), "is empty; give a path"),
    ("path", lambda c: c.upload_dataset(None), "`None` is given, but a path is needed"),
    ("path", lambda c: c.upload_dataset(LONE), r"`\ud800` is not a file or folder"),
    ("folder", lambda c: c.model("m").download(""), "is empty; give a path"),
]


@pytest.mark.parametrize(("field", "call", "words"), BAD_CALLS)
def test_what_no_message_can_hold_is_refused_with_its_field(field: str, call: Call, words: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not to be sent")
    script = Script(job=a_job(), ready={"m"})
    with (
        serving(script) as address,
        Client(address) as client,
        chdir(tmp_path),
        pytest.raises(InvalidArgument) as caught,
    ):
        call(client)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert words in caught.value.violations[0].message
    str(caught.value).encode()  # A message can be printed anywhere, whatever it is about.
    assert {name for name, _ in script.requests} <= {"GetJob", "GetModel"}


async def test_the_async_client_refuses_the_same(tmp_path: Path) -> None:
    with serving(Script(ready={"m"})) as address:
        async with AsyncClient(address) as client:
            with pytest.raises(InvalidArgument, match="is not UTF-8"):
                await (await client.model("m")).predict([LONE])
            with pytest.raises(InvalidArgument, match="is empty"):
                await client.upload_dataset("")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"project": LONE}, "project"),
        ({"project": 7}, "project"),
        ({"address": f"{LONE}:7400"}, "address"),
        ({"token": "secret" + LONE}, "token"),
        ({"token": "secret\n"}, "token"),
    ],
)
def test_a_client_says_which_of_its_options_is_wrong(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(**options)
    assert caught.value.violations[0].field == field
    assert "secret" not in str(caught.value)


def test_what_is_text_in_any_language_arrives() -> None:
    def answer(instance: model_service_pb2.Instance) -> model_service_pb2.Prediction:
        made = model_service_pb2.Prediction()
        made.classification.label = instance.text
        return made

    with serving(Script(ready={"m"}, predict=answer)) as address, Client(address) as client:
        assert [found.label for found in client.model("m").predict(["é", "日本", "🙂"])] == ["é", "日本", "🙂"]
