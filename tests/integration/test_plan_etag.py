"""What was planned is what runs: through the SDK, the command line and the wire."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

import shardyard
from helpers.workplace import Workplace


def test_a_job_is_accepted_as_planned_or_not_at_all(place: Workplace) -> None:
    data = place.folder / "planned.csv"
    shutil.copy(place.folder / "reviews.csv", data)
    spec = shardyard.JobSpec(
        shardyard.TextClassification(max_length=16),
        model=place.folder / "bert",
        train_data=data,
        optimization=shardyard.Optimization(max_steps=2),
    )
    with shardyard.Client(place.address) as client:
        plan = client.plan(spec)
        assert plan.etag and client.plan(spec).etag == plan.etag
        job = client.submit(spec, job_id="as-planned", plan=plan)
        # The resolved spec is the same plan.
        assert client.plan({"job": {"spec": dict(job.info.resolved_spec or {})}}).etag == plan.etag
        other = dataclasses.replace(spec, optimization=shardyard.Optimization(max_steps=3))
        assert client.plan(other).etag != plan.etag
        with pytest.raises(shardyard.Aborted) as stale:
            client.submit(other, job_id="otherwise", plan=plan)
        assert stale.value.reason == "PLAN_STALE"
        assert stale.value.metadata["etag"] == client.plan(other).etag
        data.write_text(data.read_text().replace("good", "fine"))
        with pytest.raises(shardyard.Aborted, match="its data, its models or the defaults have changed"):
            client.submit(spec, job_id="other-data", plan=plan.etag)
        assert {each.id for each in client.jobs()} >= {"as-planned"}
        assert not {each.id for each in client.jobs()} & {"otherwise", "other-data"}
        planned = place.run("shardyard plan --task text-classification --model ./bert --train test.csv --max-steps 2")
        assert "beside the service's" in planned.stdout
        etag = planned.stdout.split("etag")[1].split()[0]
        submit = "shardyard submit --task text-classification --model ./bert --train test.csv --max-steps 2"
        assert place.run(f"{submit} --job-id cli-planned --detach --plan {etag}").returncode == 0
        refused = place.run(f"{submit} --job-id cli-stale --lr 0.1 --detach --plan {etag}")
        assert refused.returncode != 0 and "PLAN_STALE" in refused.stderr + refused.stdout
        job.wait(timeout=240)
