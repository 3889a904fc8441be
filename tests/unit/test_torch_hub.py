"""Models of PyTorch Hub, planned: what may run, what an entry point must return, and what each refusal says."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from helpers.hub_plans import SMALL, job, places, planned, refused, write_data
from helpers.torch_hub_repos import bert, encoder, resnet, transformer, write_repository
from shardyard.worker.v1 import worker_pb2
from shardyard_trainer.answering.inspect import inspect_model
from shardyard_trainer.failures import RunFailed
from shardyard_trainer.planning.pins import check_same_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_data(tmp_path_factory.mktemp("data"))
    pairs = [{"source": f"the dog {word}", "target": f"{word} a cat"} for word in ("runs", "eats", "sleeps") * 8]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def test_a_plan_counts_the_modules_own_parameters_and_pins_its_files(data: Path, tmp_path: Path) -> None:
    hub = resnet(tmp_path / "hub")
    source = {"repo": str(hub), "entrypoint": "resnet18", "arguments": SMALL}
    found = planned(job(data, source), places(data, tmp_path, hub)).plan
    # Of the ResNet-18 of 4 instead of 64 channels, with three outputs.
    assert (found.num_parameters, list(found.labels)) == (44_871, ["daisy", "rose", "violet"])
    assert found.warnings[0].reason == "NEW_HEAD"
    again = planned(found.resolved_spec, places(data, tmp_path, hub)).plan
    assert again == found and len(found.resolved_spec.model.torch_hub.revision) == 64


def test_code_that_the_operator_does_not_allow_is_not_run_and_the_refusal_says_how_to_allow_it(
    data: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    hub = write_repository(tmp_path / f"hub{'-long' * 20}", hubconf=f"open({str(ran)!r}, 'w')")
    error = refused(data, tmp_path, {"repo": str(hub), "entrypoint": "f"}, tmp_path / "other")
    assert error.reason == "CUSTOM_CODE_REFUSED" and error.field == "spec.model.torch_hub.repo"
    assert f"--torch-hub-repo {hub}" in error.message and not ran.exists()
    error = refused(data, tmp_path, {"repo": f"owner/name:{COMMIT}", "entrypoint": "f"})
    assert f"--torch-hub-repo owner/name:{COMMIT}" in error.message


def test_a_repository_of_a_name_is_taken_from_the_torch_hub_cache_by_its_commit(data: Path, tmp_path: Path) -> None:
    cached = resnet(tmp_path / f"owner_name_{COMMIT}")
    for source in ({"repo": f"owner/name:{COMMIT}"}, {"repo": "owner/name", "revision": COMMIT}):
        spec = job(data, {**source, "entrypoint": "resnet18", "arguments": SMALL})
        found = planned(spec, places(data, tmp_path, **{f"owner/name:{COMMIT}": cached}))
        assert found.plan.resolved_spec.model.torch_hub.revision == COMMIT, found
    shutil.rmtree(cached)
    (error,) = planned(spec, places(data, tmp_path, **{f"owner/name:{COMMIT}": cached})).violations
    assert error.reason == "MODEL_NOT_FOUND" and f"torch.hub.list('owner/name:{COMMIT}'" in error.message


MODULE = "import torch\nfrom torch import nn\n"
AVERAGES = """
class Averages(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)

    def forward(self, ids):
        return self.words(ids) + self.words(ids).mean(1, keepdim=True)

def f():
    return Averages()
