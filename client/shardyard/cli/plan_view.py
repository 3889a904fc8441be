"""A plan for people: how the batch adds up, what the memory consists of, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from shardyard._lines import printable, size
from shardyard.cli.output import print_pairs

if TYPE_CHECKING:
    from datetime import timedelta

    from shardyard.types import BatchPlan, DataStats, MemoryPlan, Plan, TimePlan

_VERDICTS = {
    "fits": "fits",
    "tight": "tight: the states fit, but with the activations it is close",
    "no_fit": "does not fit: the model states alone are too large",
}


def print_plan(plan: Plan) -> None:
    """Prints a plan for people."""
    print_pairs(
        [
            ("parameters", _parameters(plan)),
            ("steps", f"{plan.total_steps:,}" if plan.total_steps else ""),
            ("samples", samples_line(plan)),
            ("tokens", f"{plan.num_train_tokens:,}" if plan.num_train_tokens else ""),
            ("training data", stats_line(plan.train_stats) if plan.train_stats is not None else ""),
            ("evaluation data", stats_line(plan.eval_stats) if plan.eval_stats is not None else ""),
            ("lengths", lengths_line(plan.train_stats)),
            ("labels", ", ".join(plan.labels[:10]) + (" …" if len(plan.labels) > 10 else "")),
            ("classes", classes_line(plan.train_stats)),
            ("metrics", ", ".join(each.name for each in plan.metrics)),
            ("batch", batch_line(plan.batch) if plan.batch is not None and plan.batch.global_batch_size else ""),
            ("memory", memory_line(plan.memory) if plan.memory is not None else ""),
            *(
                (printable(decision.field.rpartition(".")[2].replace("_", " ")), f"{decision.value}: {decision.reason}")
                for decision in plan.decisions
            ),
            ("checkpoint", size(plan.checkpoint_bytes) if plan.checkpoint_bytes else ""),
            ("slots", str(plan.slots)),
            ("time", time_line(plan.time) if plan.time is not None else ""),
            ("etag", plan.etag),
        ]
    )
    for alternative in plan.alternatives:
        settings = " ".join(f"--set {path}={value}" for path, value in sorted(alternative.settings.items()))
        needs = f" ({size(alternative.memory.total_bytes)})" if alternative.memory is not None else ""
        print(f"would fit {printable(settings)}{needs}")
    for warning in plan.warnings:
        print(f"warning {printable(warning.reason)}: {printable(warning.message)}")


def samples_line(plan: Plan) -> str:
    """How many samples are read, and what for; a feature extraction neither trains nor evaluates."""
    if plan.output == "dataset":
        return f"{plan.num_train_samples:,}"
    trained = f"{plan.num_train_samples:,} to train, " if plan.output != "metrics" else ""
    return f"{trained}{plan.num_eval_samples:,} to evaluate"


def _parameters(plan: Plan) -> str:
    """`4,386,178`, with how many of them are trained if not all are, and those of the teacher if there is one."""
    count, trained = f"{plan.num_parameters:,}", plan.num_trainable_parameters
    count = f"{count}, of them {trained:,} trained" if 0 < trained < plan.num_parameters else count
    return f"{count}; the teacher has {plan.num_teacher_parameters:,}" if plan.num_teacher_parameters else count


def stats_line(stats: DataStats) -> str:
    """The data's numbers: `60 samples, 1,200 tokens, 0.0 % of the texts cut, 2.1 % of the tokens unknown`."""
    return (
        f"{stats.num_samples:,} samples, {stats.num_tokens:,} tokens, {100 * stats.cut_share:.1f} % of the texts cut, "
        f"{100 * stats.unknown_share:.1f} % of the tokens unknown"
    )


def time_line(time: TimePlan) -> str:
    """`about 12 min (6 min to 24 min), 0.4 slot-hours, 0.08 EUR`: a guess, before anything has run."""
    expected, low, high = (span(each) for each in (time.expected, time.low, time.high))
    cost = f", {time.cost:,.2f} {printable(time.currency)}".rstrip() if time.cost is not None else ""
    return f"about {expected} ({low} to {high}), {time.slot_hours:,.2g} slot-hours{cost}"


def span(duration: timedelta | None) -> str:
    """A time in its largest unit: `40 s`, `12 min`, `3.5 h`, `2.1 days`."""
    seconds = duration.total_seconds() if duration is not None else 0.0
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def lengths_line(stats: DataStats | None) -> str:
    """`half up to 18 tokens, 90 % up to 41, 99 % up to 63, the longest 64`; empty if all are equally long."""
    if stats is None or stats.lengths is None:
        return ""
    found = stats.lengths
    parts = f"half up to {found.p50:,} tokens, 90 % up to {found.p90:,}, 99 % up to {found.p99:,}"
    return f"{parts}, longest {found.longest:,}"


def classes_line(stats: DataStats | None) -> str:
    """How often classes occur in the training data, the ten most frequent; empty if that is not known."""
    found = stats.classes if stats is not None else ()
    return ", ".join(f"{printable(each.label)} {each.count:,}" for each in found[:10]) + (
        " …" if len(found) > 10 else ""
    )


def batch_line(batch: BatchPlan) -> str:
    """`micro 8 × accumulation 2 × workers 2 = 32`, or each rank's share if that does not divide."""
    product = batch.micro_batch_size * batch.accumulation_steps * batch.workers
    if product == batch.global_batch_size:
        return (
            f"micro {batch.micro_batch_size} × accumulation {batch.accumulation_steps} × workers {batch.workers} "
            f"= {batch.global_batch_size}"
        )
    shares = " + ".join(map(str, batch.samples_per_rank))
    return f"{shares} samples = {batch.global_batch_size}, in micro batches of at most {batch.micro_batch_size}"


def memory_line(memory: MemoryPlan) -> str:
    """The memory that one worker needs, part by part, and whether it has enough."""
    step = {"activations": memory.activations_bytes, "logits": memory.logits_bytes}
    most = max(step, {"evaluation": memory.evaluation_bytes}, {"export": memory.export_bytes}, key=_sum)
    parts = {
        "weights": memory.parameters_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer": memory.optimizer_bytes,
        "teacher": memory.teacher_bytes,
        **most,
        "batches": memory.batches_bytes,
        "process": memory.process_bytes,
    }
    words = " + ".join(f"{name} {size(count)}" for name, count in parts.items() if count)
    has = f" of {size(memory.available_bytes)}" if memory.available_bytes else ""
    has += f" beside the service's {size(memory.reserved_bytes)}" if has and memory.reserved_bytes else ""
    return f"{size(memory.total_bytes)}{has} a worker: {_VERDICTS.get(memory.verdict, 'not known')} ({words})"


def _sum(parts: Mapping[str, int]) -> int:
    return sum(parts.values())
