"""Shardyard's trainer as one side of `bench/trainer.py`, streaming to a supervisor that spools.

python bench/our_side.py SPEC.json
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from google.protobuf import json_format

from gate import Gate
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.entry import run
from supervisor import FD, Sender


def main(spec_file: str) -> None:
    """Train until the bench has had enough."""
    attempt = json_format.Parse(Path(spec_file).read_text(encoding="utf-8"), worker_pb2.AttemptSpec())
    Gate().install()
    run(attempt.SerializeToString(), 0, 0, Sender(int(os.environ[FD])))


if __name__ == "__main__":
    main(sys.argv[1])
