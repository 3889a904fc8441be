"""Memory of one worker by formula, before anything is allocated (docs/planning.md has formulas against measurements).

P parameters, T of them trained, W workers, V vocabulary, D width, L layers; all results in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from shardyard.v1 import plan_pb2
from shardyard_trainer.planning.deepspeed_config import BUCKET_ELEMENTS, LIVE_ELEMENTS

CPU_PROCESS_BYTES = 500 * 10**6
"""Python with torch, transformers and DeepSpeed on CPU, and what a first evaluation imports: 485 to 500 MB measured."""

COMPUTED_BYTES = 40 * 10**6
"""What a first step adds to it: pages of the matrix library's code, and its buffers. Three rows of bench/planner.py had
37 to 46 MB beside what is counted.
"""

FREED_BYTES = 64 << 20
"""What glibc's malloc keeps of freed memory: its M_TRIM_THRESHOLD rises to twice the largest block that it has mapped
and freed, of 32 MiB at most. An evaluation and the export break that up, so the next step takes as much again: 58 to 74
MB measured.
"""

COMPILER_BYTES = 60 * 10**6
"""torch's compiler, which DeepSpeed imports from stage 1 on, for an optimizer of its own (`zero/utils.py`): 56 MB
measured.
"""

GPU_PROCESS_BYTES = 700 * 10**6
"""The CUDA context and the communication buffers of NCCL."""

TIGHT = 0.85
"""Above this part of the available memory the verdict is TIGHT: the formulas were off by -12 to +4 %."""

LOGIT_TENSORS, CHUNKED_LOGIT_TENSORS = 4, 3
"""Logit-sized fp32 tensors that loss and backward pass hold at once: of torch's own cross-entropy logits,
log-probabilities and the gradients of both; of a chunk (`tasks/losses.py`) logits, which become their gradient in
place, their copy in another precision, and those of the chunk before until they are replaced.
"""

EVALUATED_LOGIT_TENSORS = 2
"""The same of an evaluation; all positions of a micro batch have theirs at once, unless the loss is in chunks."""

ADAPTED_BYTES = 53
"""What adapters keep of a position and layer for the backward pass, times the width: the inputs of its matrices again,
as dropout leaves them."""

EXPORTED_COPIES = (1, 2, 2, 3)
"""Models beside the trained one while the export is compared with it, by stage: the one that is read again; from stage
1 on a copy of the weights; at stage 3 also a whole module of them, as a sharded one does not compute on one rank.
"""

BATCHES_HELD = 3
"""Steps whose samples a rank holds as tensors: the one it computes, the one agreed on, the one made ahead."""

TAUGHT_LOGIT_TENSORS = 9
"""The same if a teacher's logits are compared with them; then all positions have theirs at once."""

ORDER_BYTES = 60
"""Of one sample of a global batch while its order is made: measured 56 to 60 on 2,000,000."""


@dataclass(frozen=True)
class Shape:
    """The inputs of the formulas about a model. Gradients and optimizer states are those of the `num_trainable` alone.

    `num_logits` is how many outputs a position has (the vocabulary; 0 if a head has a few a text), `chunk` how many
    positions have their logits in memory at once (0: all of them), `live_parameters` what ZeRO-3 gathers at once,
    `activation_bytes` what the backward pass keeps of a position in fp32 (0: by the formula for transformers),
    `can_recompute` whether layers can be computed again there instead.
    """

    num_parameters: int
    num_trainable: int
    num_layers: int
    width: int
    num_logits: int
    chunk: int
    live_parameters: int
    activation_bytes: int = 0
    num_frozen_layers: int = 0
    has_adapters: bool = False
    can_recompute: bool = False
    forward_flops: int = 0
    """Operations of a forward pass for a position, but for attention: products and sums."""

    is_attention_counted: bool = False
    """Whether `forward_flops` has attention too, as it has if it was counted in a pass."""

    is_kept_counted: bool = False
    """Whether `activation_bytes` was counted in a pass, and so is as adapters and frozen layers have it, 0 included."""

    attention_bytes: int = 0
    """What attention keeps of a position beside that, in all layers, on CPUs alone."""

    teacher: Shape | None = None
    """A frozen model beside it, which only computes."""


class Ways(NamedTuple):
    """How memory is saved: the ZeRO stage, layers computed again in the backward pass, the optimizer on the node."""

    stage: int
    recomputes: bool = False
    offloads: bool = False


@dataclass(frozen=True)
class Gang:
    """The inputs of the formulas about the workers; `available` is the memory of one of them, 0 if not known."""

    workers: int
    bf16: bool
    on_gpu: bool
    available: int

    def process(self, stage: int) -> int:
        """Bytes of the process itself, once it has made steps."""
        if self.on_gpu:
            return GPU_PROCESS_BYTES
        return CPU_PROCESS_BYTES + COMPUTED_BYTES + FREED_BYTES + (COMPILER_BYTES if stage else 0)


