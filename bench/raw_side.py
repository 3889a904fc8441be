"""The shortest loop over the DeepSpeed engine as one side of `bench/trainer.py`: same module, loss, batches, threads.

    python bench/raw_side.py SPEC.json BATCHES

Its batches are made before the first block, so they cost it nothing while it is measured.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch
from google.protobuf import json_format

from gate import Gate
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.inputs.base import MicroBatch, Samples
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare
from shardyard_trainer.training.config import train_config
from shardyard_trainer.training.engine import decay_groups, start_gang
from shardyard_trainer.training.order import Order


def main(spec_file: str, num_batches: int) -> None:
    """Train until the bench has had enough."""
    attempt = json_format.Parse(Path(spec_file).read_text(encoding="utf-8"), worker_pb2.AttemptSpec())
    torch.set_num_threads(attempt.threads_per_rank)
    start_gang(rank=0, local_rank=0, world_size=1, rendezvous=f"{attempt.rendezvous}-raw", on_gpu=False)
    tokens = 0
    gate = Gate(count=lambda: tokens)
    task = prepare(attempt.spec, attempt.locations)
    config = train_config(attempt, num_train_samples=task.train.num_samples)
    module = build_module(task, attempt.spec)
    optimizer = torch.optim.AdamW(
        decay_groups(module, config.weight_decay), lr=config.schedule.peak, betas=config.betas, fused=True
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": config.batch_size,
            "gradient_clipping": config.clip,
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        },
        dist_init_required=False,
    )
    order = Order(
        num_samples=task.train.num_samples,
        batch_size=config.batch_size,
        seed=config.seed,
        lengths=task.train.lengths(),
    )
    batches = [micro_batches(task.train, order, step, config.micro_batch_size) for step in range(num_batches)]
    gate.install()
    engine.train()
    for step in range(10**9):
        micros = batches[step % num_batches]
        tokens += sum(micro.num_tokens for micro in micros)
        units = sum(micro.num_units for micro in micros)
        for micro in micros:
            engine.backward(engine(**micro.inputs).loss_sum / units)
        engine.step()


def micro_batches(samples: Samples, order: Order, step: int, size: int) -> list[MicroBatch]:
    """The micro batches of one step."""
    found = order.rank_batches(step, rank=0, world_size=1, micro_batch_size=size)
    return [samples.micro_batch(micro.samples) for micro in found]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