"""
REFUSED: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "an entry point that is not there": (
        "def resnet18(): pass\ndef resnet34(): pass",
        {"entrypoint": "resnet19"},
        "entrypoint",
        ["no function 'resnet19'", "resnet18", "resnet34"],
    ),
    "a dependency that is missing": (
        "dependencies = ['torch', 'nowhere_one', 'nowhere_two']\nimport nowhere_one\ndef f(): pass",
        {},
        "repo",
        ["nowhere_one", "nowhere_two", "install"],
    ),
    "a package that no dependencies name": ("import nowhere\ndef f(): pass", {}, "repo", ["nowhere", "line 1"]),
    "text that is not Python": ("def f(:", {}, "repo", ["not Python", "line 1"]),
    "a function that raises": (
        "def f():\n    raise OSError('no such weights')",
        {},
        "entrypoint",
        ["f()", "OSError", "no such weights", "hubconf.py, line 2"],
    ),
    "weights that would be downloaded": (
        "from urllib.request import urlopen\ndef f(): urlopen('http://127.0.0.1:9/weights.pth')",
        {},
        "entrypoint",
        ["URLError", "hubconf.py, line 2", "nothing is downloaded", "hub/checkpoints"],
    ),
    "a function that ends the process": ("import sys\ndef f(): sys.exit(3)", {}, "entrypoint", ["SystemExit"]),
    "a function that asks": ("def f(): return input()", {}, "entrypoint", ["raises"]),
    "no module": ("def f(): return {'weight': 1}", {}, "entrypoint", ["returns dict", "torch.nn.Module"]),
    "a module and something beside it": (
        MODULE + "def f(): return nn.Linear(2, 2), None",
        {},
        "entrypoint",
        ["a tuple of 2"],
    ),
    "a module without parameters": (MODULE + "def f(): return nn.ReLU()", {}, "entrypoint", ["without parameters"]),
    "a compiled module": (
        MODULE + "def f(): return torch.jit.script(nn.Linear(2, 2))",
        {},
        "entrypoint",
        ["TorchScript"],
    ),
    "an argument that it does not have": (
        "def f(width=3): pass",
        {"arguments": {"widht": 3}},
        "arguments",
        ["f(width=3)", "widht"],
    ),
    "an argument that it needs": ("def f(width): pass", {}, "arguments", ["width"]),
    "an argument of torch.hub.load itself": (
        "def f(source='x'): pass",
        {"arguments": {"source": "y"}},
        "arguments.source",
        ["torch.hub.load"],
    ),
    "a module that reads nothing of ours": (
        MODULE + "def f(): return nn.Linear(7, 5)",
        {},
        "entrypoint",
        ["logits [B, C]", "[B, T, D]", "mat1 and mat2"],
    ),
    "texts that see their padding": (
        MODULE + AVERAGES,
        {},
        "entrypoint",
        ["depend on the padding", "attention_mask"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_model_is_refused_with_the_reason(case: str, data: Path, tmp_path: Path) -> None:
    code, source, part, words = REFUSED[case]
    hub = write_repository(tmp_path / "hub", hubconf=code)
    error = refused(data, tmp_path, {"repo": str(hub), "entrypoint": "f", **source}, hub)
    assert (error.field, error.reason) == (f"spec.model.torch_hub.{part}", "MODEL_INVALID"), error.message
    assert "hubconf.py" in error.message and not [word for word in words if word not in error.message], error.message


def test_a_folder_without_a_hubconf_and_one_with_links_are_refused(data: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    error = refused(data, tmp_path, {"repo": str(hub), "entrypoint": "f"}, hub)
    assert error.reason == "MODEL_INVALID" and "has no hubconf.py" in error.message
    resnet(hub)
    (hub / "weights").symlink_to("/etc")
    error = refused(data, tmp_path, {"repo": str(hub), "entrypoint": "f"}, hub)
    assert error.reason == "PATH_NOT_ALLOWED" and "'weights' of the repository is a link" in error.message


def test_files_that_change_are_another_model_and_never_run_for_a_job_that_was_planned_before(
    data: Path, tmp_path: Path
) -> None:
    hub, ran = resnet(tmp_path / "hub"), tmp_path / "ran"
    locations = places(data, tmp_path, hub)
    source = {"repo": str(hub), "entrypoint": "resnet18", "arguments": SMALL}
    found = planned(job(data, source), locations).plan
    check_same_model(found.resolved_spec, locations, found)
    with (hub / "resnet.py").open("a") as file:
        file.write(f"\nopen({str(ran)!r}, 'w')\n")
    with pytest.raises(RunFailed, match="have changed") as failed:
        check_same_model(found.resolved_spec, locations, found)
    assert failed.value.cause == "MODEL_CHANGED"
    (error,) = planned(found.resolved_spec, locations).violations
    assert (error.field, error.reason) == ("spec.model.torch_hub.revision", "MODEL_CHANGED") and not ran.exists()
    fresh = planned(job(data, source), locations).plan
    assert fresh.model_fingerprint != found.model_fingerprint and ran.exists()


def test_repositories_with_modules_of_the_same_name_each_have_their_own(data: Path, tmp_path: Path) -> None:
    """`resnet.py` is in both; a process that plans both imports each from its own folder."""
    small, large = resnet(tmp_path / "small"), resnet(tmp_path / "large")
    text = (large / "resnet.py").read_text()
    (large / "resnet.py").write_text(text.replace("width * 2**number", "width * 3**number"))
    counts = [
        planned(
            job(data, {"repo": str(hub), "entrypoint": "resnet18", "arguments": SMALL}), places(data, tmp_path, hub)
        ).plan.num_parameters
        for hub in (small, large, small)
    ]
    assert counts[0] == counts[2] < counts[1]
    # `helpers` is a module of this process.
    (small / "resnet.py").rename(small / "helpers.py")
    (small / "hubconf.py").write_text((small / "hubconf.py").read_text().replace("from resnet", "from helpers"))
    found = planned(
        job(data, {"repo": str(small), "entrypoint": "resnet18", "arguments": SMALL}), places(data, tmp_path, small)
    )
    assert found.plan.num_parameters == counts[0]
    assert sys.modules["helpers.torch_hub_repos"].resnet is resnet
    assert not list(tmp_path.rglob("__pycache__")) and not [path for path in sys.path if str(tmp_path) in path]


@pytest.mark.parametrize(
    ("write", "task", "file", "model_type"),
    [
        (bert, "text_classification", "reviews.csv", "bert"),
        (encoder, "text_classification", "reviews.csv", "torch_hub_texts"),
        (transformer, "translation", "pairs.jsonl", "bart"),
    ],
    ids=["bert", "encoder", "transformer"],
)
def test_models_of_texts_are_planned_with_the_tokenizer_of_their_repository(
    write: Callable[[Path], Path], task: str, file: str, model_type: str, data: Path, *, tmp_path: Path
) -> None:
    hub = write(tmp_path / "hub")
    spec = job(data, {"repo": str(hub), "entrypoint": write.__name__}, task=task, file=file)
    result = planned(spec, places(data, tmp_path, hub))
    assert not result.violations and result.plan.num_parameters > 0
    (made,) = (tmp_path / "cache" / "torch_hub").glob("*/config.json")
    config = json.loads(made.read_text())
    assert config["model_type"] == model_type and (made.parent / "tokenizer.json").is_file()
    if model_type == "torch_hub_texts":
        wanted = {"vocab_size": 25, "hidden_size": 16, "max_position_embeddings": 24, "output": "0"}
        assert {name: config[name] for name in wanted} == wanted
        assert (config["mask"], config["masks_padding"]) == ("src_key_padding_mask", True)


def test_a_folder_with_code_runs_neither_from_a_data_root_nor_from_an_upload(data: Path, tmp_path: Path) -> None:
    hub = resnet(tmp_path / "hub")
    locations = places(data, tmp_path, hub)
    spec = job(data, {"repo": str(hub), "entrypoint": "resnet18", "arguments": SMALL})
    assert planned(spec, locations).plan.num_parameters
    (made,) = (tmp_path / "cache" / "torch_hub").glob("*/config.json")
    ran, copy = tmp_path / "ran", tmp_path / "copy"
    shutil.copytree(made.parent, copy)
    (copy / "torch_hub" / "hubconf.py").write_text(f"open({str(ran)!r}, 'w')")
    spec.model.uri = str(copy)
    request = worker_pb2.InspectModelRequest(folder=str(copy))
    looked = worker_pb2.InspectModelResult.FromString(inspect_model(request.SerializeToString()))
    for found in (planned(spec, locations).violations, looked.violations):
        assert found[0].reason == "CUSTOM_CODE_REFUSED", json_format.MessageToJson(found[0])
    assert not ran.exists()
