"""A user's program as a type checker sees it: pyright reads it, it is never run."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import assert_type

import shardyard
from shardyard.types import Checkpoint, MetricSeries, ModelInfo


def sync_use() -> None:
    with shardyard.Client("127.0.0.1:7400", project="default") as client:
        job = client.submit(
            shardyard.TextClassification(problem="single_label", pooling="mean", labels=["bad", "good"]),
            model="./bert",
            train_data=shardyard.Data("reviews.csv", text="review", label="sentiment"),
            optimization=shardyard.Optimization(epochs=2, learning_rate=1e-4, schedule="cosine"),
            resources=shardyard.Resources(workers=2),
            max_run_time=timedelta(hours=1),
            job_id="mine",
            labels={"team": "nlp"},
        )
        assert_type(job, shardyard.Job)
        for event in job.watch(after=3, kinds=["progress"]):
            assert_type(event, shardyard.Event)
            if event.progress is not None:
                assert_type(event.progress.loss, float)
        assert_type(job.wait(timeout=60), shardyard.JobInfo)
        assert_type(job.metrics("loss"), dict[str, MetricSeries])
        assert_type(job.checkpoints(), list[Checkpoint])
        model = job.model()
        assert_type(model.info, ModelInfo)
        assert_type(model.predict(["a", ("b", "c")], threshold=0.5), list[shardyard.Prediction])
        assert_type(model.embed(["a"], output="last_hidden_state", pooling="cls"), list[shardyard.Embedding])
        assert_type(model.explain(("b", "c"), target="good", max_steps=64), shardyard.Explanation)
        for other in client.jobs(filter="state = RUNNING"):
            assert_type(other, shardyard.Job)
        assert_type(client.plan(shardyard.JobSpec(shardyard.CausalLm(), model="hub:gpt2")), shardyard.Plan)


async def async_use() -> None:
    async with shardyard.AsyncClient() as client:
        spec = shardyard.JobSpec(
            shardyard.MaskedLm(mask_probability=0.15),
            model=shardyard.Architecture("bert", {"num_hidden_layers": 2}, dropout=0.0),
            tokenizer=shardyard.TrainedTokenizer("wordpiece", vocab_size=4096),
            train_data="corpus.txt",
            optimization=shardyard.Optimization(max_steps=100),
        )
        job = await client.submit(spec)
        assert_type(job, shardyard.AsyncJob)
        async for event in job.watch():
            assert_type(event, shardyard.Event)
        async for line in job.logs(follow=True, level="warning"):
            assert_type(line.text, str)
        model = await job.model()
        assert_type(await model.predict(["a"]), list[shardyard.Prediction])


def errors() -> None:
    try:
        asyncio.run(async_use())
    except shardyard.InvalidArgument as error:
        for violation in error.violations:
            assert_type(violation.field, str)
    except shardyard.JobFailed as error:
        assert_type(error.reason, str)
    except shardyard.ShardyardError as error:
        assert_type(error.code, str)
