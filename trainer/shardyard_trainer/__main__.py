"""`python -m shardyard_trainer spec.json`: one rank of an AttemptSpec in proto JSON.

Alone it trains in this process, or as one rank of torchrun's, and prints. With `--rank`, `--local-rank` and
`--report-fd` it is a rank of a launcher's gang: the descriptor is a socket that takes frames of 4 bytes big-endian
length and a ReportRequest, and answers each with a ReportReply framed alike.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
from pathlib import Path

from google.protobuf import json_format

from shardyard.v1 import plan_pb2
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.entry import run
from shardyard_trainer.training.report import SendReport


def main() -> None:
    """Reads the arguments and runs the rank."""
    parser = argparse.ArgumentParser(prog="python -m shardyard_trainer", description="Runs one rank of an attempt.")
    parser.add_argument("spec", type=Path, help="an AttemptSpec in proto JSON")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--local-rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    parser.add_argument("--report-fd", type=int)
    arguments = parser.parse_args()
    attempt = json_format.Parse(arguments.spec.read_text(), worker_pb2.AttemptSpec())
    if arguments.report_fd is None:
        complete(attempt)
    send = None if arguments.report_fd is None else socket_sender(arguments.report_fd)
    run(attempt.SerializeToString(), arguments.rank, arguments.local_rank, send)


def socket_sender(descriptor: int) -> SendReport:
    """Sends over a connected socket; ConnectionError when the other side is gone."""
    channel = socket.socket(fileno=descriptor)

    def send(request: bytes) -> bytes:
        channel.sendall(struct.pack(">I", len(request)) + request)
        (length,) = struct.unpack(">I", _read(channel, 4))
        return _read(channel, length)

    return send


def _read(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = channel.recv(length - len(data))
        if not part:
            raise ConnectionError("the supervisor is gone")
        data += part
    return bytes(data)


def complete(attempt: worker_pb2.AttemptSpec) -> None:
    """Fills in what a launcher would have: the number of ranks, folders, and the plan."""
    attempt.world_size = attempt.world_size or int(os.environ.get("WORLD_SIZE", "1"))
    attempt.epoch = attempt.epoch or 1
    attempt.threads_per_rank = attempt.threads_per_rank or max((os.cpu_count() or 1) // attempt.world_size, 1)
    attempt.job_dir = attempt.job_dir or str(Path("shardyard-run").absolute())
    attempt.attempt_dir = attempt.attempt_dir or f"{attempt.job_dir}/e{attempt.epoch:06}"
    attempt.export_dir = attempt.export_dir or f"{attempt.job_dir}/model"
    if attempt.plan.total_steps == 0 and _trains(attempt):
        from shardyard_trainer.planning.node import this_node  # Heavy, and not needed if a coordinator has planned.
        from shardyard_trainer.planning.plan import plan

        if not attempt.HasField("node_shape"):
            attempt.node_shape.CopyFrom(this_node())
        if attempt.spec.resources.WhichOneof("size") is None:
            attempt.spec.resources.workers = attempt.world_size
        request = worker_pb2.PlanRequest(spec=attempt.spec, locations=attempt.locations, node_shape=attempt.node_shape)
        result = worker_pb2.PlanResult.FromString(plan(request.SerializeToString()))
        if result.violations:
            raise SystemExit("\n".join(f"{found.field}: {found.message}" for found in result.violations))
        if result.plan.memory.verdict == plan_pb2.MEMORY_VERDICT_NO_FIT:
            raise SystemExit("\n".join(f"{each.field}: {each.message}" for each in result.plan.warnings[:1]))
        attempt.plan.CopyFrom(result.plan)


def _trains(attempt: worker_pb2.AttemptSpec) -> bool:
    from shardyard_trainer.tasks import table  # Heavy.
    from shardyard_trainer.tasks.base import Output

    return table.of(attempt.spec).output is Output.MODEL


if __name__ == "__main__":
    main()
