"""The files in deploy/, and what docs/operating.md types: every command, flag, variable, path and version exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from helpers.fences import fences
from helpers.repository import ROOT
from shardyard.cli.app import make_app
from shardyard_coordinator.launch.ray_head import _TEMP_PREFIX, _TEMP_ROOT
from shardyard_coordinator.main import EXIT_CONFIG
from shardyard_coordinator.settings import Settings, is_loopback
from shardyard_coordinator.store.failures import StoreBroken

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "systemd" / "shardyard.service").read_text(encoding="utf-8")
OBJECTS = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "shardyard.yaml").read_text(encoding="utf-8")))
PAGES = [ROOT / "docs" / name for name in ("operating.md", "monitoring.md")]
COMMANDS: Mapping[str, Any] = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
KUBERNETES = "1.32"
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if "==" in line and not line.startswith("#")
)


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: (name, arguments), continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def setting(name: str) -> list[str]:
    """The values of a setting of the unit, in their order."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def object_of(kind: str, name: str = "shardyard") -> dict[str, Any]:
    [found] = [each for each in OBJECTS if each["kind"] == kind and each["metadata"]["name"] == name]
    return dict(found)


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, pod spec) of each kind of pod."""
    spec = object_of("RayCluster")["spec"]
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]["spec"]


def coordinator() -> dict[str, Any]:
    [found] = [each for each in dict(pods())["head"]["containers"] if each["name"] == "coordinator"]
    return dict(found)


def typed() -> Iterator[tuple[str, list[str]]]:
    """(where, words after `shardyard`) of every command that is started or typed."""
    for name, arguments in instructions():
        if name in ("CMD", "HEALTHCHECK"):
            words = yaml.safe_load(arguments[arguments.index("[") :])
            yield f"Dockerfile {name}", words[words[0] == "shardyard" :]
    [start] = setting("ExecStart")
    yield "unit", shlex.split(start)[1:]
    yield "kubernetes", [str(word) for word in coordinator()["args"]]
    for page in PAGES:
        for fence in fences(page, ROOT):
            for command in fence.commands():
                words = shlex.split(command)
                for at, word in enumerate(words):
                    after = words[at + 1 :]
                    if Path(word).name in ("shardyard", "shardyard:cpu") and after and after[0] in COMMANDS:
                        yield f"{page.name}:{fence.line}", after
                        break


def values(words: list[str]) -> dict[str, str]:
    """The flags of a command with their values, `--flag value` or `--flag=value`."""
    found = {}
    for at, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            after = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith("--") else ""
            found[name] = value if equals else after
    return found


@pytest.mark.parametrize(("where", "words"), list(typed()), ids=lambda each: each if isinstance(each, str) else "")
def test_every_command_and_flag_exists(where: str, words: list[str]) -> None:
    command, rest = COMMANDS[words[0]], iter(words[1:])
    while hasattr(command, "commands"):  # Such as `store backup`.
        command = command.commands[next(rest)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert set(values(words)) <= known, where
    if words[0] == "serve":
        given = values(words)
        kept = {
            name.removeprefix("--").replace("-", "_"): value
            for name, value in given.items()
            if name.removeprefix("--").replace("-", "_") in Settings.model_fields and value
        }
        settings = Settings(**kept, auth="--auth" in given)  # type: ignore[arg-type]
        assert is_loopback(settings.host) or (settings.tls and settings.authentication.is_required), where


def test_each_door_has_a_port_of_its_own_everywhere() -> None:
    pages = [
        path.read_text(encoding="utf-8")
        for path in (*(ROOT / "docs").glob("*.md"), *DEPLOY.rglob("*"))
        if path.is_file()
    ]
    pages.append(UNIT)
    doors = {
        flag: {port for text in pages for port in re.findall(rf"--{flag}[ =]\S+?:([0-9]+)", text)}
        for flag in ("listen", "http", "admin-listen")
    }
    assert doors == {"listen": {"7400"}, "http": {"7480"}, "admin-listen": {"7401"}}


def test_nothing_that_is_deployed_or_typed_is_insecure() -> None:
    for path in (*DEPLOY.rglob("*"), ROOT / "docs" / "operating.md"):
        assert not path.is_file() or "--insecure" not in path.read_text(encoding="utf-8"), path


def test_commands_are_found_in_every_place() -> None:
    assert {where.split(":")[0] for where, _ in typed()} >= {
        *("Dockerfile CMD", "Dockerfile HEALTHCHECK", "unit", "kubernetes", "operating.md", "monitoring.md")
    }


def test_every_variable_is_a_setting() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (*DEPLOY.rglob("*"), *PAGES) if path.is_file()]
    named = {name for text in texts for name in re.findall(r"\bSHARDYARD_([A-Z_]+)\b", text)}
    of_clients = {"ca", "address"}
    assert named and {name.lower() for name in named} <= Settings.model_fields.keys() | of_clients


def test_the_image_runs_as_nobody_special_and_is_healthy_by_its_own_word() -> None:
    stages = [arguments.split() for name, arguments in instructions() if name == "FROM"]
    names = [words[2] for words in stages]
    assert {"cpu", "cuda"} <= set(names)
    # Both images are made of the runtime, and nothing after it changes the account.
    assert [words[0] for words in stages if words[2] in ("cpu", "cuda")] == ["runtime", "runtime"]
    [account] = [arguments for name, arguments in instructions() if name == "USER"]
    assert account == "10001:10001" and f"--uid {account[:5]}" in DOCKERFILE
    assert [name for name, _ in instructions()].count("HEALTHCHECK") == 1
    assert not any(":latest" in words[0] or ("/" in words[0] and ":" not in words[0]) for words in stages)


def test_what_the_image_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name, arguments in instructions():
        if name == "COPY" and "--from" not in arguments:
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists() and f"!{source}" in ignored, source


def test_the_image_has_the_versions_and_extras_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(re.findall(r"torch==(\S+)", DOCKERFILE)) == {PINS["torch"].split("+")[0]}
    for extras in re.findall(r"'\.\[([^\]]+)\]'", DOCKERFILE):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    [python] = re.findall(r"^ARG PYTHON=(\S+)", DOCKERFILE, re.MULTILINE)
    assert f">={python}" in project["requires-python"]


def test_the_unit_restarts_without_ending_jobs_and_leaves_a_broken_store_alone() -> None:
    assert setting("KillMode") == ["process"] and setting("OOMPolicy") == ["continue"]
    assert setting("PrivateTmp") == setting("PrivateDevices") == setting("MemoryDenyWriteExecute") == []
    assert setting("RestartPreventExitStatus") == [f"{StoreBroken.exit_code} {EXIT_CONFIG}"]
    assert int(setting("TimeoutStopSec")[0]) > Settings.model_fields["drain_s"].default
    rule = (DEPLOY / "systemd" / "shardyard.conf").read_text(encoding="utf-8").splitlines()[-1]
    assert rule == f"x {_TEMP_ROOT}/{_TEMP_PREFIX}*"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "shardyard.service"
    unit.write_text(UNIT.replace("/opt/shardyard/bin/shardyard", sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60, check=False)
    assert [line for line in done.stderr.splitlines() if "shardyard.service" in line] == []


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_exposes_little_by_systemds_own_measure() -> None:
    unit = DEPLOY / "systemd" / "shardyard.service"
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", "--no-pager", unit]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd is older than 250")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = ["hadolint", DEPLOY / "docker" / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_the_example_for_curl() -> None:
    command = ["shellcheck", ROOT / "examples" / "curl" / "finetune.sh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_every_object_follows_the_schema_of_kubernetes(manifest: dict[str, Any]) -> None:
    assert manifest["apiVersion"] and manifest["metadata"]["name"]
    if manifest["kind"] != "RayCluster":  # KubeRay's own kind: its pods are checked below.
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@pytest.mark.parametrize(("name", "spec"), list(pods()))
def test_pods_follow_the_schema_and_have_no_rights(name: str, spec: dict[str, Any]) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    volumes = {each["name"] for each in spec["volumes"]}
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
        assert mounts.keys() <= volumes and mounts["storage"] == "/storage" and mounts["ray"] == "/tmp/ray"


def test_the_schema_is_really_asked() -> None:
    broken = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"nam": "y"}]}}
    with pytest.raises(Exception, match="nam"):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_the_certificate_is_a_secret_that_only_the_coordinator_sees() -> None:
    head = dict(pods())["head"]
    [volume] = [each for each in head["volumes"] if "secret" in each]
    assert volume["secret"] == {"secretName": "shardyard-tls", "defaultMode": 0o440}
    [place] = [each for each in coordinator()["volumeMounts"] if each["name"] == volume["name"]]
    assert place["readOnly"]
    flags = values(coordinator()["args"])
    assert (flags["--tls-cert"], flags["--tls-key"]) == (
        f"{place['mountPath']}/tls.crt",
        f"{place['mountPath']}/tls.key",
    )
    others = [each for _, spec in pods() for each in spec["containers"] if each["name"] != "coordinator"]
    assert others and not any(mount["name"] == volume["name"] for each in others for mount in each["volumeMounts"])


def test_volumes_ports_and_versions_of_the_manifest_fit_together() -> None:
    claims = {each["metadata"]["name"]: each["spec"]["accessModes"] for each in OBJECTS if "Claim" in each["kind"]}
    assert claims == {"shardyard-state": ["ReadWriteOnce"], "shardyard-storage": ["ReadWriteMany"]}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for _, spec in pods()
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert used == claims.keys()
    assert object_of("RayCluster")["spec"]["rayVersion"] == PINS["ray"]
    flags, ports = (
        values(coordinator()["args"]),
        {each["name"]: each["containerPort"] for each in coordinator()["ports"]},
    )
    assert flags["--listen"].endswith(f":{ports['grpc']}") and flags["--admin-listen"].endswith(f":{ports['admin']}")
    assert flags["--storage-root"].startswith("/storage/")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert coordinator()[probe]["httpGet"]["port"] == "admin"
        assert coordinator()[probe]["httpGet"]["path"] in ("/healthz", "/readyz")
    assert {each["targetPort"] for each in object_of("Service")["spec"]["ports"]} == ports.keys()
