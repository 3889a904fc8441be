"""The DeepSpeed engine with the contract of docs/training.md: the only file that imports DeepSpeed.

The caller owns the boundary between optimizer steps. A step is: seed, backward of every micro batch with its summed
loss scaled by world / n (n: the units of the whole global batch, over all ranks), one `step`. Gradients are then those
of the mean over the global batch, for every ZeRO stage, number of ranks and choice of micro batches.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import nn

from shardyard_trainer.inputs.base import MicroBatch, seed_for
from shardyard_trainer.planning.deepspeed_config import deepspeed_config
from shardyard_trainer.tasks.base import WriteBatch
from shardyard_trainer.tasks.module import ModuleOutput, TaskModule
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.gang import Gang, keep_to_loopback, rendezvous_method
from shardyard_trainer.training.joint import Part, joint_losses
from shardyard_trainer.training.shards import ShardWriter
from shardyard_trainer.training.teacher import Teacher

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
NORM_ELEMENTS = 1 << 10
"""How many squares are added up in fp32: few enough to lose nothing, enough to make a call worth its cost."""


class StepResult(NamedTuple):
    """One optimizer step. `loss_sum` is this rank's alone and stays on the device; `grad_norm` is the gang's.

    `applied` is false, on every rank alike, if loss or gradient was not finite: then no weight was changed.
    """

    loss_sum: torch.Tensor
    grad_norm: float
    applied: bool


class PreparedMicroBatch(NamedTuple):
    """A micro batch on the CPU; a dummy counts nothing. `taught` is what the teacher reads of it, if there is one."""

    batch: MicroBatch
    is_dummy: bool
    taught: MicroBatch | None = None


def start_gang(*, rank: int, local_rank: int, world_size: int, rendezvous: str, on_gpu: bool) -> Gang:
    """Meets the other ranks: NCCL on GPUs, gloo on CPUs, on loopback if the gang is on one node."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    method = rendezvous_method(rendezvous)
    keep_to_loopback(method)
    if not on_gpu:
        # Else the first start compiles a C++ extension that training never uses, and a killed build leaves a lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # The device's index, which DeepSpeed takes from here alone.
    os.environ["LOCAL_RANK"] = str(device.index or 0 if on_gpu else local_rank)
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=COLLECTIVE_TIMEOUT,
        init_method=method,
        rank=rank,
        world_size=world_size,
    )
    return Gang(rank=rank, world_size=world_size, device=device)


