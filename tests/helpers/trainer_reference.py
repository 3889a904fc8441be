"""The same training in plain PyTorch: no DeepSpeed, no micro batches, one process; clips with a float64 norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from helpers.trainer_tasks import TAG_WEIGHTS, TinyTask
from shardyard_trainer.inputs.base import MicroBatch
from shardyard_trainer.inputs.tagged import IGNORED
from shardyard_trainer.tasks.base import Task
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.engine import decay_groups
from shardyard_trainer.training.order import Order


def reference_losses(task: TinyTask, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of every step."""
    return plain_losses(task, task.module(), config, loss_of=_taught_tags(task) if task.lesson else _own_loss)


LossOf = Callable[[torch.nn.Module, MicroBatch], torch.Tensor]


def _own_loss(module: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    loss: torch.Tensor = module(**batch.inputs).loss_sum
    return loss


def _taught_tags(task: TinyTask) -> LossOf:
    """The loss of a tagger beside that of its teacher, with the functions of torch."""
    lesson = task.lesson
    assert lesson is not None
    teacher: Any = lesson.make_module()

    def loss_of(module: Any, batch: MicroBatch) -> torch.Tensor:
        inputs = dict(batch.inputs)
        labels_N = inputs.pop("labels").flatten()
        counts_N = labels_N != IGNORED
        own_NC = module.model(**inputs).logits.flatten(0, 1)[counts_N]
        with torch.no_grad():
            logits_NC = teacher.model(**inputs).logits.flatten(0, 1)[counts_N]
        weights_C = torch.tensor(TAG_WEIGHTS)
        wanted_NC = functional.softmax(logits_NC[:, list(lesson.columns)] / lesson.temperature, dim=1)
        log_NC = functional.log_softmax(own_NC / lesson.temperature, dim=1)
        kl_N = functional.kl_div(log_NC, wanted_NC, reduction="none").sum(1) * lesson.temperature**2
        hard = functional.cross_entropy(own_NC, labels_N[counts_N], weight=weights_C, reduction="sum")
        soft = (kl_N * weights_C[labels_N[counts_N]]).sum()
        return (1 - lesson.weight) * hard + lesson.weight * soft

    return loss_of


def plain_losses(
    task: Task, module: torch.nn.Module, config: TrainConfig, *, loss_of: LossOf = _own_loss
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of every step of a module without dropout."""
    optimizer = torch.optim.AdamW(decay_groups(module, config.weight_decay), betas=config.betas, fused=True)
    order = Order(
        num_samples=task.train.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        lengths=task.train.lengths(),
    )
    losses, norms = [], []
    for step in range(config.total_steps):
        batch = task.train.micro_batch(order.global_batch(step).refs())
        loss = loss_of(module, batch) / batch.num_units
        loss.backward()
        losses.append(loss.item())
        norms.append(_clip(module, config.clip))
        for group in optimizer.param_groups:
            group["lr"] = config.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def mean_of_means_losses(task: TinyTask, config: TrainConfig) -> list[float]:
    """The counter-example: micro batches are weighed equally, whatever they count. Losses are still true means."""
    module = task.module()
    optimizer = torch.optim.AdamW(decay_groups(module, config.weight_decay), betas=config.betas, fused=True)
    order = Order(
        num_samples=task.train.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        lengths=task.train.lengths(),
    )
    losses = []
    for step in range(config.total_steps):
        micros = [
            task.train.micro_batch(micro.samples)
            for micro in order.rank_batches(step, rank=0, world_size=1, micro_batch_size=config.micro_batch_size)
        ]
        total = 0.0
        for batch in micros:
            loss = module(**batch.inputs).loss_sum
            (loss / batch.num_units / len(micros)).backward()
            total += loss.item()
        losses.append(total / sum(batch.num_units for batch in micros))
        _clip(module, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _clip(module: torch.nn.Module, clip: float) -> float:
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = float(torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt())
    for gradient in gradients if norm > clip else []:
        gradient.mul_(clip / (norm + 1e-6))
    return norm
