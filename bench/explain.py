"""How long an explanation takes, as a multiple of a `Predict` of the same instance, through a real service.

A BERT of 11 million parameters with a text of 20 tokens, and a ViT of 5 million with a picture of 224 pixels. Both
calls are made in turn, by one caller; the ratio is the median over pairs.

python bench/explain.py [--pairs N] [--write]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertForSequenceClassification, ViTConfig, ViTForImageClassification

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from answer import SIZES, text
from helpers.tiny_folders import bert_config, bert_tokenizer
from light import free_port, wait_for
from measure import Ratio, ratio_of, report
from shardyard import Client, Model

TARGET_STEPS = 64
TARGET_RATIO = 3.0
"""Forward passes that a gradient may cost: one forward, and two for the way back."""

BIN = Path(sys.executable).parent


def main() -> int:
    """Measure, print, and say by the exit code whether every target was met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="of each model")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sy") as name:
        folder = Path(name)
        make_texts(folder / "bert")
        make_pictures(folder / "vit")
        address = f"127.0.0.1:{free_port()}"
        command = [BIN / "shardyard", "serve", "--launcher", "local", "--listen", address, "--data-root", name]
        with subprocess.Popen(
            [*command, "--state-dir", folder / "state"],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.DEVNULL,
        ) as service:
            try:
                wait_for(address, service)
                with Client(address) as client:
                    bert, vit = client.upload_model(folder / "bert"), client.upload_model(folder / "vit")
                    found = {
                        "BERT, a text of 20 tokens": compared(bert, text, arguments.pairs),
                        "ViT, a picture of 224 pixels": compared(vit, picture, arguments.pairs),
                    }
            finally:
                service.send_signal(signal.SIGTERM)
                service.wait(timeout=60)
    return judge(found, write=arguments.write)


def make_texts(folder: Path) -> None:
    """The BERT of `answer`, with the small weights that BERT begins with: large ones would make it a chaos."""
    torch.manual_seed(0)
    config = bert_config(**SIZES, initializer_range=0.02)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)


def make_pictures(folder: Path) -> None:
    """A ViT of the size of DeiT-tiny."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768, num_labels=10)
    ViTForImageClassification(config).eval().save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 224, "width": 224}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")


def picture(seed: int) -> bytes:
    """A PNG of smooth noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (14, 14, 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).resize((224, 224)).save(made, "PNG")
    return made.getvalue()


def compared(model: Model, make: Callable[[int], str | bytes], pairs: int) -> tuple[Ratio, float]:
    """Seconds of an explanation ÷ seconds of a prediction, and the gradients of one explanation on average."""
    model.predict([make(0)])
    model.explain(make(0))
    explained, predicted, steps = [], [], 0
    for at in range(1, pairs + 1):
        item = make(at)
        begun = time.perf_counter()
        model.predict([item])
        between = time.perf_counter()
        steps += model.explain(item).steps
        explained.append(time.perf_counter() - between)
        predicted.append(between - begun)
    return ratio_of(explained, predicted), steps / pairs


def judge(found: dict[str, tuple[Ratio, float]], *, write: bool) -> int:
    """Print the table; 0 if every target was met."""
    rows = []
    for name, (ratio, steps) in found.items():
        rows.append((f"{name}: explanation ÷ `Predict`", "", str(ratio)))
        rows.append(("gradients, mean", f"at most {TARGET_STEPS}", f"{steps:.0f}"))
        rows.append(("explanation ÷ `Predict` ÷ gradients", f"at most {TARGET_RATIO:g}", f"{ratio.median / steps:.2f}"))
    report("explain", rows, write=write)
    return int(any(steps > TARGET_STEPS or ratio.median / steps > TARGET_RATIO for ratio, steps in found.values()))


if __name__ == "__main__":
    sys.exit(main())
