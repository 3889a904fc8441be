"""What the quickstart does with its models: a sentence, predictions, features, a raw gRPC call, plain transformers."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import shardyard

BUF = Path(sys.executable).parent / "buf"
HELLO = "Hello, my dog is cute"
TRANSFORMERS = """\
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained({folder!r}), AutoModel.from_pretrained({folder!r})
features = model(**tokenizer({text!r}, return_tensors="pt")).last_hidden_state
"""


class WrongAnswer(Exception):
    """An answer is not what it must be."""


def write_a_sentence(client: shardyard.Client, model: str, beginning: str) -> None:
    """Lets the language model continue a text."""
    (answer,) = client.model(model).predict([beginning], max_new_tokens=24, temperature=0.7, seed=3)
    print(f"  it writes: {beginning}{answer.text}".replace("\n", " "))


def predict(client: shardyard.Client, model: str, sentences: Sequence[str]) -> None:
    """Print the class of each sentence with the probabilities of the likeliest three."""
    for sentence, answer in zip(sentences, client.model(model).predict(sentences), strict=True):
        likeliest = sorted(answer.scores.items(), key=lambda item: -item[1])[:3]
        if not math.isclose(sum(answer.scores.values()), 1.0, abs_tol=1e-4):
            raise WrongAnswer(f"the probabilities of {sentence!r} add up to {sum(answer.scores.values())}")
        scores = ", ".join(f"{label} {score:.2f}" for label, score in likeliest)
        print(f"  {sentence!r}: {answer.label} ({scores})")


def features(client: shardyard.Client, model: str, texts: tuple[str, str, str]) -> None:
    """Print the shape of the last hidden state, and that the first text is nearer to the second than to the third."""
    (states,) = client.model(model).embed([HELLO], output="last_hidden_state")
    print(f"  last_hidden_state of {HELLO!r}: {list(states.shape)}")
    vectors = [vector.values for vector in client.model(model).embed(texts, pooling="mean", normalize=True)]
    for other in (1, 2):
        similarity = sum(a * b for a, b in zip(vectors[0], vectors[other], strict=True))
        print(f"  similarity of {texts[0]!r} and {texts[other]!r}: {similarity:.2f}")


def raw_call(address: str, model: str, text: str) -> None:
    """The same through gRPC without the SDK: any language, any tool. Raises WrongAnswer if the call fails."""
    body = json.dumps({"model": model, "instances": [{"text": text}]})
    url = f"http://{address}/shardyard.v1.ModelService/Predict"
    command = [str(BUF), "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", body, url]
    print(f"  $ buf curl --protocol grpc --http2-prior-knowledge --data '{body}' {url}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise WrongAnswer(f"buf curl failed: {done.stderr.strip()}")
    answer = json.loads(done.stdout)["predictions"][0]
    print(f"  {json.dumps(answer)}")


def in_transformers(client: shardyard.Client, model: str, folder: Path) -> None:
    """Download the model, load it without Shardyard, and compare. Raises WrongAnswer if the features differ."""
    shutil.rmtree(folder, ignore_errors=True)
    client.model(model).download(folder)
    lines = TRANSFORMERS.format(folder=str(folder), text=HELLO)
    print(f"  its folder: {folder}\n  loaded by transformers alone:")
    print("".join(f"    {line}\n" for line in lines.splitlines()), end="")
    program = f"import json\n{lines}print(json.dumps(features[0].flatten().tolist()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise WrongAnswer(f"transformers does not load {folder}:\n{done.stderr[-2000:]}")
    theirs = json.loads(done.stdout.splitlines()[-1])
    (ours,) = client.model(model).embed([HELLO], output="last_hidden_state")
    worst = max(abs(a - b) for a, b in zip(ours.values, theirs, strict=True))
    print(f"  largest difference to the service's features: {worst:.1e}")
    if worst > 1e-4:
        raise WrongAnswer(f"the features differ by {worst}")
