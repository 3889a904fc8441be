"""This machine's resources, for an attempt without a coordinator, which would otherwise report them."""

from __future__ import annotations

import os

import psutil
import torch

from shardyard.worker.v1 import worker_pb2

_BF16_CAPABILITY = (8, 0)
"""From Ampere on: earlier GPUs emulate bfloat16, slower than they compute fp32."""


def this_node() -> worker_pb2.NodeShape:
    """Cores, memory in bytes, and the weakest of the GPUs that torch can use."""
    shape = worker_pb2.NodeShape(memory_bytes=psutil.virtual_memory().total, cpus=os.cpu_count() or 1)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return shape
    devices = [torch.cuda.get_device_properties(index) for index in range(count)]
    weakest = min(devices, key=lambda device: (device.major, device.minor, device.total_memory))
    shape.gpus = count
    shape.gpu_memory_bytes = min(device.total_memory for device in devices)
    shape.bf16 = (weakest.major, weakest.minor) >= _BF16_CAPABILITY
    shape.gpu_name = weakest.name
    return shape
