"""Modules of PyTorch Hub as their authors write them: what the trial finds in them, and what their code leaves."""

from __future__ import annotations

import copy
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.hub_plans import job, places, planned, write_data
from helpers.tiny_folders import bert_tokenizer
from helpers.torch_hub_nets import FIXED_POSITIONS, NESTED_ENCODER, NET, VIT
from helpers.torch_hub_repos import write_repository
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.models.hub_code import run_entrypoint
from shardyard_trainer.tasks.adaptation import _adapted
from shardyard_trainer.tasks.base import build_module
from shardyard_trainer.tasks.ingredients import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def plan_of(data: Path, folder: Path, code: str, *, entrypoint: str = "f", **options: Any) -> worker_pb2.PlanResult:
    hub = write_repository(folder / "hub", hubconf=code)
    if "task" in options:
        bert_tokenizer().save_pretrained(hub)
    return planned(job(data, {"repo": str(hub), "entrypoint": entrypoint}, **options), places(data, folder, hub))


GOOD: dict[str, tuple[str, dict[str, Any], int]] = {
    "train that returns nothing": (
        NET + "class T(Net):\n    def train(self, mode=True):\n        super().train(mode)\ndef f():\n    return T()",
        {},
        267,
    ),
    "a parameter of whole numbers": (
        NET + "class T(Net):\n    def __init__(self):\n        super().__init__()\n"
        "        self.first = nn.Parameter(torch.arange(8), requires_grad=False)\n"
        "    def features(self, x):\n        return super().features(x)[:, self.first]\ndef f():\n    return T()",
        {},
        267,
    ),
    "the weight of the head": (
        NET + "class T(Net):\n    def forward(self, x):\n"
        "        return self.fc(self.features(x).to(self.fc.weight.dtype))\ndef f():\n    return T()",
        {},
        267,
    ),
    "a head under two names": (
        NET + "class T(Net):\n    def __init__(self):\n        super().__init__()\n"
        "        self.also = nn.Sequential(self.fc)\n"
        "    def forward(self, x):\n        return self.also(self.features(x))\ndef f():\n    return T()",
        {},
        267,
    ),
    "grey pictures without a convolution": (
        NET + "def f():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))",
        {"side": 0},
        12_611,
    ),
    "pictures of 384": (NET + VIT + "def f():\n    return V(384, 32, 10)", {"side": 0}, 53_779),
    "pictures of the spec's own size": (NET + VIT + "def f():\n    return V(80, 16, 10)", {"side": 80}, 15_011),
    "classes from a convolution": (
        NET
        + "def f():\n    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.Flatten(2),\n"
        "        nn.AdaptiveAvgPool1d(1), nn.Flatten())",
        {},
        251,
    ),
    "vectors without classes": (NET + "def f():\n    net = Net()\n    net.fc = nn.Identity()\n    return net", {}, 267),
    "vectors of a transformer": (NET + VIT + "def f():\n    return V(32, 16, 0)", {}, 14_675),
    "a compiled module": (NET + "def f():\n    return torch.compile(Net())", {}, 267),
    "a name that is not one of Python": (NET + 'globals()["net.v1-de"] = Net', {"entrypoint": "net.v1-de"}, 267),
    "an annotated list of dependencies": (
        NET + "dependencies: list[str] = ['torch']\ndef f():\n    return Net()",
        {},
        267,
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_modules_with_the_habits_of_their_authors_are_planned(case: str, data: Path, tmp_path: Path) -> None:
    code, options, num_trained = GOOD[case]
    result = plan_of(data, tmp_path, code, **options)
    assert not result.violations, result.violations
    assert result.plan.num_trainable_parameters == num_trained
    assert result.plan.warnings[0].reason == "NEW_HEAD"


BAD: dict[str, tuple[str, str, list[str]]] = {
    "lazy layers": ("def f():\n    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))", "entrypoint", ["1.weight"]),
    "probabilities": (
        "class T(Net):\n    def forward(self, x):\n        return super().forward(x).softmax(1)\n"
        "def f():\n    return T()",
        "entrypoint",
        ["probabilities", "before its softmax"],
    ),
    "a sigmoid whose logits are 0": (
        "class T(Net):\n    def forward(self, x):\n        return super().forward(x).sigmoid()\n"
        "def f():\n    net = T()\n    nn.init.zeros_(net.fc.weight)\n    return net",
        "entrypoint",
        ["probabilities"],
    ),
    "no gradients": (
        "class T(Net):\n    @torch.no_grad()\n    def forward(self, x):\n        return super().forward(x)\n"
        "def f():\n    return T()",
        "entrypoint",
        ["without gradients", "no_grad"],
    ),
    "vectors before the logits": (
        "class T(Net):\n    def forward(self, x):\n        return self.features(x), super().forward(x)\n"
        "def f():\n    return T()",
        "entrypoint",
        ["a tuple of [2, 8], [2, 10]", "return the logits alone"],
    ),
    "a dictionary of other names": (
        "class T(Net):\n    def forward(self, x):\n        return {'pred_logits': super().forward(x)}\n"
        "def f():\n    return T()",
        "entrypoint",
        ["pred_logits [2, 10]"],
    ),
    "annotated dependencies that are missing": (
        "dependencies: list[str] = ['nowhere_one']\ndef f():\n    return Net()",
        "repo",
        ["nowhere_one", "install"],
    ),
    "a file that is not there": (
        "import os\ndef f():\n    return torch.load(os.path.join(os.path.dirname(__file__), 'whole.pt'))",
        "entrypoint",
        ["No such file or directory: 'whole.pt'"],
    ),
    "another repository": (
        "def f():\n    return torch.hub.load('owner/other', 'net')",
        "entrypoint",
        ["nothing is downloaded", "owner/other", "put its code into this repository"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_trained_is_refused_with_what_to_change(case: str, data: Path, tmp_path: Path) -> None:
    code, part, words = BAD[case]
    (error,) = plan_of(data, tmp_path, NET + code).violations
    assert error.field == f"spec.model.torch_hub.{part}" and str(tmp_path) not in error.message
    assert not [word for word in words if word not in error.message], error.message


def test_texts_that_are_computed_across_the_batch_are_refused_with_batch_first(data: Path, tmp_path: Path) -> None:
    code = NESTED_ENCODER.replace("batch_first=True", "batch_first=False")
    options = {"task": "text_classification", "file": "reviews.csv", "entrypoint": "nested"}
    (error,) = plan_of(data, tmp_path, code, **options).violations
    assert "depend on the texts beside it" in error.message and "batch_first=True" in error.message


def test_what_an_author_froze_stays_frozen_unless_it_is_everything(data: Path, tmp_path: Path) -> None:
    code = NET + FIXED_POSITIONS
    found = plan_of(data, tmp_path, f"{code}def f():\n    return Fixed()").plan
    assert (found.num_parameters, found.num_trainable_parameters) == (275, 267)
    assert "PARAMETERS_UNFROZEN" not in {warning.reason for warning in found.warnings}
    frozen = "def f():\n    return Fixed().requires_grad_(False)"
    found = plan_of(data, tmp_path, f"{code}{frozen}").plan
    assert found.num_trainable_parameters == found.num_parameters == 275
    assert "PARAMETERS_UNFROZEN" in {warning.reason for warning in found.warnings}


def test_an_adapter_beside_a_torch_encoder_counts_in_evaluation_and_its_frozen_layers_compute(
    data: Path, tmp_path: Path
) -> None:
    hub = write_repository(tmp_path / "hub", hubconf=NESTED_ENCODER)
    bert_tokenizer().save_pretrained(hub)
    source = {"repo": str(hub), "entrypoint": "nested"}
    adapted = {"lora": {"rank": 2}, "freeze": {"layers": 1}}
    spec = job(data, source, task="text_classification", file="reviews.csv", **adapted)
    locations = places(data, tmp_path, hub)
    found = planned(spec, locations)
    assert not found.violations
    module = build_module(prepare(found.plan.resolved_spec, locations), found.plan.resolved_spec)
    for _, layer in _adapted(module):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 5, 3, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "return_outputs": True}
    in_training = module.train()(**inputs).outputs["logits"]
    with torch.no_grad():
        in_evaluation = module.eval()(**inputs).outputs["logits"]
    assert torch.allclose(in_training, in_evaluation, atol=1e-5)


CHANGES = """
import logging, os, sys, warnings
torch.set_grad_enabled(False)
torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_num_threads(7)
torch.use_deterministic_algorithms(True)
os.chdir(os.path.dirname(__file__))
os.environ["HUB_CHANGED"] = "1"
os.environ.pop("HUB_KEPT", None)
sys.path.insert(0, "/nowhere")
logging.basicConfig(level=logging.DEBUG, force=True)
logging.disable(logging.CRITICAL)
warnings.simplefilter("error")
torch.set_default_device("cpu")


def f():
    return Net()
"""


def test_what_the_code_changes_for_its_process_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_KEPT", "1")

    def settings() -> list[Any]:
        return [
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.empty(0).device,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            Path.cwd(),
            dict(os.environ),
            list(sys.path),
            (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        ]

    hub = write_repository(tmp_path / "hub", hubconf=NET + CHANGES)
    before = copy.copy(settings())
    made = run_entrypoint(hub, "f", {}).module
    assert settings() == before
    with torch.device("meta"):
        run_entrypoint(hub, "f", {})
        assert torch.empty(0).is_meta
    assert settings() == before
    assert {tensor.dtype for tensor in made.state_dict().values()} == {torch.float32, torch.int64}
    assert made(torch.rand(2, 3, 8, 8)).requires_grad


def test_folders_that_the_code_adds_to_the_path_come_last(tmp_path: Path) -> None:
    """A module may import from them when it is called; this process's own imports come first."""
    code = (
        "import os, sys\nsys.path.insert(0, os.path.join(os.path.dirname(__file__), 'src'))\ndef f():\n    return Net()"
    )
    first, second = (write_repository(tmp_path / name, hubconf=NET + code) for name in ("first", "second"))
    before = list(sys.path)
    run_entrypoint(first, "f", {})
    assert sys.path == [*before, str(first / "src")]
    run_entrypoint(second, "f", {})
    assert sys.path == [*before, str(second / "src")]
    sys.path[:] = before


def test_weights_that_the_code_loads_are_asked_for_by_name_and_found_once_they_are_there(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    load = "torch.hub.load_state_dict_from_url('http://127.0.0.1:9/some/net.pth')"
    hub = write_repository(
        tmp_path / "hub", hubconf=f"{NET}def f():\n    net = Net()\n    net.load_state_dict({load})\n    return net"
    )
    spec, locations = job(data, {"repo": str(hub), "entrypoint": "f"}), places(data, tmp_path, hub)
    (error,) = planned(spec, locations).violations
    assert "have the operator put net.pth into torch's cache" in error.message, error.message
    names: dict[str, Any] = {}
    exec(NET, names)
    weights = tmp_path / "torch" / "hub" / "checkpoints" / "net.pth"
    torch.save(names["Net"]().state_dict(), weights)
    assert not planned(spec, locations).violations
    # The model keeps a copy of what its code reads.
    (copied,) = (tmp_path / "cache" / "torch_hub").glob("*/torch_hub/torch_cache/checkpoints/*")
    assert copied.read_bytes() == weights.read_bytes()
    weights.unlink()
    assert not planned(spec, locations).violations


def test_an_error_of_the_code_in_training_is_not_blamed_on_the_size_of_the_pictures(data: Path, tmp_path: Path) -> None:
    code = (
        "class T(Net):\n    def forward(self, x):\n        return "
        "self.nowhere(x) if self.training else super().forward(x)\n"
        "def f():\n    return T()"
    )
    (error,) = plan_of(data, tmp_path, NET + code).violations
    assert (error.field, error.reason) == ("spec.model.torch_hub", "MODEL_INVALID"), error.message
    assert "does not compute in training: AttributeError" in error.message and "another size" not in error.message
