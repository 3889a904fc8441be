"""A student learns from a model of the service, through the command line and the SDK, on two workers."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest

import shardyard
from helpers.adapters import adapt
from helpers.served import wait_for_step
from helpers.tiny_folders import WORDS
from helpers.workplace import Workplace

SPLIT = "--workers 2 --batch-size 20 --lr 1e-2 --seed 3 --max-length 16 --json"


def write_rows(path: Path, number: int, *, seed: int, by_lot: bool = False) -> list[tuple[str, str]]:
    """Texts with one of two words in them, labelled by it, or by lot."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        label = draw.choice(("good", "bad"))
        words = [*draw.choices(WORDS[:6], k=4), label]
        draw.shuffle(words)
        rows.append((" ".join(words), draw.choice(("good", "bad")) if by_lot else label))
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return rows


def test_a_student_learns_from_its_teacher_what_the_labels_do_not_say(place: Workplace) -> None:
    write_rows(place.folder / "known.csv", 300, seed=1)
    held_out = write_rows(place.folder / "held-out.csv", 80, seed=2)
    write_rows(place.folder / "by-lot.csv", 300, seed=3, by_lot=True)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with shardyard.Client(place.address) as client:
        teacher = shardyard.JobSpec(
            shardyard.TextClassification(max_length=16),
            model=place.folder / "bert",
            train_data=place.folder / "known.csv",
            eval_data=place.folder / "held-out.csv",
            optimization=shardyard.Optimization(epochs=6, learning_rate=1e-2, global_batch_size=20, seed=3),
        )
        assert client.submit(teacher, job_id="taught-before").wait(timeout=240).state == "succeeded"
        assert client.model("taught-before").info.metrics["accuracy"] > 0.95
        (place.folder / "student.yaml").write_text(
            f"""
job_id: student
job:
  spec:
    fine_tuning: {{text_classification: {{}}}}
    model: {{architecture: {{model_type: bert, overrides: {sizes}}}, dropout: 0}}
    tokenizer: ./bert
    train_data: ./by-lot.csv
    eval_data: ./held-out.csv
    distillation: {{teacher: "model:taught-before", weight: 1}}
    optimization: {{epochs: 8}}
    parallelism: {{zero_stage: 3}}
"""
        )
        planned = place.run("shardyard plan student.yaml")
        assert planned.returncode == 0, planned.stderr
        assert "the teacher has" in planned.stdout and "teacher " in planned.stdout
        done = place.run(f"shardyard submit student.yaml {SPLIT}", timeout_s=240)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        job = client.job("student")
        assert job.info.state == "succeeded"
        student = job.model()
        accuracy = student.info.metrics["accuracy"]
        assert accuracy > 0.9, "half of the labels were wrong; the teacher's were not"
        answers = student.predict([text for text, _ in held_out])
        right = sum(answer.label == label for answer, (_, label) in zip(answers, held_out, strict=True))
        assert right / len(held_out) == pytest.approx(accuracy, abs=1e-9)
        card = (student.download(place.folder / "student") / "README.md").read_text()
        assert "It also learnt from a teacher, `projects/default/models/taught-before`" in card
        # The teacher is held while a job may read it, and the student is a model like any other.
        spec = job.info.spec
        assert spec is not None and spec["distillation"]["teacher"] == {
            "model": "projects/default/models/taught-before"
        }
        assert len(student.embed(["good dog"])) == 1


def test_a_job_with_an_adapter_as_its_teacher_is_paused_and_continues_bit_for_bit(place: Workplace) -> None:
    write_rows(place.folder / "unlabelled.csv", 60, seed=5)
    lora = {"num_labels": 2, "task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
    adapt(place.folder / "judge", place.folder / "bert", "AutoModelForSequenceClassification", **lora)
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=place.folder / "bert",
        train_data=place.folder / "unlabelled.csv",
        distillation=shardyard.Distillation(shardyard.Adapter(place.folder / "judge", place.folder / "bert"), weight=1),
        optimization=shardyard.Optimization(max_steps=200, global_batch_size=8, learning_rate=1e-3, seed=3),
        checkpoints=shardyard.Checkpoints(every=1000),
        evaluation=shardyard.EvaluationPolicy(every=1000),
        parallelism=shardyard.Parallelism(zero_stage=3),
        resources=shardyard.Resources(workers=2),
    )
    with shardyard.Client(place.address) as client:
        job = client.submit(spec, job_id="paused-pupil")
        wait_for_step(job, 10)
        job.pause()
        assert any(event.state == "paused" for event in job.watch(kinds=["state"]))
        job.resume()
        undisturbed = client.submit(spec, job_id="undisturbed-pupil")
        assert job.wait(timeout=300).state == undisturbed.wait(timeout=300).state == "succeeded"
        resumed_at = [attempt.resumed_from_step for attempt in job.attempts()]
        assert len(resumed_at) == 2 and 10 <= resumed_at[1] < 200
        losses = [
            [(point.step, point.value) for point in each.metrics("loss")["loss"].points] for each in (job, undisturbed)
        ]
        assert losses[0] == losses[1] and len(losses[0]) > 20
        card = (job.model().download(place.folder / "pupil") / "README.md").read_text()
    assert "It also learnt from a teacher, `projects/default/models/" in card and "with the LoRA adapter of" in card


def test_a_teacher_is_named_by_a_flag_and_uploaded_from_here(place: Workplace) -> None:
    write_rows(place.folder / "few.csv", 60, seed=4)
    done = place.run(
        "shardyard plan --task text-classification --model ./bert --train few.csv --epochs 1 --teacher ./bert --json"
    )
    assert done.returncode != 0
    assert "spec.distillation.teacher" in done.stderr + done.stdout and "no trained head" in done.stderr + done.stdout


def test_a_teacher_that_is_missing_is_asked_for(place: Workplace) -> None:
    with shardyard.Client(place.address) as client:
        spec = shardyard.JobSpec(
            shardyard.TextClassification(),
            model=place.folder / "bert",
            train_data=place.folder / "reviews.csv",
            optimization=shardyard.Optimization(epochs=1),
        ).to_dict()
        with pytest.raises(shardyard.InvalidArgument) as refused:
            client.plan({"job": {"spec": {**spec, "distillation": {"weight": 0.5}}}})
        assert [each.field for each in refused.value.violations] == ["job.spec.distillation.teacher"]
        beyond = {"teacher": "model:no-such", "weight": 2, "temperature": 0}
        with pytest.raises(shardyard.InvalidArgument) as refused:
            client.plan({"job": {"spec": {**spec, "distillation": beyond}}})
        fields = {each.field for each in refused.value.violations}
        assert {"job.spec.distillation.weight", "job.spec.distillation.temperature"} <= fields
