"""The DeepSpeed configuration: the only dict of settings there is, and the only function that builds one.

Neither torch nor DeepSpeed is imported here, so that a plan can show the configuration without them.
"""

from __future__ import annotations

from typing import Any

BUCKET_ELEMENTS = 50_000_000
"""Gradients are reduced in buckets of this many elements: large enough to hide latency, small in memory."""

LIVE_ELEMENTS = 100_000_000
"""Parameters that stage 3 keeps gathered at once. DeepSpeed's own figure is ten times that, and keeps every model of up
to 500 million whole from the forward to the backward pass: a job at stage 3 does not have the memory for that.
"""


def deepspeed_config(
    *,
    zero_stage: int,
    clip: float,
    precision: str,
    micro_batch_size: int,
    workers: int,
    on_gpu: bool,
    offload: bool = False,
) -> dict[str, Any]:
    """What `deepspeed.initialize` is given.

    `clip` is the gradient norm to clip to, 0 for none; `precision` is `fp32` or `bf16`; `offload` keeps the optimizer's
    states in the node's memory. The training loop owns the
    boundary between optimizer steps (`managed_gradient_accumulation` is off), so `micro_batch_size` and the
    accumulation of 1 only satisfy DeepSpeed's own arithmetic.

    Raises: ValueError for a combination that trains wrongly.
    """
    if precision not in {"fp32", "bf16"}:
        raise ValueError(f"precision {precision!r} is not supported; use fp32 or bf16")
    if zero_stage == 0 and precision == "bf16":
        # DeepSpeed's optimizer for this pair scales the first updates wrongly.
        raise ValueError("zero_stage 0 with bf16 trains wrongly in DeepSpeed; use zero_stage 1")
    if zero_stage == 0 and offload:
        raise ValueError("zero_stage 0 has no optimizer states to offload; use zero_stage 1 or more")
    config: dict[str, Any] = {
        "train_batch_size": micro_batch_size * workers,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Stage 0 clips in a hook of ours: DeepSpeed's own norm there is summed in fp32 and off by 1e-4 and more.
        "gradient_clipping": 0.0 if zero_stage == 0 else clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero(zero_stage, on_gpu=on_gpu, offload=offload),
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def _zero(stage: int, *, on_gpu: bool, offload: bool) -> dict[str, Any]:
    if stage == 0:
        return {"stage": 0}
    section: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        # Stage 1 refuses overlap when the caller owns the boundary; a CPU has nothing to overlap with.
        "overlap_comm": on_gpu and stage >= 2,
    }
    if stage <= 2:
        section["allgather_bucket_size"] = BUCKET_ELEMENTS
    else:
        section["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        section["stage3_max_live_parameters"] = section["stage3_max_reuse_distance"] = LIVE_ELEMENTS
    if offload:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return section
