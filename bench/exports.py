"""The formats of a real model: size, time of a sample, and what they cost in accuracy, as their receipts have it.

A BERT of 22.7 million parameters learns SST-2 as examples/sst2.yaml has it; it comes from the Python index, as in the
quickstart.

python bench/exports.py [--write]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.served import BIN, Served, served
from helpers.small_specs import shared_data
from measure import report
from shardyard import Client
from shardyard.types import ExportedFormat

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("onnx", "onnx-int8", "bf16")
TARGET_SIZE = 0.35
TARGET_DROP = 0.01
SMALL = "onnx_int8"


def main() -> int:
    """Measure, print, and say by the exit code whether int8 is small and good enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy-") as name, served(Path(name), "local") as service:
        found = made(service)
    report("exports", [row for each in found for row in rows(each)], write=arguments.write)
    small = next(each for each in found if each.format == SMALL)
    return int(small.size_ratio > TARGET_SIZE or small.drop > TARGET_DROP)


def made(service: Served) -> tuple[ExportedFormat, ...]:
    """The receipts of the model's formats. Raises RuntimeError if the job does not succeed."""
    data = shared_data("sst2")
    code = "import assets; print(assets.bert_folder())"
    folder = ROOT / "examples" / "quickstart"
    bert = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    command = [str(BIN / "shardyard"), "submit", str(ROOT / "examples" / "sst2.yaml"), "--model", bert.stdout.strip()]
    command += ["--train", str(data / "train.tsv"), "--eval", str(data / "test.tsv")]
    done = service.run(*command, *(part for each in FORMATS for part in ("--export", each)), timeout_s=3600)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    with Client(service.address) as client:
        return client.model("sst2").info.exports


def rows(each: ExportedFormat) -> list[tuple[str, str, str]]:
    """A format's size, time and accuracy."""
    word, is_small = each.format.replace("_", "-"), each.format == SMALL
    latency = f"{each.latency_s / each.original_latency_s:.2f} ({each.latency_s * 1e3:.1f} ms)"
    accuracy = f"{each.metrics['accuracy']:.4f} ({each.original_metrics['accuracy']:.4f})"
    return [
        (f"{word}: size ÷ the model's", f"at most {TARGET_SIZE}" if is_small else "", f"{each.size_ratio:.2f}"),
        (f"{word}: time of a sample ÷ the model's", "", latency),
        (f"{word}: accuracy (the model's)", "within 0.01" if is_small else "", accuracy),
    ]


if __name__ == "__main__":
    sys.exit(main())