def stop_gang() -> None:
    """Leaves the gang in good order."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Engine:
    """A module, its optimizer and their sharded states, on one rank of a gang."""

    def __init__(self, module: TaskModule, config: TrainConfig, gang: Gang, *, teacher: Teacher | None = None) -> None:
        self._config = config
        self._gang = gang
        self._teacher = teacher
        if teacher is not None:
            teacher.place(self._frozen(teacher))
        self._grad_norm = 0.0
        self._applied = True
        optimizer = torch.optim.AdamW(
            decay_groups(module, config.weight_decay),
            lr=config.schedule.peak,
            betas=config.betas,
            fused=True,
        )
        # At stage 0 DeepSpeed would clip by a norm that is summed in fp32: see `gradient_norm`.
        if config.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip_stage_0)
        self._deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=self._settings(),
            dist_init_required=False,
        )
        if config.zero_stage == 0 and gang.world_size == 1:
            # Else it copies all gradients into buckets and back, to add nothing to them: a tenth of a small step.
            self._deepspeed.enable_backward_allreduce = False
        self._writer = _CheckpointEngine()
        self._deepspeed.checkpoint_engine = self._writer
        # It copies scripts beside each checkpoint, past the writer: on a full disk rank 0 alone would raise.
        self._deepspeed._copy_recovery_script = _write_no_script
        if config.compile:
            self._deepspeed.compile()

    def _settings(self) -> dict[str, Any]:
        config, gang = self._config, self._gang
        return deepspeed_config(
            zero_stage=config.zero_stage,
            clip=config.clip,
            precision=config.precision,
            micro_batch_size=config.micro_batch_size,
            workers=gang.world_size,
            on_gpu=gang.device.type == "cuda",
            offload=config.offload,
        )

    def _frozen(self, teacher: Teacher) -> nn.Module:
        """A module that only computes, placed as the trained one is: sharded at stage 3, else whole on each rank."""
        if self._config.zero_stage < 3:
            if self._config.precision == "bf16":
                teacher.to_bf16()
            return teacher.module.to(self._gang.device)
        sharded, *_ = deepspeed.initialize(model=teacher.module, config=self._settings(), dist_init_required=False)
        sharded.eval()
        return sharded  # type: ignore[no-any-return]

    @property
    def module(self) -> TaskModule:
        """The live module; at ZeRO-3 its parameters are only whole inside forward and `gather_state_dict`."""
        module: TaskModule = self._deepspeed.module
        return module

    @property
    def forwards_are_collective(self) -> bool:
        """Whether every rank has to call forward equally often."""
        return self._config.zero_stage == 3

    def train_step(
        self, micros: Sequence[PreparedMicroBatch], *, num_units: float, step: int, learning_rate: float
    ) -> StepResult:
        """Makes optimizer step `step`, counted from 0, over this rank's micro batches.

        `num_units` counts the tokens or samples of the whole global batch, over all ranks.
        """
        # Each step seeds itself, so no random state is ever saved: whatever an evaluation or an export draws in between
        # has no effect, and a resumed run draws the same dropout.
        torch.manual_seed(seed_for(self._config.seed, step, self._gang.rank))
        # Set here, not by a scheduler of DeepSpeed: the rate follows from the step, so there is no state to resume.
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.train()
        before = self._running_statistics()
        loss_sum = torch.zeros((), device=self._gang.device)
        for (_, is_dummy, _), loss in zip(micros, self._losses(micros, step), strict=True):
            # DeepSpeed averages gradients over the ranks; times their number that is the sum, and divided by all units
            # the mean. (A mean of micro batches' means would weigh the tokens of short batches more.) A dummy only lets
            # this rank join the reductions that stages 2 and 3 make inside backward.
            scale = 0.0 if is_dummy else self._gang.world_size / num_units
            # A loss that is not finite makes every gradient NaN, so that all ranks see it in the norm.
            self._deepspeed.backward(loss * (scale + loss.detach() * 0.0), scale_wrt_gas=False)
            if not is_dummy:
                loss_sum += loss.detach()
        self._deepspeed.step()
        # Stages 1 to 3 clip inside `step`, and skip it by themselves; at stage 0 the optimizer's hook has noted both.
        if self._config.zero_stage > 0:
            self._applied = self._deepspeed.was_step_applied()
            self._grad_norm = float(self._deepspeed.get_global_grad_norm())
        if before is not None:
            self._agree_on_statistics(before)
        return StepResult(loss_sum, self._grad_norm, self._applied)

    def _losses(self, micros: Sequence[PreparedMicroBatch], step: int) -> Iterator[torch.Tensor]:
        """The summed loss of each micro batch, computed one at a time: a step's may be larger than the device."""
        if self._teacher is not None:
            for batch, _, taught in micros:
                assert taught is not None
                wanted = self._teacher.scores(self.to_device(taught))
                yield self._teacher.mix(self._deepspeed(**self.to_device(batch).inputs, return_scores=True), wanted)
            return
        if self.module.joint is None:
            for batch, *_ in micros:
                yield self._deepspeed(**self.to_device(batch).inputs).loss_sum
            return
        parts = [
            Part(self.to_device(batch), is_dummy, seed_for(self._config.seed, step, self._gang.rank, at))
            for at, (batch, is_dummy, _) in enumerate(micros)
        ]
        yield from joint_losses(self.evaluate, self.module.joint, parts, self._gang)

    def _running_statistics(self) -> torch.Tensor | None:
        """The running statistics of batch normalisation, in one tensor; None: the model has none."""
        found = [buffer.detach().float().flatten() for buffer in _statistics(self.module)]
        return torch.cat(found) if found else None

    def _agree_on_statistics(self, before: torch.Tensor) -> None:
        """Gives every rank the mean of what the ranks saw, and takes back a step that was not applied.

        So evaluation, checkpoints and export are of one model, whichever rank makes them.
        """
        after = self._running_statistics()
        assert after is not None
        after = self._gang.sum_tensor(after) / self._gang.world_size
        agreed = after if self._applied and bool(after.isfinite().all()) else before
        at = 0
        for buffer in _statistics(self.module):
            buffer.copy_(agreed[at : at + buffer.numel()].view_as(buffer))
            at += buffer.numel()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients; seeds nothing, since every training step seeds itself."""
        self._deepspeed.eval()
        with torch.no_grad():
            yield
        self._deepspeed.train()

    def evaluate(self, batch: MicroBatch) -> ModuleOutput:
        """One micro batch with its outputs; a metric's inside `evaluating`."""
        output: ModuleOutput = self._deepspeed(**batch.inputs, return_outputs=True)
        return output

    def generate(self, batch: MicroBatch, write: WriteBatch) -> Sequence[Sequence[int]]:
        """What the model writes for a micro batch, inside `evaluating`.

        At ZeRO-3 every rank takes as many steps as the one with the longest text: each step gathers the weights.
        """
        return write(self._deepspeed, batch, self._any_goes_on if self.forwards_are_collective else bool)

    def _any_goes_on(self, is_open: bool) -> bool:
        mine = torch.tensor(float(is_open), device=self._gang.device)
        return float(self._gang.sum_tensor(mine)) > 0

    def to_device(self, batch: MicroBatch) -> MicroBatch:
        """The micro batch on this rank's device; itself on a CPU."""
        return batch.on(self._gang.device)

    def gather_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights and buffers by name, on the CPU of rank 0; None elsewhere. Every rank calls it."""
        state = {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}
        if self._config.zero_stage == 3:
            whole: dict[int, torch.Tensor] = {}
            # One parameter at a time: no device ever holds the whole model. Tied weights are gathered once.
            for name, parameter in self.module.named_parameters(remove_duplicate=False):
                if id(parameter) not in whole:
                    with deepspeed.zero.GatheredParameters([parameter]):
                        is_wanted = self._gang.is_chief
                        whole[id(parameter)] = parameter.detach().cpu().clone() if is_wanted else torch.empty(0)
                state[name] = whole[id(parameter)]
        return state if self._gang.is_chief else None

    def save(self, folder: Path, state: dict[str, Any], writer: ShardWriter) -> None:
        """Writes this rank's shards into `folder`; `writer` keeps what went wrong. Every rank calls it."""
        self._writer.shards = writer
        client_state = {
            "shardyard": state,
            # Lets DeepSpeed convert the checkpoint to another number of ranks.
            "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
        }
        try:
            self._deepspeed.save_checkpoint(
                str(folder.parent), tag=folder.name, client_state=client_state, save_latest=False
            )
        finally:
            self._writer.shards = None

    def load(self, folder: Path) -> dict[str, Any]:
        """Loads what `save` wrote, in the same number of ranks, and returns its state. Every rank calls it."""
        path, client_state = self._deepspeed.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint of DeepSpeed")
        state: dict[str, Any] = client_state["shardyard"]
        return state

    def _clip_stage_0(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clips with `gradient_norm`, and leaves a step out whose gradient is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._grad_norm = gradient_norm([p.grad for p in parameters])
        self._applied = math.isfinite(self._grad_norm)
        if not self._applied:
            # AdamW passes over a parameter without a gradient: neither its moments nor its weights decay.
            for parameter in parameters:
                parameter.grad = None
        # 1e-6 as in torch's clip_grad_norm_: a plain loop scales by the same factor.
        elif self._config.clip > 0 and (factor := self._config.clip / (self._grad_norm + 1e-6)) < 1:
            torch._foreach_mul_([p.grad for p in parameters], factor)


class _CheckpointEngine(TorchCheckpointEngine):  # type: ignore[misc]
    """Writes through a ShardWriter: a rank that cannot write still meets the others, who then all give up together."""

    def __init__(self) -> None:
        super().__init__()
        self.shards: ShardWriter | None = None

    def save(self, state_dict: Any, path: str) -> None:
        assert self.shards is not None
        self.shards.write(state_dict, Path(path))


def _statistics(module: nn.Module) -> list[torch.Tensor]:
    """Means and variances that batch normalisation keeps of what it has seen."""
    norms = [each for each in module.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]


def _write_no_script(save_path: str) -> None:
    """In place of DeepSpeed's scripts for another format: no manifest names them, and nothing here reads them."""


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The norm over all gradients, as exact as fp32 gradients are: float64 sums of short fp32 ones.

    One fp32 sum over a large tensor, as `clip_grad_norm_` makes it on a CPU, is off by 1e-4 to 1e-3, which ends in
    other weights; squaring in float64 throughout costs fifteen times as much as this.
    """
    norms = []
    for gradient in gradients:
        flat = gradient.reshape(-1)
        in_rows = flat.numel() // NORM_ELEMENTS * NORM_ELEMENTS
        if in_rows:
            rows = torch.linalg.vector_norm(flat[:in_rows].view(-1, NORM_ELEMENTS), dim=1)
            norms.append(torch.linalg.vector_norm(rows, dtype=torch.float64))
        if in_rows < flat.numel():
            norms.append(torch.linalg.vector_norm(flat[in_rows:], dtype=torch.float64))
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; biases and the weights of norms, which have one dimension, do not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # If adapters alone are trained there is no bias: ZeRO cannot shard a group of nothing.
    return [group for group in groups if group["params"]]
