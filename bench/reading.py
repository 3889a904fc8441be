"""What preparing a large file takes: the peak memory and time of reading, checking and tokenising JSONL.

    python bench/reading.py [--megabytes 1000] [--write]

A process of its own for each task; its memory before the data is printed with the peak.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from measure import report

TEXT = "the film was a slow and tender story about people who never say what they want from each other"
WORDS = TEXT.split()
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 128},
    "bert": {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64},
}
TASKS: Mapping[str, Mapping[str, Any]] = {
    "pretraining": {"pretraining": {"causal_lm": {"sequence_length": 128}}, "model": "gpt2"},
    "classification": {"fine_tuning": {"text_classification": {"max_length": 128}}, "model": "bert"},
}
LIMIT_MB = 1500


def main() -> int:
    """Measure, print, and say by the exit code whether the target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        folder = Path(name)
        write_texts(folder / "large.jsonl", arguments.megabytes * 1_000_000)
        write_texts(folder / "small.jsonl", 2_000_000)
        tokenizer = train_tokenizer(folder)
        for task in TASKS:
            found = prepare_apart(task, folder, tokenizer)
            worst = max(worst, found["peak_mb"])
            took = (
                f"{found['peak_mb']:,.0f} MB ({found['before_mb']:,.0f} MB before the data), {found['seconds']:.0f} s"
            )
            rows.append((f"{task}, {arguments.megabytes:,} MB of JSONL: peak memory", f"under {LIMIT_MB:,} MB", took))
    report("reading", rows, write=arguments.write)
    return int(worst > LIMIT_MB)


def write_texts(path: Path, size: int) -> None:
    """Texts of 5 to 120 words with one of two labels; as many as make the size."""
    drawn = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            lines = []
            for _ in range(1000):
                text = " ".join(drawn.choices(WORDS, k=drawn.randint(5, 120)))
                lines.append(json.dumps({"text": text, "label": drawn.choice(("good", "bad"))}))
            file.write("\n".join(lines) + "\n")


def train_tokenizer(folder: Path) -> Path:
    """A folder with a WordPiece tokenizer of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=500, special_tokens=names))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    target = folder / "tokenizer"
    target.mkdir()
    tokenizer.save(str(target / "tokenizer.json"))
    settings = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    settings |= {"eos_token": "[SEP]", "tokenizer_class": "PreTrainedTokenizerFast"}
    (target / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return target


def prepare_apart(task: str, folder: Path, tokenizer: Path) -> dict[str, float]:
    """`prepare_here` in a process of its own, so that the peak is its alone."""
    command = [sys.executable, __file__, "--prepare", task, str(folder), str(tokenizer)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def prepare_here(task: str, folder: Path, tokenizer: Path) -> dict[str, float]:
    """Prepare a small file, then the large one, and how much memory each took at most."""
    from google.protobuf import json_format

    from shardyard.v1 import spec_pb2
    from shardyard.worker.v1 import worker_pb2
    from shardyard_trainer.tasks.ingredients import prepare

    places = worker_pb2.Locations(data_roots=[str(folder)], cache_dir=str(folder / f"cache-{task}"))
    found = {}
    started = time.monotonic()
    for name, file in (("before_mb", "small.jsonl"), ("peak_mb", "large.jsonl")):
        started = time.monotonic()
        settings = dict(TASKS[task])
        kind = settings.pop("model")
        data = {"uri": str(folder / file), "columns": {"text": "text"}}
        model = {"architecture": {"model_type": kind, "overrides": dict(ARCHITECTURES[kind])}}
        spec = {**settings, "model": model, "tokenizer": {"uri": str(tokenizer)}, "train_data": data}
        prepare(json_format.ParseDict(spec, spec_pb2.JobSpec()), places)
        found[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {**found, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--prepare"]:
        print(json.dumps(prepare_here(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    else:
        sys.exit(main())
