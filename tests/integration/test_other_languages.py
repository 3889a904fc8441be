"""Every door to a service with TLS and tokens: the command line, both SDKs, buf, curl, and the examples in Node and Go.

The same fine-tuning comes out of each, and each says what to do about a token or an authority that is wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shardyard
from helpers.doors import (
    TEXTS,
    Failed,
    Refusal,
    Story,
    Visit,
    by_async_client,
    by_buf_curl,
    by_client,
    by_command,
    by_example,
    curve,
)
from helpers.languages import curl_client, go_client, node_client
from helpers.protected import EXPIRED, NOBODY, OUTSIDER, PROJECT, VIEWER, Protected, protected
from helpers.web import Web, answering
from helpers.workplace import fill

Door = Callable[[Visit], Story | Awaitable[Story]]
OWN: dict[str, Door] = {"client": by_client, "async-client": by_async_client, "buf-curl": by_buf_curl}
EXAMPLES = ("curl", "node", "go")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    with protected(tmp_path_factory.mktemp("protected")) as running:
        yield running


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return node_client(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return go_client(tmp_path_factory.mktemp("go"))


@pytest.fixture(scope="module")
def curl() -> list[str]:
    return curl_client()


@pytest.fixture
def client(request: pytest.FixtureRequest) -> list[str]:
    """The command of an example, by name."""
    return list(request.getfixturevalue(request.param))


@pytest.fixture
def door(request: pytest.FixtureRequest) -> Door:
    """A door, by name."""
    if request.param in EXAMPLES:
        return by_example(request.getfixturevalue(request.param))
    return {**OWN, "command": by_command}[request.param]


async def through(door: Door, visit: Visit) -> Story:
    found = door(visit)
    return await found if inspect.isawaitable(found) else found


@pytest.fixture(scope="module")
def reference(place: Protected) -> Story:
    return by_command(Visit(place, "by-command"))


def test_the_command_line_follows_a_job_to_its_end(place: Protected, reference: Story) -> None:
    assert reference.has_succeeded and len(curve(place, reference.job_id)) > 4
    assert reference.sequences == sorted(set(reference.sequences)) and len(reference.answers) == len(TEXTS)


@pytest.mark.parametrize("door", [*OWN, *EXAMPLES], indirect=True)
async def test_each_door_trains_the_same_model(
    place: Protected, reference: Story, door: Door, request: pytest.FixtureRequest
) -> None:
    story = await through(door, Visit(place, f"by-{request.node.callspec.id}"))
    assert story.has_succeeded and story.sequences == list(range(1, len(story.sequences) + 1))
    assert curve(place, story.job_id) == curve(place, reference.job_id)
    for (label, score), (expected, known) in zip(story.answers, reference.answers, strict=True):
        assert label == expected and score == pytest.approx(known, abs=1e-3)


SAID = {
    NOBODY: "set SHARDYARD_TOKEN",
    EXPIRED: "has expired; ask an admin for another one",
    VIEWER: f"it needs the role submitter in projects/{PROJECT}; ask an admin",
    OUTSIDER: f"no right to projects/{PROJECT}, or it does not exist; use a project of yours",
}


@pytest.mark.parametrize("door", ["command", *OWN, *EXAMPLES], indirect=True)
async def test_each_door_says_what_to_do_about_a_token(place: Protected, door: Door) -> None:
    for who, words in SAID.items():
        refusal = await refused(door, Visit(place, f"refused-{who}", who))
        assert words in refusal.text and refusal.exit_code, who


@pytest.mark.parametrize("door", ["command", *OWN, *EXAMPLES], indirect=True)
async def test_each_door_says_that_the_authority_is_another_one(
    place: Protected, door: Door, request: pytest.FixtureRequest
) -> None:
    visit = Visit(place, "elsewhere", variables=(("SHARDYARD_CA", str(place.other_ca)),))
    refusal = await refused(door, visit)
    # buf has words of its own.
    words = "signed by unknown authority" if "buf-curl" in request.node.callspec.id else "SHARDYARD_CA"
    assert words in refusal.text and refusal.exit_code


@pytest.mark.parametrize("door", ["command", "client", *EXAMPLES], indirect=True)
async def test_no_door_sends_a_token_in_clear_to_another_machine(place: Protected, door: Door) -> None:
    elsewhere = {"SHARDYARD_ADDRESS": "train.example.org:7400", "SHARDYARD_URL": "http://train.example.org:7480"}
    visit = Visit(place, "in-clear", variables=tuple({**elsewhere, "SHARDYARD_CA": ""}.items()))
    refusal = await refused(door, visit)
    assert "readable on the way" in refusal.text and refusal.exit_code


@pytest.mark.parametrize("door", ["command", "client", *EXAMPLES], indirect=True)
async def test_each_door_says_that_a_service_may_have_tls(place: Protected, door: Door) -> None:
    variables = {"SHARDYARD_CA": "", "SHARDYARD_URL": f"http://{place.web.address}"}
    refusal = await refused(door, Visit(place, "without-tls", variables=tuple(variables.items())))
    assert "if the service has TLS" in refusal.text and refusal.exit_code


@pytest.mark.parametrize("door", ["command", "client", "node"], indirect=True)
async def test_the_port_of_http_is_said_to_be_that(place: Protected, door: Door) -> None:
    refusal = await refused(door, Visit(place, "at-http", variables=(("SHARDYARD_ADDRESS", place.web.address),)))
    assert "does not speak gRPC" in refusal.text and refusal.exit_code


async def refused(door: Door, visit: Visit) -> Refusal:
    """How a door ends that cannot do it: with words, no stack, and without the token."""
    try:
        await through(door, visit)
    except Failed as failed:
        refusal = failed.refusal
    except shardyard.ShardyardError as error:
        refusal = Refusal(1, str(error))
    else:
        raise AssertionError("it was not refused")
    token = visit.place.tokens[visit.who]
    assert not token or token.rpartition("_")[2] not in refusal.text
    assert not any(sign in refusal.text for sign in ("Traceback", "goroutine", "    at ", "ssl_transport_security"))
    return refusal


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A service on loopback that has tokens, and no TLS."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "data").mkdir()
    fill(folder / "data")
    with answering(folder / "service", "--auth", "--data-root", str(folder / "data")) as running:
        yield running


@pytest.mark.parametrize("client", EXAMPLES, indirect=True)
def test_an_example_reaches_this_machine_without_tls_and_past_any_proxy(plain: Web, client: list[str]) -> None:
    service = plain.service
    data = service.folder.parent / "data"
    variables: dict[str, Any] = {
        "SHARDYARD_TOKEN_FILE": service.state / "admin-token",
        "SHARDYARD_URL": f"http://{plain.address}",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    given = [f"{name}={value}" for name, value in variables.items()]
    command = ["env", *given, *client]
    # The data is there already from the second client on.
    done = service.run(*command, str(data / "bert"), str(data / "reviews.csv"), *TEXTS, timeout_s=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any("FINALIZING → SUCCEEDED" in line for line in lines)
    assert [line.partition(" ")[0] in {"good", "bad"} for line in lines[-2:]] == [True, True]
    wrong = service.run(*command, str(data / "none"), str(data / "reviews.csv"), "a film")
    assert wrong.returncode == 1 and "job.spec.model.uri" in wrong.stderr and "is not there" in wrong.stderr


def test_the_examples_read_the_same_variables() -> None:
    from helpers.languages import EXAMPLES as folder

    for path in ("curl/finetune.sh", "node/reach.js", "go/reach.go"):
        text = (Path(folder) / path).read_text(encoding="utf-8")
        for name in ("CA", "TOKEN", "TOKEN_FILE", "PROJECT"):
            assert f"SHARDYARD_{name}" in text, path
