"""What people wear: a small ResNet on the first 10,000 pictures of Fashion-MNIST (MIT; Xiao, Rasul and Vollgraf, 2017).

Debian packages them; apt checks the signature. Without apt the same story uses scikit-learn's handwritten digits.
"""

from __future__ import annotations

import gzip
import io
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import assets
import numpy as np
import show
import story
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import shardyard
from shardyard.spec_sources import Architecture
from shardyard.specs import Data, ImageClassification, JobSpec, Optimization, Resources

TITLE = "Fetch small pictures of clothes"
WHAT = "small ResNet"
METRIC = "accuracy"
PACKAGE = "dataset-fashion-mnist"
INSTALLED = Path("usr/share/datasets/fashion-mnist")
PICTURES, OF_BASELINE, ASKED = 10_000, 3_000, 5
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
RESNET = {
    "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1], "layer_type": "basic", "num_channels": 1,
    "downsample_in_first_stage": False,
}  # fmt: skip

Pictures = tuple[np.ndarray, np.ndarray]
"""Pixels, uint8 [pictures, height, width], and the number of each picture's class, uint8 [pictures]."""


class Material(NamedTuple):
    """Two folders with a pair of files each, what they hold, and the names of the classes."""

    train_folder: Path
    test_folder: Path
    train: Pictures
    test: Pictures
    names: tuple[str, ...]


def prepare(folder: Path) -> Material:
    """Writes both parts as pairs of IDX files, like MNIST."""
    try:
        found = fashion_folder()
    except assets.AssetsUnavailable as error:
        print(f"  not available: {error}\n  The same story on scikit-learn's handwritten digits instead:")
        train, test = digits()
        names = tuple("0123456789")
    else:
        whole = read(found, "train")
        train, test, names = (whole[0][:PICTURES], whole[1][:PICTURES]), read(found, "t10k"), CLOTHES
    print(f"  {len(train[0])} pictures to learn from, {len(test[0])} held out, {len(names)} classes")
    folders = [write(folder / name, pictures) for name, pictures in (("train", train), ("test", test))]
    return Material(*folders, train, test, names)


def job(material: Material) -> JobSpec:
    """Trains a ResNet from scratch."""
    return JobSpec(
        ImageClassification(labels=material.names, image_size=material.train[0].shape[1], flip=0.0),
        model=Architecture("resnet", RESNET),
        train_data=Data(material.train_folder),
        eval_data=Data(material.test_folder),
        optimization=Optimization(epochs=4, global_batch_size=64, learning_rate=2e-3),
        resources=Resources(workers=1),
    )


def compare(client: shardyard.Client, outcome: story.Outcome, material: Material) -> tuple[float, dict[str, float]]:
    """Compares with the most frequent class, and with logistic regression on the pixels of 3,000 pictures."""
    pixels, labels = (part[:OF_BASELINE] for part in material.train)
    plain = LogisticRegression(max_iter=1000).fit(flat(pixels), labels)
    return outcome.metrics[METRIC], {
        "always one class": float(np.bincount(material.test[1]).max() / len(material.test[1])),
        "logistic regression on 3,000 pictures": float(plain.score(flat(material.test[0]), material.test[1])),
    }


def ask(client: shardyard.Client, model: str, material: Material) -> None:
    """Prints the classes of the first held-out pictures. Raises WrongAnswer for an unknown class."""
    pixels, labels = (part[:ASKED] for part in material.test)
    answers = client.model(model).predict([shardyard.Image(as_png(each)) for each in pixels])
    for label, answer in zip(labels, answers, strict=True):
        if answer.label not in material.names:
            raise show.WrongAnswer(f"{answer.label!r} is not a class")
        print(f"  a picture of a {material.names[label]}: {answer.label} ({answer.scores[answer.label]:.2f})")


def fashion_folder() -> Path:
    """A folder with Fashion-MNIST: installed, cached, or fetched now. Raises AssetsUnavailable."""
    installed = Path("/") / INSTALLED
    target = assets.cache_root() / "fashion-mnist"
    for there in (installed, target):
        if there.is_dir():
            return there
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        run("apt-get", "download", PACKAGE, folder=folder)
        (package,) = Path(folder).glob(f"{PACKAGE}*.deb")
        run("dpkg-deb", "-x", package.name, "unpacked", folder=folder)
        shutil.move(Path(folder) / "unpacked" / INSTALLED, target)
    return target


def run(*command: str, folder: str) -> None:
    """Runs a command in `folder`. Raises AssetsUnavailable if it fails or is not installed."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise assets.AssetsUnavailable(f"{PACKAGE}: {command[0]} is not installed") from error
    if done.returncode:
        last = (done.stderr.strip() or f"{command[0]} gave no reason").splitlines()[-1]
        raise assets.AssetsUnavailable(f"{PACKAGE}: {last}")


def read(folder: Path, name: str) -> Pictures:
    """One part of Fashion-MNIST: `train` or `t10k`."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        _, count, height, width = struct.unpack(">4I", file.read(16))
        pixels = np.frombuffer(file.read(), np.uint8).reshape(count, height, width)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        file.read(8)
        return pixels, np.frombuffer(file.read(), np.uint8)


def digits() -> tuple[Pictures, Pictures]:
    """The handwritten digits that come with scikit-learn, 8 × 8 pixels: 1,497 to learn from, 300 held out."""
    found: Any = load_digits()
    pixels, labels = (found.images * 255 / 16).round().astype(np.uint8), found.target.astype(np.uint8)
    return (pixels[300:], labels[300:]), (pixels[:300], labels[:300])


def write(folder: Path, pictures: Pictures) -> Path:
    """Writes a pair of IDX files with the names of MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = pictures
    images = struct.pack(">4I", 0x803, *pixels.shape) + pixels.tobytes()
    (folder / "pictures-images-idx3-ubyte").write_bytes(images)
    (folder / "pictures-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, len(labels)) + labels.tobytes())
    return folder


def flat(pixels: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 1, [pictures, pixels]."""
    return pixels.reshape(len(pixels), -1) / 255


def as_png(pixels: np.ndarray) -> bytes:
    """The bytes of a PNG file of a picture, uint8 [height, width]."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
