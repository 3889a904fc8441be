"""Training speed: ours, streaming, beside a minimal raw DeepSpeed loop and transformers' `Trainer`, taking turns.

    python bench/trainer.py [--blocks 20] [--steps 5] [--only gpt2|bert] [--write]

Real tokens a second: padding is not counted. One rank and all cores for every side.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

from google.protobuf import json_format

from gate import Block, Side, take_turns
from measure import Ratio, quantile, ratio_of, report
from shardyard.v1 import spec_pb2
from shardyard.worker.v1 import worker_pb2
from supervisor import FD, Supervisor
from workload import Workload

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples" / "quickstart"))
WARM_UP = 8
ROUNDS_OF_WARM_UP = 2
TARGET_RAW, TARGET_HF, LOWER_BOUND = 0.98, 1.0, 0.96
GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 256}


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=20, help="measured blocks a side")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a block")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("gpt2", "bert"))
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    rows, missed = [], 0
    for kind in [arguments.only] if arguments.only else ["gpt2", "bert"]:
        with tempfile.TemporaryDirectory(prefix="sy") as folder:
            workload = prepare(kind, Path(folder), threads=arguments.threads)
            blocks = measure(kind, workload, blocks=arguments.blocks, steps=arguments.steps)
        kind_rows, kind_missed = judge(kind, blocks)
        rows += kind_rows
        missed += kind_missed
    report("trainer", rows, write=arguments.write)
    return int(missed > 0)


def prepare(kind: str, folder: Path, *, threads: int) -> Workload:
    """Data, model and tokenizer of one workload: those of the quickstart."""
    import assets
    import material

    data = material.reviews(assets.snippets_folder(), folder / "reviews")
    workload = Workload(
        folder=folder,
        text=data.unlabelled,
        labelled=data.all,
        model=assets.bert_folder(),
        tokenizer=folder / "tokenizer" / "tokenizer.json",
        sequence_length=64,
        batch_size=32,
        learning_rate=1e-4,
        threads=threads,
    )
    if kind == "bert":
        return workload
    train_tokenizer(workload.text, workload.tokenizer)
    return replace(workload, sequence_length=256, batch_size=8, learning_rate=1e-3, overrides=GPT2)


def train_tokenizer(text: Path, target: Path) -> None:
    """A byte-level BPE, the same for every side."""
    from tokenizers import ByteLevelBPETokenizer

    target.parent.mkdir(parents=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text)], vocab_size=16_384, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(target))
    # A bare tokenizer.json does not say which of its tokens ends a text.
    (target.parent / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}\n', encoding="utf-8")


def measure(kind: str, workload: Workload, *, blocks: int, steps: int) -> dict[str, list[Block]]:
    """Blocks of every side by its name. Ours makes raw's batches, so its tokens are raw's."""
    num_batches = WARM_UP * ROUNDS_OF_WARM_UP + blocks * steps
    workload_file, spec_file = workload.folder / "workload.json", workload.folder / "spec.json"
    workload_file.write_text(json.dumps(workload.to_dict()), encoding="utf-8")
    spec_file.write_text(json_format.MessageToJson(attempt_spec(kind, workload, num_batches)), encoding="utf-8")
    supervisor = Supervisor(workload.folder / "attempt", job_uid=uuid.uuid4().hex)
    environment = {"OMP_NUM_THREADS": str(workload.threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    commands = {
        "ours": [HERE / "our_side.py", spec_file],
        "raw": [HERE / "raw_side.py", spec_file, num_batches],
        "hf": [HERE / "hf_side.py", kind, workload_file],
    }
    if kind == "bert":
        commands["hf-grouped"] = [HERE / "hf_side.py", kind, workload_file, "group_by_length"]
    sides = []
    try:
        for name, command in commands.items():
            fd = supervisor.theirs.fileno() if name == "ours" else None
            extra = {FD: str(fd)} if fd is not None else {}
            sides.append(
                Side(
                    name,
                    [sys.executable, *map(str, command)],
                    log=workload.folder / f"{name}.log",
                    environment={**environment, **extra},
                    keep_fds=(fd,) if fd is not None else (),
                )
            )
        for _ in range(ROUNDS_OF_WARM_UP - 1):
            for side in sides:
                side.block(WARM_UP)
        measured = take_turns(sides, blocks=blocks, steps=steps, warm_up=WARM_UP)
    finally:
        for side in sides:
            side.close()
    pairs = zip(measured["ours"], measured["raw"], strict=True)
    measured["ours"] = [replace(mine, tokens=raw.tokens) for mine, raw in pairs]
    return measured


def attempt_spec(kind: str, workload: Workload, num_steps: int) -> worker_pb2.AttemptSpec:
    """The job as the service would hand it to its gang; the canary is its only evaluation and checkpoint."""
    spec = spec_pb2.JobSpec(
        optimization=spec_pb2.Optimization(
            max_steps=10 * num_steps,
            global_batch_size=workload.batch_size,
            micro_batch_size=workload.batch_size,
            learning_rate=workload.learning_rate,
        ),
        parallelism=spec_pb2.Parallelism(zero_stage=0),
        resources=spec_pb2.Resources(workers=1, cpus_per_worker=workload.threads),
        checkpoints=spec_pb2.CheckpointPolicy(every=10 * num_steps),
        evaluation=spec_pb2.EvaluationPolicy(every=10 * num_steps, holdout=0.01),
    )
    if kind == "gpt2":
        spec.pretraining.causal_lm.sequence_length = workload.sequence_length
        spec.model.architecture.model_type = "gpt2"
        spec.model.architecture.overrides.update({**workload.overrides, "n_positions": workload.sequence_length})
        spec.tokenizer.uri = str(workload.tokenizer.parent)
        spec.train_data.uri = str(workload.text)
        spec.train_data.format = spec_pb2.DATA_FORMAT_TEXT
    else:
        spec.fine_tuning.text_classification.max_length = workload.sequence_length
        spec.fine_tuning.text_classification.pooling = spec_pb2.POOLING_CLS
        spec.model.uri = str(workload.model)
        spec.train_data.uri = str(workload.labelled)
    folder = workload.folder
    return worker_pb2.AttemptSpec(
        job_name="projects/default/jobs/bench",
        job_uid=uuid.uuid4().hex,
        epoch=1,
        spec=spec,
        locations=worker_pb2.Locations(data_roots=["/"], cache_dir=str(folder / "cache")),
        job_dir=str(folder / "job"),
        attempt_dir=str(folder / "job" / "e000001"),
        export_dir=str(folder / "export"),
        world_size=1,
        threads_per_rank=workload.threads,
        rendezvous=f"file://{folder}/rendezvous",
    )


def judge(kind: str, blocks: dict[str, list[Block]]) -> tuple[list[tuple[str, str, str]], int]:
    """Rows of the table, and how many targets were missed."""
    what = {"gpt2": "GPT-2 pretraining", "bert": "BERT fine-tuning"}[kind]
    speeds = {name: [block.tokens / block.seconds for block in found] for name, found in blocks.items()}
    names = {"raw": "raw DeepSpeed", "hf": "HF Trainer", "hf-grouped": "HF Trainer, group_by_length"}
    targets = {"raw": TARGET_RAW, "hf": TARGET_HF}
    rows = [(f"{what}, ours", "", f"{quantile(speeds['ours'], 0.5):,.0f} tokens/s")]
    missed = 0
    for name in [name for name in names if name in speeds]:
        ratio = ratio_of(speeds["ours"], speeds[name])
        rows.append((f"{what}, ours ÷ {names[name]}", wanted(targets.get(name)), str(ratio)))
        missed += name in targets and not is_met(ratio, targets[name])
    return rows, missed


def wanted(target: float | None) -> str:
    """A target in words."""
    return f"at least {target:.2f}, lower bound {LOWER_BOUND:.2f}" if target is not None else "(no target)"


def is_met(ratio: Ratio, target: float) -> bool:
    """Whether the median reaches the target and the interval's lower end the lower bound."""
    return ratio.median >= target and ratio.low >= LOWER_BOUND


if __name__ == "__main__":
    sys.exit(main())
