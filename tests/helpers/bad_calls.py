"""Rows of the catalogue of bad inputs: calls that are not about the spec of a job."""

from __future__ import annotations

import math
from typing import Any

from google.protobuf import duration_pb2

from helpers.bad_inputs import IA, NF, OUT, PD, STORY, Row
from helpers.service import PARENT
from shardyard.v1 import checkpoint_service_pb2 as checkpoints
from shardyard.v1 import choosing_pb2 as choosing
from shardyard.v1 import dataset_service_pb2 as datasets
from shardyard.v1 import job_service_pb2 as jobs
from shardyard.v1 import log_service_pb2 as logs
from shardyard.v1 import metric_service_pb2 as metrics
from shardyard.v1 import model_service_pb2 as models

ROWS: dict[str, Row] = {
    # Pages, cursors.
    "196 page_size": Row(lambda: jobs.ListJobsRequest(parent=PARENT, page_size=-1), IA, "SPEC_INVALID", "page_size"),
    "197 page_token": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, page_token="garbage"), IA, "PAGE_TOKEN_INVALID", "page_token"
    ),
    "197 page_token, not ASCII": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, page_token="ü"), IA, "PAGE_TOKEN_INVALID", "page_token"
    ),
    "198 half a filter": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, filter="state = "), IA, "FILTER_INVALID", "filter", ("column 1",)
    ),
    "199 SQL": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, filter="a' OR 1=1 --"), IA, "FILTER_INVALID", "filter"
    ),
    "an unknown state": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, filter="state = BUSY"), IA, "FILTER_INVALID", "filter", ("RUNNING",)
    ),
    "200 order": Row(
        lambda: jobs.ListJobsRequest(parent=PARENT, order_by="uid"), IA, "SPEC_INVALID", "order_by", ("create_time",)
    ),
    "201 cursor ahead": Row(
        lambda: jobs.WatchJobRequest(name=STORY, after_sequence=999), OUT, "CURSOR_AHEAD", "after_sequence", ("999",)
    ),
    "a negative cursor": Row(
        lambda: jobs.WatchJobRequest(name=STORY, after_sequence=-1), IA, "SPEC_INVALID", "after_sequence"
    ),
    "203 a metrics cursor": Row(
        lambda: metrics.WatchMetricsRequest(name=STORY, cursor="x"), IA, "CURSOR_INVALID", "cursor"
    ),
    "203 a log cursor": Row(lambda: logs.TailLogsRequest(name=STORY, cursor="x"), IA, "CURSOR_INVALID", "cursor"),
    "205 max_points": Row(
        lambda: metrics.QueryMetricsRequest(name=STORY, max_points=0), IA, "SPEC_INVALID", "max_points", ("3",)
    ),
    "206 metric": Row(
        lambda: metrics.QueryMetricsRequest(name=STORY, metrics=["nope"]), NF, "METRIC_NOT_FOUND", None, ("nope",)
    ),
    "207 rank": Row(lambda: logs.TailLogsRequest(name=STORY, rank=99), IA, "SPEC_INVALID", "rank", ("`99`", "0 to 0")),
    "208 end before start": Row(
        lambda: metrics.QueryMetricsRequest(name=STORY, min_step=5, max_step=4), IA, "SPEC_INVALID", "max_step"
    ),
    "a wait under 0": Row(
        lambda: jobs.WaitJobRequest(name=STORY, timeout=duration_pb2.Duration(seconds=-1)), IA, "SPEC_INVALID",
        "timeout",
    ),
    "a checkpoint": Row(
        lambda: checkpoints.GetCheckpointRequest(name=STORY + "/checkpoints/e1-s1"), NF, "CHECKPOINT_NOT_FOUND", None
    ),
    "a checkpoint's name": Row(
        lambda: checkpoints.GetCheckpointRequest(name=STORY + "/checkpoints/last"), IA, "SPEC_INVALID", "name",
        ("`last`", "e1-s100"),
    ),
    # Predict and the rest.
    "210 no instances": Row(
        lambda: models.PredictRequest(model=f"{PARENT}/models/m"), IA, "SPEC_INVALID", "instances", ("1",)
    ),
    "211 10,001 instances": Row(
        lambda: models.PredictRequest(
            model=f"{PARENT}/models/m", instances=[models.Instance(text="x") for _ in range(10_001)]
        ), IA, "SPEC_INVALID", "instances", ("10001", "10000"),
    ),
    "212 1 MB": Row(
        lambda: models.PredictRequest(model=f"{PARENT}/models/m", instances=[models.Instance(text="x" * 10**6)]),
        IA, "SPEC_INVALID", "instances[0]", ("64 KiB",),
    ),
    "an empty instance": Row(
        lambda: models.EmbedRequest(model=f"{PARENT}/models/m", instances=[models.Instance()]),
        IA, "SPEC_INVALID", "instances[0]", ("text, pair",),
    ),
    "215 pooling": Row(
        lambda: models.EmbedRequest(
            model=f"{PARENT}/models/m", instances=[models.Instance(text="x")], pooling=9  # type: ignore[arg-type]
        ), IA, "SPEC_INVALID", "pooling", ("unknown value 9",),
    ),
    "nothing to explain": Row(
        lambda: models.ExplainPredictionRequest(model=f"{PARENT}/models/m"),
        IA, "SPEC_INVALID", "instance", ("required",),
    ),
    "an empty instance to explain": Row(
        lambda: models.ExplainPredictionRequest(model=f"{PARENT}/models/m", instance=models.Instance()),
        IA, "SPEC_INVALID", "instance", ("text, pair",),
    ),
    "1 MB to explain": Row(
        lambda: models.ExplainPredictionRequest(model=f"{PARENT}/models/m", instance=models.Instance(text="x" * 10**6)),
        IA, "SPEC_INVALID", "instance", ("64 KiB",),
    ),
    "too few steps": Row(lambda: _explained(max_steps=15), IA, "SPEC_INVALID", "max_steps", ("15", "16")),
    "too many steps": Row(lambda: _explained(max_steps=2049), IA, "SPEC_INVALID", "max_steps", ("2049", "2048")),
    "a word before the first": Row(lambda: _explained(word=-1), IA, "SPEC_INVALID", "word", ("-1",)),
    "a target without a name": Row(lambda: _explained(target=""), IA, "SPEC_INVALID", "target", ()),
    "a target too long": Row(lambda: _explained(target="x" * 4097), IA, "SPEC_INVALID", "target", ("4097",)),
    "a model that is not there to be asked why": Row(lambda: _explained(max_steps=64), NF, "MODEL_NOT_FOUND", None),
    "a model that is not there to be asked": Row(
        lambda: models.PredictRequest(model=f"{PARENT}/models/m", instances=[models.Instance(text="x")]),
        NF, "MODEL_NOT_FOUND", None,
    ),
    "a task that is misspelt": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="text-clasification"),
        IA, "SPEC_INVALID", "task", ("`text-clasification`", "did you mean `text_classification`?"),
    ),
    "no task": Row(lambda: choosing.RecommendModelsRequest(parent=PARENT), IA, "SPEC_INVALID", "task"),
    "rows under 0": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", rows=-1),
        IA, "SPEC_INVALID", "rows", ("`-1`",),
    ),
    "memory under 0": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", memory_bytes=-5),
        IA, "SPEC_INVALID", "memory_bytes", ("`-5`",),
    ),
    "a language in capitals": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", languages=["en", "DE"]),
        IA, "SPEC_INVALID", "languages[1]", ("`DE`", "use `de`"),
    ),
    "a language of three letters": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", languages=["deu"]),
        IA, "SPEC_INVALID", "languages[0]", ("`deu`", "use `de`"),
    ),
    "a language with its country": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", languages=["pt_BR"]),
        IA, "SPEC_INVALID", "languages[0]", ("`pt_BR`", "use `pt`"),
    ),
    "a language by its name": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", languages=["german"]),
        IA, "SPEC_INVALID", "languages[0]", ("ISO 639",),
    ),
    "a language twice": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", languages=["en", "en"]),
        IA, "SPEC_INVALID", "languages", ("`en`",),
    ),
    "a language of pictures": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="image-classification", languages=["en"]),
        IA, "SPEC_INVALID", "languages", ("pictures have no language",),
    ),
    "tokens of pictures": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_image", tokens_per_row=9),
        IA, "SPEC_INVALID", "tokens_per_row", ("`9`", "no tokens"),
    ),
    "a time without rows": Row(
        lambda: choosing.RecommendModelsRequest(
            parent=PARENT, task="masked_lm", max_time=duration_pb2.Duration(seconds=9)
        ), IA, "SPEC_INVALID", "max_time", ("needs `rows`",),
    ),
    "a latency of 0": Row(
        lambda: choosing.RecommendModelsRequest(
            parent=PARENT, task="masked_lm", max_latency=duration_pb2.Duration()
        ), IA, "SPEC_INVALID", "max_latency", ("over 0",),
    ),
    "a cost that is no number": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", rows=1, max_cost=math.nan),
        IA, "SPEC_INVALID", "max_cost", ("not finite",),
    ),
    "a cost without a price": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", rows=1, max_cost=2),
        IA, "SPEC_INVALID", "max_cost", ("--slot-hour-price",),
    ),
    "51 results": Row(
        lambda: choosing.RecommendModelsRequest(parent=PARENT, task="masked_lm", max_results=51),
        IA, "SPEC_INVALID", "max_results", ("`51`",),
    ),
    "models of another project": Row(
        lambda: choosing.RecommendModelsRequest(parent="projects/theirs", task="masked_lm"),
        PD, "ACCESS_DENIED", None,
    ),
    "an unknown data set": Row(
        lambda: datasets.GetDatasetRequest(name=f"{PARENT}/datasets/x"), NF, "DATASET_NOT_FOUND", None
    ),
}  # fmt: skip


def _explained(**fields: Any) -> models.ExplainPredictionRequest:
    return models.ExplainPredictionRequest(model=f"{PARENT}/models/m", instance=models.Instance(text="x"), **fields)
