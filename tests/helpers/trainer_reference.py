"""The same training in plain PyTorch: no DeepSpeed, no micro batches, one process; clips with a float64 norm."""

from __future__ import annotations

import torch

from helpers.trainer_tasks import TinyTask
from shardyard_trainer.tasks.base import Task
from shardyard_trainer.training.config import TrainConfig
from shardyard_trainer.training.engine import decay_groups
from shardyard_trainer.training.order import Order


def reference_losses(task: TinyTask, config: TrainConfig) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of every step."""
    return plain_losses(task, task.module(), config)


def plain_losses(task: Task, module: torch.nn.Module, config: TrainConfig) -> tuple[list[float], list[float]]:
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
        loss = module(**batch.inputs).loss_sum / batch.num_units
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
