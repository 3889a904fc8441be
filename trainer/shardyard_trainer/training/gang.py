"""The ranks of one attempt, and how they agree: everything that all of them must know goes through here."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Gang:
    """One rank's view of its gang. Every method is a collective: all ranks call it, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_chief(self) -> bool:
        """Whether this is rank 0, which decides and reports."""
        return self.rank == 0

    def sum_ahead(self, values: list[float]) -> Callable[[], list[float]]:
        """Begins to add up `values` over the ranks, in float64; the function returned waits for the sums.

        On a GPU this waits only for work enqueued before: a step enqueued in between keeps running.
        """
        if self.world_size == 1:
            return lambda: values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> list[float]:
            work.wait()
            return tensor.tolist()

        return wait

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_rows(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's rows, in the order of the ranks; they may differ in number alone."""
        if self.world_size == 1:
            return [rows]
        own = torch.tensor(len(rows), device=self.device)
        counts = [torch.zeros_like(own) for _ in range(self.world_size)]
        dist.all_gather(counts, own)
        # Ranks exchange tensors of one size.
        padded = rows.new_zeros((max(int(count) for count in counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(found, padded)
        return [each[: int(count)] for each, count in zip(found, counts, strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on every rank. Values are pickled: only between own ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_chief(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait_for_all(self) -> None:
        """Returns when every rank has called it."""
        if self.world_size > 1:
            dist.barrier()


def rendezvous_method(rendezvous: str, scratch: Path | None = None) -> str:
    """The init method of torch.distributed: as given, torchrun's environment, or a gang of one's own file."""
    if rendezvous:
        return rendezvous
    if "MASTER_ADDR" in os.environ:
        return "env://"
    folder = scratch or Path(tempfile.mkdtemp(prefix="shardyard-rendezvous-"))
    return f"file://{folder / 'rendezvous'}"


def keep_to_loopback(method: str) -> None:
    """Makes gloo and NCCL of a gang that is on one node listen on loopback only; several nodes choose themselves."""
    if method.startswith("tcp://") or (method == "env://" and not _is_loopback(os.environ["MASTER_ADDR"])):
        return
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def _is_loopback(host: str) -> bool:
    return host in {"localhost", "::1"} or host.startswith("127.")
