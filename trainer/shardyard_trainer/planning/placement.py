"""Where a worker keeps what it trains: the ZeRO stage, layers computed again, the optimizer in the node's memory.

All three are memory decisions only: none of them changes a loss. What a spec leaves out is chosen here, the cheapest
first, and explained in the plan. The explanation of a value is the same whether the spec gives it or leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from shardyard.v1 import plan_pb2, spec_pb2
from shardyard_trainer.data.errors import SpecError
from shardyard_trainer.planning.memory import TIGHT, Gang, Memory, Shape, Ways, estimate, positions_that_fit

FIELD = "spec.parallelism"
_GIVEN = "as the spec has it"

_T = TypeVar("_T", int, bool)


@dataclass(frozen=True)
class Placement:
    """The ways to save memory that a job takes, and why."""

    ways: Ways
    decisions: tuple[plan_pb2.Decision, ...]


def place(
    wanted: spec_pb2.Parallelism, shape: Shape, gang: Gang, *, length: int, node_bytes: int, kind: str
) -> Placement:
    """Takes what `wanted` gives, and chooses the rest. Raises SpecError for what the model or the stage cannot do.

    `length` are the positions of the longest sample, `node_bytes` a worker's part of its node's memory (0: not known);
    `kind` is what a message calls the model.
    """
    if wanted.offload_optimizer and wanted.HasField("zero_stage") and wanted.zero_stage == 0:
        message = "at zero_stage 0 every worker has the whole optimizer on its device; use zero_stage 1 or more"
        raise SpecError(f"{FIELD}.offload_optimizer", "SPEC_INVALID", message)
    if wanted.activation_checkpointing and not shape.can_recompute:
        message = f"transformers cannot compute the layers of this {kind} again; leave it out"
        raise SpecError(f"{FIELD}.activation_checkpointing", "OBJECTIVE_UNSUPPORTED", message)
    stage, why_stage = _stage(shape, gang, least=1 if wanted.offload_optimizer else 0)
    stage, why_stage = _given(wanted, "zero_stage", stage, why_stage)
    offloads, why_offloads = _offloads(shape, gang, stage, node_bytes)
    offloads, why_offloads = _given(wanted, "offload_optimizer", offloads, why_offloads)
    ways = Ways(stage, offloads=offloads)
    need = estimate(shape, gang, ways)
    if 0 < node_bytes < need.offloaded:
        message = (
            f"the optimizer takes {need.offloaded:,} bytes of a worker's part of the node, which is {node_bytes:,}"
        )
        raise SpecError(
            f"{FIELD}.offload_optimizer",
            "MODEL_DOES_NOT_FIT",
            f"{message}; use more workers on more nodes, or leave it out",
            {"states_bytes": str(need.offloaded), "available_bytes": str(node_bytes)},
        )
    recomputes, why_recomputes = _recomputes(shape, gang, ways, length)
    recomputes, why_recomputes = _given(wanted, "activation_checkpointing", recomputes, why_recomputes)
    return Placement(
        ways._replace(recomputes=recomputes),
        (
            plan_pb2.Decision(field=f"{FIELD}.zero_stage", value=str(stage), reason=why_stage),
            _decision("activation_checkpointing", recomputes, why_recomputes),
            _decision("offload_optimizer", offloads, why_offloads),
        ),
    )


def _decision(name: str, value: bool, reason: str) -> plan_pb2.Decision:
    return plan_pb2.Decision(field=f"{FIELD}.{name}", value=str(value).lower(), reason=reason)


def _given(wanted: spec_pb2.Parallelism, name: str, chosen: _T, reason: str) -> tuple[_T, str]:
    """The value of the spec, if it has one, with its reason."""
    if not wanted.HasField(name):  # type: ignore[arg-type]
        return chosen, reason
    value: _T = getattr(wanted, name)
    return value, reason if value == chosen else _GIVEN


def _stage(shape: Shape, gang: Gang, *, least: int) -> tuple[int, str]:
    """The lowest stage with which a worker's memory suffices: 0 on one worker in fp32, 1 on several.

    If it never does, the one that takes least: of models that are gathered whole, stage 3 takes more than stage 2.
    bf16 starts at 1, since DeepSpeed's stage 0 trains bf16 wrongly.
    """
    base = max(0 if gang.workers == 1 and not gang.bf16 else 1, least)
    first = estimate(shape, gang, Ways(base))
    if not gang.available:
        return base, "the memory of a worker is not known: the lowest stage that trains rightly"
    if gang.workers == 1:
        return base, f"one worker has all states, {first.states:,} bytes of {gang.available:,}, at every stage"
    needs = {stage: estimate(shape, gang, Ways(stage)) for stage in range(base, 4)}
    stage = next((each for each in needs if _fits(needs[each])), min(needs, key=lambda each: needs[each].total))
    need = needs[stage]
    found = f"a worker's states take {need.states:,} bytes of {gang.available:,}"
    if stage == base:
        return stage, f"{found}: no higher stage {'is needed' if _fits(need) else 'takes less'}"
    below = estimate(shape, gang, Ways(stage - 1))
    return stage, f"{found}; at stage {stage - 1} they would take {below.states:,}"


def _offloads(shape: Shape, gang: Gang, stage: int, node_bytes: int) -> tuple[bool, str]:
    """Whether states that do not fit on a GPU fit with the optimizer in the node's memory."""
    if not gang.on_gpu:
        return False, "without GPUs a worker computes in the node's memory"
    need = estimate(shape, gang, Ways(stage))
    states = f"the states take {need.states:,} bytes of the GPU's {gang.available:,}"
    if not gang.available or stage == 0 or _fits(need):
        return False, f"{states}: they fit" if gang.available else "the memory of the GPUs is not known"
    less = estimate(shape, gang, Ways(stage, offloads=True))
    if not _fits(less) or 0 < node_bytes < less.offloaded:
        return False, f"{states}; without the optimizer {less.states:,}, with {less.offloaded:,} on the node: no help"
    return True, f"{states}, without the optimizer {less.states:,}; its {less.offloaded:,} go to the node"


def _recomputes(shape: Shape, gang: Gang, ways: Ways, length: int) -> tuple[bool, str]:
    """Whether the activations of a single sample are too many to be kept."""
    kept = estimate(shape, gang, ways, positions=length)
    one = f"a sample of {length:,} positions has {kept.activations:,} bytes of activations"
    if not gang.available:
        return False, "the memory of a worker is not known"
    fitting = positions_that_fit(shape, gang, ways)
    if fitting is None or fitting >= length:
        return False, f"{one}, which fit beside {kept.states:,} of states"
    if not shape.can_recompute:
        return False, f"{one}, which are too many, but the layers of this model cannot be computed again"
    less = estimate(shape, gang, ways._replace(recomputes=True), positions=length)
    return True, f"{one}, too many beside {kept.states:,} of states; computed again they are {less.activations:,}"


def _fits(need: Memory) -> bool:
    return need.total <= TIGHT * need.available