@dataclass(frozen=True)
class Memory:
    """The parts of one worker's memory; `available` 0: not known.

    `batches` are samples as tensors; they wait in the node's memory, which is the worker's own only without a GPU.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    batches: int
    process: int
    available: int
    on_gpu: bool
    teacher: int = 0
    offloaded: int = 0
    """What `offloads` puts into the node's memory, out of that of a GPU."""

    evaluation: int = 0
    export: int = 0
    """Beside the states, instead of activations: the copies that are gathered, written, and loaded to be compared."""

    @property
    def states(self) -> int:
        """The memory that does not depend on the batch."""
        on_device = 0 if self.offloaded else self.optimizer
        return self.parameters + self.gradients + on_device + self.teacher

    @property
    def resting(self) -> int:
        """What the worker holds between steps, in the memory in which it computes."""
        return self.states + self.process + (0 if self.on_gpu else self.batches)

    @property
    def total(self) -> int:
        """The most at a time: beside what rests, a training step, an evaluation or the export."""
        return self.resting + max(self.activations + self.logits, self.evaluation, self.export)

    @property
    def verdict(self) -> plan_pb2.MemoryVerdict.ValueType:
        """FITS, TIGHT or NO_FIT; only NO_FIT, states alone over what there is, refuses a job."""
        if not self.available:
            return plan_pb2.MEMORY_VERDICT_UNSPECIFIED
        if self.states > self.available:
            return plan_pb2.MEMORY_VERDICT_NO_FIT
        if self.total > TIGHT * self.available:
            return plan_pb2.MEMORY_VERDICT_TIGHT
        return plan_pb2.MEMORY_VERDICT_FITS

    def to_proto(self, reserved: int = 0) -> plan_pb2.MemoryPlan:
        """As the contract shows it; `reserved` is what no worker has of the node, because the service takes it."""
        return plan_pb2.MemoryPlan(
            parameters_bytes=self.parameters,
            gradients_bytes=self.gradients,
            optimizer_bytes=self.optimizer,
            activations_bytes=self.activations,
            logits_bytes=self.logits,
            process_bytes=self.process,
            total_bytes=self.total,
            available_bytes=self.available,
            verdict=self.verdict,
            batches_bytes=self.batches,
            teacher_bytes=self.teacher,
            evaluation_bytes=self.evaluation,
            export_bytes=self.export,
            reserved_bytes=reserved,
        )


def estimate(shape: Shape, gang: Gang, ways: Ways, *, positions: int = 0, batches: int = 0) -> Memory:
    """Memory of one worker that computes `positions` token positions at once and holds `batches` bytes of samples."""
    parameters, gradients, optimizer = states(
        shape, zero_stage=ways.stage, workers=gang.workers, bf16=gang.bf16, on_gpu=gang.on_gpu
    )
    scale = 0.5 if gang.bf16 else 1.0
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        activations=int(positions * activation_bytes_per_position(shape, ways, on_gpu=gang.on_gpu) * scale),
        logits=_logit_bytes(shape, positions),
        batches=batches,
        process=gang.process(ways.stage),
        available=gang.available,
        on_gpu=gang.on_gpu,
        teacher=_weights(shape.teacher, ways.stage, gang) if shape.teacher is not None else 0,
        # The node updates in fp32, so it has gradients of that kind too.
        offloaded=optimizer + 4 * _part(shape.num_trainable, gang.workers) if ways.offloads and gang.on_gpu else 0,
        evaluation=EVALUATED_LOGIT_TENSORS * 4 * shape.num_logits * min(positions, shape.chunk or positions),
        # With GPUs the copies are in the node's memory.
        export=0 if gang.on_gpu else 4 * shape.num_parameters * EXPORTED_COPIES[ways.stage],
    )


def _weights(shape: Shape, zero_stage: int, gang: Gang) -> int:
    """Bytes of a model that only computes."""
    size = 2 if gang.bf16 else 4
    return size * (_held_at_3(shape, gang.workers, on_gpu=gang.on_gpu) if zero_stage == 3 else shape.num_parameters)


def _held_at_3(shape: Shape, workers: int, *, on_gpu: bool) -> int:
    """Parameters in the memory of one worker at stage 3: its part, and those that are gathered.

    These are at least the layer that computes, and what DeepSpeed fetches ahead or keeps for the backward pass up to
    its limit (`__params_to_release` and `fetch_sub_module` of its partitioned_param_coordinator.py, 0.19). Gloo gathers
    into a tensor of its own, which is then copied, and a fetch ahead is a bucket at most.
    """
    gathered = min(max(shape.live_parameters, LIVE_ELEMENTS), shape.num_parameters)
    copied = 0 if on_gpu else min(gathered, BUCKET_ELEMENTS)
    return _part(shape.num_parameters, workers) + gathered + copied


def _gradients_at_3(trained: int, workers: int, *, on_gpu: bool) -> int:
    """Elements of gradients at stage 3: a worker's part, the bucket that collects them, and its copy by ranks.

    A GPU's bucket is allocated whole, but on a CPU only pages that are written count (`ipg_buckets` of DeepSpeed's
    stage3.py, and `reduce_scatter_coalesced`, which concatenates all of them again). Gloo adds up a copy of its own
    (ProcessGroupGloo.cpp of torch).
    """
    filled = min(BUCKET_ELEMENTS, trained)
    buckets = BUCKET_ELEMENTS + filled if on_gpu and trained else 3 * filled
    return _part(trained, workers) + buckets


def logit_bytes_per_position(shape: Shape) -> int:
    """Of loss and backward pass."""
    if shape.teacher is not None:
        return TAUGHT_LOGIT_TENSORS * 4 * shape.num_logits
    return (CHUNKED_LOGIT_TENSORS if shape.chunk else LOGIT_TENSORS) * 4 * shape.num_logits


def _logit_bytes(shape: Shape, positions: int) -> int:
    """Of the positions at once; in chunks, the output layer's gradient is added up beside them, and kept."""
    each, chunk = logit_bytes_per_position(shape), chunk_of(shape)
    return each * min(positions, chunk) + 4 * shape.num_logits * shape.width if chunk else each * positions


def chunk_of(shape: Shape) -> int:
    """Positions that have their logits in memory at once; 0: all of them, as a teacher needs them."""
    return shape.chunk if shape.teacher is None else 0


def batches_bytes(*, global_batch_size: int, workers: int, sample_bytes: float) -> int:
    """Bytes that a rank holds of the samples of its steps; every rank makes the order of the whole batch."""
    return int(BATCHES_HELD * _part(global_batch_size, workers) * sample_bytes) + ORDER_BYTES * global_batch_size


def activation_bytes_per_position(shape: Shape, ways: Ways, *, on_gpu: bool) -> int:
    """What the backward pass keeps in fp32: as counted, else 118 D L, as of GPT-2; on CPUs also attention weights.

    Of the layers from the first that is trained on: nothing is computed backwards through those below it. If layers
    are computed again, 4 D of each, and everything of the one that is computed.
    """
    layers = shape.num_layers - shape.num_frozen_layers
    whole = shape.activation_bytes
    if not shape.is_kept_counted:
        whole = whole or 118 * shape.width * layers
        whole += ADAPTED_BYTES * shape.width * layers if shape.has_adapters else 0
    whole += 0 if on_gpu else shape.attention_bytes
    return whole // max(layers, 1) + 4 * shape.width * layers if ways.recomputes else whole


def states(shape: Shape, *, zero_stage: int, workers: int, bf16: bool, on_gpu: bool = False) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer (two moments, fp32 master weights) on one worker.

    fp32: 4 P + 12 T at stage 0; 4 P + 4 T + 12 T / W at stages 1 and 2; (4 P + 12 T) / W at stage 3, and what is
    gathered and collected. bf16: 2 P + 2 T + 12 T / W at stage 1; 2 P + 14 T / W at stage 2; stage 3 as above, in
    halves.
    """
    total, trained = shape.num_parameters, shape.num_trainable
    size = 2 if bf16 else 4
    if zero_stage == 0:
        return 4 * total, 4 * trained, 8 * trained
    if zero_stage == 3:
        weights = size * _held_at_3(shape, workers, on_gpu=on_gpu)
        gradients = size * _gradients_at_3(trained, workers, on_gpu=on_gpu)
        return weights, gradients, (12 if bf16 else 8) * _part(trained, workers)
    # At stage 2 in fp32 the gradients were measured as at stage 1: they are whole until the step partitions them.
    gradients = size * _part(trained, workers) if bf16 and zero_stage == 2 else size * trained
    return size * total, gradients, 12 * _part(trained, workers)


def _part(total: int, workers: int) -> int:
    return -(-total // workers)


def positions_that_fit(shape: Shape, gang: Gang, ways: Ways) -> int | None:
    """Token positions whose activations fit beside the states, with the TIGHT margin; None: not known."""
    if not gang.available:
        return None
    room = TIGHT * gang.available - estimate(shape, gang, ways).resting
    each = activation_bytes_per_position(shape, ways, on_gpu=gang.on_gpu) * (0.5 if gang.bf16 else 1.0)
    logits = logit_bytes_per_position(shape)
    if chunk := chunk_of(shape):
        room, logits = room - _logit_bytes(shape, chunk), 0
    # Evaluations compute as many positions at once.
    evaluated = 0 if shape.chunk else EVALUATED_LOGIT_TENSORS * 4 * shape.num_logits
    return max(0, int(room / max(each + logits, evaluated, 1)))
